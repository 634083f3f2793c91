"""A cell: one run of a study, an ordinary `composer` command, and the row that comes of it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_kd.jobs import is_at_work
from composer_kd.recipes.check import DEFAULTS, Plan, check
from composer_kd.recipes.folder import differences, essence, evaluated_run, finished_run, run_folder
from composer_kd.recipes.load import Recipe, load
from composer_kd.recipes.lock import FolderLock
from composer_kd.recording import Record, RecordError
from composer_kd.recording.cost import SUMMARY, read_summary
from composer_kd.studies.study import Override, Study
from composer_kd.teachers.recorded import RecordedTeacher

_OF_THE_RUN = (
    *('train_seconds', 'teacher_seconds', 'teacher_forwards', 'teacher_share', 'teacher_training_seconds'),
    *('epochs', 'batches', 'samples', 'samples_per_second', 'parameters'),
    *('world_size', 'device', 'precision', 'versions', 'git_commit', 'best_team', 'teams'),
)


@dataclass
class Cell:
    """One run of a study, or one pass of `composer-kd record`.

    Made by :meth:`of_run` and :meth:`of_record`.

    Args:
        study: The study.
        name: Of its folder, log and row.
        method: What it is one of.
        role: `student`; `teacher`, a run that others learn from; `record`; or `follow-up`, a run that goes on from a
            student.
        command: What a person would type after `composer`, or after `composer-kd` for a record.
        recipe: Its recipe, as the run is to have it.
        plan: What was checked, in which teachers that are still to come are stood in for.
        seed: Its seed; for a record, that of the recipe.
        settings: Dotted keys that vary in the study, and their values here.
        is_baseline: Whether it is of the method that the others are compared with.
        after: The names of cells that must be finished first.
        ground: Of each, what decides what it leaves, as `digest`.
        out: Of a record, its folder.
        top: Of a record, how many logits are kept, if it is said.
        arm: Of a sequence, which one of those that are compared.
        step: Of a sequence, its place in it, from 0.
        of: Of a follow-up, the name of the student.
    """

    study: Study
    name: str
    method: str
    role: str
    command: list[str]
    recipe: Recipe
    plan: Plan = field(repr=False)
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    is_baseline: bool = False
    after: list[str] = field(default_factory=list)
    ground: dict[str, str] = field(default_factory=dict)
    out: Path | None = None
    top: int | None = None
    arm: str | None = None
    step: int | None = None
    of: str | None = None

    @classmethod
    def of_run(
        cls,
        study: Study,
        name: str,
        method: str,
        file: Path,
        overrides: Sequence[Override] = (),
        *,
        role: str = 'student',
        seed: int | None = None,
        after: Sequence[Cell] = (),
        **more: Any,
    ) -> Cell:
        """The cell of a run, whose recipe is checked.

        Args:
            study: The study.
            name: Its name.
            method: What it is one of.
            file: The recipe.
            overrides: For the recipe.
            role: `student`, `teacher` or `follow-up`.
            seed: The recipe's seed. Default: None, as the recipe says.
            after: Cells that must be finished first. A pattern for teachers in the recipe stands for those of these
                cells that it matches, if there are any, whatever else lies there when the run begins.
            more: Other arguments of the class.

        Raises:
            RecipeError: The recipe or an override is wrong.
        """
        ours = {'run_name': name, 'runs_dir': str(study.folder), 'autoresume': True}
        own = [*overrides, *([] if seed is None else [Override('seed', seed)])]
        own += [Override(key, value) for key, value in ours.items()]
        own = _with_known_teachers(file, own, after)
        recipe, plan = _checked(file, own, after)
        command = [str(file), *map(str, own)]
        made = cls(study, name, method, role, command, recipe, plan, recipe.config['seed'], **more)
        made.wait_for(*after)
        return made

    @classmethod
    def of_record(
        cls,
        study: Study,
        name: str,
        method: str,
        file: Path,
        overrides: Sequence[Override] = (),
        *,
        views: Override | None = None,
        top: int | None = None,
        after: Sequence[Cell] = (),
    ) -> Cell:
        """The cell of a pass of `composer-kd record`, whose recipe is checked.

        Args:
            study: The study.
            name: Its name.
            method: The method that learns from it; names its folder, too.
            file: The recipe whose teachers are recorded.
            overrides: For the recipe.
            views: `train_data.views`. Default: None, as the recipe says.
            top: How many logits to keep. Default: None, as `composer-kd record` chooses.
            after: Cells that must be finished first.

        Raises:
            RecipeError: The recipe or an override is wrong, or it has no teachers.
        """
        own = _with_known_teachers(file, [*overrides, Override('runs_dir', str(study.folder))], after)
        recipe, plan = _checked(file, [*own, *([] if views is None else [views])], after)
        if not plan.teachers:
            raise recipe.error((), 'there is no teacher to record; add a `teachers` section')
        out = study.folder / 'records' / method
        options = [] if views is None else ['--views', str(views.value)]
        options += [*([] if top is None else ['--top', str(top)]), '--out', str(out)]
        command = ['record', str(file), *map(str, own), *options]
        made = cls(study, name, method, 'record', command, recipe, plan, recipe.config['seed'], out=out, top=top)
        made.wait_for(*after)
        return made

    def wait_for(self, *others: Cell) -> None:
        """Have it begin after others."""
        for other in others:
            if other.name not in self.ground:
                self.after.append(other.name)
                self.ground[other.name] = other.digest

    @property
    def digest(self) -> str:
        """A SHA-256 of what decides what it leaves: its recipe, as far as it does, and the cells before it."""
        content = json.dumps([essence(self.recipe.config), self.top, self.ground], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def _config(self) -> dict[str, Any]:
        """The recipe, but for where its run lies."""
        return {key: value for key, value in self.recipe.config.items() if key not in ('runs_dir', 'run_name')}

    @property
    def folder(self) -> Path:
        """Where it leaves what it makes."""
        return self.out or run_folder(self.recipe)

    @property
    def records(self) -> list[Path]:
        """Of a record, the folder of each of its teachers."""
        assert self.out is not None
        teachers = len(self.plan.teachers)
        return [self.out] if teachers == 1 else [self.out / str(index) for index in range(teachers)]

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.study.folder / f'{self.name}.log'

    @property
    def arguments(self) -> list[str]:
        """What Composer's launcher is given."""
        return ['-m', 'composer_kd', *self.command] if self.role == 'record' else self.command

    def finished(self) -> dict[str, Any] | None:
        """The summary of what is finished, None if it is still to be started or finished.

        Raises:
            RecipeError: Its folder holds something else.
        """
        if self.role == 'record':
            return self._recorded()
        return finished_run(self.recipe) if self.role == 'teacher' else evaluated_run(self.recipe)

    def is_at_work(self) -> bool:
        """Whether a process is at work on it, such as one whose parent was killed."""
        if is_at_work(self.log) or self.role == 'record':
            return is_at_work(self.log)
        with FolderLock(self.recipe) as lock:
            return not lock.take(self.folder)

    def row(self, error: str | None = None, summary: dict[str, Any] | None = None) -> dict[str, Any]:
        """The row of results.

        Args:
            error: Of a run that failed, the end of its log. Default: None, it is finished.
            summary: What `finished` gave. Default: None, it is asked.
        """
        summary = {} if error is not None else summary or self.finished()
        assert summary is not None, f'{self.name} is not finished'
        records = [] if error is not None or self.role == 'record' else self._learned_from()
        row = {
            'study': self.study.name,
            'cell': self.name,
            'method': self.method,
            'role': self.role,
            'baseline': self.is_baseline,
            'settings': self.settings,
            'seed': self.seed,
            'status': 'finished' if error is None else 'failed',
            'command': self.command,
            'config': self._config,
            'metrics': summary.get('metrics', {}),
            **{name: summary.get(name) for name in _OF_THE_RUN},
            'recording_seconds': sum(record['seconds'] for record in records),
            'error': error,
            'arm': self.arm,
            'step': self.step,
            'of': self.of,
            'ground': self.ground,
        }
        if records:
            row['teacher_training_seconds'] += sum(record['teacher_training_seconds'] for record in records)
        return row

    def _recorded(self) -> dict[str, Any] | None:
        """The summaries of its records as one, if they are whole and of this recipe."""
        found = self._summaries(self.records)
        config = self.recipe.config
        if len(found) < len(self.records) or any(differences(one['config'], config) for one in found):
            return None  # composer-kd record says what is wrong with it, if anything is
        try:
            if any(Record.open(record).missing(found[0]['views']) for record in self.records):
                return None
        except RecordError as error:
            raise self.recipe.error((), str(error), 1) from error
        sums = {name: sum(one[name] for one in found) for name in ('teacher_training_seconds', 'teacher_forwards')}
        return found[0] | sums | {'train_seconds': sum(one['seconds'] for one in found)}

    def _learned_from(self) -> list[dict[str, Any]]:
        """The summaries of the records that a run learns from, as far as they have one."""
        paths = [t.call.arguments['path'] for t in self.plan.teachers if t.call.target is RecordedTeacher]
        return self._summaries([Path(path) for path in paths])

    def _summaries(self, records: Sequence[Path]) -> list[dict[str, Any]]:
        try:
            return [read_summary(path) for record in records if (path := record / SUMMARY).is_file()]
        except RecordError as error:
            raise self.recipe.error((), str(error), 1) from error


