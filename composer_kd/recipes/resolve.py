"""Names in a recipe -> what they build: our builders, whatever Composer has, or a dotted path to one's own."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from composer_kd.recipes.load import Recipe, nearest

Target = Callable[..., Any]


def resolve(recipe: Recipe, key: tuple[object, ...], kind: str, name: object) -> Target:
    """Find what a name builds.

    Args:
        recipe: The recipe that names it.
        key: Where it is named.
        kind: `model`, `data`, `teacher`, `optimizer`, `scheduler`, `algorithm`, `callback` or `logger`.
        name: A name of that kind, or `module.attribute`. Underscores do not count: CutMix is `cut_mix` and
            `cutmix`.

    Raises:
        RecipeError: If there is nothing of that name.
    """
    if not isinstance(name, str) or not name:
        raise recipe.error(key, f'the name of the {kind} must be a word, not {name!r}')
    if '.' in name:
        return _import(recipe, key, name)
    known = dict(_catalogue(kind))
    if name in known:
        return known[name]
    for candidate, target in known.items():
        if _plain(candidate) in (_plain(name), _plain(name).removesuffix(kind)):
            return target
    raise recipe.error(key, f'there is no {kind} {name!r}; {nearest(name, known)}')


def _catalogue(kind: str) -> Iterator[tuple[str, Target]]:
    """Name and target of everything of a kind; where two share a name, the last is meant."""
    # Imported here, because Composer takes seconds to import and a recipe that is no YAML should not wait for it.
    import composer.algorithms
    import composer.callbacks
    import composer.core
    import composer.loggers
    import composer.optim
    import torch

    import composer_kd.algorithms
    import composer_kd.data
    import composer_kd.models
    import composer_kd.teachers.recorded

    if kind in ('model', 'data'):
        module = composer_kd.models if kind == 'model' else composer_kd.data
        yield from ((name, getattr(module, name)) for name in module.__all__ if callable(getattr(module, name)))
    elif kind == 'teacher':
        yield 'network', composer_kd.teachers.NetworkTeacher
        yield 'recorded', composer_kd.teachers.recorded.RecordedTeacher
    else:
        modules, base = {
            'optimizer': ([torch.optim, composer.optim], torch.optim.Optimizer),
            'scheduler': ([composer.optim], composer.optim.ComposerScheduler),
            'algorithm': ([composer.algorithms, composer_kd.algorithms], composer.core.Algorithm),
            'callback': ([composer.callbacks], composer.core.Callback),
            'logger': ([composer.loggers], composer.loggers.LoggerDestination),
        }[kind]
        for module in modules:
            for name, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, base) and value is not base:
                    yield snake_case(name).removesuffix(f'_{kind}'), value


def _import(recipe: Recipe, key: tuple[object, ...], name: str) -> Target:
    module_name, _, attribute = name.rpartition('.')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a person's own modules lie in the folder they work in
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise recipe.error(key, f'cannot import {module_name}: {type(error).__name__}: {error}') from error
    target = getattr(module, attribute, None)
    if not callable(target):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith('_')]
        raise recipe.error(key, f'{module_name} has no {attribute!r} to call; {nearest(attribute, public)}')
    return target


def snake_case(name: str) -> str:
    """`EMA` -> `ema`, `DecoupledSGDW` -> `decoupled_sgdw`, `BlurPool` -> `blur_pool`."""
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()


def _plain(name: str) -> str:
    return name.replace('_', '').lower()
