"""The loss in chunks against the same loss of dense logits, in float64."""

import functools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from composer_kd import losses
from composer_kd.topk import TopKLogits, topk_loss
from composer_kd.vocabulary import DeferredLogits, EachLogits, MeanLogits, _temperature_of_kl, part, vocabulary_loss

half, double = torch.float16, torch.float64
KD_LOSSES = {
    'kl': losses.kl,
    'kl_t3': functools.partial(losses.kl, temperature=3.0),
    'reverse_kl': functools.partial(losses.reverse_kl, temperature=2.0),
    'jsd': losses.jsd,
    'mse': losses.mse,
    'cosine': losses.cosine,
}


def projection(positions, words, seed, *, hidden=5, bias=True, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(positions, hidden), (words, hidden)] + ([(words,)] if bias else [])
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return DeferredLogits(*(tensor.requires_grad_(grad) for tensor in tensors))


def leaves(logits):
    return [x for x in (logits.hidden, logits.weight, logits.bias) if x is not None]


def mean_over_positions(loss, sequences):
    """`loss` over the positions of each sequence by itself, with no filling up."""

    def mean(*, student_logits, teacher_logits):
        each = [sequences == sequence for sequence in sequences.unique()]
        parts = [loss(student_logits=student_logits[i], teacher_logits=teacher_logits[i], axis=0) for i in each]
        return sum(parts) / len(parts)

    return mean


def dense(student, labels, teacher, kd_loss, kd_weight, label_weight):
    logits = F.linear(student.hidden, student.weight, student.bias)
    label = F.cross_entropy(logits, labels)
    kd = kd_loss(student_logits=logits, teacher_logits=teacher)
    return {'label': label, 'kd': kd, 'total': label_weight * label + kd_weight * kd}


def assert_equal(found, expected, student, scale=1.0):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)
    inputs = leaves(student)
    for ours, theirs in zip(
        torch.autograd.grad(scale * found['total'], inputs),
        torch.autograd.grad(scale * expected['total'], inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('name', KD_LOSSES)
@pytest.mark.parametrize('chunk_size', [1, 7, 100])
def test_is_the_loss_of_dense_logits(name, chunk_size):
    student, teacher = projection(23, 31, 0, grad=True), projection(23, 31, 1, hidden=9)
    labels = torch.randint(31, (23,), generator=torch.Generator().manual_seed(2))
    weights = {'kd_weight': 0.7, 'label_weight': 0.4}
    found = vocabulary_loss(
        student_logits=student,
        labels=labels,
        teacher_logits=teacher,
        kd_loss=KD_LOSSES[name],
        chunk_size=chunk_size,
        **weights,
    )
    expected = dense(student, labels, part(teacher), KD_LOSSES[name], **weights)
    assert_equal(found, expected, student, scale=8.0)
    assert not found['label'].requires_grad and not found['kd'].requires_grad


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 12),
    words=st.integers(2, 12),
    chunk_size=st.integers(1, 13),
    temperature=st.floats(0.3, 8.0),
    kd_weight=st.floats(0, 2),
    label_weight=st.floats(0, 2),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_weight_and_temperature(
    positions, words, chunk_size, temperature, kd_weight, label_weight, bias, seed
):
    student, teacher = projection(positions, words, seed, bias=bias, grad=True), projection(positions, words, seed + 1)
    labels = torch.randint(words, (positions,), generator=torch.Generator().manual_seed(seed))
    weights = {'kd_weight': kd_weight, 'label_weight': label_weight}
    kd_loss = functools.partial(losses.kl, temperature=temperature)
    given = {'student_logits': student, 'labels': labels, 'teacher_logits': teacher, 'kd_loss': kd_loss}
    found = vocabulary_loss(**given, chunk_size=chunk_size, **weights)
    assert_equal(found, dense(student, labels, part(teacher), kd_loss, **weights), student)


@pytest.mark.parametrize('name', ['kl_t3', 'reverse_kl', 'jsd'])
@pytest.mark.parametrize('chunk_size', [1, 4, 100])
def test_distributions_over_sequences(name, chunk_size):
    student, teacher = projection(12, 31, 0, grad=True), projection(12, 31, 1)
    labels = torch.randint(31, (12,), generator=torch.Generator().manual_seed(2))
    sequences = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3, 7, 7, 8])
    weights = {'kd_weight': 0.7, 'label_weight': 0.4}
    found = vocabulary_loss(
        student_logits=student,
        labels=labels,
        teacher_logits=teacher,
        kd_loss=KD_LOSSES[name],
        sequences=sequences,
        chunk_size=chunk_size,
        **weights,
    )
    expected = dense(student, labels, part(teacher), mean_over_positions(KD_LOSSES[name], sequences), **weights)
    assert_equal(found, expected, student)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(0, 12),
    words=st.integers(1, 12),
    k=st.integers(1, 12),
    chunk_size=st.integers(1, 13),
    temperature=st.floats(0.3, 8.0),
    kd_weight=st.floats(0, 2),
    label_weight=st.floats(0, 2),
    seed=st.integers(0, 2**20),
)
def test_a_teacher_known_by_its_top_k(positions, words, k, chunk_size, temperature, kd_weight, label_weight, seed):
    student, teacher = projection(positions, words, seed, grad=True), part(projection(positions, words, seed + 1))
    labels = torch.randint(words, (positions,), generator=torch.Generator().manual_seed(seed))
    known = TopKLogits.of(teacher, min(k, words), [1.0, temperature])
    kl = functools.partial(losses.kl, temperature=temperature, where=None)
    weights = {'kd_weight': kd_weight, 'label_weight': label_weight}
    given = {'student_logits': student, 'labels': labels, 'teacher_logits': known}

    def found():
        return vocabulary_loss(**given, kd_loss=kl, chunk_size=chunk_size, **weights)

    logits = part(student)
    kd = topk_loss(student_logits=logits, teacher=known, temperature=temperature)
    label = F.cross_entropy(logits, labels) if positions else logits.sum()
    assert_equal(found(), {'label': label, 'kd': kd, 'total': label_weight * label + kd_weight * kd}, student)
    if k >= words and positions:
        assert_equal(found(), dense(student, labels, teacher, kl, **weights), student)


