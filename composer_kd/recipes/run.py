"""A recipe file -> a finished run in a folder of its own."""

import atexit
import contextlib
import gc
import os
import pickle
import shutil
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict
import yaml
from composer import Trainer
from composer.core import Engine
from composer.utils import dist, get_device

from composer_kd.recipes.build import build
from composer_kd.recipes.check import Plan, check
from composer_kd.recipes.folder import differences, finished_run, free_folder, on_rank_zero, run_folder, write
from composer_kd.recipes.load import Recipe, load
from composer_kd.recipes.metrics_logger import MetricsLogger
from composer_kd.recipes.report import EvaluationLines, lines, summarize
from composer_kd.teachers import TeacherError

_CAUSED_BY_PEOPLE = (ValueError, OSError, ImportError, NotImplementedError, TeacherError)
_CAUSED_BY_CHECKPOINTS = (RuntimeError, LookupError, EOFError, pickle.UnpicklingError)


def run(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do what a recipe says: train its teachers if they are still to be trained, then its student.

    Args:
        path: The recipe.
        overrides: `key.sub=value`.

    Returns:
        The summary of the run, as in its `summary.json`.

    Raises:
        RecipeError: If the recipe is wrong, or cannot be followed here.
    """
    plan = check(load(path, overrides))
    _start(plan)
    return _train(plan)


def _start(plan: Plan) -> None:
    """Set up what all runs of this process share."""
    device, ranks = plan.trainer.get('device'), dist.get_local_world_size()
    try:
        get_device(device)
        if dist.get_world_size() > 1:
            dist.initialize_dist(device, plan.trainer.get('dist_timeout', 300.0))
    except (ValueError, RuntimeError, ImportError) as error:
        raise plan.recipe.error(('device',), str(error), 2 if isinstance(error, ValueError) else 1) from error
    on_cpu = device == 'cpu' or not torch.cuda.is_available()
    if on_cpu and ranks > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))  # ranks that share cores stall each other
    warnings.filterwarnings('ignore', message='Cannot split tensor of length')  # the last batch is a small one


def _train(plan: Plan) -> dict[str, Any]:
    """Train the teachers that are to be trained first, then build and train."""
    recipe = plan.recipe
    on_rank_zero(lambda: free_folder(recipe))  # so that a name that is taken is an error now, not after hours
    teachers = [_teacher_run(teacher.recipe) if teacher.recipe else None for teacher in plan.teachers]
    keywords = build(plan, [run and (run.checkpoint, run.sha256) for run in teachers])
    folder, is_new = on_rank_zero(lambda: _claim(recipe))
    try:
        trainer = _trainer(plan, keywords, folder)
    except Exception as error:
        if is_new and dist.get_global_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # unless there are other runs
        if isinstance(error, _CAUSED_BY_PEOPLE):
            raise recipe.error((), str(error), 2 if isinstance(error, ValueError) else 1) from error
        if isinstance(error, _CAUSED_BY_CHECKPOINTS) and (keywords.get('autoresume') or keywords.get('load_path')):
            message = f'cannot load the checkpoint: {textwrap.shorten(str(error), 300)}'
            raise recipe.error((), message, exit_code=1) from error
        raise
    try:
        _fit(trainer)
    except BaseException as error:
        trainer.engine.close()  # not trainer.close(), which would wait for ranks that may never come
        if isinstance(error, TeacherError):
            raise recipe.error(('teachers',), str(error), exit_code=1) from error
        raise
    trainer.close()
    seconds = sum(run.seconds for run in teachers if run)
    summary = on_rank_zero(lambda: summarize(plan, trainer, folder, seconds))
    _say(lines(summary, folder))
    return summary


def _claim(recipe: Recipe) -> tuple[Path, bool]:
    """Take the folder of the run; whether it is new."""
    folder = free_folder(recipe)
    written, latest = folder / 'recipe.yaml', folder / 'checkpoints' / 'latest-rank0.pt'
    is_new = not written.exists()
    if not is_new:
        if changed := differences(yaml.safe_load(written.read_text(encoding='utf-8')), recipe.config):
            print(f'going on in {folder} with another recipe than it began with: {", ".join(changed)} changed')
        if latest.exists() and not zipfile.is_zipfile(latest):
            todo = f'put one back that is whole, or delete {folder} to start anew'
            raise recipe.error((), f'the checkpoint {latest} is damaged; {todo}', exit_code=1)
        (folder / 'summary.json').unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.error(('runs_dir',), f'cannot make {folder}: {error.strerror}', exit_code=1) from error
    return folder, is_new


def _trainer(plan: Plan, keywords: dict[str, Any], folder: Path) -> Trainer:
    """The Trainer, with what every run of a recipe has."""
    defaults = {'save_folder': str(folder / 'checkpoints'), 'save_overwrite': True, 'progress_bar': sys.stderr.isatty()}
    keywords = defaults | keywords | {'run_name': folder.name}
    keywords['loggers'].append(MetricsLogger(folder / 'metrics.jsonl'))
    if not keywords['progress_bar'] and not keywords.get('log_to_console'):
        keywords['loggers'].append(EvaluationLines())
    trainer = Trainer(**keywords)
    if dist.get_global_rank() == 0:
        config = plan.recipe.config | {'run_name': folder.name}
        write(folder / 'recipe.yaml', yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        latest = Path(keywords['save_folder'] or '', 'latest-rank0.pt')
        if keywords['save_folder'] and latest.is_symlink():
            # Composer forgets at resume which checkpoint it came from, and would leave it behind for ever.
            trainer.saved_checkpoints.append(str(latest.parent / latest.readlink()))
    return trainer


def _fit(trainer: Trainer) -> None:
    state = trainer.state
    assert state.max_duration is not None
    if state.timestamp < state.max_duration:
        trainer.fit()
    elif state.evaluators:  # a run that was interrupted between its last batch and its summary
        trainer.eval()


@dataclass
class _TeacherRun:
    checkpoint: Path
    sha256: str
    seconds: float


def _teacher_run(plan: Plan) -> _TeacherRun:
    """Find the finished run of a teacher's recipe, or train it now."""
    recipe = plan.recipe
    summary, folder = on_rank_zero(lambda: finished_run(recipe)), run_folder(recipe)
    if summary is None:
        _say(f'training the teacher {recipe.path} in {folder}')
        recipe.config['autoresume'] = plan.trainer['autoresume'] = True
        summary = _train(plan)
        _free_memory()
    else:
        _say(f'found the teacher {recipe.path} in {folder}')
    if summary['checkpoint'] is None:
        raise recipe.error(('save_folder',), 'a teacher needs a checkpoint: its recipe must not switch it off')
    seconds = summary['train_seconds'] + summary['teacher_training_seconds']
    return _TeacherRun(folder / summary['checkpoint'], summary['checkpoint_sha256'], seconds)


def _free_memory() -> None:
    """Let go of closed runs, whose state Composer's exit handler and torch's cache of parameter names would keep."""
    atexit.unregister(Engine._close)
    names = getattr(torch.distributed.checkpoint.state_dict, '_get_fqns', None)
    if names and hasattr(names, 'cache_clear'):
        names.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, flush=True)
