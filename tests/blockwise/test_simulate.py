"""Simulated pipelines: against closed forms, and against what cannot be otherwise."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.blockwise.simulate import Timing, idle, simulate, step_seconds

SECONDS = st.floats(0.01, 10.0)
STAGES = st.lists(st.tuples(st.just(0.0), SECONDS, SECONDS).map(lambda each: Timing(*each)), min_size=1, max_size=6)


@given(STAGES)
def test_a_step_takes_as_long_as_the_slowest_stage(stages):
    slowest = max(stage.relay + stage.train for stage in stages)
    assert step_seconds(simulate(stages, 40, depth=40)) == pytest.approx(slowest)


@given(STAGES)
def test_with_a_barrier_each_stage_waits_for_all_teachers_before_it(stages):
    longest = max(sum(one.relay for one in stages[: i + 1]) + stage.train for i, stage in enumerate(stages))
    assert step_seconds(simulate(stages, 10, barrier=True)) == pytest.approx(longest)


@given(STAGES, st.integers(1, 3), st.floats(0.0, 0.5))
def test_no_stage_does_two_things_at_a_time_or_anything_before_its_input(stages, depth, jitter):
    work = simulate(stages, 12, depth=depth, jitter=jitter)
    of = {(each.stage, each.batch, each.kind): each for each in work}
    assert Counter(each.kind for each in work) == {'relay': 12 * len(stages), 'train': 12 * len(stages)}
    for (stage, batch, kind), each in of.items():
        assert each.begin <= each.end
        if kind == 'train':
            assert each.begin == of[stage, batch, 'relay'].end
        elif batch:
            assert each.begin >= of[stage, batch - 1, 'train'].end
        if kind == 'relay' and stage:
            assert each.begin >= of[stage - 1, batch, 'relay'].end
        if kind == 'relay' and batch > 2 * depth and stage + 1 < len(stages):
            # As many are on their way as there are buffers on both sides.
            assert each.begin >= of[stage + 1, batch - 2 * depth - 1, 'relay'].begin


@given(STAGES)
def test_two_buffers_are_as_good_as_any_number_without_jitter(stages):
    assert step_seconds(simulate(stages, 60, depth=2)) == pytest.approx(
        step_seconds(simulate(stages, 60, depth=60)), rel=1e-6
    )


def test_more_buffers_help_against_jitter():
    stages = [Timing(0.0, 0.2, 0.8)] * 4
    one, two, many = (step_seconds(simulate(stages, 400, depth=depth, jitter=0.3, seed=17)) for depth in (1, 2, 50))
    assert many < two < one


def test_a_slow_link_is_a_stage_of_its_own():
    stages = [Timing(0.0, 0.1, 0.1), Timing(3.0, 0.1, 0.1)]
    work = simulate(stages, 20)
    assert step_seconds(work) == pytest.approx(3.0)
    assert idle(work, 1) > 0.9


def test_slow_data_is_one_too():
    assert step_seconds(simulate([Timing(2.0, 0.1, 0.1)], 20)) == pytest.approx(2.0)


def test_the_slowest_stage_never_waits_once_the_pipeline_is_full():
    work = simulate([Timing(0.0, 0.5, 0.5), Timing(0.0, 1.0, 2.0), Timing(0.0, 0.2, 0.1)], 30)
    assert idle(work, 1) == pytest.approx(0.0)
    assert idle(work, 0) > 0.5


def test_jitter_is_a_function_of_its_seed():
    stages = [Timing(0.1, 0.5, 0.5)] * 2
    assert simulate(stages, 5, jitter=0.2, seed=1) == simulate(stages, 5, jitter=0.2, seed=1)
    assert simulate(stages, 5, jitter=0.2, seed=1) != simulate(stages, 5, jitter=0.2, seed=2)
