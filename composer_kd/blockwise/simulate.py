"""What a pipeline does, event by event: when each stage relays, trains and waits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal['relay', 'train']


@dataclass(frozen=True)
class Timing:
    """What a stage does with each batch, in seconds.

    Args:
        receive: Until its input is there, once it was sent; for stage 0, until the data is loaded.
        relay: Its teacher's blocks, after which it sends on.
        train: Its student's blocks.
    """

    receive: float
    relay: float
    train: float


@dataclass(frozen=True)
class Work:
    """What a stage did with one batch.

    Args:
        stage: Number of the stage.
        batch: Number of the batch.
        kind: `relay` or `train`.
        begin: Seconds since the first batch was asked for.
        end: Likewise.
    """

    stage: int
    batch: int
    kind: Kind
    begin: float
    end: float


def simulate(
    stages: Sequence[Timing],
    batches: int,
    *,
    depth: int = 2,
    barrier: bool = False,
    jitter: float = 0.0,
    seed: int = 0,
) -> list[Work]:
    """Run a pipeline.

    A stage takes a batch when it has trained on the one before and the batch has arrived, runs its teacher's blocks,
    has their output sent, and trains. What it sends lies in one of `depth` buffers until it has arrived at the next
    stage, where it lies in one of as many until that stage takes it.

    Args:
        stages: In order.
        batches: How many.
        depth: Buffers between two stages, on each side.
        barrier: Whether each stage waits, after each batch, for all others.
        jitter: Standard deviation of the logarithm of all seconds.
        seed: Of the jitter.

    Returns:
        In the order of batches, and for each of stages.
    """
    source = random.Random(seed)

    def lasts(seconds: float) -> float:
        return seconds * source.lognormvariate(0.0, jitter) if jitter else seconds

    done: list[Work] = []
    free = [0.0] * len(stages)
    taken: list[list[float]] = [[] for _ in stages]  # when each stage began with each batch
    sent: list[list[float]] = [[] for _ in stages]  # when what it sends of each batch has arrived at the next stage
    loaded = 0.0
    for batch in range(batches):
        for number, stage in enumerate(stages):
            if number == 0:
                arrived = loaded = max(loaded, taken[0][-depth] if batch >= depth else 0.0) + lasts(stage.receive)
            else:
                arrived = sent[number - 1][batch]
            begin = max(free[number], arrived)
            taken[number].append(begin)
            if batch >= depth:  # the buffer that it sends from has to be free again
                begin = max(begin, sent[number][batch - depth])
            relayed = begin + lasts(stage.relay)
            free[number] = relayed + lasts(stage.train)
            done.append(Work(number, batch, 'relay', begin, relayed))
            done.append(Work(number, batch, 'train', relayed, free[number]))
            if number + 1 < len(stages):
                has_room = taken[number + 1][batch - depth] if batch >= depth else 0.0
                link = sent[number][-1] if batch else 0.0
                sent[number].append(max(relayed, has_room, link) + lasts(stages[number + 1].receive))
            else:
                sent[number].append(relayed)
        if barrier:
            free = [max(free)] * len(stages)
    return done


def step_seconds(work: Sequence[Work]) -> float:
    """Seconds of a step once the pipeline is full: the mean over the second half of the batches."""
    batches = 1 + max(each.batch for each in work)
    half = batches // 2
    ends = [max(each.end for each in work if each.batch == batch) for batch in (half - 1, batches - 1)]
    return (ends[1] - ends[0]) / (batches - half)


def idle(work: Sequence[Work], stage: int) -> float:
    """The share of the time, in the second half of the batches, in which a stage waits."""
    batches = 1 + max(each.batch for each in work)
    own = [each for each in work if each.stage == stage and each.batch >= batches // 2]
    return 1 - sum(each.end - each.begin for each in own) / (own[-1].end - own[0].begin)
