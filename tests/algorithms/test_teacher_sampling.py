"""Draws of teachers: stateless, fair, weighted, the same on every rank."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from composer import Callback
from hypothesis import given
from hypothesis import strategies as st

from composer_kd import KnowledgeDistillation, NetworkTeacher, TeacherSampling
from composer_kd.algorithms.teacher_sampling import draw_teachers, draw_teachers_of_samples
from composer_kd.losses import kl
from settings import BATCH, logged, network, teachers, train, trainer


@given(seed=st.integers(0, 2**63), batch=st.integers(0, 10**9), pool_size=st.integers(1, 9), data=st.data())
def test_a_draw_is_a_function_of_its_arguments(seed, batch, pool_size, data):
    num_teachers = data.draw(st.integers(1, pool_size))
    draw = draw_teachers(seed, batch, pool_size=pool_size, num_teachers=num_teachers)
    assert draw == draw_teachers(seed, batch, pool_size=pool_size, num_teachers=num_teachers)
    assert len(set(draw)) == num_teachers and list(draw) == sorted(draw) and set(draw) <= set(range(pool_size))


def test_draws_do_not_change_between_versions():
    assert [draw_teachers(17, batch, pool_size=4)[0] for batch in range(12)] == [0, 3, 0, 1, 2, 1, 1, 3, 0, 2, 0, 0]


@pytest.mark.parametrize(
    'weights, shares', [(None, [1 / 3] * 3), ([1, 2, 5], [1 / 8, 2 / 8, 5 / 8]), ([0, 1, 1], [0, 0.5, 0.5])]
)
def test_one_teacher_is_drawn_in_proportion_to_its_weight(weights, shares):
    draws = Counter(draw_teachers(5, batch, pool_size=3, weights=weights)[0] for batch in range(20_000))
    for index, share in enumerate(shares):
        assert draws[index] / 20_000 == pytest.approx(share, abs=0.015)


def test_several_are_drawn_one_after_another():
    # P({0, 1}) = P(0 then 1) + P(1 then 0), with weights 1, 2, 5.
    draws = Counter(draw_teachers(5, batch, pool_size=3, num_teachers=2, weights=[1, 2, 5]) for batch in range(20_000))
    assert draws[0, 1] / 20_000 == pytest.approx(1 / 8 * 2 / 7 + 2 / 8 * 1 / 6, abs=0.01)


def test_the_run_hears_who_was_drawn():
    run = train([KnowledgeDistillation(teachers(3)), TeacherSampling(weights=[1, 1, 2])])
    expected = {batch: draw_teachers(3, batch, pool_size=3, weights=[1, 1, 2])[0] for batch in range(8)}
    assert logged(run, 'distillation/teacher_index') == expected
    assert run.state.algorithms[-1].pool.forwards == 8


@given(seed=st.integers(0, 2**63), batch=st.integers(0, 10**9), pool_size=st.integers(1, 9), data=st.data())
def test_draws_of_samples_are_functions_of_seed_batch_and_position(seed, batch, pool_size, data):
    num_teachers = data.draw(st.integers(1, pool_size))
    options = {'pool_size': pool_size, 'num_teachers': num_teachers}
    whole = draw_teachers_of_samples(seed, batch, np.arange(12), **options)
    assert whole.shape == (12, num_teachers)
    for draw in whole.tolist():
        assert len(set(draw)) == num_teachers and draw == sorted(draw) and set(draw) <= set(range(pool_size))
    for ranks in (2, 3):
        for rank in range(ranks):
            mine = draw_teachers_of_samples(seed, batch, np.arange(12)[rank::ranks], **options)
            assert np.array_equal(mine, whole[rank::ranks])


def test_draws_of_samples_do_not_change_between_versions():
    assert draw_teachers_of_samples(17, 5, np.arange(12), pool_size=4)[:, 0].tolist() == [
        1,
        0,
        0,
        2,
        1,
        1,
        2,
        1,
        1,
        3,
        2,
        0,
    ]


@pytest.mark.parametrize(
    'weights, shares', [(None, [1 / 3] * 3), ([1, 2, 5], [1 / 8, 2 / 8, 5 / 8]), ([0, 1, 1], [0, 0.5, 0.5])]
)
def test_a_sample_hears_one_in_proportion_to_its_weight(weights, shares):
    draws = draw_teachers_of_samples(5, 3, np.arange(20_000), pool_size=3, weights=weights)
    np.testing.assert_allclose(np.bincount(draws[:, 0], minlength=3) / 20_000, shares, atol=0.015)
    two = draw_teachers_of_samples(5, 4, np.arange(20_000), pool_size=3, num_teachers=2, weights=[1, 2, 5])
    of_0_and_1 = (two == [0, 1]).all(1).mean()
    assert of_0_and_1 == pytest.approx(1 / 8 * 2 / 7 + 2 / 8 * 1 / 6, abs=0.01)


class Hears(Callback):
    """Recomputes the loss of each microbatch from what each sample's own teachers say."""

    def __init__(self, networks, num_teachers, weights):
        self.networks = [copy.deepcopy(network).eval() for network in networks]
        self.options = {'pool_size': len(networks), 'num_teachers': num_teachers, 'weights': weights}
        self.batches = self.first = 0

    def batch_start(self, state, logger):
        self.first = 0

    def before_backward(self, state, logger):
        images, _ = state.batch
        positions = np.arange(self.first, self.first + len(images))
        self.first += len(images)
        heard = torch.from_numpy(draw_teachers_of_samples(3, int(state.timestamp.batch), positions, **self.options))
        with torch.no_grad():
            said = torch.stack([network(images) for network in self.networks])
        teacher_logits = torch.stack([said[i, torch.arange(len(images))] for i in heard.unbind(1)]).mean(0)
        expected = kl(student_logits=state.outputs, teacher_logits=teacher_logits, temperature=4.0)
        torch.testing.assert_close(state.loss['kd'], expected)
        self.batches += 1


@pytest.mark.parametrize('microbatch', [None, 8])
@pytest.mark.parametrize('num_teachers, weights', [(1, None), (2, [1, 2, 3, 4])])
def test_each_sample_hears_those_that_were_drawn_for_it(num_teachers, weights, microbatch):
    networks = [network(seed) for seed in range(5, 9)]
    hears = Hears(networks, num_teachers, weights)
    distillation = KnowledgeDistillation([NetworkTeacher(x) for x in networks])
    train(
        [distillation, TeacherSampling(num_teachers, weights, per='sample')],
        callbacks=hears, device_train_microbatch_size=microbatch,
    )  # fmt: skip
    assert hears.batches == (8 if microbatch is None else 32)
    assert distillation.pool.samples_heard == 8 * BATCH * num_teachers


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'num_teachers': 0}, 'num_teachers must be a whole number, 1 or more'),
        ({'num_teachers': 1.5}, 'num_teachers must be a whole number'),
        ({'num_teachers': 3}, 'num_teachers is 3, but there are 2 teachers'),
        ({'weights': [1, 2, 3]}, 'weights has 3 numbers for 2 teachers'),
        ({'weights': [1, -2]}, 'weights must be 0 or more each'),
        ({'num_teachers': 2, 'weights': [1, 0]}, '2 teachers cannot be drawn'),
        ({'per': 'epoch'}, "per must be 'batch' or 'sample', not 'epoch'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer([TeacherSampling(**arguments), KnowledgeDistillation(teachers(2))])
