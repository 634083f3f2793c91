"""A sequence file: runs one after another, and the arms in which the whole of them is gone through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from composer_kd.recipes.load import load, read
from composer_kd.studies.study import Override, Study

KINDS = ('search', 'continual', 'chain')
_OF_ALL = ('kind', 'arms', 'recipe', 'seed')
_OF_KIND = {
    'search': ('trials', 'search', 'sampler', 'pruner', 'storage'),
    'continual': ('stages', 'start'),
    'chain': ('steps', 'generations'),
}
_OF_AN_ARM = ('teachers_from', 'teacher', 'distillation', 'record', 'overrides', 'when_taught', 'start')
_RULES = ('best', 'last', 'all')
_STARTS = ('fresh', 'warm')
_SEED = 17


@dataclass(frozen=True)
class Arm:
    """One way to go through the whole sequence.

    Args:
        name: Its name.
        teachers_from: Which earlier runs teach: `best`, `last`, `all` or `{'top': k}`; None, no run does.
        teacher: Options of each teacher, beside the run that it is.
        distillation: Arguments of `knowledge_distillation`.
        records: Whether what teachers say is kept, for later runs.
        overrides: For all runs.
        when_taught: For runs that have a teacher, too.
        is_warm: Whether a run begins with the weights of the one before.
    """

    name: str
    teachers_from: str | Mapping[str, int] | None
    teacher: dict[str, Any]
    distillation: dict[str, Any]
    records: bool
    overrides: list[Override]
    when_taught: list[Override]
    is_warm: bool


@dataclass(frozen=True)
class Step:
    """One place in the sequence, the same in all arms.

    Args:
        file: The recipe.
        overrides: For it; those of all runs first.
        settings: What varies from step to step, dotted keys and values.
        seed: Of its runs.
    """

    file: Path
    overrides: list[Override]
    settings: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Sequence:
    """What a sequence file says.

    Args:
        study: What all studies say.
        arms: The arms, of which the first without teachers, or else the first, is what the others are compared with.
        steps: The steps. Those of a search differ in nothing yet: their settings are proposed.
    """

    study: Study
    arms: list[Arm]
    steps: list[Step]

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return next((arm for arm in self.arms if arm.teachers_from is None), self.arms[0])


def read_sequence(path: str | Path) -> Sequence:
    """Read a sequence file; recipes are not checked yet.

    Raises:
        RecipeError: Something is wrong with it.
    """
    source = read(path, 'sequence')
    kind = source.config.get('kind')
    if kind not in KINDS:
        raise source.error(('kind',), f'must be one of {", ".join(KINDS)}, not {kind!r}')
    study = Study.of(source, kind, [*_OF_ALL, *_OF_KIND[kind]])
    names = study.mapping(('arms',))
    if not names:
        raise study.error(
            ('arms',), 'say what is compared, for instance arms: {without: {}, with: {teachers_from: best}}'
        )
    return Sequence(study, [_arm(study, name) for name in names], _STEPS[kind](study))


def _arm(study: Study, name: str) -> Arm:
    key = ('arms', name)
    if not name.replace('-', '').replace('_', '').isalnum():
        raise study.error(key, 'is a part of folder names: letters, digits, - and _ alone')
    given = study.mapping(key, _OF_AN_ARM) if study.value(key) is not None else {}
    rule = given.get('teachers_from')
    top = rule.get('top') if isinstance(rule, dict) and [*rule] == ['top'] else None
    if not (rule is None or rule in _RULES or (_is_whole(top) and top > 0)):
        raise study.error((*key, 'teachers_from'), f'must be {", ".join(_RULES)} or {{top: 3}}, not {rule!r}')
    for needless in ('teacher', 'distillation', 'record', 'when_taught'):
        if rule is None and needless in given:
            raise study.error((*key, needless), 'is for runs with a teacher: say which, teachers_from: best')
    distillation = study.mapping((*key, 'distillation'))
    if 'record' in distillation:
        raise study.error((*key, 'distillation', 'record'), 'is chosen by the command; give the arm record: true')
    records = given.get('record', False)
    if not isinstance(records, bool):
        raise study.error((*key, 'record'), f'must be true or false, not {records!r}')
    start = given.get('start', study.value(('start',), 'fresh'))
    if start not in _STARTS or (start == 'warm' and study.kind != 'continual'):
        where = (*key, 'start') if 'start' in given else ('start',)
        known = ' or '.join(_STARTS) if study.kind == 'continual' else f'fresh in a {study.kind}'
        raise study.error(where, f'must be {known}, not {start!r}')
    return Arm(
        name,
        rule,
        study.mapping((*key, 'teacher')),
        distillation,
        records,
        study.overrides((*key, 'overrides')),
        study.overrides((*key, 'when_taught')),
        start == 'warm',
    )


def _trials(study: Study) -> list[Step]:
    trials = study.value(('trials',))
    if not _is_whole(trials) or trials < 1:
        raise study.error(('trials',), f'must be the number of trials, 1 or more, not {trials!r}')
    file, common = _recipe(study, ('recipe',)), study.overrides(('overrides',))
    return [Step(file, common, {}, _seed(study, file))] * trials


def _stages(study: Study) -> list[Step]:
    given, key = study.value(('stages',)), ('stages',)
    is_short = isinstance(given, dict) and {*given} == {'key', 'values'}
    if is_short and isinstance(given['key'], str) and isinstance(given['values'], list):
        places = [(*key, 'values', index) for index in range(len(given['values']))]
        settings = [{given['key']: value} for value in given['values']]
    elif isinstance(given, list) and all(isinstance(stage, dict) for stage in given):
        places = [(*key, index) for index in range(len(given))]
        settings = given
    else:
        raise study.error(key, 'must be {key: train_data.subset, values: [...]}, or a list of mappings of dotted keys')
    if not settings:
        raise study.error(key, 'there is not one stage')
    file, common = _recipe(study, ('recipe',)), study.overrides(('overrides',))
    return [
        Step(file, [*common, *_overrides(study, place, stage)], stage, _seed(study, file))
        for place, stage in zip(places, settings, strict=True)
    ]


def _steps(study: Study) -> list[Step]:
    key, common = ('steps',), study.overrides(('overrides',))
    generations = study.value(('generations',))
    if (generations is None) == (study.value(key) is None):
        raise study.error((), 'a chain has either `steps`, or `generations` of one `recipe`')
    if generations is not None:
        if not _is_whole(generations) or generations < 1:
            raise study.error(('generations',), f'must be a number of generations, 1 or more, not {generations!r}')
        file = _recipe(study, ('recipe',))
        # With another seed each, or a student would begin with the very weights that its teacher began with.
        return [Step(file, common, {}, _seed(study, file) + number) for number in range(generations)]
    if study.value(('recipe',)) is not None:
        raise study.error(('recipe',), 'is for `generations`: each of the `steps` has its own')
    given = study.value(key)
    if not isinstance(given, list) or not given:
        raise study.error(key, f'must be a list of steps {{recipe: ..., overrides: ...}}, not {given!r}')
    steps = []
    for index in range(len(given)):
        study.mapping((*key, index), ('recipe', 'overrides'))
        file, own = _recipe(study, (*key, index, 'recipe')), study.overrides((*key, index, 'overrides'))
        settings = {'recipe': file.stem, **{override.key: override.value for override in own}}
        steps.append(Step(file, [*common, *own], settings, _seed(study, file) + index))
    return steps


_STEPS = {'search': _trials, 'continual': _stages, 'chain': _steps}


def _overrides(study: Study, place: tuple[object, ...], settings: Mapping[str, Any]) -> list[Override]:
    return [study.override((*place, name), name, value) for name, value in settings.items()]


def _recipe(study: Study, key: tuple[object, ...]) -> Path:
    file = study.recipe(key)
    if load(file).config.get('teachers'):
        raise study.error(key, f'{file} has teachers, but those of a sequence are its earlier runs; give its baseline')
    return file


def _seed(study: Study, file: Path) -> int:
    seed = study.value(('seed',), load(file).config.get('seed', _SEED))
    if not _is_whole(seed):
        raise study.error(('seed',), f'must be a whole number, not {seed!r}')
    return seed


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
