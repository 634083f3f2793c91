"""Earlier runs of a sequence as teachers of the next one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_kd.data.loader import LoaderOptions
from composer_kd.studies.arms import Arm
from composer_kd.studies.cell import Cell
from composer_kd.studies.study import Override, Study

_RECORDS = 'records'
_DIGITS = 8
_OF_DEALING = {'batch_size', 'num_workers', 'download', *LoaderOptions.__annotations__}  # no sample depends on them
_OF_DISTILLATION = ('knowledge_distillation', 'teacher_sampling', 'early_stop_distillation')  # nor on these
_OF_A_RECORD = ('temperature', 'record_top', 'record_dtype')


@dataclass(frozen=True)
class Predecessor:
    """An earlier run.

    Args:
        cell: Its cell.
        quality: Its metric.
        checkpoint: Its last checkpoint.
    """

    cell: Cell
    quality: float
    checkpoint: Path


@dataclass(frozen=True)
class Lesson:
    """What makes a run learn from earlier ones.

    Args:
        overrides: For its recipe.
        links: Of records that it needs in one folder: names there, and the folders that they stand for.
    """

    overrides: list[Override]
    links: dict[Path, Path]

    def link(self) -> None:
        """Make the links."""
        for name, folder in self.links.items():
            name.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            if not name.is_symlink():
                name.symlink_to(os.path.relpath(folder, name.parent))


def chosen(rule: str | Mapping[str, int] | None, finished: Sequence[Predecessor], goal: str) -> list[Predecessor]:
    """Those that teach the next run, in the order in which they ran.

    Args:
        rule: `best`, `last`, `all`, or `{'top': k}`; None is none of them. Of two that are as good, the earlier one is
            taken for better.
        finished: All there are, in the order in which they ran.
        goal: `max` or `min`.
    """
    if rule is None or rule == 'all':
        return [*finished] if rule else []
    if rule == 'last':
        return [*finished[-1:]]
    count = rule['top'] if isinstance(rule, Mapping) else 1
    sign = -1 if goal == 'max' else 1
    best = sorted(range(len(finished)), key=lambda index: sign * finished[index].quality)[:count]
    return [finished[index] for index in sorted(best)]


def lesson(study: Study, arm: Arm, teachers: Sequence[Predecessor], config: Mapping[str, Any]) -> Lesson:
    """What makes a run learn from these.

    A record lies in a folder whose name tells what it is of: the teacher, and what it is asked about and how. So no run
    finds one there that it cannot go on with. `knowledge_distillation` wants those of several teachers in folders `0`,
    `1` and so on; these are links, so that a teacher has one record in whichever pool it is.

    Args:
        study: The study.
        arm: The arm that the run is of.
        teachers: One or more.
        config: The run's recipe without them.
    """

    def override(key: str, value: Any, place: str) -> Override:
        return Override(key, value, study.source.where(('arms', arm.name, place)))

    entries = [{'name': 'network', **arm.teacher, 'runs': str(teacher.cell.folder)} for teacher in teachers]
    distillation, links = arm.distillation, {}
    if arm.records:
        root = study.folder / _RECORDS
        folders = [root / f'{teacher.cell.name}-{_digest(_asked(arm, config))}' for teacher in teachers]
        record = folders[0]
        if len(folders) > 1:
            record = root / f'pool-{_digest([folder.name for folder in folders])}'
            links = {record / str(index): folder for index, folder in enumerate(folders)}
        distillation = {**distillation, 'record': str(record)}
    overrides = [
        override('teachers', entries, 'teacher'),
        override('algorithms.knowledge_distillation', distillation, 'distillation'),
    ]
    if len(teachers) > 1:
        overrides.append(override('algorithms.teacher_sampling', {'num_teachers': 1}, 'teachers_from'))
    return Lesson([*overrides, *arm.when_taught], links)


def forget_records(study: Study, cell: Cell) -> None:
    """Delete the records of a run that is not there: those of an earlier one, which somebody has taken away."""
    if not cell.folder.exists():
        for record in (study.folder / _RECORDS).glob(f'{cell.name}-{"?" * _DIGITS}'):
            shutil.rmtree(record)


def _asked(arm: Arm, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a teacher is asked about, how, and what of its answers is kept."""
    algorithms = config.get('algorithms') or {}
    return {
        'teacher': arm.teacher,
        'data': {name: value for name, value in config['train_data'].items() if name not in _OF_DEALING},
        'algorithms': {name: value for name, value in algorithms.items() if name not in _OF_DISTILLATION},
        'precision': config.get('precision'),
        'kept': [arm.distillation.get(name) for name in _OF_A_RECORD],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]
