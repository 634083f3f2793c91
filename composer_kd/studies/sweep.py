"""`composer-kd sweep`: the cells of a sweep, as many at a time as there is room for, and a row for each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from composer_kd.jobs import tail
from composer_kd.recipes.load import RecipeError
from composer_kd.studies.cell import Cell, check_ground
from composer_kd.studies.grid import read_sweep
from composer_kd.studies.launcher import Launcher, LocalLauncher
from composer_kd.studies.rows import RESULTS_FILE, read_rows, write_rows
from composer_kd.studies.study import Study

_BAR = '{desc}: {n_fmt} of {total_fmt} runs |{bar}| {elapsed}, {remaining} left if the others take as long each'


def sweep(
    file: str | Path,
    *,
    jobs: int | None = None,
    gpus_per_job: int | None = None,
    ranks: int | None = None,
    launcher: str = 'local',
    slurm: Sequence[str] = (),
    retry: bool = False,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Bring all runs of a sweep to their end, each a `composer` process of its own; write a row for each.

    Runs that are finished are not repeated, others go on where they were. Teachers and records come first, once each.

    Args:
        file: The sweep file.
        jobs: Runs at the same time. Default: None, as many as there are GPUs for, or one without any.
        gpus_per_job: GPUs of each run. Default: None, all GPUs, divided among the runs at the same time.
        ranks: Processes of each run where there are no GPUs. Default: None, one.
        launcher: `local`, processes of this machine; or `slurm`.
        slurm: For that, `key=value` as submitit names them.
        retry: Whether to start again what failed before.
        dry_run: Whether to print the runs, and start none.

    Returns:
        The rows, as in `results.jsonl` in the study's folder.

    Raises:
        RecipeError: The sweep or a recipe is wrong, somebody else is at work on it, or a run failed.
    """
    if slurm and launcher != 'slurm':
        raise RecipeError(f'--slurm {slurm[0]}: is for --launcher slurm; add that, or leave it out')
    if ranks is not None and launcher == 'slurm':
        raise RecipeError(f'--ranks {ranks}: is for --launcher local; take --gpus-per-job')
    study, cells = read_sweep(file)
    if dry_run:
        print(_listing(cells))
        return []
    if launcher == 'slurm':
        from composer_kd.studies.slurm import SlurmLauncher  # needs an extra

        starter: Launcher = SlurmLauncher(study.folder, jobs, gpus_per_job, slurm)
    else:
        starter = LocalLauncher(jobs, gpus_per_job, ranks)
    with study.locked():
        study.write([cell.name for cell in cells if cell.role == 'student'])
        return _Driver(study, cells, starter, retry).work()


