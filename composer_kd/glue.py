"""`composer-kd glue`: fine-tune one checkpoint on the tasks of GLUE, some of them several times, and tabulate it."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from composer_kd.checkpoints import file_sha256, find_checkpoint
from composer_kd.files import write
from composer_kd.jobs import Job, Jobs, is_at_work, tail
from composer_kd.models.pretrained import read_pretrained
from composer_kd.recipes import RecipeError, check, load
from composer_kd.recipes.folder import evaluated_run, run_folder
from composer_kd.recipes.load import Recipe, nearest
from composer_kd.recipes.lock import FolderLock
from composer_kd.tokenization import load_tokenizer

# What a task is judged by: its name, and where a run's summary has it. The order is that in which tasks are begun.
SCORES = {
    'mnli': {
        'm accuracy': 'metrics/mnli_matched/MulticlassAccuracy',
        'mm accuracy': 'metrics/mnli_mismatched/MulticlassAccuracy',
    },
    'qqp': {'F1': 'metrics/eval/BinaryF1Score', 'accuracy': 'metrics/eval/MulticlassAccuracy'},
    'qnli': {'accuracy': 'metrics/eval/MulticlassAccuracy'},
    'sst2': {'accuracy': 'metrics/eval/MulticlassAccuracy'},
    'cola': {'Matthews': 'metrics/eval/MatthewsCorrCoef'},
    'mrpc': {'F1': 'metrics/eval/BinaryF1Score', 'accuracy': 'metrics/eval/MulticlassAccuracy'},
    'stsb': {'Pearson': 'metrics/eval/PearsonCorrCoef', 'Spearman': 'metrics/eval/SpearmanCorrCoef'},
    'rte': {'accuracy': 'metrics/eval/MulticlassAccuracy'},
}
_SMALL = ('cola', 'mrpc', 'stsb', 'rte')  # whose scores differ much from seed to seed
_FROM_MNLI = ('mrpc', 'stsb', 'rte')
_FILES_OF_A_FOLDER = ('*.json', '*.txt', '*.safetensors', '*.bin')  # config, tokenizer and weights
_DIGITS = 8
_OURS = ('seed', 'run_name', 'runs_dir', 'autoresume', 'model.pretrained')

_FIRST_SEED = 17


@dataclass
class _Run:
    """One run of a task's recipe, and what has become of it."""

    task: str
    seed: int
    file: Path
    overrides: list[str]
    recipe: Recipe
    after: '_Run | None' = None
    summary: dict[str, Any] | None = None
    failed: bool = False
    is_announced: bool = False

    @property
    def log(self) -> Path:
        folder = run_folder(self.recipe)
        return folder.with_name(f'{folder.name}.log')

    def say(self, text: str) -> None:
        print(f'{self.task:<5} seed {self.seed}  {text}', flush=True)

    def scores(self) -> dict[str, float]:
        metrics = (self.summary or {}).get('metrics', {})
        # One that is not finite is text in a summary, and one that a recipe does not measure is missing.
        return {name: float(metrics.get(key, 'nan')) for name, key in SCORES[self.task].items()}

    def say_scores(self, how: str) -> None:
        self.say(f'{how}: ' + ', '.join(f'{name} {100 * value:.1f}' for name, value in self.scores().items()))


