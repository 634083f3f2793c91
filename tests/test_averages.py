"""Means of logits against a plain reference in fp64, position by position: of dense logits, and of deferred ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.averages import Mean
from composer_kd.vocabulary import DeferredLogits, MeanLogits

POSITIONS, CLASSES, WIDTH = 7, 5, 3


def reference(members, weights, temperature, labels):
    """What the mean is, as its definition says it."""
    mean = np.empty((POSITIONS, CLASSES))
    for position in range(POSITIONS):
        said = [member[position] for member in members]
        kept = [i for i, z in enumerate(said) if labels is not None and z.argmax() == labels[position]]
        kept = kept or range(len(said))
        shares = np.array([weights[i] for i in kept]) / sum(weights[i] for i in kept)
        if temperature is None:
            mean[position] = sum(share * said[i] for i, share in zip(kept, shares))
        else:
            of_each = [np.exp(said[i] / temperature) / np.exp(said[i] / temperature).sum() for i in kept]
            mean[position] = temperature * np.log(sum(share * p for share, p in zip(shares, of_each)))
    return mean


cases = given(
    seed=st.integers(0, 2**32 - 1),
    members=st.integers(1, 4),
    temperature=st.sampled_from([None, 1.0, 4.0, 0.5]),
    with_labels=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)


def drawn(seed, members, with_labels):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(members, generator=generator, dtype=torch.float64) + 0.1
    labels = torch.randint(CLASSES, (POSITIONS,), generator=generator) if with_labels else None
    return generator, (weights / weights.sum()).tolist(), labels


@cases
def test_dense_logits(seed, members, temperature, with_labels, scale):
    generator, weights, labels = drawn(seed, members, with_labels)
    logits = [scale * torch.randn(POSITIONS, CLASSES, generator=generator, dtype=torch.float64) for _ in weights]
    expected = reference([x.numpy() for x in logits], weights, temperature, None if labels is None else labels.numpy())

    def mean(dtype, axis=-1):
        mean = Mean(temperature=temperature, labels=labels, axis=axis)
        for x, weight in zip(logits, weights):
            mean.add(x.to(dtype).movedim(-1, axis).contiguous(), weight)
        return mean.result().movedim(axis, -1)

    np.testing.assert_allclose(mean(torch.float64), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mean(torch.float64, axis=0), expected, rtol=1e-10, atol=1e-10)
    assert mean(torch.float32).dtype == torch.float32
    np.testing.assert_allclose(mean(torch.float32), expected, rtol=2e-4, atol=2e-4)


@cases
def test_deferred_logits_in_chunks(seed, members, temperature, with_labels, scale):
    generator, weights, labels = drawn(seed, members, with_labels)

    def deferred():
        hidden, weight, bias = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((POSITIONS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
        )
        return DeferredLogits(scale * hidden, weight, bias)

    logits = [deferred() for _ in weights]
    expected = reference(
        [x.part().numpy() for x in logits], weights, temperature, None if labels is None else labels.numpy()
    )
    # What is there and what is deferred go together.
    mean = MeanLogits([logits[0].part(), *logits[1:]], weights, temperature=temperature, labels=labels).detach()
    assert mean.shape == (POSITIONS, CLASSES)
    chunks = [mean.part(slice(begin, begin + 3)) for begin in range(0, POSITIONS, 3)]
    np.testing.assert_allclose(torch.cat(chunks), expected, rtol=1e-10, atol=1e-10)
    if temperature is None and labels is None:
        np.testing.assert_allclose(mean.part(columns=slice(1, 3)), expected[:, 1:3], rtol=1e-10, atol=1e-10)


def test_weights_of_their_own_at_each_position():
    logits = torch.randn(2, POSITIONS, CLASSES, dtype=torch.float64)
    weights = torch.rand(POSITIONS, 2)
    weights /= weights.sum(1, keepdim=True)
    mean = Mean(temperature=2.0)
    for x, weight in zip(logits, weights.unbind(1)):
        mean.add(x, weight.unsqueeze(1))
    expected = torch.einsum('pm,mpc->pc', weights.double(), (logits / 2).softmax(-1))
    torch.testing.assert_close((mean.result() / 2).softmax(-1), expected)


@pytest.mark.parametrize('temperature', [None, 1.0])
@pytest.mark.parametrize('labels', [None, torch.tensor([0])])
def test_a_class_that_is_ruled_out(temperature, labels):
    mean = Mean(temperature=temperature, labels=labels)
    mean.add(torch.tensor([[3.0, 1.0, -torch.inf]]), 0.5)
    mean.add(torch.tensor([[2.0, 1.0, -torch.inf]]), 0.5)
    assert mean.result()[0, 2] == -torch.inf and mean.result()[0, :2].isfinite().all()


def test_a_class_that_one_of_two_rules_out_is_out_for_logits_and_halved_for_probabilities():
    members = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    of_logits, of_probabilities = Mean(), Mean(temperature=1.0)
    for member in members:
        of_logits.add(member, 0.5)
        of_probabilities.add(member, 0.5)
    assert of_logits.result()[0, 1] == -torch.inf
    torch.testing.assert_close(of_probabilities.result().exp(), torch.tensor([[0.75, 0.25]]))


def test_the_wrong_one_that_rules_out_a_class_has_no_say():
    mean = Mean(labels=torch.tensor([0]))
    mean.add(torch.tensor([[2.0, 1.0, 0.0]]), 0.5)
    mean.add(torch.tensor([[-torch.inf, 5.0, 1.0]]), 0.5)
    assert torch.equal(mean.result(), torch.tensor([[2.0, 1.0, 0.0]]))
