"""`composer-kd sequence`: runs one after another, each of which may learn from those before it, and a row for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer_kd.jobs import Jobs, tail
from composer_kd.recipes.load import RecipeError
from composer_kd.recipes.report import is_evaluation
from composer_kd.studies.accounting import evaluations, quality, seconds_spent, table, with_costs
from composer_kd.studies.arms import Arm, read_sequence
from composer_kd.studies.arms import Sequence as Plan
from composer_kd.studies.cell import Cell, check_ground
from composer_kd.studies.predecessors import Lesson, Predecessor, forget_records
from composer_kd.studies.rows import RESULTS_FILE, read_rows, write_rows
from composer_kd.studies.search import Search
from composer_kd.studies.steps import foreseen, hint, listing, step_cell

_SECONDS_BETWEEN_LOOKS = 1.0  # at what a run has logged


def sequence(
    file: str | Path, *, gpus_per_job: int | None = None, retry: bool = False, dry_run: bool = False
) -> list[dict[str, Any]]:
    """Go through a sequence of runs once for each of its arms, each run a `composer` process; write a row for each.

    Runs that are finished are not repeated, others go on where they were.

    Args:
        file: The sequence file.
        gpus_per_job: GPUs of each run. Default: None, all.
        retry: Whether to start again what failed before.
        dry_run: Whether to print the runs, as far as they can be known, and start none.

    Returns:
        The rows, as in `results.jsonl` in the study's folder.

    Raises:
        RecipeError: The sequence or a recipe is wrong, somebody else is at work on it, or a run failed.
    """
    plan = read_sequence(file)
    cells = [*foreseen(plan)]
    if dry_run:
        print(listing(plan, cells))
        return []
    jobs = Jobs(1, gpus_per_job)
    with plan.study.locked():
        plan.study.write()
        return _Driver(plan, jobs, retry).work()


def check_file(path: str | Path) -> None:
    """Check a sequence file, and the recipes of its runs as far as they can be known. Starts nothing.

    Raises:
        RecipeError: Something is wrong.
    """
    for _ in foreseen(read_sequence(path)):
        pass


class _Driver:
    """Brings all arms to their end, one after another.

    Args:
        plan: The sequence.
        jobs: Starts its runs.
        retry: Whether to start again what failed before.
    """

    def __init__(self, plan: Plan, jobs: Jobs, retry: bool):
        self._plan, self._study, self._jobs, self._retry = plan, plan.study, jobs, retry
        self._before = {row['cell']: row for row in read_rows(plan.study.folder)}
        self._rows: list[dict[str, Any]] = []
        self._not_started: list[str] = []

    def work(self) -> list[dict[str, Any]]:
        """Do all of it."""
        runs = len(self._plan.arms) * len(self._plan.steps)
        try:
            with self._jobs:
                for arm in self._plan.arms:
                    self._go_through(arm)
        except KeyboardInterrupt:
            done = sum(row['status'] == 'finished' for row in self._rows)
            print(f'interrupted: {done} of {runs} runs are finished; the same command goes on', flush=True)
            raise
        write_rows(self._study.folder, self._rows)
        print(f'\n{table(self._study, self._rows)}')
        if failed := [row['cell'] for row in self._rows if row['status'] == 'failed']:
            others = f'; not started after them: {", ".join(self._not_started)}' if self._not_started else ''
            todo = f'their logs are in {self._study.folder}, and --retry starts them again'
            raise RecipeError(f'failed: {", ".join(failed)}{others}; {todo}', exit_code=1)
        print(f'{runs} runs are done with; rows in {self._study.folder / RESULTS_FILE}', flush=True)
        return self._rows

    def _go_through(self, arm: Arm) -> None:
        """Bring the runs of one arm to their end; of those that are no trials, one that fails is the last."""
        search = Search(self._study, arm.name) if self._study.kind == 'search' else None
        if search and self._retry:
            search.run_failed_again()
        finished: list[Predecessor] = []
        done, rows = self._rows, []
        for number in range(len(self._plan.steps)):
            if rows and rows[-1]['status'] == 'failed' and not search:
                self._not_started += [f'{arm.name}-{later}' for later in range(number, len(self._plan.steps))]
                break
            proposed, teachers = {}, finished
            if search:
                proposed = search.proposed(number, [run.cell.name for run in finished]).params
                teachers = [run for run in finished if run.cell.name in search.known(number)]
            cell, taught = step_cell(self._plan, arm, number, proposed, teachers)
            if number == 1 and (text := hint(arm, cell)):
                print(text, flush=True)
            row = self._trial(search, cell, taught) if search else self._step(cell, taught)
            rows.append(row)
            self._rows = [*done, *with_costs(rows, self._study.metric, self._study.goal)]
            if self._rows[-1] != self._before.get(cell.name):
                write_rows(self._study.folder, [*self._rows, *self._still_to_come()])
            value = quality(row, self._study.metric)
            if row['status'] == 'finished' and value is not None and (summary := cell.finished()):
                finished.append(Predecessor(cell, value, cell.folder / summary['checkpoint']))

    def _still_to_come(self) -> list[dict[str, Any]]:
        """The rows that there were before, of the runs that are not looked at yet."""
        looked_at = {*self._not_started, *(row['cell'] for row in self._rows)}
        names = [f'{arm.name}-{number}' for arm in self._plan.arms for number in range(len(self._plan.steps))]
        return [self._before[name] for name in names if name in self._before and name not in looked_at]

    def _step(self, cell: Cell, taught: Lesson) -> dict[str, Any]:
        """The row of a step that is no trial, once it is done."""
        before = self._before.get(cell.name)
        is_known = before and before['status'] == 'failed' and before['command'] == cell.command
        if is_known and not self._retry and not cell.finished():
            print(f'{cell.name}  failed before; --retry starts it again', flush=True)
            return self._before[cell.name]
        self._run(cell, taught, lambda: False)
        return self._row(cell)

    def _trial(self, search: Search, cell: Cell, taught: Lesson) -> dict[str, Any]:
        """The row of a trial, once it is done."""
        assert cell.step is not None
        number, metric = cell.step, self._study.metric
        outcome = search.outcome(number)
        if outcome == 'failed' and not cell.finished():
            print(f'{cell.name}  failed before; --retry starts it again', flush=True)
            return self._before.get(cell.name) or self._row(cell)
        if outcome == 'running':

            def is_to_end() -> bool:
                return search.is_to_end(number, [row[metric] for row in self._evaluations(cell)])

            is_early = self._run(cell, taught, is_to_end)
            row = self._row_of_pruned(cell, search.evaluated(number)) if is_early else self._row(cell)
            search.tell(number, row['status'], quality(row, metric))
            return row
        # There is nothing left to run, unless somebody took the folder away.
        if outcome == 'pruned':
            last = search.evaluated(number)
            self._run(cell, taught, lambda: len(self._evaluations(cell)) >= last)
            return self._row_of_pruned(cell, last)
        self._run(cell, taught, lambda: False)
        return self._row(cell)

    def _run(self, cell: Cell, taught: Lesson, is_to_end: Callable[[], bool]) -> bool:
        """Bring a run to its end, unless it is there; whether it is to end early, and has."""
        if cell.is_at_work():
            print(f'{cell.name}  waiting for another process, which is at work on it', flush=True)
        while cell.is_at_work():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if is_to_end():
            return True
        if cell.finished():
            check_ground(cell, self._before.get(cell.name))
            return False
        forget_records(self._study, cell)
        taught.link()
        job = self._jobs.start(cell.arguments, cell.log)
        assert job is not None, 'nobody else starts it while the study is locked'
        of = f' after {", ".join(cell.after)}' if cell.after else ''
        print(f'{cell.name}  started{of}, log {cell.log}', flush=True)
        looked = time.monotonic()
        while job not in self._jobs.ended():
            if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                if is_to_end():
                    self._jobs.end(job)
                    return True
        return is_to_end()

    def _row(self, cell: Cell) -> dict[str, Any]:
        """The row of a run that has ended."""
        metric, known = self._study.metric, self._before.get(cell.name, {}).get('status') == 'finished'
        problem = 'it ended, but is not finished'
        try:
            summary = cell.finished()
        except RecipeError as error:
            summary, problem = None, str(error)
        if summary is None:
            end = tail(cell.log)
            print(f'{cell.name}  failed ({problem}); {cell.log} ends so:')
            print(''.join(f'    {line}\n' for line in end.splitlines()), end='', flush=True)
            return cell.row(error=end) | {'train_seconds': seconds_spent(cell.folder)}
        row = cell.row(summary=summary)
        if metric not in row['metrics']:
            there = ', '.join(row['metrics'])
            raise self._study.error(('metric',), f'{cell.name} does not report {metric}; it has: {there}')
        if not known:
            value = f'{metric.split("/")[-1]} {float(row["metrics"][metric]):.4f}'
            print(f'{cell.name}  done, {row["train_seconds"]:.1f} s, {value}', flush=True)
        return row

    def _row_of_pruned(self, cell: Cell, last: int) -> dict[str, Any]:
        """The row of a run that was ended after so many evaluations: what it had found and cost by then."""
        logged = self._evaluations(cell)[last - 1]
        if cell.name not in self._before:
            print(f'{cell.name}  ended early, after {logged["seconds"]:.1f} s', flush=True)
        return cell.row(error='') | {
            'status': 'pruned',
            'error': None,
            'metrics': {name: value for name, value in logged.items() if is_evaluation(name)},
            'train_seconds': logged['seconds'],
            'teacher_seconds': logged.get('time/teacher', 0.0),
            'batches': logged['batch'],
        }

    def _evaluations(self, cell: Cell) -> list[dict[str, Any]]:
        return evaluations(cell.folder, self._study.metric)
