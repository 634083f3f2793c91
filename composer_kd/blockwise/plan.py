"""Which blocks go to which devices: the plan whose slowest stage is the quickest, found exactly.

A step of the pipeline takes as long as its slowest stage, because no stage waits for the update of another one. A stage
has neighbouring blocks, and one device or more that share its batches, and takes, for each batch,

    what it waits for its input + the sum over its blocks of (teacher + student + average of gradients).

After *Pipe-BD* (`Jang et al, 2023 <https://arxiv.org/abs/2301.12443>`_), section on automatic hybrid distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Costs:
    """What each block costs, for one batch.

    Of each table, row `b` is block `b`, and column `g - 1` that block on `g` devices, each of which has its share of
    the batch. A batch that cannot be shared by so many costs infinitely much there.

    Args:
        teacher: Seconds of the teacher's block.
        student: Seconds of the student's block: forward, backward and update.
        average: Seconds until the gradients of the student's block are the mean over the devices.
        receive: Seconds until the input of the block is there, if a stage begins with it: for block 0 the data, for
            others what another stage sends.
        memory: Bytes on each device: weights, gradients, state of the optimizer and activations of the block.
    """

    teacher: Table
    student: Table
    average: Table
    receive: Table
    memory: Table

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.teacher)


@dataclass(frozen=True)
class Device:
    """A device.

    Args:
        speed: How quick it is; the seconds of costs are those of a device of speed 1. Default: 1.
        memory: Bytes that it has for blocks. Default: no limit.
    """

    speed: float = 1.0
    memory: float = math.inf


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks, and the devices that they are on.

    Args:
        blocks: Their numbers.
        devices: The numbers of the devices.
    """

    blocks: range
    devices: range

    def __str__(self) -> str:
        return f'{_words("block", self.blocks)} on {_words("device", self.devices)}'


@dataclass(frozen=True)
class Plan:
    """The stages of a pipeline.

    Args:
        stages: In order; together they have all blocks, and all devices.
        seconds: Of each stage, for one batch.
    """

    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a step of the pipeline: those of its slowest stage."""
        return max(self.seconds)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each stage, the share of the time in which it waits for the slowest one."""
        return tuple(1 - seconds / self.step for seconds in self.seconds)


def best(costs: Costs, devices: Sequence[Device]) -> Plan:
    """The plan whose slowest stage is the quickest.

    All devices are used, in the order in which they are given. Of plans that are equally quick it is one that has the
    fewest devices where the pipeline begins.

    Args:
        costs: Of the blocks, on up to as many devices as there are.
        devices: In the order of the stages.

    Raises:
        ValueError: There is no plan in which each stage has the memory that it needs, and the batch can be shared.
    """
    blocks, number = costs.blocks, len(devices)
    # step[b, d]: of the first b blocks on the first d devices, the quickest step; and where its last stage begins.
    step = {(0, 0): 0.0}
    begins: dict[tuple[int, int], tuple[int, int]] = {}
    for b, d in itertools.product(range(1, blocks + 1), range(1, number + 1)):
        for before in itertools.product(range(b), range(d)):
            if before not in step:
                continue
            stage = Stage(range(before[0], b), range(before[1], d))
            seconds = max(step[before], stage_seconds(costs, devices, stage))
            if seconds < step.get((b, d), math.inf):
                step[b, d], begins[b, d] = seconds, before
    end = blocks, number
    if end not in step:
        raise ValueError(_no_plan(costs, devices))
    stages: list[Stage] = []
    while end != (0, 0):
        stages.insert(0, Stage(range(begins[end][0], end[0]), range(begins[end][1], end[1])))
        end = begins[end]
    return planned(costs, devices, stages)


def planned(costs: Costs, devices: Sequence[Device], stages: Sequence[Stage]) -> Plan:
    """The plan of given stages."""
    return Plan((*stages,), tuple(stage_seconds(costs, devices, stage) for stage in stages))


def every(blocks: int, devices: int) -> Iterator[list[Stage]]:
    """All ways to have so many blocks on so many devices."""
    for number in range(1, min(blocks, devices) + 1):
        for cuts, ends in itertools.product(_parts(blocks, number), _parts(devices, number)):
            yield [Stage(*each) for each in zip(cuts, ends, strict=True)]


def stage_seconds(costs: Costs, devices: Sequence[Device], stage: Stage) -> float:
    """Seconds that a stage takes for each batch; infinite if it lacks memory, or the batch cannot be shared so."""
    own = [devices[number] for number in stage.devices]
    column = len(own) - 1
    if sum(costs.memory[block][column] for block in stage.blocks) > min(device.memory for device in own):
        return math.inf
    work = sum(costs.teacher[block][column] + costs.student[block][column] for block in stage.blocks)
    average = sum(costs.average[block][column] for block in stage.blocks)
    return costs.receive[stage.blocks[0]][column] + work / min(device.speed for device in own) + average


def data_parallel(costs: Costs, devices: Sequence[Device]) -> float:
    """Seconds of a step that trains one block after another, each on all devices.

    Each block is trained for itself, from the data on, so that the teacher's blocks before it run anew for each.
    """
    column, speed = len(devices) - 1, min(device.speed for device in devices)
    tasks = [_task(costs, block, column) for block in range(costs.blocks)]
    return sum(work / speed + rest for work, rest in tasks)


def layer_split(costs: Costs, devices: Sequence[Device]) -> tuple[float, list[list[int]]]:
    """Seconds of a step in which each device trains blocks of its own, and the blocks of each device.

    Each block is trained for itself, as by :func:`data_parallel`, but on one device. The longest tasks are dealt out
    first, each to the device that is done with it first.
    """
    tasks = [_task(costs, block, 0) for block in range(costs.blocks)]
    seconds, dealt = [0.0] * len(devices), [[] for _ in devices]
    for block in sorted(range(costs.blocks), key=lambda block: (-sum(tasks[block]), block)):
        work, rest = tasks[block]
        ends = [so_far + work / device.speed + rest for so_far, device in zip(seconds, devices, strict=True)]
        first = ends.index(min(ends))
        seconds[first] = ends[first]
        dealt[first].append(block)
    return max(seconds), [sorted(blocks) for blocks in dealt]


def _task(costs: Costs, block: int, column: int) -> tuple[float, float]:
    """Seconds of one block that is trained for itself: those that depend on a device's speed, and the others."""
    work = sum(costs.teacher[before][column] for before in range(block + 1)) + costs.student[block][column]
    return work, costs.receive[0][column] + costs.average[block][column]


def _parts(length: int, number: int) -> Iterator[list[range]]:
    """All ways to cut a row into so many parts."""
    for cuts in itertools.combinations(range(1, length), number - 1):
        yield [range(*ends) for ends in itertools.pairwise((0, *cuts, length))]


def _no_plan(costs: Costs, devices: Sequence[Device]) -> str:
    """Why there is none."""
    room = max(device.memory for device in devices)
    for block in range(costs.blocks):
        if (least := min(costs.memory[block])) > room:
            return (
                f'block {block} needs {least:,.0f} bytes, but no device has more than {room:,.0f}: cut it into '
                'smaller blocks, or take smaller batches'
            )
    todo = 'take smaller batches, or batches that can be shared by more devices'
    return f'{costs.blocks} blocks cannot be on {len(devices)} devices within their memory: {todo}'


def _words(what: str, numbers: range) -> str:
    if len(numbers) == 1:
        return f'{what} {numbers[0]}'
    return f'{what}s {numbers[0]}-{numbers[-1]}'
