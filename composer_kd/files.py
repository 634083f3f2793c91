"""Files that appear whole, and paths that one process at a time has."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path
from typing import Any

_descriptors: dict[Path, int] = {}  # the lock files that this process holds
_locked: set[int] = set()  # descriptors of all files that it has locked
_process = secrets.token_hex(4)  # process ids alone come again on other machines


def unfinished(path: Path) -> Path:
    """Where this process, and no other one, writes a file before it gets its name."""
    return path.with_name(f'.{path.name}.{os.getpid()}-{_process}.tmp')


def write(path: Path, *parts: Any) -> None:
    """Write a file as a whole or not at all, and for good: it is on the disk when this returns.

    Args:
        path: The file. What is there is replaced.
        parts: What it is to hold, one after another: text, or anything with bytes, such as a contiguous array.

    Raises:
        OSError: It cannot be written; then nothing half-written is left.
    """
    beside = unfinished(path)
    try:
        with beside.open('wb') as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """See to it that the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove what `write` left of some files when its process was killed; for whoever alone writes them.

    Args:
        folder: Where they lie.
        names: A pattern of their names.
    """
    for beside in folder.glob(f'.{names}*.tmp'):
        beside.unlink(missing_ok=True)


def lock(descriptor: int) -> bool:
    """Lock an open file for this process, until `unlock_and_close` or its end; False if another one has it.

    Never waits. Forked processes do not hold it, nor the descriptor.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system that knows no locks is no reason not to work
    _locked.add(descriptor)
    return True


def unlock_and_close(descriptor: int) -> None:
    """Let go of a file that `lock` has locked."""
    _locked.discard(descriptor)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


class FileLock:
    """The right to what a lock file stands for, for one process. It ends with the process, however that ends.

    Args:
        path: The lock file. It is made, with its folder, where the lock is taken, and removed where it is released.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._is_taken = self._made_folder = False

    def is_ours(self) -> bool:
        """Whether this process has it, by this object or by another one."""
        return self.path in _descriptors

    def take(self) -> bool:
        """Take it; False if another process has it. Never waits.

        Raises:
            OSError: The file cannot be made.
        """
        descriptor = self._locked()
        if descriptor is None:
            return False
        _descriptors[self.path], self._is_taken = descriptor, True
        return True

    def release(self) -> None:
        """Let go of it, if it was taken by this object."""
        if self._is_taken and self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()
            unlock_and_close(_descriptors.pop(self.path))
        self._is_taken = False
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()  # unless there is something in it

    def _locked(self) -> int | None:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made_folder = True
                continue
            if not lock(descriptor):
                os.close(descriptor)
                return None
            if is_at(descriptor, self.path):
                return descriptor
            unlock_and_close(descriptor)  # whoever had it took the file away in between


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that lies there."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _forget() -> None:
    """Close what a forked process, such as a loader's worker, would keep locked when its parent is killed."""
    _descriptors.clear()
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_forget)
