"""What the benchmarks of a step share: networks and batches, turns, clocks, ratios, and peers that are set up alike."""

import argparse
import copy
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer import Trainer
from torch import nn

from composer_kd import KnowledgeDistillation, models

Weights = tuple[torch.Tensor, torch.Tensor]  # parameters, and running statistics

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


def loss_by_hand(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Both losses as one writes them."""
    log_q = F.log_softmax(logits / TEMPERATURE, dim=-1)
    p = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
    kd_loss = F.kl_div(log_q, p, reduction='batchmean') * TEMPERATURE**2
    return LABEL_WEIGHT * F.cross_entropy(logits, labels) + KD_WEIGHT * kd_loss


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
        seed=17,  # by which teachers are sampled, too
        spin_dataloaders=False,
        progress_bar=False,
    )
    return student, lambda batches: trainer.fit(train_dataloader=batches, duration='1ep')


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

    def weights(self) -> Weights:
        """Of its student, as of `weights`."""
        return weights(self.student)


def weights(student: nn.Module) -> Weights:
    """All that training changes: the parameters, and the running statistics of normalization."""
    state = {name: value for name, value in student.state_dict().items() if value.is_floating_point()}
    running = [state.pop(name) for name in [*state] if name.endswith(('running_mean', 'running_var'))]
    return flat([*state.values()]), flat(running)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values in one row."""
    return torch.cat([torch.zeros(0), *(tensor.detach().cpu().double().flatten() for tensor in tensors)])


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


def gap(own: Weights, goal: Weights, start: Weights) -> float:
    """How far one is from another, as a share of the way that this has come."""
    triples = zip(own, goal, start, strict=True)
    return max(float((one - other).norm() / (other - began).norm()) for one, other, began in triples if len(one))


def small_gap(name: str, twin: str, own: Weights, goal: Weights, start: Weights) -> float:
    """The same, of one that does the same work; there is no result if it does not."""
    found = gap(own, goal, start)
    if not found <= LARGEST_GAP:
        raise SystemExit(f'{name} does other work than {twin}: its weights differ by {found:.2g} of the way')
    return found


def build_networks(arguments: argparse.Namespace) -> tuple[Any, Any, torch.memory_format]:
    """Student and teacher, on the device, and how their images lie in memory."""
    keep_freed_memory()
    on_gpu = arguments.device == 'cuda'
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(17)
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    student, teacher = (
        getattr(models, name)(num_classes=CLASSES).to(arguments.device, memory_format=memory_format)
        for name in (arguments.student, arguments.teacher)
    )
    return student, teacher, memory_format


def build(arguments: argparse.Namespace) -> tuple[Setting, list[Any]]:
    """Student, a teacher that teaches as a trained one does, and two batches of noise."""
    student, teacher, memory_format = build_networks(arguments)
    shape = arguments.batch_size, 3, arguments.image_size, arguments.image_size
    batches = [
        (
            torch.randn(shape).to(arguments.device, memory_format=memory_format),
            torch.randint(CLASSES, shape[:1]).to(arguments.device),
        )
        for _ in range(2)
    ]
    settle(teacher.module, batches[0][0])
    return Setting(student, teacher, arguments.batch_size, torch.device(arguments.device)), batches


def torchdistill_box(setting: Setting) -> tuple[nn.Module, Any]:
    """A student, and torchdistill's distillation box, which teaches it."""
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
    return student, get_distillation_box(teacher, student, {}, config, setting.device, None, False, 1)


def textbrewer_distiller(setting: Setting, training: dict[str, Any], **distillation: Any) -> tuple[nn.Module, Any]:
    """A student, and TextBrewer's distiller, which teaches it; with more options of its two configurations."""
    from textbrewer import BasicDistiller, DistillationConfig, TrainingConfig  # pyright: ignore[reportMissingImports]

    class GivenTheBatch(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.network(images)

    student, teacher = setting.networks()
    weighted = {'kd_loss_weight': KD_WEIGHT * TEMPERATURE**2, 'hard_label_weight': LABEL_WEIGHT}
    distiller = BasicDistiller(
        TrainingConfig(device=str(setting.device), **training),
        DistillationConfig(TEMPERATURE, **weighted, **distillation),
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
    return student, distiller
