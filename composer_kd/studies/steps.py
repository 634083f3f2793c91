"""The cell of one step of a sequence: its recipe, what varies, and what it learns from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from composer_kd.recipes.bind import signature
from composer_kd.recipes.load import load
from composer_kd.studies import search
from composer_kd.studies.arms import Arm
from composer_kd.studies.arms import Sequence as Plan
from composer_kd.studies.cell import Cell
from composer_kd.studies.predecessors import Lesson, Predecessor, chosen, lesson
from composer_kd.studies.study import Override


def step_cell(
    plan: Plan, arm: Arm, number: int, proposed: Mapping[str, Any], finished: Sequence[Predecessor]
) -> tuple[Cell, Lesson]:
    """The cell of a step, whose recipe is checked, and what it is taught.

    Args:
        plan: The sequence.
        arm: The arm.
        number: Of the step, from 0.
        proposed: Of a search, the settings of this trial.
        finished: The finished runs before it in this arm.

    Raises:
        RecipeError: The recipe or an override is wrong.
    """
    study, step = plan.study, plan.steps[number]
    settings = [study.override(('search', key), key, value) for key, value in proposed.items()]
    overrides = [*step.overrides, *settings, *arm.overrides]
    teachers, taught = chosen(arm.teachers_from, finished, study.goal), Lesson([], {})
    if teachers:
        places = [override.where for override in overrides]
        config = load(step.file, [f'seed={step.seed}', *map(str, overrides)], ['the study', *places]).config
        taught = lesson(study, arm, teachers, config)
    after = [*teachers]
    if arm.is_warm and finished:
        where = study.source.where(('arms', arm.name, 'start'))
        overrides += [Override('load_path', str(finished[-1].checkpoint), where)]
        overrides += [Override('load_weights_only', True, where)]
        after += [finished[-1]] if finished[-1] not in teachers else []
    cell = Cell.of_run(
        study,
        f'{arm.name}-{number}',
        arm.name,
        step.file,
        [*overrides, *taught.overrides],
        seed=step.seed,
        after=[predecessor.cell for predecessor in after],
        settings={**step.settings, **proposed},
        is_baseline=arm is plan.baseline,
        arm=arm.name,
        step=number,
    )
    return cell, taught


def foreseen(plan: Plan) -> Iterator[Cell]:
    """The cells of all steps, as far as they can be known before any has run.

    Where the best run is to teach, the first one stands for it. Of a search the first trials come, with each value at
    an end of what is searched.

    Raises:
        RecipeError: A recipe or an override is wrong.
    """
    values = {}
    if plan.study.kind == 'search':
        values = {key: search.candidates(found) for key, found in search.checked(plan.study)[0].items()}
    first = {key: found[0] for key, found in values.items()}
    for arm in plan.arms:
        finished: list[Predecessor] = []
        for number in range(min(len(plan.steps), 2) if values else len(plan.steps)):
            cell, _ = step_cell(plan, arm, number, first, finished)
            yield cell
            finished.append(Predecessor(cell, math.inf, Path('checkpoint')))
    for key, found in values.items():
        for value in found[1:]:
            step_cell(plan, plan.arms[0], 0, {**first, key: value}, [])


def listing(plan: Plan, cells: Sequence[Cell]) -> str:
    """The runs of a sequence, for a person."""
    lines = []
    for cell in cells:
        after = f' after {", ".join(cell.after)}, or another run before it' if cell.after else ''
        state = ' (finished)' if not cell.after and cell.finished() else ''
        lines += [f'{cell.name}{state}{after}', f'    {shlex.join(["composer", *cell.command])}']
    if plan.study.kind == 'search':
        lines.append('... and so on, with the settings that are proposed')
    runs = len(plan.arms) * len(plan.steps)
    return '\n'.join([*lines, f'{len(plan.arms)} arms of {len(plan.steps)} runs, {runs} in all; nothing was started'])


def hint(arm: Arm, cell: Cell) -> str | None:
    """What to say of the views of a run whose teachers are recorded, if anything."""
    data = cell.plan.train_data
    if not arm.records or 'views' not in signature(data.target) or 'views' in data.arguments:
        return None
    if not data.arguments.get('augment', True):
        return None
    what = f'{arm.name}: where samples are augmented, a record grows by a view with each epoch'
    return f'{what}; overrides: {{train_data.views: 4}} lets four of them come again and again'
