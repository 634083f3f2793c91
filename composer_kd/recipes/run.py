"""A recipe file -> a finished run in a folder of its own."""

import os
import pickle
import shutil
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.backends.cudnn
from composer import Trainer
from composer.core import Event
from composer.utils import dist, ensure_tuple, format_name_with_dist, get_device

from composer_kd.algorithms import (
    Codistillation,
    EarlyStopDistillation,
    KnowledgeDistillation,
    RegularizationSchedule,
    TeacherSampling,
)
from composer_kd.algorithms.knowledge_distillation import distillers
from composer_kd.channel import PeerLost
from composer_kd.checkpoints import kept_checkpoints, link_latest
from composer_kd.data.text_files import TextError
from composer_kd.launching import leave_ranks
from composer_kd.memory import end_workers, free_closed_runs
from composer_kd.recipes.build import build
from composer_kd.recipes.check import Plan, TeacherPlan, TeacherRun
from composer_kd.recipes.folder import (
    check_name,
    claim,
    differences,
    finished_run,
    on_rank_zero,
    run_folder,
    write_recipe,
    written_recipe,
)
from composer_kd.recipes.load import Recipe, RecipeError
from composer_kd.recipes.lock import FolderLock
from composer_kd.recipes.metrics_logger import MetricsLogger
from composer_kd.recipes.report import EvaluationLines, lines, say, summarize
from composer_kd.recipes.team_run import TeamRun, join
from composer_kd.teachers import TeacherError
from composer_kd.teams import current
from composer_kd.tokenization import saved_tokenizer, tokenizer_difference

# NotImplementedError is how Composer refuses settings that do not go together.
_CAUSED_BY_PEOPLE = (ValueError, OSError, ImportError, NotImplementedError, TeacherError)
_CAUSED_BY_CHECKPOINTS = (RuntimeError, LookupError, EOFError, pickle.UnpicklingError)

_OURS = (Codistillation, EarlyStopDistillation, KnowledgeDistillation, RegularizationSchedule, TeacherSampling)

_signal_file = dist.get_node_signal_file_name

SECONDS_BETWEEN_LOOKS = 2.0  # at a folder in which another launch is at work


def run_plan(plan: Plan, overrides: Sequence[str]) -> dict[str, Any]:
    """Do what a recipe says: train its teachers if they are still to be trained, then its student.

    Args:
        plan: Of the recipe.
        overrides: With which it was loaded.

    Returns:
        The summary of the run, as in its `summary.json`; in a launch of several teams, that of this team's run.

    Raises:
        RecipeError: If the recipe is wrong, or cannot be followed here.
    """
    plan, team = join(plan, overrides)
    start(plan)
    on_rank_zero(lambda: check_name(plan.recipe))
    _rehearse(plan)
    try:
        with FolderLock(plan.recipe) as lock, team or nullcontext():
            summary = train(plan, lock, team)
            if team:
                leave_ranks()  # who would otherwise wait for rank 0 while that waits for other teams
                team.conclude(summary)
            return summary
    finally:
        free_closed_runs()