def glue(
    checkpoint: str,
    *,
    recipes: str | Path = 'yamls/glue',
    tasks: Sequence[str] = (),
    seeds: int = 5,
    jobs: int | None = None,
    runs_dir: str | Path = 'runs',
    distilled: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Fine-tune a checkpoint on GLUE, every run a `composer` process of its own; print and write the scores.

    Runs that are finished are not repeated, others go on where they were. RTE, MRPC and STS-B start from the MNLI run
    of this checkpoint, which is therefore trained even where it is not asked for.

    Args:
        checkpoint: what `model.pretrained` of a recipe takes: a checkpoint, the folder of a run, ...
        recipes: folder of the tasks' recipes. Default: `yamls/glue`.
        tasks: which tasks. Default: all eight.
        seeds: runs of each small task (CoLA, MRPC, STS-B, RTE); the others have one. Default: 5.
        jobs: runs at the same time, each on one GPU. Default: None, one for each GPU, or one alone without any.
        runs_dir: folder of the runs. Default: `runs`.
        distilled: run the recipes that distill, `<task>_kd.yaml`. Default: False.
        overrides: `key=value` for every recipe.

    Returns:
        What is written to `<runs_dir>/<name of the checkpoint>_<first digits of its SHA-256>_glue.json`.

    Raises:
        RecipeError: A recipe is missing or wrong, the checkpoint cannot be used, or a run failed.
    """
    for task in tasks:
        if task not in SCORES:
            raise RecipeError(f'there is no task {task!r}; {nearest(task, SCORES)}')
    for name, value in (('seeds', seeds), ('jobs', jobs)):
        if value is not None and value < 1:
            raise RecipeError(f'--{name} must be 1 or more, not {value}')
    source, name, sha256 = _source(checkpoint)
    name = f'{name}{f"_{sha256[:_DIGITS]}" if sha256 else ""}_glue{"_kd" if distilled else ""}'
    wanted = [task for task in SCORES if task in tasks or not tasks]
    runs = _runs(source, name, wanted, Path(recipes), seeds, Path(runs_dir), distilled, overrides)
    _work(runs, jobs)

    results = {
        'checkpoint': source,
        'sha256': sha256,
        'distilled': distilled,
        'overrides': [*overrides],
        **_scores([run for run in runs if run.task in wanted]),
    }
    if results['tasks']:
        table = _table(results)
        print(f'\n{table}')
        write(Path(runs_dir) / f'{name}.json', json.dumps(_finite(results), indent=2) + '\n')
        write(Path(runs_dir) / f'{name}.md', f'GLUE, validation sets, from {source}, times 100.\n\n{table}')
        print(f'written to {Path(runs_dir) / name}.json and .md')
    if missing := [run for run in runs if run.summary is None]:
        which = ', '.join(f'{run.task} seed {run.seed}' for run in missing)
        raise RecipeError(f'not finished: {which}; the same command goes on with them', exit_code=1)
    return results


def _source(checkpoint: str) -> tuple[str, str, str | None]:
    """What runs start from, a name for it and its SHA-256; found out now that it can be used, not run by run.

    A checkpoint has one path, however it was given. That names the file: a run that goes on has another one, and what
    started from this one is not of it. What is on the hub has no SHA-256.
    """
    file, folder = find_checkpoint(checkpoint), Path(checkpoint).resolve()
    found = file or (folder if folder.is_dir() else None)
    source = checkpoint if found is None else os.path.relpath(found) if found.is_relative_to(Path.cwd()) else str(found)
    try:
        read_pretrained(source)
        load_tokenizer(source)
        sha256 = file_sha256(file) if file else _folder_sha256(folder) if found else None
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(str(error), exit_code=1) from error
    if file is None:
        return source, folder.name, sha256
    return source, file.parent.parent.name if file.parent.name == 'checkpoints' else file.stem, sha256


def _folder_sha256(folder: Path) -> str:
    files = sorted({file for pattern in _FILES_OF_A_FOLDER for file in folder.glob(pattern)})
    return hashlib.sha256(''.join(f'{file.name} {file_sha256(file)}\n' for file in files).encode()).hexdigest()


def _runs(
    source: str,
    name: str,
    tasks: list[str],
    recipes: Path,
    seeds: int,
    runs_dir: Path,
    distilled: bool,
    overrides: Sequence[str],
) -> list[_Run]:
    """All runs that the tasks need, in the order in which they are begun."""
    for override in overrides:
        if override.partition('=')[0] in _OURS:
            raise RecipeError(f'command line: {override}: is not for an override, the command chooses it itself')
    runs: list[_Run] = []
    needs_mnli = any(task in _FROM_MNLI for task in tasks)
    for task in SCORES:
        if task not in tasks and not (task == 'mnli' and needs_mnli):
            continue
        file = recipes / f'{task}{"_kd" if distilled else ""}.yaml'
        if not file.is_file():
            raise RecipeError(f'there is no recipe {file}: go where yamls/glue is, or name its folder by --recipes')
        base = runs[0] if task in _FROM_MNLI else None
        for seed in range(_FIRST_SEED, _FIRST_SEED + (seeds if task in _SMALL else 1)):
            own = [
                *overrides,
                f'model.pretrained={json.dumps(str(run_folder(base.recipe)) if base else source)}',
                f'seed={seed}',
                f'run_name={name}_{task}_seed{seed}',
                f'runs_dir={json.dumps(str(runs_dir))}',
                'autoresume=true',
            ]
            run = _Run(task, seed, file, own, check(load(file, own)).recipe, base)
            run.summary = evaluated_run(run.recipe)
            runs.append(run)
    return runs


def _work(runs: list[_Run], jobs: int | None) -> None:
    """Bring all runs to their end; those that fail leave the others alone."""
    waiting: list[_Run] = []
    running: dict[Job, _Run] = {}
    for run in runs:
        if run.summary is None:
            waiting.append(run)
        else:
            run.say_scores('finished before')
    with Jobs(jobs, gpus_per_job=1) as processes:
        while waiting or running:
            for run in [*waiting]:
                if run.after and run.after.failed:
                    run.failed = True
                    run.say('not started, because the MNLI run that it starts from failed')
                elif not processes.free or (run.after and run.after.summary is None) or _is_busy(run):
                    continue
                elif (summary := evaluated_run(run.recipe)) is not None:  # by another launch, meanwhile
                    run.summary = summary
                    run.say_scores('finished by another launch')
                elif job := processes.start([str(run.file), *run.overrides], run.log):
                    running[job] = run
                    run.say(f'started, log {run.log}')
                else:
                    continue
                waiting.remove(run)
            for job in processes.ended():
                _settle(running.pop(job), job)


def _is_busy(run: _Run) -> bool:
    """Whether another launch is at work on a run, such as one whose parent was killed."""
    with FolderLock(run.recipe) as lock:
        if not is_at_work(run.log) and lock.take(run_folder(run.recipe)):
            return False
    if not run.is_announced:
        run.say(f'waiting for another launch, which is at work in {run_folder(run.recipe)}')
        run.is_announced = True
    return True


def _settle(run: _Run, job: Job) -> None:
    """Look what has become of a run whose process ended."""
    try:
        run.summary = evaluated_run(run.recipe) if job.process.returncode == 0 else None
    except RecipeError as error:
        run.say(str(error))
    run.failed = run.summary is None
    if run.failed:
        run.say(f'failed (exit code {job.process.returncode}); {run.log} ends so:')
        print(''.join(f'    {line}\n' for line in tail(run.log).splitlines()), end='', flush=True)
    else:
        run.say_scores('done')


def _scores(runs: list[_Run]) -> dict[str, Any]:
    """The scores of each task, and their average, in which a task counts once."""
    tasks = {}
    for task in SCORES:
        done = [run for run in runs if run.task == task and run.summary is not None]
        if done:
            values = {name: [run.scores()[name] for run in done] for name in SCORES[task]}
            tasks[task] = {
                'mean': {name: fmean(scores) for name, scores in values.items()},
                'values': values,
                'seeds': [run.seed for run in done],
                'runs': [str(run_folder(run.recipe)) for run in done],
            }
    means = [fmean(task['mean'].values()) for task in tasks.values()]
    return {'tasks': tasks, 'average': fmean(means) if means else None}


def _table(results: dict[str, Any]) -> str:
    rows = [
        (task, name, f'{100 * mean:.1f}', str(len(found['seeds'])))
        for task, found in results['tasks'].items()
        for name, mean in found['mean'].items()
    ]
    if results['average'] is not None:
        rows.append((f'average of {len(results["tasks"])} tasks', '', f'{100 * results["average"]:.1f}', ''))
    rows = [('task', 'metric', 'mean x 100', 'seeds'), ('-' * 18, '-' * 11, '-' * 10, '-' * 5), *rows]
    return ''.join(f'| {task:<18} | {name:<11} | {mean:>10} | {seeds:>5} |\n' for task, name, mean, seeds in rows)


def _finite(value: Any) -> Any:
    """The value as JSON has it: without NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
