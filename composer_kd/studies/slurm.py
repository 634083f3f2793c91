"""Starts the cells of a study as jobs of Slurm, through submitit."""

from __future__ import annotations

import getpass
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from composer_kd.files import write
from composer_kd.interrupts import Interrupts
from composer_kd.recipes.load import RecipeError, parse_value
from composer_kd.studies.cell import Cell
from composer_kd.studies.slurm_task import Task

_COMMANDS = ('sbatch', 'srun', 'sacct', 'squeue', 'scancel')
_TIMEOUTS = 100  # how often a job that ran out of time is put back into the queue
_INTENTION = 'submitting'  # a file that is there from before jobs are submitted until it is written down which

_SECONDS_BETWEEN_LOOKS = 2.0  # at the files of jobs
_SECONDS_BETWEEN_QUESTIONS = 30.0  # to Slurm
_SECONDS_FOR_FILES = 60.0  # until what one node has written is there for another

# What Slurm says of a job that has not ended well. Of others that have ended, it may not know that yet.
_BADLY = ('BOOT_FAIL', 'CANCELLED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY', 'TIMEOUT')


class SlurmLauncher:
    """Starts cells as jobs of Slurm, all that are ready together as one array.

    A job that runs out of time, or is preempted, is put back into the queue and goes on from its last checkpoint. The
    jobs are cancelled when the context is left; those of a driver that was killed are waited for.

    Args:
        folder: That of the study, which all nodes must see under this path.
        jobs: Jobs at the same time: each array has as many of them, and waits for the one before. Default: None, as
            many as Slurm allows.
        gpus_per_job: GPUs on each node. Default: None, what the options say.
        options: `key=value`, as submitit's AutoExecutor names them: `timeout_min=600`, `slurm_partition=x`, `nodes=2`.

    Raises:
        RecipeError: submitit is not installed, Slurm is not to be found, or an option is wrong.
    """

    def __init__(self, folder: Path, jobs: int | None, gpus_per_job: int | None, options: Sequence[str]):
        try:
            self._submitit: Any = importlib.import_module('submitit')
        except ImportError as error:
            raise RecipeError("--launcher slurm needs submitit: pip install 'composer-kd[slurm]'") from error
        if missing := [name for name in _COMMANDS if shutil.which(name) is None]:
            todo = 'start this on a machine from which jobs are submitted'
            raise RecipeError(f'--launcher slurm: there is no {missing[0]} here; {todo}')
        self._folder = folder.absolute() / 'slurm'
        self._executor = self._submitit.AutoExecutor(self._folder, 'slurm', slurm_max_num_timeout=_TIMEOUTS)
        parameters = _parameters(folder.name, jobs, gpus_per_job, options)
        self._name = str(parameters['name'])
        for key, value in parameters.items():
            try:
                self._executor.update_parameters(**{key: value})
            except (NameError, ValueError, AssertionError, TypeError) as error:
                raise RecipeError(f'--slurm {key}: {str(error).splitlines()[0]}') from error
        self._jobs = jobs
        self._running: dict[str, tuple[Cell, Any, float | None]] = {}  # job, and when it was found to have ended
        self._earlier: dict[str, str] = {}
        self._active: set[str] = set()
        self._next_question = self._next_look_at_queue = 0.0
        self._interrupts = Interrupts()

    def __enter__(self) -> Self:
        self._earlier = _read(self._folder / 'jobs.json')
        self._look_for_unknown()
        self._interrupts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._interrupts.ignore()
        if self._running:
            subprocess.run(['scancel', *(job.job_id for _, job, _ in self._running.values())], check=False)
        self._interrupts.__exit__(*error)

    @property
    def free(self) -> int:
        """How many more cells may be started now."""
        return 0 if self._jobs is not None and self._running else sys.maxsize

    def is_at_work(self, cell: Cell) -> bool:
        """Whether a job that an earlier driver started is still in the queue, or a process of this machine at work."""
        return self._earlier.get(cell.name) in self._queued() or cell.is_at_work()

    def start(self, cells: Sequence[Cell]) -> list[Cell]:
        """Submit cells as one array.

        Raises:
            RecipeError: Slurm does not take it.
        """
        tasks = [Task(cell.arguments, str(cell.log.absolute())) for cell in cells]
        for cell in cells:
            cell.log.touch()  # a job may end before it writes a word
        intention = self._folder / _INTENTION
        with self._interrupts.held():
            intention.parent.mkdir(exist_ok=True)
            write(intention, self._name)
            try:
                jobs = self._executor.submit_array(tasks)
            except (RuntimeError, subprocess.SubprocessError, OSError) as error:
                intention.unlink()
                says = ' '.join(str(error).splitlines()[-3:])
                raise RecipeError(f'--launcher slurm: the jobs were not taken: {says}', exit_code=1) from error
            for cell, job in zip(cells, jobs, strict=True):
                self._running[cell.name] = cell, job, None
                self._earlier.pop(cell.name, None)
            self._write()
            intention.unlink()
        return [*cells]

    def ended(self) -> list[tuple[Cell, str | None]]:
        """Wait for a moment; the cells whose jobs have ended since, and what Slurm says of them if not all is well."""
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if time.monotonic() > self._next_question:  # submitit itself asks ever more seldom
            self._next_question = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
            self._submitit.SlurmJob.watcher.update()
        ended = []
        for name, (cell, job, since) in [*self._running.items()]:
            if not job.done():
                continue
            state = self._submitit.SlurmJob.watcher.get_state(job.job_id, mode='force').split()[0]
            is_well, since = state not in _BADLY, since or time.monotonic()
            if is_well and not _is_finished(cell) and time.monotonic() < since + _SECONDS_FOR_FILES:
                self._running[name] = cell, job, since
                continue
            del self._running[name]
            ended.append((cell, None if is_well else f'Slurm says {state} of job {job.job_id}'))
        if ended:
            self._write()
        return ended

    def _look_for_unknown(self) -> None:
        """A driver that is killed while it submits jobs cannot write down which."""
        intention = self._folder / _INTENTION
        if not intention.is_file():
            return
        name = intention.read_text()
        if unknown := _queue(f'--name={name}') - {*self._earlier.values()}:
            todo = f'see whether squeue --name={name} shows jobs of this study, scancel them, and delete {intention}'
            raise RecipeError(
                f'--launcher slurm: nobody knows which runs {", ".join(sorted(unknown))} are; {todo}', exit_code=1
            )
        intention.unlink()

    def _queued(self) -> set[str]:
        """The jobs of this person that have not ended, as of lately."""
        if self._earlier and time.monotonic() > self._next_look_at_queue:
            self._next_look_at_queue = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
            self._active = _queue()
        return self._active

    def _write(self) -> None:
        jobs = self._earlier | {name: job.job_id for name, (_, job, _) in self._running.items()}
        write(self._folder / 'jobs.json', json.dumps(jobs, indent=2) + '\n')


