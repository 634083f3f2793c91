"""How long one step of distillation takes: ours, a plain loop's, other libraries', on the same networks and batches.

    python benchmarks/step_time.py [--quick] [--student resnet50 --teacher resnet101 ...]

All start from the same weights, see the same batches and must come to the same weights, or there is no result. They
take turns within one process, a few steps each, in another order every round, with Python's garbage collector off. The
clock is in the iterator that hands out the batches, and sees the same of each: all that happens from one batch to the
next. A ratio is the median over the rounds of the ratios within a round. On CPU cores that others use too, set
OMP_NUM_THREADS=1: threads that wait for each other wait for everybody.
"""

import argparse
import copy
import gc
import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench_parts import (
    CLASSES,
    KD_WEIGHT,
    LABEL_WEIGHT,
    TEMPERATURE,
    Batches,
    Build,
    Setting,
    Train,
    Variant,
    Weights,
    build,
    compare_times,
    composer,
    loss_by_hand,
    medians,
    rotated,
    sgd,
    small_gap,
    textbrewer_distiller,
    torchdistill_box,
)
from row import row
from torch import nn

from composer_kd import KnowledgeDistillation, NetworkTeacher, models


def student_step(setting: Setting) -> tuple[nn.Module, Train]:
    """A part of the work: a step without a teacher."""
    student, _ = setting.networks()
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        for images, labels in batches:
            with setting.autocast():
                loss = F.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return student, train


def teacher_forward(setting: Setting) -> tuple[nn.Module, Train]:
    """The other part of the work: the teacher's forward pass."""
    student, teacher = setting.networks()

    def train(batches: Batches) -> None:
        for images, _ in batches:
            with torch.no_grad(), setting.autocast():
                teacher(images)

    return student, train


