"""Processes side by side: each has GPUs, a log and a session of its own, and none outlives who started it."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from typing_extensions import Self

from composer_kd.interrupts import Interrupts
from composer_kd.launching import launching
from composer_kd.recipes.load import RecipeError

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_END = 10
_TAIL = 12  # lines of a log to show
_BYTES_OF_TAIL = 1 << 16


@dataclass(eq=False)
class Job:
    """A rank at work on something, or Composer's launcher of several, with all processes that it started."""

    process: subprocess.Popen
    log: Path
    slot: int

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of them."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Jobs:
    """Up to so many jobs at the same time.

    Used as a context, it ends all of them when it is left: they are asked to end, and killed if they do not. SIGINT,
    SIGTERM and SIGHUP become a KeyboardInterrupt meanwhile. When what was started for a job has ended, so has all that
    it started.

    A job has its log locked for as long as any process of it lives. So a job that outlives its context, because that
    was killed, is never started twice.

    Args:
        jobs: How many at the same time. Default: None, as many as there are GPUs for, or one without any.
        gpus_per_job: GPUs of each job, which has as many ranks. Default: None, all GPUs, divided among the jobs.
        ranks: Processes of each job where there are no GPUs. Default: None, one.

    Attributes:
        running: The jobs at work.

    Raises:
        RecipeError: One of them is less than 1, or there are fewer GPUs than a job is to have, or than jobs of
            several are to have, or GPUs say how many ranks there are.
    """

    def __init__(self, jobs: int | None = None, gpus_per_job: int | None = None, ranks: int | None = None):
        for name, value in (('jobs', jobs), ('gpus-per-job', gpus_per_job), ('ranks', ranks)):
            if value is not None and value < 1:
                raise RecipeError(f'--{name} must be 1 or more, not {value}')
        self._gpus = _gpus()
        if gpus_per_job is not None and gpus_per_job > max(1, len(self._gpus)):
            raise RecipeError(f'--gpus-per-job {gpus_per_job}: there are only {len(self._gpus)} GPUs here')
        if jobs and gpus_per_job and jobs * gpus_per_job > len(self._gpus) and gpus_per_job > 1:
            todo = 'give less of either, since jobs of several GPUs share none'
            raise RecipeError(f'--jobs {jobs} --gpus-per-job {gpus_per_job}: there are {len(self._gpus)} GPUs; {todo}')
        if ranks is not None and self._gpus:
            raise RecipeError(f'--ranks {ranks}: a job has as many ranks as GPUs; take --gpus-per-job')
        self._gpus_per_job = gpus_per_job or max(1, len(self._gpus) // (jobs or 1))
        self._slots = jobs or max(1, len(self._gpus) // self._gpus_per_job)
        self._ranks = ranks or self._gpus_per_job
        self._free = list(range(self._slots))
        self.running: list[Job] = []
        self._interrupts = Interrupts()

    def __enter__(self) -> Self:
        self._interrupts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._interrupts.ignore()
        self.end(*self.running)
        self._interrupts.__exit__(*error)

    @property
    def free(self) -> int:
        """How many more can be started now."""
        return len(self._free)

    def start(self, arguments: Sequence[str], log: Path) -> Job | None:
        """Start a job.

        Args:
            arguments: What a person would type after `composer`: a recipe and its overrides, or `-m` and a module.
            log: What it prints is added to this file.

        Returns:
            The job; None if an earlier one with this log is still at work.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        command, more = launching(arguments, self._ranks)
        with log.open('ab') as file:
            if not _lock(file):
                return None
            with self._interrupts.held():
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment(self._free[0]) | more,
                    start_new_session=True,  # so that all of it can be ended at once
                )
                job = Job(process, log, self._free.pop(0))
                self.running.append(job)
        return job

    def ended(self) -> list[Job]:
        """The jobs that have ended since this was asked last, after a short while."""
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        over = [job for job in self.running if job.process.poll() is not None]
        for job in over:
            job.send(signal.SIGKILL)  # a launcher that was killed leaves its ranks at work
            self._settle(job)
        return over

    def end(self, *jobs: Job) -> None:
        """End jobs before their time."""
        for job in jobs:
            job.send(signal.SIGTERM)
        end = time.monotonic() + _SECONDS_TO_END
        for job in jobs:
            while job.process.poll() is None and time.monotonic() < end:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            job.send(signal.SIGKILL)
            job.process.wait()
            self._settle(job)

    def _settle(self, job: Job) -> None:
        self.running.remove(job)
        self._free.append(job.slot)

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._gpus:
            first = slot * self._gpus_per_job
            own = [self._gpus[(first + index) % len(self._gpus)] for index in range(self._gpus_per_job)]
            environment['CUDA_VISIBLE_DEVICES'] = ','.join(own)
        else:
            processes = self._slots * self._ranks
            environment.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // processes)))
        return environment


def is_at_work(log: Path) -> bool:
    """Whether a job with this log is at work, whoever started it."""
    if not log.is_file():
        return False
    with log.open('ab') as file:
        return not _lock(file)


def tail(log: Path) -> str:
    """The last lines of a log, none of one that is gone."""
    if not log.is_file():
        return ''
    with log.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _BYTES_OF_TAIL))
        text = file.read().decode(errors='replace')
    return '\n'.join(text.splitlines()[-_TAIL:])


def _lock(file: BinaryIO) -> bool:
    """Lock a file for all who have it open by inheritance; False if others have it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system that knows no locks is no reason not to work
    return True


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
    count = torch.cuda.device_count()
    return visible[:count] if visible else [str(index) for index in range(count)]
