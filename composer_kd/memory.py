"""What closed Trainers leave behind: memory, and processes."""

import atexit
import gc

import torch
import torch.distributed.checkpoint.state_dict
from composer.core import Engine, State


def free_closed_runs() -> None:
    """Let go of closed Trainers, whose state Composer's exit handlers and torch's cache of parameter names would keep.

    Whoever still holds one keeps it. Trainers that are open are closed as Python ends, as before.
    """
    atexit.unregister(Engine._close)  # of all Trainers: there is no way to name one
    names = getattr(torch.distributed.checkpoint.state_dict, '_get_fqns', None)
    if names and hasattr(names, 'cache_clear'):
        names.cache_clear()
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) is Engine and not thing._is_closed:
            atexit.register(Engine._close, thing.state, thing.logger)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def end_workers(state: State) -> None:
    """End the workers that load a closed Trainer's evaluation data; Composer ends those of the training data alone.

    Once they are garbage, Python would wait for each of them for five seconds.
    """
    for evaluator in state.evaluators:
        iterator = getattr(evaluator.dataloader.dataloader, '_iterator', None)  # of workers that live on
        if iterator is not None:
            iterator._shutdown_workers()
