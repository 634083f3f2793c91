"""The folder of a run: which one, what lies in it, whether it is what is wanted."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from composer.utils import dist

from composer_kd.files import remove_unfinished, write
from composer_kd.recipes.load import Recipe, RecipeError
from composer_kd.recipes.lock import FolderLock

_Decision = TypeVar('_Decision')

_OF_LOADING = ('data_dir', 'download', 'num_workers', 'pin_memory', 'persistent_workers', 'prefetch_factor')

# What a recipe may say that does not change what is trained, nor, within `eval_data`, what is measured.
_BESIDE_THE_POINT = {
    *('run_name', 'runs_dir', 'device', 'autoresume', 'loggers', 'dist_timeout', 'python_log_level', 'eval_data'),
    *(f'train_data.{name}' for name in _OF_LOADING),
    *(f'eval_data.{name}' for name in (*_OF_LOADING, 'batch_size')),
}
_PREFIXES_BESIDE_THE_POINT = ('save_', 'log_', 'console_', 'progress_bar', 'load_progress_bar', 'auto_log_hparams')

# What a summary says about a run that can teach.
_OF_A_TEACHER = {
    'checkpoint': str | None,
    'checkpoint_sha256': str | None,
    'train_seconds': float | int,
    'teacher_training_seconds': float | int,
    'metrics': dict,
}


def on_rank_zero(decide: Callable[[], _Decision]) -> _Decision:
    """What rank 0 decides, on all ranks; where it fails, all fail, so that none waits for it."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            # Not every exception survives the way to another process.
            outcome[1] = error if isinstance(error, RecipeError) else RuntimeError(f'rank 0 failed: {error!r}')
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run_folder(recipe: Recipe) -> Path:
    """The folder that a recipe's run has unless it is taken."""
    return Path(recipe.config['runs_dir'], recipe.config.get('run_name') or recipe.path.stem)


def check_name(recipe: Recipe) -> None:
    """See whether the name that a recipe gives its run is still to be had.

    Raises:
        RecipeError: If it is taken.
    """
    folder = run_folder(recipe)
    if recipe.config.get('run_name') and folder.exists() and not (_goes_on(recipe) or _is_left_over(folder)):
        todo = 'choose another run_name, or go on with that run by autoresume=true'
        raise recipe.error(('run_name',), f'{folder} is there already; {todo}')


def claim(recipe: Recipe, lock: FolderLock) -> tuple[Path, bool]:
    """Take, or make, the folder of a run: a numbered one where the name is not a given one and is taken.

    Args:
        recipe: The recipe.
        lock: What holds the folder from now on; the run's own folder may be taken already.

    Returns:
        The folder, and whether it is new; otherwise it is the one of the run to go on with (`autoresume`).

    Raises:
        RecipeError: If the name is taken, or another process is at work there.
    """
    own = run_folder(recipe)
    numbered = (own.with_name(f'{own.name}-{number}') for number in itertools.count(2))
    for folder in itertools.chain([own], numbered):
        if not lock.take(folder):
            if folder == own and (recipe.config.get('run_name') or recipe.config.get('autoresume')):
                todo = 'wait until it is done, or choose another run_name'
                raise recipe.error((), f'another process is at work in {folder}; {todo}', exit_code=1)
            continue
        if folder == own and _goes_on(recipe):
            _check_teams(recipe, folder)
            return folder, False
        try:
            folder.mkdir(exist_ok=_is_left_over(folder))
            write_recipe(recipe, folder)
        except FileExistsError:
            check_name(recipe)
        except OSError as error:
            raise recipe.error(('runs_dir',), f'cannot make {folder}: {error.strerror}', exit_code=1) from error
        else:
            return folder, True
    raise AssertionError('numbers never end')


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write down what is run in a folder."""
    config = recipe.config | {'run_name': folder.name}
    remove_unfinished(folder, 'recipe.yaml')
    write(folder / 'recipe.yaml', yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def written_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The values of the recipe that a folder is of.

    Raises:
        RecipeError: If they cannot be read.
    """
    todo = f'put one back that is whole, or delete {folder} to start anew'
    return _read(recipe, folder / 'recipe.yaml', yaml.safe_load, todo)


