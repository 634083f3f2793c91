"""How what Composer's launcher would run is started, at once where one process is enough, and how it ends.

Imports nothing slow.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence

# What the launcher tells the only rank.
_ONE_RANK = {
    **dict.fromkeys(('RANK', 'LOCAL_RANK', 'NODE_RANK'), '0'),
    **dict.fromkeys(('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'PYTHONUNBUFFERED', 'TORCH_NCCL_ASYNC_ERROR_HANDLING'), '1'),
    'MASTER_ADDR': '127.0.0.1',
}

_SECONDS_FOR_THREADS = 0.1


def launching(arguments: Sequence[str], ranks: int, nodes: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command to start, and what it needs in its environment beside what is there.

    Args:
        arguments: What a person would type after `composer`: a recipe and its overrides, or `-m` and a module.
        ranks: On this machine.
        nodes: What the launcher is told about other machines. Default: none, there are no others.
    """
    if ranks == 1 and not nodes:  # the launcher would import Composer only to wait for what imports it again
        command = [sys.executable, arguments[0], *map(os.path.expandvars, arguments[1:])]
        return command, {**_ONE_RANK, 'MASTER_PORT': str(_free_port())}
    place = nodes or ['--master_port', str(_free_port())]
    return [sys.executable, '-m', 'composer', '-n', str(ranks), *place, *arguments], {}


def leave_ranks() -> None:
    """Part from the other ranks, if there are any, when all have done their work."""
    import torch.distributed

    if torch.distributed.is_initialized():
        # Gloo's threads free the tensors of what was gathered last, for which they need Python's lock; torch keeps it
        # while it waits for these threads to end. So they get it now.
        torch.distributed.barrier()
        time.sleep(_SECONDS_FOR_THREADS)
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
