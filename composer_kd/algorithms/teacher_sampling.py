"""Hear some of the teachers in each batch, at their cost instead of the whole pool's."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from composer_kd.algorithms.knowledge_distillation import find_distiller


def draw_teachers(
    seed: int, batch: int, *, pool_size: int, num_teachers: int = 1, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    r"""Draw teachers without replacement, as a function of its arguments alone.

    With weights :math:`w_i` and independent uniform :math:`u_i`, the largest ``num_teachers`` of
    :math:`\log(u_i) / w_i` are a draw one after another, each in proportion to the weights of those that are left
    (`Efraimidis and Spirakis, 2006 <https://doi.org/10.1016/j.ipl.2005.11.003>`_).

    Args:
        seed: The run's seed.
        batch: The batch's number in the run.
        pool_size: How many teachers there are.
        num_teachers: How many to draw. Default: ``1``.
        weights: One weight per teacher, 0 or more. Default: ``None``, all alike.

    Returns:
        Indices of the teachers drawn, in ascending order.
    """
    # `random()` of Python's generator, seeded with a string, is the same on every platform and version.
    uniform = random.Random(f'composer_kd.draw_teachers {seed} {batch}').random
    keys = []
    for index in range(pool_size):
        u, weight = 1.0 - uniform(), 1.0 if weights is None else weights[index]
        keys.append((math.log(u) / weight if weight > 0 else -math.inf, index))
    return tuple(sorted(index for _, index in sorted(keys, reverse=True)[:num_teachers]))


def draw_teachers_of_samples(
    seed: int,
    batch: int,
    positions: np.ndarray,
    *,
    pool_size: int,
    num_teachers: int = 1,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw teachers for each sample of a batch, without replacement, as a function of the arguments alone.

    Args:
        seed: The run's seed.
        batch: The batch's number in the run.
        positions: Of the samples in the batch over all ranks, shape (samples,).
        pool_size: How many teachers there are.
        num_teachers: How many to draw for each sample. Default: ``1``.
        weights: One weight per teacher, 0 or more. Default: ``None``, all alike.

    Returns:
        Indices of the teachers drawn, ascending for each sample, shape (samples, num_teachers).
    """
    # As in `draw_teachers`; the numbers of one position come after those of the position before.
    random = np.random.Generator(np.random.Philox(key=np.array([seed, batch], dtype=np.uint64)))
    uniform = 1.0 - random.random((int(positions.max(initial=-1)) + 1, pool_size))[positions]
    lots = np.log(uniform)
    if weights is not None:
        per_teacher = np.asarray(weights, dtype=np.float64)
        lots = np.divide(lots, per_teacher, out=np.full_like(lots, -np.inf), where=per_teacher > 0)
    return np.sort(np.argsort(-lots, axis=1, kind='stable')[:, :num_teachers], axis=1)


class TeacherSampling(Algorithm):
    """Hear ``num_teachers`` of the teachers in each batch, drawn at random.

    One teacher drawn per batch keeps what an ensemble gives at the cost of one teacher
    (`Blakeney et al, 2022 <https://arxiv.org/abs/2211.00683>`_). The logits of several are averaged. A draw is a
    function of the run's seed and the batch's number: it is the same on all ranks and after a resume, and no random
    stream of the run knows of it.

    Runs on :attr:`.Event.INIT` to tell :class:`.KnowledgeDistillation`, which may stand anywhere in the list.

    Args:
        num_teachers: How many teachers are heard in a batch. Default: ``1``.
        weights: How often each teacher is drawn, in proportion: one number per teacher,
            0 or more. Default: ``None``, all alike.
        per: ``'batch'``: the same teachers for all samples of a batch. ``'sample'``: each sample has teachers of its
            own, drawn by its position in the batch over all ranks, and each teacher is asked about its own samples
            alone: together at the same cost, in smaller batches. Default: ``'batch'``.

    Raises:
        ValueError: An argument is out of range, or does not fit the pool.
    """

    def __init__(
        self,
        num_teachers: int = 1,
        weights: Sequence[float] | None = None,
        per: Literal['batch', 'sample'] = 'batch',
    ):
        if not isinstance(num_teachers, int) or num_teachers < 1:
            raise ValueError(f'num_teachers must be a whole number, 1 or more, not {num_teachers}')
        if weights is not None:
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
                raise ValueError(f'weights must be 0 or more each, not {list(weights)}')
            if sum(weight > 0 for weight in weights) < num_teachers:
                raise ValueError(f'{num_teachers} teachers cannot be drawn: fewer have a weight above 0')
        if per not in ('batch', 'sample'):
            raise ValueError(f"per must be 'batch' or 'sample', not {per!r}")
        self.num_teachers = num_teachers
        self.weights = weights
        self.per = per

    def match(self, event: Event, state: State) -> bool:
        """Runs on :attr:`.Event.INIT`."""
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Have the distilling algorithm ask only the teachers that are drawn."""
        distiller = find_distiller(state, self)
        pool_size = len(distiller.pool)
        if self.num_teachers > pool_size:
            raise ValueError(f'num_teachers is {self.num_teachers}, but there are {pool_size} teachers')
        if self.weights is not None and len(self.weights) != pool_size:
            raise ValueError(f'weights has {len(self.weights)} numbers for {pool_size} teachers: give one for each')
        options = {'pool_size': pool_size, 'num_teachers': self.num_teachers, 'weights': self.weights}
        if self.per == 'batch':
            distiller.speakers = lambda state, batch: draw_teachers(state.rank_zero_seed, batch, **options)
            return
        may_be_drawn = tuple(i for i in range(pool_size) if self.weights is None or self.weights[i] > 0)
        distiller.speakers = lambda state, batch: may_be_drawn
        distiller.speakers_of_samples = functools.partial(_of_samples, **options)


def _of_samples(state: State, samples: range, **options: Any) -> torch.Tensor:
    # Rank r of n has, of a batch over all ranks, the samples r, r + n, r + 2n ...
    positions = np.asarray(samples, dtype=np.int64) * dist.get_world_size() + dist.get_global_rank()
    drawn = draw_teachers_of_samples(state.rank_zero_seed, state.timestamp.batch.value, positions, **options)
    return torch.from_numpy(drawn)
