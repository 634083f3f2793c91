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
import ctypes
import gc
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer import Trainer
from row import row
from torch import nn

from composer_kd import KnowledgeDistillation, NetworkTeacher, models

TEMPERATURE, KD_WEIGHT, LABEL_WEIGHT = 4.0, 0.9, 0.1
SGD: dict[str, Any] = {'lr': 0.01, 'momentum': 0.9}
CLASSES = 1000
SPREAD = 2 * TEMPERATURE  # of the teacher's logits: large enough for a wrong KD loss to show
LARGEST_GAP = 0.02  # how far apart weights may end, as a share of the way that they have come


@dataclass
class Setting:
    """What all have in common; each works on copies of its own."""

    student: Any  # ComposerClassifier
    teacher: Any  # ComposerClassifier
    batch_size: int
    device: torch.device

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher as bare networks."""
        student, teacher = copy.deepcopy(self.student.module), copy.deepcopy(self.teacher.module)
        return student.train(), teacher.eval().requires_grad_(False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision: on a GPU that which Composer calls amp_bf16, on a CPU fp32."""
        return torch.autocast('cuda', torch.bfloat16) if self.device.type == 'cuda' else nullcontext()


class Batches:
    """Hands out batches for a number of steps and one more, and times the steps from the first batch to the last."""

    def __init__(self, batches: list[Any], steps: int, on_gpu: bool):
        self.batches = batches
        self.steps = steps
        self.on_gpu = on_gpu
        self.times: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            if number in (0, self.steps):
                if self.on_gpu:
                    torch.cuda.synchronize()
                self.times.append((time.perf_counter(), time.process_time()))
            yield self.batches[number % len(self.batches)]

    def seconds(self) -> tuple[float, float]:
        """Wall clock and CPU time of one step."""
        (wall, cpu), (wall_end, cpu_end) = self.times
        return (wall_end - wall) / self.steps, (cpu_end - cpu) / self.steps


Train = Callable[[Batches], object]  # does one step with every batch
Build = Callable[[Setting], tuple[nn.Module, Train]]


def sgd(student: nn.Module) -> torch.optim.SGD:
    """The optimizer of all."""
    return torch.optim.SGD([parameter for parameter in student.parameters() if parameter.requires_grad], **SGD)


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