def check_ground(cell: Cell, before: Mapping[str, Any] | None) -> None:
    """See whether what a finished run went on from, or learned from, is still made as it was.

    Args:
        cell: The run.
        before: Its row, if it has one.

    Raises:
        RecipeError: It is a run after others than there are now.
    """
    then = (before or {}).get('ground') or {}
    for name, digest in cell.ground.items():
        if then.get(name, digest) != digest:
            message = f'{cell.folder} is of a run after {name}, which had another recipe then; delete it'
            raise cell.recipe.error((), message, 1)


def _loaded(file: Path, overrides: Sequence[Override]) -> Recipe:
    return load(file, [str(override) for override in overrides], [override.where for override in overrides])


def _with_known_teachers(file: Path, overrides: Sequence[Override], after: Sequence[Cell]) -> list[Override]:
    """Overrides that name each teacher among the cells before it, where a recipe has patterns for them.

    So its run learns from these, whatever else a pattern would match by then, and is seen to be another one when they
    are not the same any more.
    """
    teachers = _loaded(file, overrides).config.get('teachers')
    if not isinstance(teachers, list):
        return [*overrides]
    known = [each for entry in teachers for each in _known(entry, after)]
    if known == teachers:
        return [*overrides]
    where = [override.where for override in overrides if override.key.split('.')[0] == 'teachers']
    others = [override for override in overrides if override.key.split('.')[0] != 'teachers']
    return [Override('teachers', known, where[-1] if where else str(file)), *others]