def test_a_rest_of_next_to_no_mass():
    """Where the chosen words have all but 1e-12 of the mass, the gradient of the others is still their own."""
    hidden = torch.eye(6, 5, dtype=torch.float64)
    weight = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[:3] += 30
    given = {'labels': torch.zeros(6, dtype=torch.int64), 'kd_weight': 1.0, 'label_weight': 0.0}

    def gradient(dtype):
        logits = DeferredLogits(hidden.to(dtype), weight.to(dtype).requires_grad_())
        teacher = torch.linspace(0, 1, 40, dtype=dtype).index_fill(0, torch.arange(3), 30).expand(6, 40)
        known = TopKLogits.of(teacher, 3, [1.0])
        total = vocabulary_loss(student_logits=logits, teacher_logits=known, **given)['total']
        return torch.autograd.grad(total, logits.weight)[0][3:].double()

    exact = gradient(torch.float64)
    assert 0 < exact.abs().max() < 1e-11
    torch.testing.assert_close(gradient(torch.float32), exact, rtol=1e-4, atol=0)


def test_what_a_top_k_cannot_teach():
    student, labels = projection(4, 31, 0, grad=True), torch.arange(4)
    known = TopKLogits.of(part(projection(4, 31, 1)), 3, [1.0, 2.0])
    given = {'student_logits': student, 'labels': labels, 'teacher_logits': known}
    sequences = torch.zeros(4, dtype=torch.int64)
    for options, message in (
        ({'kd_loss': losses.jsd}, 'the loss is not kl, which takes all logits of the teacher, and only the 3 largest'),
        ({'kd_loss': functools.partial(losses.kl, axis=1)}, 'the loss is not kl'),
        ({'sequences': sequences}, 'distributions lie over sequences, which takes all logits'),
        ({'kd_loss': functools.partial(losses.kl, temperature=3.0)}, r'tails are at temperatures 1, 2, not 3: distil'),
        ({'teacher_logits': known.rows(slice(3))}, r'teacher_logits \(3, 31\) do not fit'),
    ):
        with pytest.raises(ValueError, match=message):
            vocabulary_loss(**(given | options))


def test_a_mean_of_teachers_dense_and_deferred():
    student, one, other = projection(9, 11, 0, grad=True), projection(9, 11, 1), projection(9, 11, 2, hidden=3)
    labels = torch.arange(9)
    weights = {'kd_weight': 1.0, 'label_weight': 0.0}
    found = vocabulary_loss(
        student_logits=student, labels=labels, teacher_logits=MeanLogits([one, part(other)]), chunk_size=4, **weights
    )
    expected = dense(student, labels, (part(one) + part(other)) / 2, losses.kl, **weights)
    assert_equal(found, expected, student)


