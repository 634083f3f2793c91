"""The folder of a run: which one, what lies in it, whether it is what is wanted."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from composer.utils import dist

from composer_kd.recipes.load import Recipe, RecipeError

_Decision = TypeVar('_Decision')

# What a recipe may say that does not change what is trained.
_BESIDE_THE_POINT = ('run_name', 'runs_dir', 'device', 'autoresume', 'loggers', 'dist_timeout', 'python_log_level')
_PREFIXES_BESIDE_THE_POINT = ('save_', 'log_', 'console_', 'progress_bar', 'load_progress_bar', 'auto_log_hparams')


def on_rank_zero(decide: Callable[[], _Decision]) -> _Decision:
    """What rank 0 decides, on all ranks; what it refuses is refused by all."""
    outcome: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            outcome = [decide()]
        except RecipeError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], RecipeError):
        raise outcome[0]
    return outcome[0]


def run_folder(recipe: Recipe) -> Path:
    """The folder that a recipe's run has unless it is taken."""
    return Path(recipe.config['runs_dir'], recipe.config.get('run_name') or recipe.path.stem)


def free_folder(recipe: Recipe) -> Path:
    """A folder for a new run, or the one of the run to go on with (`autoresume`).

    Raises:
        RecipeError: If the folder of the run's own name is taken.
    """
    folder = run_folder(recipe)
    if _is_free(folder) or (recipe.config.get('autoresume') and (folder / 'recipe.yaml').is_file()):
        return folder
    if recipe.config.get('run_name'):
        todo = 'choose another run_name, or go on with that run by autoresume=true'
        raise recipe.error(('run_name',), f'{folder} is there already; {todo}')
    numbered = (folder.with_name(f'{folder.name}-{number}') for number in itertools.count(2))
    return next(candidate for candidate in numbered if _is_free(candidate))


def finished_run(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run that this recipe describes, None if it is still to be started or finished.

    Raises:
        RecipeError: If its folder holds the run of another recipe, or lost its checkpoint.
    """
    folder = run_folder(recipe)
    if _is_free(folder):
        return None
    todo = f'delete {folder}, or give {recipe.path} another run_name'
    written = folder / 'recipe.yaml'
    if not written.is_file():
        raise recipe.error((), f'{folder} is there, but is no run; {todo}')
    if others := differences(yaml.safe_load(written.read_text(encoding='utf-8')), recipe.config):
        raise recipe.error(
            others[0].split('.'), f'{folder} is a run of another recipe, which differs in {", ".join(others)}; {todo}'
        )
    if not (folder / 'summary.json').is_file():
        return None
    summary = json.loads((folder / 'summary.json').read_text(encoding='utf-8'))
    if summary['checkpoint'] is None or not (folder / summary['checkpoint']).is_file():
        raise recipe.error((), f'the checkpoint of {folder} is gone; {todo}')
    return summary


def differences(one: Any, other: Any, key: str = '') -> list[str]:
    """Keys in which two recipes differ in what they train."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in (one | other) if key or not _is_beside_the_point(name)]
        parts = [(f'{key}.{name}' if key else name, one.get(name), other.get(name)) for name in names]
        return [found for name, a, b in parts for found in differences(a, b, name)]
    return [] if one == other else [key]


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    beside = path.with_name(f'.{path.name}.tmp')
    with beside.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _is_beside_the_point(name: str) -> bool:
    return name in _BESIDE_THE_POINT or name.startswith(_PREFIXES_BESIDE_THE_POINT)
