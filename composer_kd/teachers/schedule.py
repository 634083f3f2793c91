"""Which samples a run is to ask its teachers about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer.core import Time, TimeUnit
from composer.utils import dist

if TYPE_CHECKING:
    from composer.core import State

BEGIN = Time(0, TimeUnit.BATCH)
END = Time(1, TimeUnit.DURATION)

_NEXT_TO_NEVER = 1e-3


@dataclass(frozen=True)
class Schedule:
    """When a run asks a teacher.

    Args:
        start: From this time on. Default: the begin of the run.
        stop: Up to this time. Default: its end.
        interval: The teacher is asked in each batch of which the number is a multiple. Default: ``1``. ``None``: in
            some batches, nobody knows beforehand in which.
    """

    start: Time = BEGIN
    stop: Time = END
    interval: int | None = 1

    def asked(self, state: State, loader: Any) -> dict[int, list[int]] | None:
        """For each view that may be asked for: about how many samples at least, in each epoch in which it comes.

        None if nobody knows how long the run is.

        Args:
            state: That of the run.
            loader: That of its training data, which knows which samples are in a batch.
        """
        start, stop, end = (_in_batches(time, state) for time in (self.start, self.stop, state.max_duration))
        known = [time for time in (stop, end) if time is not None]
        if state.dataloader_len is None or not known:
            return None
        per_epoch, last = state.dataloader_len.value, min(known)
        is_known = None not in (start, stop, end) and self.interval is not None
        sure_begin, sure_end = (math.ceil(start or 0), math.floor(last)) if is_known else (0, 0)
        batch_size = (loader.batch_size or 1) * dist.get_world_size()
        short = max(0, per_epoch * batch_size - loader.samples)  # by which the last batch is smaller
        views: dict[int, list[int]] = {}
        for epoch in range(math.floor(start or 0) // per_epoch, math.ceil(math.ceil(last) / per_epoch)):
            begin, stop_here = max(sure_begin, epoch * per_epoch), min(sure_end, (epoch + 1) * per_epoch)
            batches = max(0, stop_here - begin) // (self.interval or 1)
            view = epoch if loader.views is None else epoch % loader.views
            views.setdefault(view, []).append(max(0, batches * batch_size - short))
        return views


def surely_asks(samples: int, missing: int, asked: Sequence[int]) -> bool:
    """Whether epochs, each about other samples, are certain to ask about one that is missing, or as good as certain.

    Args:
        samples: How many there are.
        missing: How many of them are missing.
        asked: About how many each epoch asks.
    """
    if not missing or not any(asked):
        return False
    if missing > samples - max(asked):
        return True
    # The chance that there are as many samples that no epoch asks about is at most binomial(n, m) prod (1 - a / n)^m.
    ways = math.lgamma(samples + 1) - math.lgamma(missing + 1) - math.lgamma(samples - missing + 1)
    return ways + missing * sum(math.log1p(-number / samples) for number in asked) < math.log(_NEXT_TO_NEVER)


def _in_batches(time: Time | None, state: State) -> float | None:
    """A time in batches since the run began; None if it cannot be told beforehand."""
    if time is None or state.dataloader_len is None:
        return None
    if time.unit == TimeUnit.DURATION:
        end = state.max_duration
        whole = None if end is None or end.unit == TimeUnit.DURATION else _in_batches(end, state)
        return None if whole is None else round(time.value * whole, 6)
    if time.unit == TimeUnit.EPOCH:
        return time.value * state.dataloader_len.value
    return time.value if time.unit == TimeUnit.BATCH else None
