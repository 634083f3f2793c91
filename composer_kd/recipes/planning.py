"""A recipe with `blockwise` -> where its blocks are to go, and how long a step will take."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer.core import DataSpec
from composer.utils import get_device
from torch.distributed import HashStore

from composer_kd.blockwise.forecast import draw, forecast, table
from composer_kd.blockwise.plan import Device, best, layer_split
from composer_kd.blockwise.profile import Link, Profile, ProfileError, fit, measure
from composer_kd.blockwise.settings import Blockwise
from composer_kd.files import write
from composer_kd.recipes.blockwise_run import batch_of, networks
from composer_kd.recipes.check import Plan, check
from composer_kd.recipes.load import RecipeError, load

_SIZES = (1 << 12, 1 << 18, 1 << 21)  # bytes of messages that are timed
_BATCHES = 5  # that are loaded
_ROUNDS = 5


def plan_recipe(
    file: str | Path,
    overrides: Sequence[str],
    *,
    devices: int,
    profile: str | Path | None = None,
    out: str | Path | None = None,
) -> None:
    """Find the best plan, print it beside the baselines, and write it down if somebody says where.

    Args:
        file: The recipe.
        overrides: For it.
        devices: How many there are.
        profile: A file with what blocks cost. Default: None, what the recipe says, or what they cost here.
        out: A folder, for `profile.json`, `plan.json` and `plan.png`. Default: None.

    Raises:
        RecipeError: The recipe is wrong, or there is no plan.
    """
    plan = check(load(file, overrides))
    if plan.blockwise is None:
        raise plan.recipe.error((), 'there is no `blockwise` section, so that there is nothing to plan')
    if devices < 1:
        raise plan.recipe.error(('blockwise',), f'there must be 1 device or more, not {devices}')
    settings: Blockwise = plan.blockwise()
    given = profile or settings.profile
    try:
        costs_of = Profile.load(given) if given else _measured(plan, settings, devices)
        costs, all_devices = costs_of.costs(devices), [Device()] * devices
        found = best(costs, all_devices)
    except RecipeError:
        raise
    except ProfileError as error:
        raise plan.recipe.error(('blockwise', 'profile'), str(error), exit_code=1) from error
    except ValueError as error:
        raise plan.recipe.error(('blockwise',), str(error), exit_code=1) from error
    promised = forecast(costs, all_devices, found, depth=settings.depth)
    title = f'{Path(file).stem}, {devices} x {costs_of.device}, batches of {costs_of.batch_size}'
    print(title, table(promised), sep='\n', flush=True)
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    costs_of.save(folder / 'profile.json')
    draw(promised, folder / 'plan.png', title)
    said = {
        'blocks': [[stage.blocks.start, stage.blocks.stop] for stage in found.stages],
        'devices': [[stage.devices.start, stage.devices.stop] for stage in found.stages],
        'seconds': list(found.seconds),
        'steps': promised.steps,
        'layer_split': layer_split(costs, all_devices)[1],
    }
    write(folder / 'plan.json', json.dumps(said) + '\n')


def _measured(plan: Plan, settings: Blockwise, devices: int) -> Profile:
    """What blocks cost here."""
    on_gpu = get_device(plan.trainer.get('device')).name == 'gpu'
    if not on_gpu and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices))  # as in a launch of so many processes
    _, pairs = networks(plan, settings)
    data = plan.train_data()
    inputs, labels = batch_of(plan, data)
    optimizer: Callable[..., Any] = plan.optimizer or torch.optim.AdamW
    send, average = _links_of_gpus() if on_gpu else _links_of_cores()
    return measure(
        pairs,
        inputs,
        devices,
        lambda parameters: optimizer(params=parameters),
        device='cuda' if on_gpu else 'cpu',
        labels=labels if settings.label_weight else None,
        data=_seconds_to_load(data),
        send=send,
        average=average,
    )


def _seconds_to_load(data: DataSpec) -> float:
    """The median of the first batches, but for the very first."""
    times = [time.perf_counter()]
    for _ in itertools.islice(iter(data.dataloader), _BATCHES):
        times.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(times[1:])) if times[2:] else 0.0


def _links_of_cores() -> tuple[Link, Link]:
    """Between two processes of this machine, here two threads, which send by the same means."""
    store, found = HashStore(), {}

    def talk(rank: int) -> None:
        group: Any = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        for size in _SIZES:
            tensor, move = torch.zeros(size, dtype=torch.uint8), group.send if rank == 0 else group.recv
            sends = [_timed(partial(move, [tensor], 1 - rank, 0)) for _ in range(_ROUNDS)]
            averages = [_timed(partial(group.allreduce, [tensor.view(torch.float32)])) for _ in range(_ROUNDS)]
            found[rank, size] = statistics.median(sends), statistics.median(averages)
        group.barrier().wait()
        time.sleep(0.1)  # for its threads to free what they hold, for which they need Python's lock

    threads = [threading.Thread(target=talk, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sends, averages = ([found[1, size][which] for size in _SIZES] for which in range(2))
    return fit(_SIZES, sends), fit(_SIZES, averages)


def _timed(begin: Callable[[], Any]) -> float:
    before = time.perf_counter()
    begin().wait()
    return time.perf_counter() - before


def _links_of_gpus() -> tuple[Link, Link]:
    """From one GPU to another one, or within the only one."""
    other = torch.device('cuda', min(1, torch.cuda.device_count() - 1))
    seconds = []
    for size in _SIZES:
        tensor, runs = torch.zeros(size, dtype=torch.uint8, device='cuda'), []
        for _ in range(_ROUNDS):
            torch.cuda.synchronize()
            before = time.perf_counter()
            tensor.to(other, copy=True)
            torch.cuda.synchronize(other)
            runs.append(time.perf_counter() - before)
        seconds.append(statistics.median(runs))
    link = fit(_SIZES, seconds)
    return link, link