@pytest.mark.parametrize('loss', [losses.kl, losses.jsd, losses.mse])
@pytest.mark.parametrize('sequences', [None, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])])
def test_a_mean_of_losses(loss, sequences):
    if sequences is not None and loss is losses.mse:
        return
    student, labels = projection(9, 11, 0, grad=True), torch.arange(9)
    members, shares = [projection(9, 11, 1), part(projection(9, 11, 2))], [0.25, 0.75]
    given = {'student_logits': student, 'labels': labels, 'kd_loss': loss, 'label_weight': 0.3, 'sequences': sequences}
    alone = [vocabulary_loss(**given, teacher_logits=one, kd_weight=2.0) for one in members]
    expected = {
        'label': alone[0]['label'],
        'kd': shares[0] * alone[0]['kd'] + shares[1] * alone[1]['kd'],
        'total': shares[0] * alone[0]['total'] + shares[1] * alone[1]['total'],
    }
    found = vocabulary_loss(**given, teacher_logits=EachLogits(members, shares), kd_weight=2.0, chunk_size=4)
    assert_equal(found, expected, student)


def test_a_mean_of_losses_of_the_largest_logits():
    student, labels = projection(9, 11, 0, grad=True), torch.arange(9)
    members = [TopKLogits.of(part(projection(9, 11, seed)), 3, [1.0]) for seed in (1, 2)]
    given = {'student_logits': student, 'labels': labels, 'kd_weight': 1.0}
    alone = [vocabulary_loss(**given, teacher_logits=one) for one in members]
    expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    found = vocabulary_loss(**given, teacher_logits=EachLogits(members, [0.5, 0.5]), chunk_size=4)
    assert_equal(found, expected, student)


def test_a_word_that_the_teacher_rules_out_adds_nothing():
    student, labels = projection(4, 6, 0, grad=True), torch.arange(4)
    teacher = part(projection(4, 6, 1)).clone()
    teacher[:, 2] = -torch.inf
    found = vocabulary_loss(student_logits=student, labels=labels, teacher_logits=teacher, kd_weight=1.0)
    assert_equal(found, dense(student, labels, teacher, losses.kl, 1.0, 1.0), student)


def test_without_a_teacher_it_is_the_cross_entropy():
    student, labels = projection(9, 11, 0, grad=True), torch.arange(9)
    found = vocabulary_loss(student_logits=student, labels=labels, chunk_size=2)
    assert found.keys() == {'total', 'label'}
    assert_equal(found, {'total': F.cross_entropy(part(student), labels)}, student)


@pytest.mark.parametrize('sequences', [None, torch.zeros(0, dtype=torch.int64)])
def test_no_position_at_all(sequences):
    student, labels = projection(0, 11, 0, grad=True), torch.zeros(0, dtype=torch.int64)
    given = {'teacher_logits': projection(0, 11, 1), 'kd_weight': 0.5, 'sequences': sequences}
    found = vocabulary_loss(student_logits=student, labels=labels, **given)
    assert [found[name].item() for name in ('total', 'label', 'kd')] == [0.0, 0.0, 0.0]
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(found['total'], leaves(student)))


def test_no_gradient_reaches_the_teacher_or_a_frozen_projection():
    student, teacher = projection(9, 11, 0, grad=True), projection(9, 11, 1, grad=True)
    student.weight.requires_grad_(False)
    found = vocabulary_loss(student_logits=student, labels=torch.arange(9), teacher_logits=teacher, kd_weight=1.0)
    found['total'].backward()
    assert student.hidden.grad is not None and student.bias.grad is not None
    assert all(x.grad is None for x in (student.weight, *leaves(teacher)))


def test_tied_weights_get_the_gradients_of_both_their_uses():
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9)

    def gradient(loss):
        hidden = torch.tanh(weight[labels])
        return torch.autograd.grad(loss(hidden), weight)[0]

    chunked = gradient(
        lambda hidden: vocabulary_loss(student_logits=DeferredLogits(hidden, weight), labels=labels)['total']
    )
    torch.testing.assert_close(chunked, gradient(lambda hidden: F.cross_entropy(hidden @ weight.t(), labels)))


