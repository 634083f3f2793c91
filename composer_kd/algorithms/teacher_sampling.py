"""Hear some of the teachers in each batch, at their cost instead of the whole pool's."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

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

    Raises:
        ValueError: An argument is out of range, or does not fit the pool.
    """

    def __init__(self, num_teachers: int = 1, weights: Sequence[float] | None = None):
        if not isinstance(num_teachers, int) or num_teachers < 1:
            raise ValueError(f'num_teachers must be a whole number, 1 or more, not {num_teachers}')
        if weights is not None:
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
                raise ValueError(f'weights must be 0 or more each, not {list(weights)}')
            if sum(weight > 0 for weight in weights) < num_teachers:
                raise ValueError(f'{num_teachers} teachers cannot be drawn: fewer have a weight above 0')
        self.num_teachers = num_teachers
        self.weights = weights

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
        distiller.speakers = lambda state: draw_teachers(
            state.rank_zero_seed,
            state.timestamp.batch.value,
            pool_size=pool_size,
            num_teachers=self.num_teachers,
            weights=self.weights,
        )
