"""Plans of pipelines: against all there are, and against those that need no search."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.blockwise.plan import (
    Costs,
    Device,
    Stage,
    best,
    data_parallel,
    every,
    layer_split,
    planned,
    stage_seconds,
)


def costs_of(teacher, student, *, devices=1, average=0.0, data=0.0, receive=0.0, memory=0.0):
    """Costs that a batch shares out evenly."""
    blocks = len(teacher)
    shared = lambda seconds: [[each / g for g in range(1, devices + 1)] for each in seconds]  # noqa: E731
    return Costs(
        shared(teacher),
        shared(student),
        [[average * (g > 1) for g in range(1, devices + 1)]] * blocks,
        [[data] * devices, *[[receive] * devices] * (blocks - 1)],
        [[memory] * devices] * blocks,
    )


def random_costs(source, blocks, devices):
    """Tables of any numbers, some of them infinite where a batch cannot be shared."""
    table = lambda most: [[source.uniform(0, most) for _ in range(devices)] for _ in range(blocks)]  # noqa: E731
    cannot = {g for g in range(1, devices) if source.random() < 0.2}
    student = [[math.inf if g in cannot else each for g, each in enumerate(row)] for row in table(3.0)]
    return Costs(table(1.0), student, table(0.5), table(0.5), table(10.0))


def random_devices(source, number):
    return [Device(source.choice([0.5, 1.0, 1.0, 2.0]), source.choice([12.0, 20.0, math.inf])) for _ in range(number)]


def test_the_best_of_a_thousand_random_tables_is_that_of_all_plans():
    source, without = random.Random(17), 0
    for _ in range(1000):
        blocks, number = source.randint(1, 6), source.randint(1, 5)
        costs, devices = random_costs(source, blocks, number), random_devices(source, number)
        steps = [planned(costs, devices, stages).step for stages in every(blocks, number)]
        if min(steps) == math.inf:
            without += 1
            with pytest.raises(ValueError, match=r'bytes|cannot be on'):
                best(costs, devices)
        else:
            assert best(costs, devices).step == min(steps)
    assert 0 < without < 500  # both happen


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_plan_has_all_blocks_and_devices_once_and_in_order(blocks, number, source):
    devices = [Device(source.choice([0.5, 1.0])) for _ in range(number)]
    plan = best(costs_of([source.random() for _ in range(blocks)], [1.0] * blocks, devices=number), devices)
    assert [block for stage in plan.stages for block in stage.blocks] == [*range(blocks)]
    assert [device for stage in plan.stages for device in stage.devices] == [*range(number)]
    assert max(plan.seconds) == plan.step
    assert min(plan.idle) == 0


@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_a_plan_is_never_worse_than_a_pipeline_of_single_devices_or_one_stage_of_all(number, source):
    blocks = number
    costs = random_costs(source, blocks, number)
    devices = [Device()] * number
    pipeline = planned(costs, devices, [Stage(range(n, n + 1), range(n, n + 1)) for n in range(number)])
    together = planned(costs, devices, [Stage(range(blocks), range(number))])
    if min(pipeline.step, together.step) < math.inf:
        assert best(costs, devices).step <= min(pipeline.step, together.step)


def test_a_block_that_is_as_dear_as_all_others_gets_half_of_the_devices():
    plan = best(costs_of([0, 0, 0], [1, 1, 2], devices=4), [Device()] * 4)
    assert [str(stage) for stage in plan.stages] == ['blocks 0-2 on devices 0-3']  # without any cost of sharing
    plan = best(costs_of([0, 0, 0], [1, 1, 2], devices=4, average=0.01), [Device()] * 4)
    assert plan.step == 1.0 + 0.01 * (len(plan.stages) < 4)


def test_costly_averages_of_gradients_make_a_pipeline():
    plan = best(costs_of([1, 1], [1, 1], devices=2, average=1.0, data=0.5, receive=0.5), [Device()] * 2)
    assert [str(stage) for stage in plan.stages] == ['block 0 on device 0', 'block 1 on device 1']
    assert plan.seconds == (2.5, 2.5)
    assert plan.idle == (0, 0)


def test_costly_transfers_make_one_stage():
    plan = best(costs_of([1, 1], [1, 1], devices=2, average=0.1, receive=2.0), [Device()] * 2)
    assert [str(stage) for stage in plan.stages] == ['blocks 0-1 on devices 0-1']


def test_a_slow_device_gets_less():
    plan = best(costs_of([0] * 3, [1] * 3, devices=2, average=9), [Device(0.5), Device(1.0)])
    assert [str(stage) for stage in plan.stages] == ['block 0 on device 0', 'blocks 1-2 on device 1']
    assert plan.seconds == (2, 2)


def test_what_a_slow_device_waits_for_is_not_slower():
    costs = costs_of([1], [1], data=3.0)
    assert stage_seconds(costs, [Device(0.5)], Stage(range(1), range(1))) == 3.0 + 2 / 0.5


def test_memory_moves_a_cut():
    costs = costs_of([0] * 4, [3, 1, 1, 1], devices=2, average=9, memory=1.0)
    assert best(costs, [Device(), Device()]).stages[0].blocks == range(1)
    assert best(costs, [Device(), Device(memory=2)]).stages[0].blocks == range(2)


def test_a_block_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match=r'block 0 needs 5 bytes, but no device has more than 4: .* smaller blocks'):
        best(costs_of([1, 1], [1, 1], memory=5.0), [Device(memory=4)])


def test_blocks_that_fit_alone_but_not_together():
    with pytest.raises(ValueError, match=r'2 blocks cannot be on 1 devices within their memory: .* smaller batches'):
        best(costs_of([1, 1], [1, 1], memory=3.0), [Device(memory=4)])


def test_the_baselines_run_the_teacher_anew_for_each_block():
    costs = costs_of([1, 10, 100], [2, 2, 2], devices=2, average=0.5, data=0.25)
    devices = [Device(), Device()]
    prefixes = 1 + 11 + 111
    assert data_parallel(costs, devices) == (prefixes + 6) / 2 + 3 * (0.5 + 0.25)
    seconds, dealt = layer_split(costs, devices)
    assert dealt == [[2], [0, 1]]
    assert seconds == 111 + 2 + 0.25


def test_layer_split_gives_quick_devices_more():
    costs = costs_of([0, 0, 0], [1, 1, 1], devices=2)
    seconds, dealt = layer_split(costs, [Device(2.0), Device(1.0)])
    assert seconds == 1.0
    assert sorted(map(len, dealt)) == [1, 2]
    assert len(dealt[0]) == 2
