"""One process at a time is at work in the folder of a run."""

import contextlib
import fcntl
import os
from pathlib import Path

from typing_extensions import Self

from composer_kd.recipes.load import Recipe

_descriptors: dict[Path, int] = {}  # the lock files that this process holds


class FolderLock:
    """The right to a run's folder, for rank 0. It ends with the process, however that ends.

    The lock is on a file beside the folder, `.<name>.lock`, because the folder may be still to be made.

    Args:
        recipe: The recipe that the folder is for.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._path: Path | None = None
        self._made_parent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> bool:
        """Take a folder instead of the one before; False if another process has it. Never waits.

        Raises:
            RecipeError: If nothing can be written there, or this process is at work in it already.
        """
        path = folder.with_name(f'.{folder.name}.lock').absolute()
        if path == self._path:
            return True
        self.release()
        if path in _descriptors:
            todo = 'give one of the two another run_name'
            raise self._recipe.error(('run_name',), f'{folder} is also the folder of the run that it teaches; {todo}')
        try:
            descriptor = self._locked(path)
        except OSError as error:
            message = f'cannot make {folder}: {error.strerror}'
            raise self._recipe.error(('runs_dir',), message, exit_code=1) from error
        if descriptor is None:
            return False
        self._path, _descriptors[path] = path, descriptor
        return True

    def release(self) -> None:
        """Let go of the folder that was taken last."""
        path, self._path = self._path, None
        if path in _descriptors:
            with contextlib.suppress(OSError):
                path.unlink()
            with contextlib.suppress(OSError):
                fcntl.flock(_descriptors[path], fcntl.LOCK_UN)
            os.close(_descriptors.pop(path))
        if path and self._made_parent:
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # unless there are runs in it

    def _locked(self, path: Path) -> int | None:
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made_parent = True
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                pass  # a file system that knows no locks is no reason not to train
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)  # whoever had it took the file away in between


def _forget() -> None:
    """Close what a forked process, such as a loader's worker, would keep locked when its parent is killed."""
    while _descriptors:
        os.close(_descriptors.popitem()[1])


os.register_at_fork(after_in_child=_forget)
