"""One job at a time writes a record."""

from pathlib import Path

from typing_extensions import Self

from composer_kd.files import FileLock, remove_unfinished
from composer_kd.recording.cost import SO_FAR, SUMMARY
from composer_kd.recording.errors import RecordError
from composer_kd.recording.record import cannot_write


class RecordLock:
    """The right to write a record, for rank 0 of a job. It ends with the process, however that ends.

    The lock is on a file `.lock` in the record's folder, which is made if need be.

    Args:
        path: The folder of the record.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._lock = FileLock(self._path / '.lock')

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Take it, and clear away what a writer that was killed left half-written.

        Raises:
            RecordError: Another job has it, or this one has it already, or nothing can be written there.
        """
        if self._lock.is_ours():
            raise RecordError(f'this process writes the record {self._path} already; choose another path')
        try:
            if not self._lock.take():
                todo = 'wait until it is done, end it if it is a notebook whose run has failed, or choose another path'
                raise RecordError(f'another process writes the record {self._path}; {todo}')
            for names in ('manifest.json', 'view*-shard*.rows', SUMMARY, SO_FAR):
                remove_unfinished(self._path, names)
        except OSError as error:
            self._lock.release()
            raise cannot_write(self._path, error) from error

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()