def finished_run(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run that this recipe describes, None if it is still to be started or finished.

    Raises:
        RecipeError: If its folder holds the run of another recipe, lost its checkpoint, or is damaged.
    """
    folder = run_folder(recipe)
    if not folder.exists() or _is_left_over(folder):
        return None
    todo = f'delete {folder}, or give {recipe.path} another run_name'
    if not (folder / 'recipe.yaml').is_file():
        raise recipe.error((), f'{folder} is there, but is no run; {todo}')
    if others := differences(written_recipe(recipe, folder), recipe.config):
        raise recipe.error(
            others[0].split('.'), f'{folder} is a run of another recipe, which differs in {", ".join(others)}; {todo}'
        )
    path = folder / 'summary.json'
    if not path.is_file():
        return None
    summary = _read(recipe, path, json.loads, f'delete {path}, and it is written anew', _OF_A_TEACHER)
    if summary['checkpoint'] is None or not (folder / summary['checkpoint']).is_file():
        raise recipe.error((), f'the checkpoint of {folder} is gone; put it back, or delete {folder}')
    return summary


def evaluated_run(recipe: Recipe) -> dict[str, Any] | None:
    """As `finished_run`, for who looks at what the run was evaluated with, too.

    Raises:
        RecipeError: As there, or the run was evaluated otherwise than the recipe says.
    """
    summary = finished_run(recipe)
    if summary is not None:
        folder = run_folder(recipe)
        before, now = (config.get('eval_data') for config in (written_recipe(recipe, folder), recipe.config))
        if others := differences(before, now, 'eval_data'):
            todo = f'take what it was then, or delete {folder / "summary.json"}, and it is evaluated anew'
            raise recipe.error(others[0].split('.'), f'{folder} was evaluated with other {", ".join(others)}; {todo}')
    return summary


def differences(one: Any, other: Any, key: str = '') -> list[str]:
    """Keys in which two recipes differ in what they train."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [(f'{key}.{name}' if key else name, one.get(name), other.get(name)) for name in one | other]
        return [found for name, a, b in parts if not _is_beside_the_point(name) for found in differences(a, b, name)]
    return [] if one == other else [key]


def essence(config: dict[str, Any], key: str = '') -> dict[str, Any]:
    """What of a recipe decides what it trains: two recipes without `differences` have the same."""
    named = [(name, f'{key}.{name}' if key else name, value) for name, value in config.items()]
    return {
        name: essence(value, full) if isinstance(value, dict) else value
        for name, full, value in named
        if not _is_beside_the_point(full) and value is not None
    }


def _check_teams(recipe: Recipe, folder: Path) -> None:
    """See whether the run to go on with is one of as many teams."""
    before, now = (config.get('teams', 1) for config in (written_recipe(recipe, folder), recipe.config))
    if before != now:
        todo = f'give teams={before}, or choose another run_name'
        raise recipe.error(('teams',), f'{folder} is of {before} team{"s" if before != 1 else ""}, not {now}; {todo}')


def _is_left_over(folder: Path) -> bool:
    """Whether a process that was killed had made the folder, and no more."""
    return folder.is_dir() and all(path.match('.recipe.yaml*.tmp') for path in folder.iterdir())


def _goes_on(recipe: Recipe) -> bool:
    return bool(recipe.config.get('autoresume')) and (run_folder(recipe) / 'recipe.yaml').is_file()


def _read(
    recipe: Recipe, path: Path, parse: Callable[[str], Any], todo: str, wanted: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """A mapping that lies in the folder of a run, with values of the wanted types."""
    try:
        found = parse(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise recipe.error((), f'cannot read {path}; {todo}', exit_code=1) from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in wanted.items()):
        raise recipe.error((), f'{path} is damaged; {todo}', exit_code=1)
    return found


def _is_beside_the_point(name: str) -> bool:
    return name in _BESIDE_THE_POINT or name.startswith(_PREFIXES_BESIDE_THE_POINT)
