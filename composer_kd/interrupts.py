"""Signals that ask a command to end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP become a KeyboardInterrupt while this context is open.

    One that is ignored when it is opened stays so, since that is what `nohup` is for.
    """

    def __init__(self):
        self._handlers: dict[signal.Signals, object] = {}
        self._is_held = self._is_interrupted = False

    def __enter__(self) -> Self:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._interrupt) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def held(self) -> Iterator[None]:
        """One that comes meanwhile is raised at the end."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_interrupted:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """Let them come in vain, until the context is left."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)

    def _interrupt(self, *_: object) -> None:
        self._is_interrupted = True
        if not self._is_held:
            raise KeyboardInterrupt