def plain_loop(setting: Setting) -> tuple[nn.Module, Train]:
    """Distillation as one writes it by hand."""
    student, teacher = setting.networks()
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        for images, labels in batches:
            with setting.autocast():
                with torch.no_grad():
                    teacher_logits = teacher(images)
                logits = student(images)
                loss = loss_by_hand(logits, teacher_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return student, train


def composer_student(setting: Setting) -> tuple[nn.Module, Train]:
    """A step of the Trainer without a teacher."""
    return composer(setting)


def composer_kd(setting: Setting) -> tuple[nn.Module, Train]:
    """Ours."""
    teacher = NetworkTeacher(copy.deepcopy(setting.teacher))
    distillation = KnowledgeDistillation(
        teacher, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, label_weight=LABEL_WEIGHT
    )
    return composer(setting, distillation)


def torchdistill(setting: Setting) -> tuple[nn.Module, Train]:
    """Its distillation box, driven by the loop of its examples."""
    student, box = torchdistill_box(setting)

    def train(batches: Batches) -> None:
        box.pre_epoch_process(epoch=0)
        for images, labels in batches:
            with setting.autocast():
                loss = box.forward_process(images, labels, None)
            box.post_forward_process(loss=loss)

    return student, train


def textbrewer(setting: Setting) -> tuple[nn.Module, Train]:
    """Its distiller's own training loop."""
    student, distiller = textbrewer_distiller(setting, {'output_dir': tempfile.gettempdir(), 'ckpt_steps': 10**9})
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        # The folder is for the checkpoint that it writes behind the last step.
        with tempfile.TemporaryDirectory() as distiller.t_config.output_dir, distiller:
            distiller.train(optimizer, batches, num_steps=len(batches))

    return student, train


def modelopt(setting: Setting) -> tuple[nn.Module, Train]:
    """Its converted model in a loop as of its examples."""
    import modelopt.torch.distill as mtd  # pyright: ignore[reportMissingImports]

    student, teacher = setting.networks()
    config = {
        'teacher_model': teacher,
        'criterion': mtd.LogitsDistillationLoss(TEMPERATURE, reduction='batchmean'),
        'loss_balancer': mtd.StaticLossBalancer(KD_WEIGHT),
    }
    model: Any = mtd.convert(student, mode=[('kd_loss', config)])
    model.train()
    optimizer = sgd(model)

    def train(batches: Batches) -> None:
        for images, labels in batches:
            with setting.autocast():
                loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(images), labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return model, train


def timm(setting: Setting) -> tuple[nn.Module, Train]:
    """Its task in a loop as of its training script."""
    from timm.task import LogitDistillationTask

    student, teacher = setting.networks()
    for network in (student, teacher):  # what its networks have, and others have not
        vars(network).update(
            num_classes=CLASSES,
            in_chans=3,
            pretrained_cfg={'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)},
        )
    task = LogitDistillationTask(
        student,
        teacher,
        nn.CrossEntropyLoss(),
        task_loss_weight=LABEL_WEIGHT,
        distill_loss_weight=KD_WEIGHT,
        temperature=TEMPERATURE,
        device=setting.device,
        verbose=False,
    )
    task.train()
    optimizer = sgd(student)

    def train(batches: Batches) -> None:
        for images, labels in batches:
            with setting.autocast():
                loss = task(images, labels)['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return student, train


OURS = (student_step, teacher_forward, plain_loop, composer_student, composer_kd)
PEERS = (torchdistill, textbrewer, modelopt, timm)
TWINS = {
    'composer_student': 'student_step',
    'dense_loop': 'plain_loop',  # of step_time_bert.py
    **dict.fromkeys(('composer_kd', *(p.__name__ for p in PEERS)), 'plain_loop'),
}
RATIOS = {
    **{f'{name} / {twin}': ([name], [twin]) for name, twin in TWINS.items()},
    'composer_kd / (composer_student + teacher_forward)': (['composer_kd'], ['composer_student', 'teacher_forward']),
    'composer_kd / dense_loop': (['composer_kd'], ['dense_loop']),
    'plain_loop / (student_step + teacher_forward)': (['plain_loop'], ['student_step', 'teacher_forward']),
}


def compare(variants: dict[str, Variant], start: Weights) -> dict[str, float]:
    """How far each is from the one that does the same work, as a share of the way that this has come."""
    return {
        name: small_gap(name, twin, variants[name].weights(), variants[twin].weights(), start)
        for name, twin in TWINS.items()
        if name in variants
    }


def main() -> None:
    arguments = options()
    setting, batches = build(arguments)
    builds = list(OURS)
    for peer in PEERS:
        if installed(peer.__name__):
            builds.append(peer)
        else:
            print(f'{peer.__name__} is not installed, or too old: left out')
    title = (
        f'{arguments.student} from {arguments.teacher}, '
        f'{arguments.batch_size} x {arguments.image_size} x {arguments.image_size}'
    )
    measure('step_time', title, builds, setting, batches, arguments)


def measure(
    benchmark: str,
    title: str,
    builds: Sequence[Build],
    setting: Setting,
    batches: list[Any],
    arguments: argparse.Namespace,
) -> None:
    """Let all take turns, and report; the first of `builds` tells where all start."""
    start = Variant(builds[0], setting).weights()
    variants = {build.__name__: Variant(build, setting) for build in builds}
    gaps: dict[str, float] = {}
    gc.disable()
    for number in range(arguments.rounds + 1):
        for variant in rotated([*variants.values()], number):
            variant.turn(batches, arguments.steps if number else 1)
        gc.collect()
        if number == 0:  # was to warm up, and is short because rounding errors grow
            gaps = compare(variants, start)
            for variant in variants.values():
                variant.seconds.clear()
    report(benchmark, title, arguments, variants, gaps)


def installed(peer: str) -> bool:
    """Whether a library is there, with what is needed of it."""
    return importlib.util.find_spec(peer) is not None and (
        peer != 'timm' or importlib.util.find_spec('timm.task') is not None
    )


def report(
    benchmark: str, title: str, arguments: argparse.Namespace, variants: dict[str, Variant], gaps: dict[str, float]
) -> None:
    """Print a table, and the line of JSON."""
    on_gpu = arguments.device == 'cuda'
    print(
        f'\n{title}, {arguments.device}, {torch.get_num_threads()} threads: '
        f'medians of {arguments.rounds} rounds of {arguments.steps} steps'
    )
    print(f'\n{"": <20}{"s/step": >10}{"CPU s": >10}{"GiB": >10}{"weights differ by": >20}')
    seconds = {name: variant.seconds for name, variant in variants.items()}
    memory = {name: round(variant.memory / 2**30, 3) if on_gpu else None for name, variant in variants.items()}
    for name, (wall, cpu) in medians(seconds).items():
        gap = f'{gaps[name]:.1e} of the way' if name in gaps else ''
        print(f'{name: <20}{wall: >10.4f}{cpu: >10.4f}{memory[name] or "": >10}{gap: >20}')
    present = {name: sides for name, sides in RATIOS.items() if set(sides[0] + sides[1]) <= set(variants)}
    figures = compare_times(seconds, present)
    print(row(benchmark, **figures, peak_memory_gib=memory, gaps=gaps, setting=vars(arguments)))


def options(what: str = 'one step of distillation, ours and that of others') -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f'Times {what}.')
    networks = [name for name in models.__all__ if 'resn' in name]  # no dropout: all must do the same
    parser.add_argument('--quick', action='store_true', help='see in seconds that it works; the figures mean nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--student', choices=networks, help='default: resnet50 on a GPU, cifar_resnet20 on a CPU')
    parser.add_argument('--teacher', choices=networks, help='default: resnet101 on a GPU, cifar_resnet56 on a CPU')
    parser.add_argument('--batch-size', type=int, help='default: 256 on a GPU, 64 on a CPU')
    parser.add_argument('--image-size', type=int, help='default: 224 on a GPU, 32 on a CPU')
    parser.add_argument('--rounds', type=int, help='default: 20')
    parser.add_argument('--steps', type=int, help='steps in a round; default: 20 on a GPU, 3 on a CPU')
    arguments = parser.parse_args()
    defaults = {
        'student': 'cifar_resnet20',
        'teacher': 'cifar_resnet56',
        'batch_size': 64,
        'image_size': 32,
        'steps': 3,
    }
    if arguments.device == 'cuda':
        defaults = {'student': 'resnet50', 'teacher': 'resnet101', 'batch_size': 256, 'image_size': 224, 'steps': 20}
    if arguments.quick:
        defaults |= {'batch_size': 8, 'steps': 1}
    for name, value in {**defaults, 'rounds': 2 if arguments.quick else 20}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.rounds < 2 or arguments.steps < 1:
        parser.error('it takes at least 2 rounds of 1 step')
    return arguments


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries, of which there are many
    main()