class _Driver:
    """Says which cell begins when.

    Args:
        study: The study.
        cells: Its cells, those that others wait for before these.
        launcher: What starts them.
        retry: Whether to start again what failed before.
    """

    def __init__(self, study: Study, cells: list[Cell], launcher: Launcher, retry: bool):
        self._study, self._cells, self._launcher = study, cells, launcher
        self._before = read_rows(study.folder)
        self._rows = self._rows_before(retry)
        self._not_started: dict[str, str] = {}  # names, and what they would have waited for in vain
        self._running: list[Cell] = []
        self._bar: tqdm | None = None

    def work(self) -> list[dict[str, Any]]:
        """Bring all to their end."""
        done, waiting = len(self._rows), [cell for cell in self._cells if cell.name not in self._rows]
        hidden = not sys.stderr.isatty()
        try:
            with (
                self._launcher,
                tqdm(
                    total=len(self._cells),
                    initial=done,
                    desc=self._study.name,
                    smoothing=0,
                    bar_format=_BAR,
                    disable=hidden,
                ) as bar,
            ):
                self._bar = bar
                self._say_before()
                self._write()
                orphans = [cell for cell in waiting if self._launcher.is_at_work(cell)]
                for cell in orphans:
                    self._say_orphan(cell)
                while waiting or self._running:
                    orphans = [cell for cell in orphans if self._launcher.is_at_work(cell)]
                    if not orphans:  # nobody knows which GPUs these have
                        orphans = self._start(waiting)
                    waiting = [cell for cell in waiting if not self._is_done_with(cell)]
                    for cell, problem in self._launcher.ended():
                        self._running.remove(cell)
                        self._settle(cell, problem)
                    bar.refresh()
        except KeyboardInterrupt:
            finished = sum(row['status'] == 'finished' for row in self._rows.values())
            print(
                f'interrupted: {finished} of {len(self._cells)} runs are finished; the same command goes on', flush=True
            )
            raise
        self._complain()
        return self._ordered()

    def _rows_before(self, retry: bool) -> dict[str, dict[str, Any]]:
        """The rows of what is finished, and of what failed and is not to be started again."""
        known = {row['cell']: row for row in self._before}
        rows = {}
        for cell in self._cells:
            before = known.get(cell.name)
            if summary := cell.finished():
                check_ground(cell, known.get(cell.name))
                rows[cell.name] = self._row(cell, summary)
            elif before and before['status'] == 'failed' and before['command'] == cell.command and not retry:
                rows[cell.name] = before
        return rows

    def _row(self, cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
        row = cell.row(summary=summary)
        if self._judges(cell) and self._study.metric_of_run not in row['metrics']:
            there, metric = ', '.join(row['metrics']), self._study.metric_of_run
            raise self._study.error(('metric',), f'{cell.name} does not report {metric}; it has: {there}')
        return row

    def _judges(self, cell: Cell) -> bool:
        """Whether what is compared is a metric of this run."""
        judge = self._study.judge
        return cell.role == 'student' if judge is None else cell.role == 'follow-up' and cell.method == judge

    def _start(self, waiting: list[Cell]) -> list[Cell]:
        """Start what can be started now; what cannot be, because somebody is at work on it."""
        ready, busy = [], []
        for cell in waiting:
            lost = [name for name in cell.after if name in self._not_started or self._status(name) == 'failed']
            if lost:
                self._not_started[cell.name] = lost[0]
                self._say(cell, f'not started, because {lost[0]} failed')
            elif len(ready) < self._launcher.free and all(self._status(name) == 'finished' for name in cell.after):
                if self._launcher.is_at_work(cell):
                    self._say_orphan(cell)
                    busy.append(cell)
                elif cell.finished():  # meanwhile
                    self._settle(cell, None)
                else:
                    ready.append(cell)
        for cell in self._launcher.start(ready) if ready else []:
            self._running.append(cell)
            self._say(cell, f'started, log {cell.log}')
        return busy

    def _status(self, name: str) -> str | None:
        return self._rows[name]['status'] if name in self._rows else None

    def _is_done_with(self, cell: Cell) -> bool:
        return cell in self._running or cell.name in self._rows or cell.name in self._not_started

    def _settle(self, cell: Cell, problem: str | None) -> None:
        """Look what has become of a cell that has ended."""
        summary = None
        try:
            summary = cell.finished()  # even if its process ended badly after it had written all
        except RecipeError as error:
            problem = problem or str(error)
        if summary is None:
            self._rows[cell.name] = cell.row(error=tail(cell.log))
            self._say(cell, f'failed ({problem or "it ended, but is not finished"}); {cell.log} ends so:')
            self._print(''.join(f'    {line}\n' for line in tail(cell.log).splitlines()), end='')
        else:
            row = self._rows[cell.name] = self._row(cell, summary)
            metric = self._study.metric_of_run
            value = f', {metric.split("/")[-1]} {float(row["metrics"][metric]):.4f}' if self._judges(cell) else ''
            self._say(cell, f'done, {row["train_seconds"]:.1f} s{value}')
        self._write()
        assert self._bar is not None
        self._bar.update()

    def _ordered(self) -> list[dict[str, Any]]:
        return [self._rows[cell.name] for cell in self._cells if cell.name in self._rows]

    def _write(self) -> None:
        write_rows(self._study.folder, self._ordered())

    def _say_before(self) -> None:
        if finished := sum(row['status'] == 'finished' for row in self._rows.values()):
            self._print(f'{finished} of {len(self._cells)} runs were finished before')
        if gone := {row['cell'] for row in self._before} - {cell.name for cell in self._cells}:
            self._print(f'{len(gone)} runs are not in the file any more: their rows go, their folders stay')
        for name, row in self._rows.items():
            if row['status'] == 'failed':
                self._print(f'{name}  failed before; --retry starts it again')

    def _say_orphan(self, cell: Cell) -> None:
        self._say(cell, 'waiting for another process, which is at work on it')

    def _say(self, cell: Cell, text: str) -> None:
        self._print(f'{cell.name}  {text}')

    def _print(self, text: str, end: str = '\n') -> None:
        with tqdm.external_write_mode():
            print(text, end=end, flush=True)

    def _complain(self) -> None:
        failed = [name for name, row in self._rows.items() if row['status'] == 'failed']
        folder = self._study.folder
        if failed:
            others = f'; not started without them: {", ".join(self._not_started)}' if self._not_started else ''
            todo = f'their logs are in {folder}, and --retry starts them again'
            raise RecipeError(f'failed: {", ".join(failed)}{others}; {todo}', exit_code=1)
        print(f'{len(self._cells)} runs are finished; rows in {folder / RESULTS_FILE}', flush=True)


def _listing(cells: Sequence[Cell]) -> str:
    """The runs of a sweep, for a person."""
    lines = []
    for cell in cells:
        state = ', finished' if cell.finished() else ''
        after = f', after {", ".join(cell.after)}' if cell.after else ''
        command = ['composer-kd' if cell.role == 'record' else 'composer', *cell.command]
        lines += [f'{cell.name} ({cell.role}{state}{after})', f'    {shlex.join(command)}']
    return '\n'.join([*lines, f'{len(cells)} runs; nothing was started'])