@pytest.mark.parametrize(('kd_weight', 'label_weight', 'error'), [(0.0, 1.0, 0.003), (1.0, 0.0, 0.01)])
def test_half_precision_keeps_gradients_that_a_mean_would_lose(kd_weight, label_weight, error):
    """Divided by the number of positions in float16, or not multiplied, small gradients would be 0."""
    sides = [[projection(4096, 2000, side, dtype=dtype, grad=True) for side in (0, 1)] for dtype in (half, double)]
    given = {'labels': torch.arange(4096) % 2000, 'kd_weight': kd_weight, 'label_weight': label_weight}
    given['kd_loss'] = functools.partial(losses.kl, temperature=8.0)
    ours, theirs = (
        torch.autograd.grad(
            vocabulary_loss(student_logits=student, teacher_logits=teacher, **given)['total'] * 2**14, leaves(student)
        )
        for student, teacher in sides
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double() - other).norm() < error * other.norm()


def test_autocast_decides_the_dtype_where_the_logits_are_made():
    with torch.autocast('cpu', torch.bfloat16):
        student = projection(9, 11, 0, dtype=torch.float32, grad=True)
    assert part(student).dtype == torch.bfloat16
    found = vocabulary_loss(student_logits=student, labels=torch.arange(9))
    assert found['total'].dtype == torch.float32
    found['total'].backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves(student))


@pytest.mark.parametrize(
    ('labels', 'teacher', 'named'),
    [(8, (9, 11), 'labels'), (9, (9, 12), 'teacher_logits'), (9, (8, 11), 'teacher_logits')],
)
def test_shapes_that_do_not_belong_together(labels, teacher, named):
    with pytest.raises(ValueError, match=named):
        vocabulary_loss(
            student_logits=projection(9, 11, 0),
            labels=torch.zeros(labels, dtype=torch.int64),
            teacher_logits=torch.zeros(teacher),
        )


def test_never_more_logits_alive_than_a_chunk_of_them():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            tensors = [x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *(x.numel() for x in tensors)])
            return result

    student, teacher = projection(64, 100, 0, hidden=2, grad=True), projection(64, 100, 1, hidden=2)
    known = TopKLogits.of(part(teacher), 10, [2.0])
    for sequences, teacher in ((None, teacher), (torch.arange(64) // 8, teacher), (None, known)):
        with Largest() as largest:
            vocabulary_loss(
                student_logits=student,
                labels=torch.arange(64),
                teacher_logits=teacher,
                kd_loss=functools.partial(losses.kl, temperature=2.0),
                kd_weight=0.9,
                sequences=sequences,
                chunk_size=4,
            )['total'].backward()
        assert largest.elements == 4 * 100 if sequences is None else largest.elements <= 4 * 100 * 2


def test_kl_is_known_however_its_options_are_bound():
    """Only then is its gradient the one written by hand."""
    bound = functools.partial(functools.partial(losses.kl, temperature=2.0), where=None)
    assert _temperature_of_kl(losses.kl) == 1.0 and _temperature_of_kl(bound) == 2.0
    others = functools.partial(losses.kl, temperature=2.0, axis=1), losses.jsd, functools.partial(losses.jsd, beta=0.1)
    assert [_temperature_of_kl(other) for other in others] == [None, None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize(('dtype', 'error'), [(torch.bfloat16, 0.02), (torch.float16, 0.01)])
def test_autocast_on_a_gpu(dtype, error):
    reference = [projection(1000, 3000, side, hidden=64, dtype=torch.float32, grad=True) for side in (0, 1)]
    given = {'labels': torch.arange(1000), 'kd_loss': functools.partial(losses.kl, temperature=2.0), 'kd_weight': 0.9}
    expected = vocabulary_loss(student_logits=reference[0], teacher_logits=reference[1], **given)['total']
    with torch.autocast('cuda', dtype):
        student, teacher = (
            DeferredLogits(*(x.detach().cuda().requires_grad_() for x in leaves(side))) for side in reference
        )
        given['labels'] = given['labels'].cuda()
        found = vocabulary_loss(student_logits=student, teacher_logits=teacher, **given)['total']
    assert abs(float(found) / float(expected) - 1) < error
    for mine, other in zip(
        torch.autograd.grad(found, leaves(student)), torch.autograd.grad(expected, leaves(reference[0])), strict=True
    ):
        assert (mine.cpu() - other).norm() < error * other.norm()