def _parameters(name: str, jobs: int | None, gpus_per_job: int | None, options: Iterable[str]) -> dict[str, Any]:
    """What submitit is told about the jobs."""
    for option, value in (('jobs', jobs), ('gpus-per-job', gpus_per_job)):
        if value is not None and value < 1:
            raise RecipeError(f'--{option} must be 1 or more, not {value}')
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition('=')
        if not equals:
            raise RecipeError(f'--slurm {option}: is written key=value')
        given[key] = parse_value(value)
    if not {'timeout_min', 'slurm_time'} & given.keys():
        raise RecipeError('--launcher slurm: say how many minutes a job may take, for instance --slurm timeout_min=600')
    ours = {'name': name, 'gpus_per_node': gpus_per_job, 'slurm_array_parallelism': jobs}
    if given.get('nodes', 1) != 1:
        ours['slurm_srun_args'] = ['--kill-on-bad-exit=1']  # no node waits for one that has failed
    return {key: value for key, value in ours.items() if value is not None} | given


def _queue(*options: str) -> set[str]:
    """The jobs of this person that have not ended."""
    command = ['squeue', '--noheader', '--array', '--format=%i', f'--user={getpass.getuser()}', *options]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise RecipeError(f'--launcher slurm: squeue: {asked.stderr}', exit_code=1)
    return {line.strip() for line in asked.stdout.splitlines()}


def _is_finished(cell: Cell) -> bool:
    try:
        return cell.finished() is not None
    except RecipeError:
        return True  # there is something, of which the driver will say what is wrong with it


def _read(path: Path) -> dict[str, str]:
    """The jobs of an earlier driver."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(
            f'cannot read {path}: cancel the jobs of the study, if there are any, and delete it'
        ) from error
    return {str(name): str(job) for name, job in found.items()} if isinstance(found, dict) else {}
