"""How the cells of a study are started: the driver says which and when, a launcher where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import Self

from composer_kd.jobs import Job, Jobs
from composer_kd.studies.cell import Cell


class Launcher(Protocol):
    """Starts cells, and says when they have ended. Used as a context, it ends what is at work when it is left."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    @property
    def free(self) -> int:
        """How many more cells may be started now."""
        ...

    def is_at_work(self, cell: Cell) -> bool:
        """Whether a process is at work on a cell that was started by an earlier driver, or by a person."""
        ...

    def start(self, cells: Sequence[Cell]) -> list[Cell]:
        """Start cells, all of whose teachers are there; which of them were started. The others are asked for again."""
        ...

    def ended(self) -> list[tuple[Cell, str | None]]:
        """Wait for a moment; the cells that have ended since, and for each what went wrong, such as `exit code 1`."""
        ...


class LocalLauncher:
    """Starts cells as processes of this machine.

    Args:
        jobs: See `composer_kd.jobs.Jobs`.
        gpus_per_job: See there.
        ranks: See there.
    """

    def __init__(self, jobs: int | None = None, gpus_per_job: int | None = None, ranks: int | None = None):
        self._jobs = Jobs(jobs, gpus_per_job, ranks)
        self._cells: dict[Job, Cell] = {}

    def __enter__(self) -> Self:
        self._jobs.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.__exit__(*error)

    @property
    def free(self) -> int:
        """How many more cells may be started now."""
        return self._jobs.free

    def is_at_work(self, cell: Cell) -> bool:
        """Whether a process is at work on a cell that was started by an earlier driver, or by a person."""
        return cell.is_at_work()

    def start(self, cells: Sequence[Cell]) -> list[Cell]:
        """Start cells; which of them were started."""
        started = []
        for cell in cells:
            if job := self._jobs.start(cell.arguments, cell.log):
                self._cells[job] = cell
                started.append(cell)
        return started

    def ended(self) -> list[tuple[Cell, str | None]]:
        """Wait for a moment; the cells that have ended since, and for each what went wrong."""
        return [
            (self._cells.pop(job), f'exit code {job.process.returncode}' if job.process.returncode else None)
            for job in self._jobs.ended()
        ]
