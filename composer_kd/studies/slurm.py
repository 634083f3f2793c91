"""Starts the cells of a study as jobs of Slurm, through submitit."""

from __future__ import annotations

import getpass
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from composer_kd.files import write
from composer_kd.recipes.load import RecipeError, parse_value
from composer_kd.studies.cell import Cell

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COMMANDS = ('sbatch', 'srun', 'sacct', 'squeue', 'scancel')
_TIMEOUTS = 100  # how often a job that ran out of time is put back into the queue
_PORTS = range(20_000, 30_000)

_SECONDS_BETWEEN_LOOKS = 2.0  # at the files of jobs
_SECONDS_BETWEEN_QUESTIONS = 30.0  # to Slurm
_SECONDS_FOR_FILES = 60.0  # until what one node has written is there for another
_SECONDS_TO_END = 10.0

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
        for key, value in _parameters(folder.name, jobs, gpus_per_job, options).items():
            try:
                self._executor.update_parameters(**{key: value})
            except (NameError, ValueError, AssertionError, TypeError) as error:
                raise RecipeError(f'--slurm {key}: {str(error).splitlines()[0]}') from error
        self._jobs = jobs
        self._running: dict[str, tuple[Cell, Any, float | None]] = {}  # job, and when it was found to have ended
        self._earlier: dict[str, str] = {}
        self._active: set[str] = set()
        self._next_question = self._next_look_at_queue = 0.0
        self._handlers: list[Any] = []
        self._is_starting = self._is_interrupted = False

    def __enter__(self) -> Self:
        self._earlier = _read(self._folder / 'jobs.json')
        self._handlers = [signal.signal(number, self._interrupt) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # until all are cancelled
        if self._running:
            subprocess.run(['scancel', *(job.job_id for _, job, _ in self._running.values())], check=False)
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            signal.signal(number, handler)

    @property
    def free(self) -> int:
        """How many more cells may be started now."""
        return 0 if self._jobs is not None and self._running else sys.maxsize

    def is_at_work(self, cell: Cell) -> bool:
        """Whether a job that an earlier driver started is still in the queue, or a process of this machine at work."""
        return self._earlier.get(cell.name) in self._queue() or cell.is_at_work()

    def start(self, cells: Sequence[Cell]) -> list[Cell]:
        """Submit cells as one array.

        Raises:
            RecipeError: Slurm does not take it.
        """
        tasks = [_Task(cell.arguments, str(cell.log.absolute())) for cell in cells]
        for cell in cells:
            cell.log.touch()  # a job may end before it writes a word
        self._is_starting = True
        try:
            jobs = self._executor.submit_array(tasks)
            for cell, job in zip(cells, jobs, strict=True):
                self._running[cell.name] = cell, job, None
                self._earlier.pop(cell.name, None)
            self._write()
        except (RuntimeError, subprocess.SubprocessError, OSError) as error:
            says = ' '.join(str(error).splitlines()[-3:])
            raise RecipeError(f'--launcher slurm: the jobs were not taken: {says}', exit_code=1) from error
        finally:
            self._is_starting = False
        if self._is_interrupted:
            raise KeyboardInterrupt
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

    def _queue(self) -> set[str]:
        """The jobs of this person that have not ended."""
        if self._earlier and time.monotonic() > self._next_look_at_queue:
            self._next_look_at_queue = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
            command = ['squeue', '--noheader', '--array', '--format=%i', f'--user={getpass.getuser()}']
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            if asked.returncode:
                raise RecipeError(f'--launcher slurm: squeue: {asked.stderr}', exit_code=1)
            self._active = {line.strip() for line in asked.stdout.splitlines()}
        return self._active

    def _write(self) -> None:
        jobs = self._earlier | {name: job.job_id for name, (_, job, _) in self._running.items()}
        write(self._folder / 'jobs.json', json.dumps(jobs, indent=2) + '\n')

    def _interrupt(self, *_: object) -> None:
        self._is_interrupted = True
        if not self._is_starting:
            raise KeyboardInterrupt


class _Task:
    """A cell, as submitit keeps it and calls it on each node of its job: plain values, and no results.

    Args:
        arguments: What Composer's launcher is given.
        log: What it prints is added to this file; on the second node and later ones, to one beside it.
    """

    def __init__(self, arguments: Sequence[str], log: str):
        self.arguments, self.log = [*arguments], log

    def __call__(self) -> None:
        """Run it; an error says if it fails."""
        import submitit

        place = submitit.JobEnvironment()
        log = Path(self.log) if place.node == 0 else Path(f'{self.log.removesuffix(".log")}.node{place.node}.log')
        log.parent.mkdir(parents=True, exist_ok=True)
        if not torch.cuda.device_count():
            os.environ.setdefault('OMP_NUM_THREADS', str(len(os.sched_getaffinity(0))))
        command = [sys.executable, '-m', 'composer', *_ranks(place), *self.arguments]
        with log.open('ab') as file:
            # In a session of its own, so that it hears nothing of the signals to this process, and is ended at once.
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            exit_code = process.wait()
        finally:
            _end(process)
        if exit_code:
            raise RuntimeError(f'exit code {exit_code}; see {log}')

    def checkpoint(self) -> Any:
        """What is put back into the queue when the job has to leave its node: it goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _ranks(place: Any) -> list[str]:
    """What Composer's launcher is to know of the job's nodes, all of which have as many GPUs."""
    ranks = max(1, torch.cuda.device_count())
    options = ['-n', str(ranks)]
    if place.num_nodes > 1:
        port = _PORTS[int(place.raw_job_id) % len(_PORTS)]
        options += ['--world_size', str(place.num_nodes * ranks), '--node_rank', str(place.node)]
        options += ['--master_addr', place.hostnames[0], '--master_port', str(port)]
    return options


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
        os.killpg(process.pid, signal.SIGKILL)


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
