"""Time a part of a step without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds spent in ``with stopwatch.running():``, by events on a CUDA device.

    An event pair is read once the device has passed it, so neither running nor reading ever synchronizes.

    Args:
        seconds: What earlier parts of the run took. Default: ``0.0``.
    """

    def __init__(self, seconds: float = 0.0):
        self._seconds = seconds
        self._pending: deque[Any] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside, on ``device``."""
        if device.type == 'cuda':
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream())
            yield
            end.record(torch.cuda.current_stream())
            self._pending.append((start, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Seconds so far, as far as the device has come."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds
