"""Points in a run, as people write them, and how far the run has come."""

from __future__ import annotations

import math

from composer.core import State, Time, TimeUnit


def parse_time(name: str, time: str | Time) -> Time:
    """A time in any unit, from the begin of a run on.

    Args:
        name: What an error calls it.
        time: The time, or its time string.

    Raises:
        ValueError: It cannot be read, is negative, or lies behind the end of the run.
    """
    try:
        parsed = Time.from_input(time)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} must be a time string, such as '0.3dur', '30ep' or '5000ba', not {time!r}") from error
    if not (math.isfinite(parsed.value) and parsed.value >= 0):
        raise ValueError(f'{name} must be 0 or later, not {parsed}')
    if parsed.unit == TimeUnit.DURATION and parsed.value > 1:
        raise ValueError(f"{name} is {parsed}, but a run ends at '1dur'")
    return parsed


def progress(state: State, unit: TimeUnit) -> float:
    """How far a run has come, in a unit."""
    if unit != TimeUnit.DURATION:
        return state.timestamp.get(unit).value
    end = state.max_duration
    if end is None:
        return 0.0
    if end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        # Composer counts a duration in epochs by whole epochs; its schedulers, as we do, by batches.
        return (
            state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / state.dataloader_len.value
        ) / end.value
    return state.timestamp.get(end.unit).value / end.value
