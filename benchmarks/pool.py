"""What a pool of teachers costs, in time and in memory, when one of them is heard per batch, or all.

    python benchmarks/pool.py [--quick] [--student resnet50 --teacher resnet101 ...]

Time: a step with one teacher, with one sampled of 16, and with the mean of 16, as `step_time.py` measures: in turns
within one process, in another order every round; a ratio is the median over the rounds of the ratios within a round.
The 16 are copies of one network, so that all must come to the same weights, or there is no result. On a GPU the pool
is sampled twice: with all teachers on the device, and with those on the host that are not heard in this batch or the
next.

Memory: for pools of 1, 2, 4, 8 and 16, on a GPU the most that was allocated on the device in a few steps, student and
all; on a CPU, where host and device are one, the most that the weights of those teachers took which a GPU would hold.
"""

import argparse
import copy
import functools
import gc
import warnings
from typing import Any, Literal

import torch
from bench_parts import (
    KD_WEIGHT,
    LABEL_WEIGHT,
    TEMPERATURE,
    Batches,
    Setting,
    Variant,
    Weights,
    build,
    compare_times,
    composer,
    rotated,
    sgd,
    small_gap,
)
from composer import Callback, Trainer
from row import row
from step_time import options

from composer_kd import KnowledgeDistillation, NetworkTeacher, TeacherSampling

SIZES, SIZES_IF_QUICK = [1, 2, 4, 8, 16], [1, 2, 4]
STEPS_IN_MEMORY = 3

Residency = Literal['device', 'host']
WAYS: dict[str, tuple[bool, Residency]] = {
    'sampled, host': (True, 'host'),
    'sampled, device': (True, 'device'),
    'average, device': (False, 'device'),
}


def algorithms(teacher: Any, number: int, sampled: bool, residency: Residency) -> list[Any]:
    """Distillation from copies of a teacher, which are on the host until it begins."""
    pool = [NetworkTeacher(copy.deepcopy(teacher).cpu()) for _ in range(number)]
    distillation = KnowledgeDistillation(
        pool, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, label_weight=LABEL_WEIGHT, residency=residency
    )
    return [distillation, *([TeacherSampling()] if sampled else [])]


def run_with_pool(setting: Setting, *, number: int, sampled: bool, residency: Residency) -> Any:
    """A run of the Trainer with a pool."""
    return composer(setting, *algorithms(setting.teacher, number, sampled, residency))


def variants(number: int, on_gpu: bool) -> dict[str, Any]:
    """Those that take turns."""
    found = {
        'one_teacher': functools.partial(run_with_pool, number=1, sampled=False, residency='device'),
        f'sampled_{number}': functools.partial(run_with_pool, number=number, sampled=True, residency='device'),
        f'average_{number}': functools.partial(run_with_pool, number=number, sampled=False, residency='device'),
    }
    if on_gpu:
        found[f'sampled_{number}_host'] = functools.partial(
            run_with_pool, number=number, sampled=True, residency='host'
        )
    return found


def step_times(setting: Setting, batches: list[Any], number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let all take turns; the figures of a row."""
    builds = variants(number, setting.device.type == 'cuda')
    present = {name: Variant(start, setting) for name, start in builds.items()}
    start = present['one_teacher'].weights()
    gaps: dict[str, float] = {}
    gc.disable()
    for turn in range(arguments.rounds + 1):
        for variant in rotated([*present.values()], turn):
            variant.turn(batches, arguments.steps if turn else 1)
        gc.collect()
        if turn == 0:  # was to warm up, and is short because rounding errors grow
            gaps = compare(present, start)
            for variant in present.values():
                variant.seconds.clear()
    gc.enable()
    seconds = {name: variant.seconds for name, variant in present.items()}
    ratios = {f'{name} / one_teacher': ([name], ['one_teacher']) for name in present if name != 'one_teacher'}
    return {**compare_times(seconds, ratios), 'gaps': gaps}


def compare(present: dict[str, Variant], start: Weights) -> dict[str, float]:
    """How far each is from the run with one teacher, as a share of the way that this has come."""
    goals = present['one_teacher'].weights()
    others = {name: variant.weights() for name, variant in present.items() if name != 'one_teacher'}
    return {name: small_gap(name, 'one_teacher', own, goals, start) for name, own in others.items()}


class Most(Callback):
    """The most bytes that the teachers' weights took while they were asked."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.bytes = 0

    def after_forward(self, state: Any, logger: Any) -> None:
        """Look."""
        self.bytes = max(self.bytes, self.pool.bytes_on_device)


def memory(setting: Setting, batches: list[Any], number: int, sampled: bool, residency: Residency) -> int:
    """Bytes that a run with a pool of so many takes."""
    student = copy.deepcopy(setting.student)
    distilling = algorithms(setting.teacher, number, sampled, residency)
    most, on_gpu = Most(distilling[0].pool), setting.device.type == 'cuda'
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        model=student,
        optimizers=sgd(student),
        algorithms=distilling,
        callbacks=most,
        train_dataloader=Batches(batches, STEPS_IN_MEMORY, on_gpu),
        max_duration='1ep',
        device='gpu' if on_gpu else 'cpu',
        precision='amp_bf16' if on_gpu else 'fp32',
        device_train_microbatch_size=setting.batch_size,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return torch.cuda.max_memory_allocated() if on_gpu else most.bytes


def memory_by_size(setting: Setting, batches: list[Any], sizes: list[int]) -> dict[str, Any]:
    """Print what pools of several sizes take; the figures of a row."""
    on_gpu = setting.device.type == 'cuda'
    what = 'peak_memory_mib' if on_gpu else 'weights_of_teachers_mib'
    found = {
        name: {size: round(memory(setting, batches, size, *way) / 2**20, 2) for size in sizes}
        for name, way in WAYS.items()
    }
    title = 'the most that was allocated on the device' if on_gpu else 'weights of teachers that a device would hold'
    print(f'\nMiB, {title}, by the number of teachers\n')
    print(f'{"": <20}' + ''.join(f'{size: >10}' for size in sizes))
    for name, by_size in found.items():
        print(f'{name: <20}' + ''.join(f'{mib: >10}' for mib in by_size.values()))
    print()
    # One teacher has no next one beside it.
    growth = {f'{name}: {sizes[-1]} / 2': round(by[sizes[-1]] / by[2], 4) for name, by in found.items()}
    return {what: found, 'memory_ratios': growth}


def main() -> None:
    arguments = options('what a pool of teachers costs')
    setting, batches = build(arguments)
    setting.teacher.cpu()
    print(
        f'{arguments.student} from {arguments.teacher}, '
        f'{arguments.batch_size} x {arguments.image_size} x {arguments.image_size}, {arguments.device}, '
        f'{torch.get_num_threads()} threads: medians of {arguments.rounds} rounds of {arguments.steps} steps'
    )
    sizes = SIZES_IF_QUICK if arguments.quick else SIZES
    of_memory = memory_by_size(setting, batches, sizes)
    of_time = step_times(setting, batches, sizes[-1], arguments)
    print(row('pool', **of_time, **of_memory, setting=vars(arguments)))


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries, of which there are many
    main()
