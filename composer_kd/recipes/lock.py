"""One process at a time is at work in the folder of a run."""

from pathlib import Path

from typing_extensions import Self

from composer_kd.files import FileLock
from composer_kd.recipes.load import Recipe


class FolderLock:
    """The right to a run's folder, for rank 0. It ends with the process, however that ends.

    The lock is on a file beside the folder, `.<name>.lock`, because the folder may be still to be made.

    Args:
        recipe: The recipe that the folder is for.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> bool:
        """Take a folder instead of the one before; False if another process has it. Never waits.

        Raises:
            RecipeError: If nothing can be written there, or this process is at work in it already.
        """
        lock = FileLock(folder.with_name(f'.{folder.name}.lock'))
        if self._lock and lock.path == self._lock.path:
            return True
        self.release()
        if lock.is_ours():
            todo = 'give one of the two another run_name'
            raise self._recipe.error(('run_name',), f'{folder} is also the folder of the run that it teaches; {todo}')
        try:
            taken = lock.take()
        except OSError as error:
            message = f'cannot make {folder}: {error.strerror}'
            raise self._recipe.error(('runs_dir',), message, exit_code=1) from error
        self._lock = lock if taken else None
        return taken

    def release(self) -> None:
        """Let go of the folder that was taken last."""
        lock, self._lock = self._lock, None
        if lock:
            lock.release()
