"""What a job of Slurm does, on each of its nodes. Imports nothing that takes long, since every job does so."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer_kd.launching import launching

_PORTS = range(20_000, 30_000)
_SECONDS_TO_END = 10.0


class Task:
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
        import torch

        place = submitit.JobEnvironment()
        log = Path(self.log) if place.node == 0 else Path(f'{self.log.removesuffix(".log")}.node{place.node}.log')
        log.parent.mkdir(parents=True, exist_ok=True)
        ranks = max(1, torch.cuda.device_count())
        if not torch.cuda.device_count():
            os.environ.setdefault('OMP_NUM_THREADS', str(len(os.sched_getaffinity(0))))
        command, more = launching(self.arguments, ranks, _nodes(place, ranks))
        with log.open('ab') as file:
            # In a session of its own, so that it hears nothing of the signals to this process, and is ended at once.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | more, start_new_session=True
            )
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


def _nodes(place: Any, ranks: int) -> list[str]:
    """What Composer's launcher is to know of the job's nodes, if there are several; all have as many ranks."""
    if place.num_nodes == 1:
        return []
    port = _PORTS[int(place.raw_job_id) % len(_PORTS)]
    nodes = ['--world_size', str(place.num_nodes * ranks), '--node_rank', str(place.node)]
    return [*nodes, '--master_addr', place.hostnames[0], '--master_port', str(port)]


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
        os.killpg(process.pid, signal.SIGKILL)
