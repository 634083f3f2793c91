"""A study file: what studies of every kind say, and where in the file each value stands."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from composer_kd.files import FileLock, remove_unfinished, write
from composer_kd.recipes.load import Recipe, RecipeError, as_override, nearest, read
from composer_kd.studies.rows import RESULTS_FILE, TABLE_FILE

COMMON = ('name', 'runs_dir', 'metric', 'goal', 'overrides')
GOALS = ('max', 'min')
SETTINGS_FILE = 'study.yaml'

_OURS = ('seed', 'run_name', 'runs_dir', 'autoresume')
_FOLDER = '${folder}'


@dataclass(frozen=True)
class Override:
    """A value that a study gives to a key of a recipe.

    Args:
        key: The key, `optimizer.lr`.
        value: The value.
        where: Where it stands, for errors.
    """

    key: str
    value: Any
    where: str = 'the study'

    def __str__(self) -> str:
        return as_override(self.key, self.value)


@dataclass(frozen=True)
class Study:
    """What a study file says, as far as that is common to all kinds.

    Args:
        source: The file as it stands.
        kind: `sweep`, `search`, `continual` or `chain`.
        name: Of the study, and of its folder.
        runs_dir: Where that folder lies.
        metric: What is compared.
        goal: `max` or `min`.
        points: Of a sweep, the key in which the runs of one curve differ.
    """

    source: Recipe
    kind: str
    name: str
    runs_dir: str
    metric: str
    goal: str
    points: str | None = None

    @classmethod
    def of(cls, source: Recipe, kind: str, keys: Collection[str], points: str | None = None) -> Study:
        """Check the keys of a file, and the values that all kinds of studies have.

        Args:
            source: The file, as `recipes.load.read` gives it.
            kind: What it is.
            keys: The keys that this kind has beside those that all have.
            points: Of a sweep, the key in which the runs of one curve differ.

        Raises:
            RecipeError: A key is unknown or missing, or has a wrong value.
        """
        config = source.config
        known = [*COMMON, *keys]
        for key in config:
            if key not in known:
                raise source.error((key,), f'a {kind} has no {key!r}; {nearest(key, known)}')
        values = {'name': source.path.stem, 'runs_dir': 'runs', 'goal': 'max', **config}
        values['runs_dir'] = expanded(values['runs_dir'])
        if 'metric' not in values:
            raise source.error((), 'say what is compared, for instance metric: metrics/eval/MulticlassAccuracy')
        for key in ('name', 'runs_dir', 'metric', 'goal'):
            if not isinstance(values[key], str) or not values[key]:
                raise source.error((key,), f'must be text, not {values[key]!r}')
        if Path(values['name']).name != values['name']:
            raise source.error(('name',), f'must be the name of a folder, not {values["name"]!r}')
        if values['goal'] not in GOALS:
            raise source.error(('goal',), f'must be max or min, not {values["goal"]!r}')
        return cls(source, kind, values['name'], values['runs_dir'], values['metric'], values['goal'], points)

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return Path(self.runs_dir, self.name)

    @property
    def then(self) -> list[str]:
        """Names of the runs that go on from each student."""
        return [*self.mapping(('then',))]

    @property
    def judge(self) -> str | None:
        """The name of the run by which a student is judged that goes on from it; None, by its own."""
        name = self.metric.partition('/')[0]
        return name if name in self.then else None

    @property
    def metric_of_run(self) -> str:
        """What is compared, as the run that reports it calls it."""
        return self.metric if self.judge is None else self.metric.partition('/')[2]

    def error(self, key: Sequence[object], message: str, exit_code: int = 2) -> RecipeError:
        """The error to raise for what stands at a key."""
        return self.source.error(key, message, exit_code)

    def value(self, key: Sequence[object], default: Any = None) -> Any:
        """What stands at a key, with the study's folder for `${folder}`; the default where nothing does."""
        found: Any = self.source.config
        for part in key:
            found = found[part] if not isinstance(found, dict) else found.get(part)
            if found is None:
                return default
        return filled_in(found, _FOLDER, str(self.folder))

    def mapping(self, key: Sequence[object], keys: Collection[str] | None = None) -> dict[str, Any]:
        """The mapping that stands at a key, empty where nothing does.

        Args:
            key: The key.
            keys: What it may have. Default: None, anything.

        Raises:
            RecipeError: It is no mapping, or has another key.
        """
        found = self.value(key, {})
        if not isinstance(found, dict):
            raise self.error(key, f'must be a mapping, not {found!r}')
        for name in found:
            if keys is not None and name not in keys:
                raise self.error((*key, name), f'there is no {name!r} here; {nearest(name, keys)}')
        return found

    def overrides(self, key: Sequence[object]) -> list[Override]:
        """The mapping of dotted keys to values that stands at a key.

        Raises:
            RecipeError: It is no mapping, or has a key that is not for it to give.
        """
        return [self.override((*key, name), name, value) for name, value in self.mapping(key).items()]

    def override(self, key: Sequence[object], name: str, value: Any) -> Override:
        """A value for a key of a recipe, that stands somewhere in the file.

        Raises:
            RecipeError: That key is not for it to give.
        """
        if name in _OURS:
            instead = 'seeds' if self.kind == 'sweep' else 'seed'
            todo = f'give `{instead}` instead' if name == 'seed' else 'remove it'
            raise self.error(key, f'{name} is chosen by the command itself; {todo}')
        return Override(name, expanded(value), self.source.where(key))

    def recipe(self, key: Sequence[object]) -> Path:
        """The recipe whose path, from this file on, stands at a key.

        Raises:
            RecipeError: There is none.
        """
        given = self.value(key)
        if not isinstance(given, str):
            raise self.error(key, f'must be the path of a recipe, not {given!r}')
        path = Path(os.path.normpath(self.source.path.parent / given))
        if not path.is_file():
            raise self.error(key, f'there is no file {path}; give the path of a recipe')
        return path

    def write(self, students: Sequence[str] = ()) -> None:
        """Write down in the study's folder what its results mean.

        Args:
            students: Names of the runs that are compared, as far as they are known before there is any.

        Raises:
            RecipeError: It is the folder of something else.
        """
        path = self.folder / SETTINGS_FILE
        found = read(path, 'settings of a study').config if path.is_file() else {}
        before, file = found.get('kind', self.kind), found.get('file', self.source.path.name)
        if before != self.kind or (self.folder / 'recipe.yaml').exists():
            what = 'a run' if before == self.kind else f'a {before}'
            raise self.error(('name',), f'{self.folder} is the folder of {what}; choose another name')
        if file != self.source.path.name:
            todo = f'choose another name, or delete {path} if that file has a new one'
            raise self.error(('name',), f'{self.folder} is the folder of the study in {file}; {todo}')
        settings = {name: getattr(self, name) for name in ('name', 'kind', 'metric', 'goal', 'points')}
        settings |= {'file': self.source.path.name}
        settings |= {key: names for key, names in (('then', self.then), ('students', [*students])) if names}
        write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else is at work on the study meanwhile.

        Raises:
            RecipeError: Somebody is, or nothing can be written there.
        """
        lock = FileLock(self.folder / '.study.lock')
        try:
            taken = not lock.is_ours() and lock.take()
        except OSError as error:
            raise self.error(('runs_dir',), f'cannot make {self.folder}: {error.strerror}', 1) from error
        if not taken:
            todo = 'wait until it is done, or choose another name'
            raise self.error(('name',), f'another command is at work on the study in {self.folder}; {todo}', 1)
        try:
            for name in (SETTINGS_FILE, RESULTS_FILE, TABLE_FILE):
                remove_unfinished(self.folder, name)
            yield
        finally:
            lock.release()


def expanded(value: Any) -> Any:
    """A value of a study file, with variables of the environment (`$DATA`) as Composer's launcher fills them in."""
    if isinstance(value, dict):
        return {key: expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return os.path.expandvars(value) if isinstance(value, str) else value


def filled_in(value: Any, name: str, text: str) -> Any:
    """A value of a study file, with the text for the name wherever it stands in it."""
    if isinstance(value, dict):
        return {key: filled_in(item, name, text) for key, item in value.items()}
    if isinstance(value, list):
        return [filled_in(item, name, text) for item in value]
    return value.replace(name, text) if isinstance(value, str) else value