def loss_by_hand(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Both losses as one writes them."""
    log_q = F.log_softmax(logits / TEMPERATURE, dim=-1)
    p = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
    kd_loss = F.kl_div(log_q, p, reduction='batchmean') * TEMPERATURE**2
    return LABEL_WEIGHT * F.cross_entropy(logits, labels) + KD_WEIGHT * kd_loss


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


def composer(setting: Setting, *algorithms: KnowledgeDistillation) -> tuple[nn.Module, Train]:
    """Composer's Trainer as people get it: with training metrics, all events, a loss that is read every step."""
    student = copy.deepcopy(setting.student)
    on_gpu = setting.device.type == 'cuda'
    trainer = Trainer(
        model=student,
        optimizers=sgd(student),
        algorithms=algorithms,
        device='gpu' if on_gpu else 'cpu',
        precision='amp_bf16' if on_gpu else 'fp32',
        device_train_microbatch_size=setting.batch_size,
        spin_dataloaders=False,
        progress_bar=False,
    )
    return student, lambda batches: trainer.fit(train_dataloader=batches, duration='1ep')


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
    from torchdistill.core.distillation import get_distillation_box  # pyright: ignore[reportMissingImports]

    student, teacher = setting.networks()
    network = {'forward_proc': 'forward_batch_only'}
    ends = {
        f'{side}_module_{what}': at for side in ('student', 'teacher') for what, at in (('path', '.'), ('io', 'output'))
    }
    loss = {'key': 'KDLoss', 'kwargs': {**ends, 'temperature': TEMPERATURE, 'alpha': LABEL_WEIGHT}}
    config = {
        'num_epochs': 1,
        'student': network,
        'teacher': {**network, 'requires_grad': False},
        'optimizer': {'key': 'SGD', 'kwargs': dict(SGD)},
        'criterion': {'key': 'WeightedSumLoss', 'kwargs': {'sub_terms': {'kd': {'criterion': loss, 'weight': 1.0}}}},
    }
    box = get_distillation_box(teacher, student, {}, config, setting.device, None, False, 1)

    def train(batches: Batches) -> None:
        box.pre_epoch_process(epoch=0)
        for images, labels in batches:
            with setting.autocast():
                loss = box.forward_process(images, labels, None)
            box.post_forward_process(loss=loss)

    return student, train


def textbrewer(setting: Setting) -> tuple[nn.Module, Train]:
    """Its distiller's own training loop."""
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig  # pyright: ignore[reportMissingImports]

    class GivenTheBatch(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.network(images)

    student, teacher = setting.networks()
    optimizer = sgd(student)
    distiller = BasicDistiller(
        TrainingConfig(output_dir=tempfile.gettempdir(), device=str(setting.device), ckpt_steps=10**9),
        DistillationConfig(TEMPERATURE, kd_loss_weight=KD_WEIGHT * TEMPERATURE**2, hard_label_weight=LABEL_WEIGHT),
        GivenTheBatch(teacher),
        GivenTheBatch(student),
        lambda batch, logits: {'logits': logits},
        lambda batch, logits: {'logits': logits, 'losses': F.cross_entropy(logits, batch[1])},
    )
    losses_of = distiller.train_on_batch

    def losses_in_precision(*arguments: Any) -> Any:
        with setting.autocast():
            return losses_of(*arguments)

    distiller.train_on_batch = losses_in_precision

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


class Variant:
    """One that takes its turns."""

    def __init__(self, build: Build, setting: Setting):
        self.student, self.train = build(setting)
        self.on_gpu = setting.device.type == 'cuda'
        self.seconds: list[tuple[float, float]] = []  # of a step in each round: by the clock, and of the CPU
        self.memory = 0  # bytes of the device that its steps need for a while

    def turn(self, batches: list[Any], steps: int) -> None:
        """Train for a while."""
        resident = torch.cuda.memory_allocated() if self.on_gpu else 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        clock = Batches(batches, steps, self.on_gpu)
        self.train(clock)
        self.seconds.append(clock.seconds())
        self.memory = torch.cuda.max_memory_allocated() - resident if self.on_gpu else 0

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All that training changes: the parameters, and the running statistics of normalization."""
        state = {name: value for name, value in self.student.state_dict().items() if value.is_floating_point()}
        running = [state.pop(name) for name in [*state] if name.endswith(('running_mean', 'running_var'))]
        return flat([*state.values()]), flat(running)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values in one row."""
    return torch.cat([torch.zeros(0), *(tensor.detach().cpu().double().flatten() for tensor in tensors)])


def compare(variants: dict[str, Variant], start: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """How far each is from the one that does the same work, as a share of the way that this has come."""
    gaps = {}
    for name, twin in TWINS.items():
        if name in variants:
            triples = zip(variants[name].weights(), variants[twin].weights(), start, strict=True)
            gaps[name] = max(
                float((own - goal).norm() / (goal - began).norm()) for own, goal, began in triples if len(own)
            )
            if not gaps[name] <= LARGEST_GAP:
                raise SystemExit(
                    f'{name} does other work than {twin}: its weights differ by {gaps[name]:.2g} of the way'
                )
    return gaps


def main() -> None:
    arguments = options()
    keep_freed_memory()
    device = torch.device(arguments.device)
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(17)
    memory_format = torch.channels_last if device.type == 'cuda' else torch.contiguous_format
    student, teacher = (
        getattr(models, name)(num_classes=CLASSES).to(device, memory_format=memory_format)
        for name in (arguments.student, arguments.teacher)
    )
    shape = arguments.batch_size, 3, arguments.image_size, arguments.image_size
    batches = [
        (torch.randn(shape).to(device, memory_format=memory_format), torch.randint(CLASSES, shape[:1]).to(device))
        for _ in range(2)
    ]
    settle(teacher.module, batches[0][0])

    setting = Setting(student, teacher, arguments.batch_size, device)
    builds = list(OURS)
    for build in PEERS:
        if installed(build.__name__):
            builds.append(build)
        else:
            print(f'{build.__name__} is not installed, or too old: left out')
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


def rotated(items: list[Any], number: int) -> list[Any]:
    """In the order of a round: another one than in the last."""
    shift = number % len(items)
    return (items[shift:] + items[:shift])[:: 1 if number % 2 else -1]


def keep_freed_memory() -> None:
    """Have the C library keep what is freed.

    Whether it hands memory back at the end of a step, to fetch it again page by page in the next, hangs on the order in
    which this or that loop allocates: luck, which made up to 6 % of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):  # glibc
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def settle(teacher: nn.Module, images: torch.Tensor) -> None:
    """Let an untrained network teach as a trained one does: with running statistics, and with logits far apart."""
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    head = [module for module in teacher.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        teacher.train()(images)
        head.weight *= SPREAD / teacher.eval()(images).std()


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


Seconds = dict[str, list[tuple[float, float]]]  # of each in every round: by the clock, and of the CPU


def medians(seconds: Seconds) -> dict[str, tuple[float, float]]:
    """Of the rounds."""
    return {
        name: (statistics.median(w for w, _ in s), statistics.median(c for _, c in s)) for name, s in seconds.items()
    }


def compare_times(seconds: Seconds, ratios: dict[str, tuple[list[str], list[str]]]) -> dict[str, Any]:
    """Print ratios of sums, medians over the rounds; and give them, with all that a row says of time."""
    print(f'\n{"ratio": <52}{"by the clock": >14}{"quartiles": >18}{"CPU time": >12}')
    found, quartiles, cpu_found = {}, {}, {}
    for name, (above, below) in ratios.items():
        walls, cpus = (
            [
                sum(seconds[a][turn][clock] for a in above) / sum(seconds[b][turn][clock] for b in below)
                for turn in range(len(seconds[above[0]]))
            ]
            for clock in (0, 1)
        )
        found[name], cpu_found[name] = round(statistics.median(walls), 4), round(statistics.median(cpus), 4)
        low, _, high = statistics.quantiles(walls, n=4, method='inclusive')
        quartiles[name] = [round(low, 4), round(high, 4)]
        print(f'{name: <52}{found[name]: >14.3f}{f"{low:.3f} - {high:.3f}": >18}{cpu_found[name]: >12.3f}')
    print()
    return {
        'ratios': found,
        'quartiles': quartiles,
        'cpu_time_ratios': cpu_found,
        'seconds': {name: round(wall, 6) for name, (wall, _) in medians(seconds).items()},
    }


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
