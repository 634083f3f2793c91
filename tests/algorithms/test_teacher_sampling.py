"""Draws of teachers: stateless, fair, weighted, the same on every rank."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_kd import KnowledgeDistillation, TeacherSampling
from composer_kd.algorithms.teacher_sampling import draw_teachers
from settings import logged, teachers, train, trainer


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


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'num_teachers': 0}, 'num_teachers must be a whole number, 1 or more'),
        ({'num_teachers': 1.5}, 'num_teachers must be a whole number'),
        ({'num_teachers': 3}, 'num_teachers is 3, but there are 2 teachers'),
        ({'weights': [1, 2, 3]}, 'weights has 3 numbers for 2 teachers'),
        ({'weights': [1, -2]}, 'weights must be 0 or more each'),
        ({'num_teachers': 2, 'weights': [1, 0]}, '2 teachers cannot be drawn'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer([TeacherSampling(**arguments), KnowledgeDistillation(teachers(2))])
