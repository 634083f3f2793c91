"""A sweep file -> its cells: methods x points x seeds, and before them the teachers and records that they need."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer_kd.recipes.check import INHERITED, Plan
from composer_kd.recipes.folder import differences, run_folder
from composer_kd.recipes.load import nearest, parse_value, read
from composer_kd.recipes.report import is_evaluation
from composer_kd.studies.cell import Cell
from composer_kd.studies.study import Override, Study, filled_in

_KEYS = ('points', 'seeds', 'grid', 'list', 'methods', 'teachers', 'then')
_METHOD = ('recipe', 'baseline', 'overrides', 'grid', 'list', 'record', 'after')
_RECORD = ('recipe', 'views', 'top', 'overrides')
_TEACHER = ('recipe', 'seeds', 'overrides')
_FOLLOW_UP = ('recipe', 'overrides')

_RUN = '${run}'
_METRICS = ('metrics', 'loss')  # how the names of a run's metrics begin

_FIRST_SEED = 17
_LONGEST_NAME = 200

Key = tuple[object, ...]


def read_sweep(path: str | Path) -> tuple[Study, list[Cell]]:
    """Read a sweep file, and check the recipe of every run in it.

    Returns:
        The study, and its cells, those that others wait for before these. Of the others those of the first seed come
        first, then by points, so that methods are compared side by side from the start.

    Raises:
        RecipeError: Anything is wrong with it.
    """
    source = read(path, 'sweep')
    study = Study.of(source, 'sweep', _KEYS, source.config.get('points', 'max_duration'))
    if not isinstance(study.points, str):
        raise study.error(('points',), f'must be the key of a recipe, not {study.points!r}')
    return study, _Sweep(study).cells()


class _Sweep:
    """What is read of a sweep, and the cells that were made so far."""

    def __init__(self, study: Study):
        self._study = study
        self._cells: dict[str, Cell] = {}
        self._records: dict[str, Cell] = {}
        self._pools: dict[str, list[Cell]] = {}

    def cells(self) -> list[Cell]:
        study = self._study
        methods, teachers = study.mapping(('methods',)), study.mapping(('teachers',))
        for section, keys in (('methods', _METHOD), ('teachers', _TEACHER), ('then', _FOLLOW_UP)):
            for name in study.mapping((section,)):
                self._check_name(section, name)
                study.mapping((section, name), keys)
        for name in methods:
            if type(given := study.value(('methods', name, 'baseline'), False)) is not bool:
                raise study.error(('methods', name, 'baseline'), f'must be true or false, not {given!r}')
        baselines = [name for name in methods if study.value(('methods', name, 'baseline'))]
        if len(baselines) != 1:
            which = f', not {", ".join(baselines)}' if baselines else ''
            raise study.error(('methods',), f'one method has `baseline: true`{which}; the others are compared with it')
        for name in study.then:
            if name in _METRICS:
                raise study.error(('then', name), 'is how metrics begin; choose another name')
        if study.judge is None and study.metric.partition('/')[0] not in _METRICS:
            known = ' or '.join([*_METRICS, *study.then])
            raise study.error(('metric',), f'must begin with {known}, not {study.metric!r}')
        waited_for = {name for method in methods for name in self._after(method)}
        for name in teachers:
            if name not in waited_for:
                raise study.error(
                    ('teachers', name), 'no method waits for it; name it in the `after` of one, or remove it'
                )
        for seed, point, method in itertools.product(self._seeds(('seeds',)), self._points(()), methods):
            for own in self._points(('methods', method)):
                self._add_student(method, [*own, *point], seed)
        return [*self._cells.values()]

    def _add_student(self, method: str, varied: list[Override], seed: int) -> None:
        study, key = self._study, ('methods', method)
        for name in self._after(method):
            if name not in self._pools:
                self._pools[name] = self._pool(name)
        after = [cell for name in self._after(method) for cell in self._pools[name]]
        overrides = [*study.overrides(('overrides',)), *study.overrides((*key, 'overrides')), *varied]
        if study.value((*key, 'record')) is not None:
            if method not in self._records:
                self._records[method] = self._record(method, after)
            record = self._records[method]
            pattern = record.out if len(record.records) == 1 else f'{record.out}/*'  # of which each is named in the end
            overrides.append(Override('teachers.0.path', str(pattern), study.source.where((*key, 'record'))))
            after = [*after, record]
        settings = {override.key: override.value for override in varied}
        cell = Cell.of_run(
            study,
            self._name(method, settings, seed),
            method,
            study.recipe((*key, 'recipe')),
            overrides,
            seed=seed,
            after=after,
            settings=settings,
            is_baseline=bool(study.value((*key, 'baseline'))),
        )
        self._add_with_teachers(cell, key)
        followed_by = [self._follow_up(name, cell) for name in study.then]
        judged_by = next((each for each in followed_by if each.method == study.judge), cell)
        if is_evaluation(study.metric_of_run) and judged_by.plan.eval_data is None:
            message = f'there is none, so that no run will report {study.metric_of_run}; add it'
            raise judged_by.recipe.error(('eval_data',), message)

    def _follow_up(self, name: str, student: Cell) -> Cell:
        """The run of an entry of `then` that goes on from a student."""
        study, key = self._study, ('then', name)
        given = study.overrides((*key, 'overrides'))
        overrides = [replace(each, value=filled_in(each.value, _RUN, str(student.folder))) for each in given]
        if overrides == given:
            message = f'nothing in its `overrides` says {_RUN}, so that it would not begin with a run'
            raise study.error(key, f"{message}; for instance model.pretrained: '{_RUN}'")
        cell = Cell.of_run(
            study,
            f'{student.name}-{name}',
            name,
            study.recipe((*key, 'recipe')),
            overrides,
            role='follow-up',
            seed=student.seed,
            after=[student],
            settings=student.settings,
            of=student.name,
        )
        return self._add_with_teachers(cell, key)

    def _record(self, method: str, after: Sequence[Cell]) -> Cell:
        study, key = self._study, ('methods', method, 'record')
        study.mapping(key, _RECORD)
        views, top = study.value((*key, 'views')), study.value((*key, 'top'))
        for name, value in (('views', views), ('top', top)):
            if not (value is None or (type(value) is int and value > 0)):
                raise study.error((*key, name), f'must be a whole number above 0, not {value!r}')
        cell = Cell.of_record(
            study,
            f'{method}-record',
            method,
            study.recipe((*key, 'recipe')),
            [*study.overrides(('overrides',)), *study.overrides((*key, 'overrides'))],
            views=views and Override('train_data.views', views, study.source.where((*key, 'views'))),
            top=top,
            after=after,
        )
        return self._add_with_teachers(cell, key)

    def _pool(self, name: str) -> list[Cell]:
        """The runs of an entry of `teachers`."""
        study, key = self._study, ('teachers', name)
        cells = [
            Cell.of_run(
                study,
                f'{name}-seed{seed}',
                name,
                study.recipe((*key, 'recipe')),
                study.overrides((*key, 'overrides')),
                role='teacher',
                seed=seed,
            )
            for seed in self._seeds((*key, 'seeds'))
        ]
        return [self._add_with_teachers(cell, key) for cell in cells]

    def _add_with_teachers(self, cell: Cell, key: Key) -> Cell:
        """Add a cell, and before it those of the runs by whose recipes it is taught."""
        for teacher in self._taught_by(cell.plan, cell.method, key):
            cell.wait_for(teacher)
        return self._add(cell, key)

    def _taught_by(self, plan: Plan, method: str, key: Key) -> list[Cell]:
        entries = [entry for entry in plan.recipe.config.get('teachers') or [] if entry.get('recipe') is not None]
        teachers = [teacher.recipe for teacher in plan.teachers if teacher.recipe is not None]
        cells = []
        for entry, teacher in zip(entries, teachers, strict=True):
            config, where = teacher.recipe.config, self._study.source.where(key)
            overrides = [
                Override(name, parse_value(text), where)
                for name, _, text in (override.partition('=') for override in entry.get('overrides', []))
                if name not in INHERITED and name != 'run_name'
            ]
            overrides += [
                Override(name, config[name], where) for name in INHERITED if name != 'runs_dir' and name in config
            ]
            name = run_folder(teacher.recipe).name
            cell = Cell.of_run(self._study, name, name, teacher.recipe.path, overrides, role='teacher')
            cells.append(self._add_with_teachers(cell, key))
        return cells

    def _add(self, cell: Cell, key: Key) -> Cell:
        """Add a cell, unless it is a teacher that is there already."""
        there = self._cells.setdefault(cell.name, cell)
        if there is not cell:
            others = differences(there.recipe.config, cell.recipe.config)
            if others or cell.role != 'teacher' or there.role != 'teacher':
                what = f', which differ in {", ".join(others)}' if others else ''
                todo = 'change a name, or remove what is there twice'
                if cell.role == 'teacher':
                    todo = 'give run_name=... in the `overrides` of one'
                raise self._study.error(key, f'two runs have the name {cell.name}{what}; {todo}')
        return there

    def _after(self, method: str) -> list[str]:
        study, key = self._study, ('methods', method, 'after')
        names, teachers = study.value(key, []), study.mapping(('teachers',))
        if not isinstance(names, list):
            raise study.error(key, f'must be a list of names of `teachers`, not {names!r}')
        for index, name in enumerate(names):
            if name not in teachers:
                hint = nearest(str(name), teachers) if teachers else 'there is no `teachers` section'
                raise study.error((*key, index), f'there is no {name!r} among the teachers; {hint}')
        return names

    def _seeds(self, key: Key) -> list[int]:
        seeds = self._study.value(key, [_FIRST_SEED])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise self._study.error(key, f'must be a list of whole numbers, not {seeds!r}')
        return seeds

    def _points(self, key: Key) -> list[list[Override]]:
        """What varies at a place of the file, each time with one value for each key."""
        study = self._study
        grid, listed = study.mapping((*key, 'grid')), study.value((*key, 'list'))
        if grid and listed is not None:
            raise study.error((*key, 'list'), 'give a grid, or a list of points, not both')
        if listed is not None:
            if not isinstance(listed, list) or not listed:
                raise study.error((*key, 'list'), f'must be a list of mappings of keys to values, not {listed!r}')
            return [study.overrides((*key, 'list', index)) for index in range(len(listed))]
        axes = []
        for name, values in grid.items():
            place = (*key, 'grid', name)
            if not isinstance(values, list) or not values:
                raise study.error(place, f'must be a list of values, not {values!r}')
            axes.append([study.override(place, name, value) for value in values])
        return [[*point] for point in itertools.product(*axes)]

    def _check_name(self, section: str, name: str) -> None:
        if not re.fullmatch(r'\w[\w.-]*', name):
            raise self._study.error((section, name), 'a name is made of letters, digits, dots and dashes: change it')

    def _name(self, method: str, settings: dict[str, Any], seed: int) -> str:
        parts = [method]
        for key, value in settings.items():
            label = '' if key == self._study.points else f'{key.rpartition(".")[2]}_'
            parts.append(label + _safe(value))
        name = '-'.join([*parts, f'seed{seed}'])
        if len(name) > _LONGEST_NAME:
            raise self._study.error(('methods', method), f'the name {name[:40]}... of a run of it is too long')
        return name


def _safe(value: Any) -> str:
    """A value as a part of the name of a folder."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r'[^\w.+-]+', '_', text).strip('_')