def _known(entry: Any, after: Sequence[Cell]) -> list[Any]:
    """The teachers among the cells before that a pattern in a recipe stands for; the entry itself if there is none."""
    if not isinstance(entry, dict):
        return [entry]
    source = 'runs' if 'runs' in entry else 'path'
    pattern = entry.get(source)
    if not isinstance(pattern, str):
        return [entry]
    found = [folder for cell in after for folder in _lessons(cell, source) if _matches(folder, pattern)]
    return [{**entry, source: str(folder)} for folder in found] or [entry]


def _lessons(cell: Cell, source: str) -> list[Path]:
    """Folders of a cell that an entry of `teachers` may name as its `runs` or its `path`."""
    if source == 'path':
        return cell.records if cell.role == 'record' else []
    return [] if cell.role == 'record' else [cell.folder]


def _checked(file: Path, overrides: Sequence[Override], after: Sequence[Cell]) -> tuple[Recipe, Plan]:
    """A recipe as its run is to have it, and its plan."""
    recipe = _loaded(file, overrides)
    teachers = recipe.config.get('teachers')
    trial = copy.deepcopy(recipe)
    if isinstance(teachers, list):
        trial.config['teachers'] = [_stand_in(entry, after) for entry in teachers]
    plan = check(trial)
    recipe.config |= {key: trial.config[key] for key in DEFAULTS}
    return recipe, plan


def _stand_in(entry: Any, after: Sequence[Cell]) -> Any:
    """For a run that is not there yet, its model; the entry itself otherwise."""
    if isinstance(entry, dict) and isinstance(entry.get('runs'), str):
        for cell in after:
            if cell.role != 'record' and _matches(cell.folder, entry['runs']):
                rest = {name: value for name, value in entry.items() if name != 'runs'}
                return {**rest, 'model': cell.recipe.config['model']}
    return entry


def _matches(folder: Path, pattern: str) -> bool:
    return folder.absolute().match(str(Path(pattern).absolute()))
