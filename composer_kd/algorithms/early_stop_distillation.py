"""Distill for a part of the training only, then train on without teachers."""

from __future__ import annotations

import warnings

from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger

from composer_kd.algorithms.knowledge_distillation import find_distiller
from composer_kd.algorithms.times import parse_time, progress


def window_share(elapsed: float, *, stop: float, ramp: float = 0.0) -> float:
    """Share of the distillation that is switched on: 1, falling linearly to 0 over the last ``ramp`` before ``stop``.

    Args:
        elapsed: The present time.
        stop: When distillation has ended, in the same unit.
        ramp: How long it takes to end, in the same unit. Default: ``0.0``, it ends at once.
    """
    if elapsed >= stop:
        return 0.0
    return 1.0 if stop - elapsed >= ramp else (stop - elapsed) / ramp


class EarlyStopDistillation(Algorithm):
    """Distill from ``start`` to ``stop``, then free the teachers' memory and train on at the student's own speed.

    Teachers help most early in training: BERT trains most efficiently when it distills for the first 20-50 % of it
    (`Blakeney et al, 2022 <https://arxiv.org/abs/2211.00683>`_).

    Runs on :attr:`.Event.INIT` to tell :class:`.KnowledgeDistillation`, which may stand anywhere in the list, and on
    :attr:`.Event.FIT_START` and :attr:`.Event.BATCH_START` to release the teachers once distillation is over: for good,
    also if the run is made longer. A run that is resumed after that does not put them on the device at all.

    Args:
        stop: When distillation ends, a time string in any unit, e.g. ``'0.3dur'``, ``'30ep'``, ``'5000ba'``.
            From the batch that begins at this time on, or later, no teacher is asked.
        start: When it begins, a time string in any unit. Default: ``'0dur'``.
        ramp: Over how long a time before ``stop`` the weight of the distillation loss falls
            linearly to 0, and the weight of the labels goes back to 1: a time string in the unit of ``stop``.
            Default: ``None``, the weights jump at ``stop``.

    Raises:
        ValueError: A time cannot be read, or ``stop`` does not come after ``start``.
    """

    def __init__(self, stop: str | Time, start: str | Time = '0dur', ramp: str | Time | None = None):
        self.start = parse_time('start', start)
        self.stop = parse_time('stop', stop)
        self.ramp = Time(0, self.stop.unit) if ramp is None else parse_time('ramp', ramp)
        if self.stop.value <= 0 or (self.start.unit == self.stop.unit and self.start.value >= self.stop.value):
            raise ValueError(f'stop ({self.stop}) must come after start ({self.start})')
        if self.ramp.unit != self.stop.unit:
            raise ValueError(f'ramp ({self.ramp}) must be in the unit of stop ({self.stop})')
        begins = self.start.value if self.start.unit == self.stop.unit else 0
        if self.ramp.value > self.stop.value - begins:
            raise ValueError(
                f'ramp ({self.ramp}) is longer than the time from start ({self.start}) to stop ({self.stop})'
            )

    def match(self, event: Event, state: State) -> bool:
        """Runs on :attr:`.Event.INIT`, :attr:`.Event.FIT_START` and :attr:`.Event.BATCH_START`."""
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set the window of the distilling algorithm, and release its teachers once it is over."""
        distiller = find_distiller(state, self)
        if event == Event.INIT:
            distiller.share = self.share
            distiller.window = self.start, self.stop
        elif not distiller.pool.released and progress(state, self.stop.unit) >= self.stop.value:
            if distiller.pool.heard == 0 and distiller.kd_weight > 0:
                warnings.warn(
                    f'distillation has ended at {self.stop} before it began: no teacher was heard', stacklevel=2
                )
            distiller.pool.release()

    def share(self, state: State) -> float:
        """Share of the distillation that is switched on at the present time of ``state``, 0 to 1."""
        if progress(state, self.start.unit) < self.start.value:
            return 0.0
        return window_share(progress(state, self.stop.unit), stop=self.stop.value, ramp=self.ramp.value)