def assemble(plan: Plan, look: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Build all that a run is made of, without running it; its teachers are trained if they are still to be trained.

    Args:
        plan: The plan, with which `start` was called.
        look: Is shown the keywords for Trainer, and raises what is wrong with them; before a teacher is trained, too.
    """
    _rehearse(plan, look=look)
    keywords = build(plan, _checkpoints([_teacher_run(teacher) for teacher in plan.teachers]))
    look(keywords)
    return keywords


def start(plan: Plan) -> None:
    """Set up what all runs of this process share."""
    device, ranks, team = plan.trainer.get('device'), dist.get_local_world_size(), current()
    try:
        get_device(device)
        if dist.get_world_size() > 1:
            dist.initialize_dist(device, plan.trainer.get('dist_timeout', 300.0))
    except (ValueError, RuntimeError, ImportError) as error:
        raise plan.recipe.error(('device',), str(error), 2 if isinstance(error, ValueError) else 1) from error
    if dist.get_world_size() > ranks:
        dist.get_node_signal_file_name = _signal_file_of_node
    on_cpu = device == 'cpu' or not torch.cuda.is_available()
    processes = team.processes_here if team else ranks
    if on_cpu and processes > 1 and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))  # ranks that share cores stall each other
    warnings.filterwarnings('ignore', message='Cannot split tensor of length')  # the last batch is a small one


def _signal_file_of_node() -> str:
    """A name for each node: Composer's is the same on all, which would remove each other's file in a shared folder."""
    return f'{_signal_file()}_node{dist.get_node_rank()}'


def _rehearse(
    plan: Plan, is_teacher: bool = False, look: Callable[[dict[str, Any]], None] = lambda keywords: None
) -> None:
    """If a teacher is to be trained, build all there is but that one's weights: mistakes show now, not after hours."""
    runs = [_finished_teacher(teacher) for teacher in plan.teachers]
    untrained = [teacher.recipe for teacher, run in zip(plan.teachers, runs, strict=True) if teacher.recipe and not run]
    if untrained or is_teacher:
        keywords = build(plan, _checkpoints(runs))
        look(keywords)
        _rehearse_algorithms(plan.recipe, keywords)
    for teacher in untrained:
        _rehearse(teacher, is_teacher=True)


def _rehearse_algorithms(recipe: Recipe, keywords: dict[str, Any]) -> None:
    """See whether what the algorithms of distillation look at before the first batch is as they need it."""
    state: Any = SimpleNamespace(
        algorithms=[*keywords['algorithms']],
        model=keywords['model'],
        dataloader=keywords['train_dataloader'].dataloader,
        optimizers=ensure_tuple(keywords.get('optimizers')),
        rank_zero_seed=keywords['seed'],
    )
    logger: Any = None  # nothing is logged yet
    try:
        for algorithm in keywords['algorithms']:
            if isinstance(algorithm, _OURS):
                algorithm.apply(Event.INIT, state, logger)
        schedules = [algorithm for algorithm in state.algorithms if isinstance(algorithm, RegularizationSchedule)]
        for algorithm in [*distillers(state.algorithms), *schedules]:
            algorithm.rehearse(state)
    except TeacherError as error:
        raise recipe.error(('teachers',), str(error)) from error
    except ValueError as error:
        raise recipe.error((), str(error)) from error


def train(
    plan: Plan,
    lock: FolderLock,
    team: TeamRun | None = None,
    make: Callable[[Plan, Sequence[tuple[Path, str] | None]], dict[str, Any]] = build,
) -> dict[str, Any]:
    """Train the teachers that are to be trained first, then build and train.

    Args:
        plan: The plan.
        lock: Takes the folder.
        team: The part of this process's team, if there are several. Default: None.
        make: Makes the keywords for Trainer, of the plan and the teachers' checkpoints. Default: `build`.

    Returns:
        The summary.
    """
    recipe, of_teams = plan.recipe, 'blockwise' if plan.blockwise else 'teams'
    teachers = [_teacher_run(teacher) for teacher in plan.teachers]
    keywords = make(plan, _checkpoints(teachers))
    if team:
        team.enter(recipe)
    folder, is_new = on_rank_zero(lambda: _claim(recipe, lock, keywords, team))
    try:
        if team:
            team.level(_save_folder(keywords, folder, team))
        trainer = _trainer(plan, keywords, folder, team)
    except Exception as error:
        if is_new:
            _remove(folder, team)
        if isinstance(error, RecipeError):
            raise
        if isinstance(error, PeerLost):
            raise recipe.error((of_teams,), str(error), exit_code=1) from error
        if isinstance(error, _CAUSED_BY_PEOPLE):
            raise recipe.error((), str(error), 2 if isinstance(error, ValueError) else 1) from error
        if isinstance(error, _CAUSED_BY_CHECKPOINTS) and (keywords.get('autoresume') or keywords.get('load_path')):
            message = f'cannot load the checkpoint: {textwrap.shorten(str(error), 300)}'
            raise recipe.error((), message, exit_code=1) from error
        raise
    batches = trainer.state.timestamp.batch
    try:
        if team:
            team.compare(batches.value)
        _fit(trainer)
    except BaseException as error:
        trainer.engine.close()  # not trainer.close(), which would wait for ranks that may never come
        end_workers(trainer.state)
        if is_new and trainer.state.timestamp.batch - batches <= 1 and not trainer.saved_checkpoints:
            _remove(folder, team)
        teachers = 'teachers' if 'teachers' in recipe.config else 'algorithms'
        for kind, key in ((TeacherError, teachers), (TextError, 'train_data'), (PeerLost, of_teams)):
            if isinstance(error, kind):
                raise recipe.error((key,), str(error), exit_code=1) from error
        raise
    trainer.close()
    end_workers(trainer.state)
    seconds = sum(run.seconds for run in teachers if run)
    summary = on_rank_zero(lambda: summarize(plan, trainer, folder, seconds))
    say(lines(summary, folder))
    return summary


def _claim(recipe: Recipe, lock: FolderLock, keywords: dict[str, Any], team: TeamRun | None) -> tuple[Path, bool]:
    """Take the folder of the run, and see whether a run that is there can go on; whether the folder is new."""
    folder, is_new = claim(recipe, lock)
    if not is_new:
        if changed := differences(written_recipe(recipe, folder), recipe.config):
            if (folder / 'summary.json').exists() and set(changed) != {'max_duration'}:
                # Its weights are those of the recipe that is written there, by which it is found as a teacher.
                what = f'{folder} is a finished run of another recipe, which differs in {", ".join(changed)}'
                raise recipe.error((), f'{what}; only max_duration may change, so choose another run_name')
            say(f'going on in {folder} with another recipe than it began with: {", ".join(changed)} changed')
        checkpoints = _save_folder(keywords, folder, team)
        link_latest(checkpoints)
        latest = checkpoints / 'latest-rank0.pt'
        if latest.exists() and not zipfile.is_zipfile(latest):
            todo = f'put one back that is whole, or delete {folder} to start anew'
            raise recipe.error((), f'the checkpoint {latest} is damaged; {todo}', exit_code=1)
        reads, learned = getattr(keywords['model'], 'tokenizer', None), saved_tokenizer(latest)
        if reads and learned and (difference := tokenizer_difference(reads, learned)):
            what = f'{folder} began with another tokenizer ({difference}), or the text that it is made from has changed'
            raise recipe.error(('model',), f'{what}; choose another run_name')
    return folder, is_new


def _save_folder(keywords: dict[str, Any], folder: Path, team: TeamRun | None) -> Path:
    """Where a run has its checkpoints."""
    given = keywords.get('save_folder') or str(folder / 'checkpoints')
    return Path(format_name_with_dist(given, team.name if team else folder.name))


def _remove(folder: Path, team: TeamRun | None) -> None:
    if dist.get_global_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        if team:
            team.remove()


def _trainer(plan: Plan, keywords: dict[str, Any], folder: Path, team: TeamRun | None) -> Trainer:
    """The Trainer, with what every run of a recipe has."""
    defaults = {'save_folder': str(folder / 'checkpoints'), 'save_overwrite': True, 'progress_bar': sys.stderr.isatty()}
    keywords = defaults | keywords | {'run_name': team.name if team else folder.name}
    keywords['loggers'].append(MetricsLogger(folder / 'metrics.jsonl'))
    if team:
        keywords['callbacks'].append(team.signs_of_life())
    if not keywords['progress_bar'] and not keywords.get('log_to_console'):
        keywords['loggers'].append(EvaluationLines())
    trainer = Trainer(**keywords)
    if team:
        team.meet_to_save(trainer)
    if dist.get_global_rank() == 0:
        (folder / 'summary.json').unlink(missing_ok=True)  # now that nothing is in the way of going on
        write_recipe(plan.recipe, folder)
        latest = _save_folder(keywords, folder, team) / 'latest-rank0.pt'
        if keywords.get('autoresume') and latest.is_symlink():
            # Composer forgets at resume which checkpoints there are, and would leave them behind for ever.
            kept = kept_checkpoints(latest.parent).values() or [latest.parent / latest.readlink()]
            trainer.saved_checkpoints.extend(map(str, kept))
    return trainer


def _fit(trainer: Trainer) -> None:
    state = trainer.state
    assert state.max_duration is not None
    if state.timestamp < state.max_duration:
        trainer.fit()
        return
    # A run that was interrupted between its last batch and its summary.
    for distiller in distillers(state.algorithms):
        distiller.pool.release()
    if state.evaluators:
        trainer.eval()


def _checkpoints(runs: Sequence[TeacherRun | None]) -> list[tuple[Path, str] | None]:
    return [run and (run.checkpoint, run.sha256) for run in runs]


def _teacher_run(teacher: TeacherPlan) -> TeacherRun | None:
    """Find the finished run of a teacher's recipe, or train it now; only one launch at a time does."""
    if teacher.recipe is None:
        if teacher.run and teacher.model:
            say(f'found the teacher {run_folder(teacher.model.recipe)}', once=True)
        return teacher.run
    recipe, folder = teacher.recipe.recipe, run_folder(teacher.recipe.recipe)
    with FolderLock(recipe) as lock:
        if not on_rank_zero(lambda: lock.take(folder)):
            say(f'waiting for another {"team" if current() else "launch"}, which is at work in {folder}')
            while not on_rank_zero(lambda: lock.take(folder)):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        summary = on_rank_zero(lambda: finished_run(recipe))
        if summary is None:
            say(f'training the teacher {recipe.path} in {folder}')
            recipe.config['autoresume'] = teacher.recipe.trainer['autoresume'] = True
            with _determinism_kept():
                summary = train(teacher.recipe, lock)
            free_closed_runs()
        else:
            say(f'found the teacher {recipe.path} in {folder}', once=True)
    if summary['checkpoint'] is None:
        raise recipe.error(('save_folder',), 'a teacher needs a checkpoint: its recipe must not switch it off')
    return TeacherRun.of(summary, folder)


def _finished_teacher(teacher: TeacherPlan) -> TeacherRun | None:
    """The finished run of a teacher; None if it has none, is to be trained, or another launch is at work on it."""
    if teacher.recipe is None:
        return teacher.run
    recipe, folder = teacher.recipe.recipe, run_folder(teacher.recipe.recipe)

    def look() -> dict[str, Any] | None:
        with FolderLock(recipe) as lock:
            return finished_run(recipe) if lock.take(folder) else None

    summary = on_rank_zero(look)
    return None if summary is None else TeacherRun.of(summary, folder)


@contextmanager
def _determinism_kept() -> Iterator[None]:
    """Undo what `deterministic_mode` of a run sets for the whole process."""
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.deterministic = deterministic
