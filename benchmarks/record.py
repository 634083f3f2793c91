"""What recorded outputs cost: a step that learns from them, a sample on disk, and the recording itself.

    python benchmarks/record.py [--quick] [--student resnet50 --teacher resnet101 ...]

The student alone, taught by the network itself, taught by our records of it (the 10 largest logits, and all), and by
the stored outputs of other libraries: torchdistill's files, and TextBrewer's list in memory, which holds the batches
too, so that nothing is fetched any more. All start from the same weights, see the same batches at first, and must come
to the same weights as the one that asks the network, or there is no result; all but the one that knows 10 logits alone,
whose distance is told. They take turns as in step_time.py, an epoch each. Then recording takes turns with the teacher's
bare forward pass over the same loader. Last comes what the largest k logits leave unsaid: of the loss and of its
gradient, with the weight of the others, and without it.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from bench_parts import (
    CLASSES,
    KD_WEIGHT,
    LABEL_WEIGHT,
    SGD,
    TEMPERATURE,
    Batches,
    Seconds,
    Setting,
    Weights,
    build_networks,
    compare_times,
    composer,
    gap,
    medians,
    rotated,
    settle,
    sgd,
    small_gap,
    textbrewer_distiller,
    torchdistill_box,
    weights,
)
from composer.core import DataSpec
from row import row
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from composer_kd import KnowledgeDistillation, NetworkTeacher, RecordedTeacher, losses, models
from composer_kd.data.loader import data_spec
from composer_kd.data.normalization import Normalize
from composer_kd.data.tensor_images import TensorImages, whole_batch
from composer_kd.record import record
from composer_kd.topk import TopKLogits, topk_loss

TOP = 10
KS = (1, 2, 5, 10, 50, 100, CLASSES)


Moment = tuple[float, float]  # by the clock, and of the CPU

arrived: list[Moment] = []  # when the batches came that are being recorded


def now() -> Moment:
    """The present."""
    return time.perf_counter(), time.process_time()


def images(samples: int, size: int, batch_size: int, num_workers: int) -> DataSpec:
    """The training data of all: noise, held in memory, with random labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (samples, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    dataset = TensorImages(pixels, labels, normalize=Normalize('imagenet'))
    options = {'batch_size': batch_size, 'train': True, 'num_workers': num_workers, 'collate_fn': whole_batch}
    return data_spec(dataset, **options)


def images_to_record(samples: int, size: int, batch_size: int, num_workers: int) -> DataSpec:
    """The same, and a note of when each batch came."""

    def note(batch: Any) -> Any:
        arrived.append(now())
        return batch

    spec = images(samples, size, batch_size, num_workers)
    spec.batch_transforms = note  # afterwards, as it changes nothing that a record would be of
    return spec


class Clock(Batches):
    """A loader that is stopped after some steps, and the time of these, from the first batch to the last."""

    def __init__(self, loader: Any, steps: int, on_gpu: bool):
        super().__init__(loader, steps, on_gpu)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in zip(range(len(self)), self.batches, strict=False):
            if number in (0, self.steps):
                if self.on_gpu:
                    torch.cuda.synchronize()
                self.times.append(now())
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)


class Bench(Setting):
    """What all have in common, the data and the stored outputs among it."""

    def __init__(self, student: Any, teacher: Any, arguments: argparse.Namespace, folder: Path):
        super().__init__(student, teacher, arguments.batch_size, torch.device(arguments.device))
        self.data = {'samples': arguments.samples, 'size': arguments.image_size, 'batch_size': arguments.batch_size}
        self.data['num_workers'] = arguments.workers
        self.folder = folder
        self.on_gpu = arguments.device == 'cuda'
        torch.save(teacher.state_dict(), folder / 'teacher.pt')
        self.recipe = self._recipe(arguments)

    def loader(self) -> Any:
        """A new loader of the data."""
        return images(**self.data).dataloader

    def order(self, epoch: int) -> list[int]:
        """The samples in the order in which our loader gives them in an epoch."""
        sampler = DistributedSampler(range(self.data['samples']), 1, 0)  # pyright: ignore[reportArgumentType]
        sampler.set_epoch(epoch)
        return list(sampler)

    def record(self, name: str, top: int) -> Path:
        """Record what the teacher says, by the recipe."""
        with contextlib.redirect_stdout(io.StringIO()):
            record(self.recipe, out=self.folder / name, top=top)
        return self.folder / name

    def _recipe(self, arguments: argparse.Namespace) -> Path:
        network = {'name': arguments.teacher, 'num_classes': CLASSES}
        checkpoint = str(self.folder / 'teacher.pt')
        recipe = {
            'model': {'name': arguments.student, 'num_classes': CLASSES},
            'train_data': {'name': 'record.images_to_record', **self.data},
            'max_duration': '1ep',
            'optimizer': {'name': 'sgd', 'lr': SGD['lr']},
            'teachers': [{'name': 'network', 'model': network, 'checkpoint': checkpoint, 'channels_last': self.on_gpu}],
            'algorithms': {'knowledge_distillation': {'temperature': TEMPERATURE}},
            'device': 'gpu' if self.on_gpu else 'cpu',
            'precision': 'amp_bf16' if self.on_gpu else 'fp32',
        }
        path = self.folder / 'recipe.yaml'
        path.write_text(yaml.safe_dump(recipe))
        return path


Train = Callable[[int, int], Clock]  # of steps, in the order of an epoch
Build = Callable[[Bench], tuple[nn.Module, Train]]


def student_only(bench: Bench) -> tuple[nn.Module, Train]:
    """Composer's Trainer without a teacher."""
    return _composer(bench)


def online(bench: Bench) -> tuple[nn.Module, Train]:
    """Ours, taught by the network itself."""
    return _composer(bench, NetworkTeacher(copy.deepcopy(bench.teacher)))


def record_top(bench: Bench) -> tuple[nn.Module, Train]:
    """Ours, from a record of the largest logits, in float16."""
    return _composer(bench, RecordedTeacher(bench.record('top', TOP)))


def record_all(bench: Bench) -> tuple[nn.Module, Train]:
    """Ours, from a record of all logits, in float32."""
    return _composer(bench, RecordedTeacher(bench.record('all', CLASSES)))


def _composer(bench: Bench, *teachers: Any) -> tuple[nn.Module, Train]:
    distillation = [
        KnowledgeDistillation(teacher, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, label_weight=LABEL_WEIGHT)
        for teacher in teachers
    ]
    student, train = composer(bench, *distillation)
    loader = bench.loader()

    def turn(steps: int, epoch: int) -> Clock:
        clock = Clock(loader, steps, bench.on_gpu)
        train(clock)  # its Trainer counts the epochs
        return clock

    return student, turn


def torchdistill(bench: Bench) -> tuple[nn.Module, Train]:
    """Its distillation box, and its data set that reads a file for each sample."""
    from torchdistill.datasets.wrapper import (  # pyright: ignore[reportMissingImports]
        CacheableDataset,
        default_idx2subpath,
    )

    student, box = torchdistill_box(bench)
    dataset = CacheableDataset(bench.loader().dataset, str(bench.folder / 'torchdistill'), default_idx2subpath)

    def batches(order: list[int]) -> DataLoader:
        workers = bench.data['num_workers']
        return DataLoader(dataset, bench.batch_size, sampler=order, drop_last=True, num_workers=workers)

    def on_device(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(bench.device, non_blocking=True), labels.to(bench.device, non_blocking=True)

    for inputs, labels, more in batches(bench.order(0)):
        with bench.autocast():
            box.get_teacher_output(*on_device(inputs, labels), more)

    def turn(steps: int, epoch: int) -> Clock:
        clock = Clock(batches(bench.order(epoch)), steps, bench.on_gpu)
        box.pre_epoch_process(epoch=0)
        for inputs, labels, more in clock:
            with bench.autocast():
                loss = box.forward_process(*on_device(inputs, labels), more)
            box.post_forward_process(loss=loss)
        return clock

    return student, turn


def textbrewer(bench: Bench) -> tuple[nn.Module, Train]:
    """Its distiller with `is_caching_logits`: from the second epoch on it trains on a list of batches."""

    class Stored(Clock):
        """Its list, in an order of ours, in which all others have these batches in the first turn."""

        def __setitem__(self, index: int, batch: Any) -> None:
            """What `random.shuffle` calls."""

        def __getitem__(self, index: int) -> Any:
            return self.batches[index]

    class AllStored(list):
        """What is left to be stored: nothing, of as many batches as there are."""

        def __len__(self) -> int:
            return len(stored)

    training = {'output_dir': str(bench.folder), 'ckpt_epoch_frequency': 10**9}
    student, distiller = textbrewer_distiller(bench, training, is_caching_logits=True)
    optimizer = sgd(student)
    for batch in bench.loader():
        with bench.autocast():
            distiller.cache_logits(batch, {}, None)
    stored = distiller.logits_cache

    def turn(steps: int, epoch: int) -> Clock:
        distiller.logits_cache = clock = Stored(stored, steps, bench.on_gpu)
        with distiller:
            distiller.train(optimizer, AllStored(), num_epochs=1)
        return clock

    return student, turn


OURS = (student_only, online, record_top, record_all)
PEERS = (torchdistill, textbrewer)
RATIOS = {
    **{f'{build.__name__} / student_only': ([build.__name__], ['student_only']) for build in (*OURS[1:], *PEERS)},
    **{f'online / {build.__name__}': (['online'], [build.__name__]) for build in (*OURS[2:], *PEERS)},
}


def compare(students: dict[str, nn.Module], start: Weights) -> dict[str, float]:
    """How far each is from the one that asks the network, as a share of the way that this has come."""
    goals = weights(students['online'])
    others = {name: weights(student) for name, student in students.items() if name not in ('student_only', 'online')}
    return {
        name: gap(own, goals, start) if name == 'record_top' else small_gap(name, 'online', own, goals, start)
        for name, own in others.items()
    }


def bytes_per_sample(folder: Path, samples: int) -> float:
    """All files in a folder, and what they hold for each sample."""
    return round(sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / samples, 1)


def time_recording(bench: Bench, rounds: int) -> Seconds:
    """Seconds of recording, and of the teacher's bare forward pass over the same loader, from the first batch on."""
    teacher = copy.deepcopy(bench.teacher.module).eval()
    loader, samples = bench.loader(), [(index, 0) for index in range(bench.data['samples'])]
    keys = [samples[begin : begin + bench.batch_size] for begin in range(0, len(samples), bench.batch_size)]

    def forward() -> None:
        for (inputs, _), _ in loader.batches(keys):
            arrived.append(now())
            with torch.no_grad(), bench.autocast():
                teacher(inputs.to(bench.device, non_blocking=True))
        if bench.on_gpu:
            torch.cuda.synchronize()

    def recording() -> None:
        shutil.rmtree(bench.record('again', TOP))

    seconds: Seconds = {'forward': [], 'recording': []}
    for number in range(rounds + 1):
        for work in rotated([forward, recording], number):
            arrived.clear()
            work()
            wall, cpu = (end - begin for begin, end in zip(arrived[0], now(), strict=True))
            seconds[work.__name__].append((wall, cpu))
    return {name: times[1:] for name, times in seconds.items()}  # the first was to warm up


@dataclass
class Unsaid:
    """What the largest k logits of a teacher leave unsaid at a temperature, as shares; means over positions.

    Args:
        mass: Of the probability that the others have.
        of_loss: Of `kl`, if the others are known by what they weigh together.
        of_gradient: The distance of the gradients, if so.
        of_gradient_without: The distance, if the others are thrown away, and the k largest made to sum to 1.
    """

    mass: float
    of_loss: float
    of_gradient: float
    of_gradient_without: float

    @classmethod
    def of(cls, student_logits: Tensor, teacher_logits: Tensor, k: int, temperature: float) -> 'Unsaid':
        """Of some logits, shape (positions, classes)."""
        both = {'student_logits': student_logits, 'teacher_logits': teacher_logits, 'temperature': temperature}
        known = TopKLogits.of(teacher_logits, k, [temperature])

        def without_the_rest(student_logits: Tensor) -> Tensor:
            p = (known.values / temperature).softmax(-1)
            log_q = (student_logits / temperature).log_softmax(-1).gather(-1, known.indices)
            return F.kl_div(log_q, p, reduction='batchmean') * temperature**2

        def gradient(loss: Callable[..., Tensor]) -> Tensor:
            logits = student_logits.detach().clone().requires_grad_()
            return torch.autograd.grad(loss(student_logits=logits), logits)[0]

        whole = gradient(partial(losses.kl, teacher_logits=teacher_logits, temperature=temperature))
        with_the_rest = gradient(partial(topk_loss, teacher=known, temperature=temperature))
        return cls(
            mass=known.tail_mass(temperature).mean().item(),
            of_loss=float(losses.topk_bias(**both, k=k).mean() / losses.kl(**both)),
            of_gradient=float((with_the_rest - whole).norm() / whole.norm()),
            of_gradient_without=float((gradient(without_the_rest) - whole).norm() / whole.norm()),
        )


def tell_what_is_unsaid(bench: Bench, student: nn.Module, temperatures: tuple[float, ...]) -> list[dict[str, float]]:
    """Print what `Unsaid` is of the logits of a student and of the teacher for a batch, for some k; as rows."""
    inputs, _ = next(iter(bench.loader()))
    networks: Any = student.module, bench.teacher.module
    with torch.no_grad():
        of_student, of_teacher = (network.eval()(inputs.to(bench.device)).double() for network in networks)
    print(f'\n{"T": >4}{"k": >6}{"mass of the rest": >20}{"loss": >12}{"gradient": >12}{"without the rest": >20}')
    rows = []
    for temperature in temperatures:
        for k in KS:
            unsaid = Unsaid.of(of_student, of_teacher, k, temperature)
            rows.append({'temperature': temperature, 'k': k, **{n: round(x, 4) for n, x in vars(unsaid).items()}})
            print(
                f'{temperature: >4g}{k: >6}{unsaid.mass: >20.1%}{unsaid.of_loss: >12.1%}{unsaid.of_gradient: >12.1%}'
                f'{unsaid.of_gradient_without: >20.1%}'
            )
    return rows


def main() -> None:
    arguments = options()
    sys.modules.setdefault('record', sys.modules['__main__'])  # where the recipe finds the data
    student, teacher, memory_format = build_networks(arguments)
    some = images(arguments.batch_size, arguments.image_size, arguments.batch_size, 0).dataloader
    settle(teacher.module, next(iter(some))[0].to(arguments.device, memory_format=memory_format))
    builds: list[Build] = list(OURS)
    for build in PEERS:
        if importlib.util.find_spec(build.__name__) is not None:
            builds.append(build)
        else:
            print(f'{build.__name__} is not installed: left out')
    with tempfile.TemporaryDirectory() as folder:
        measure(Bench(student, teacher, arguments, Path(folder)), builds, arguments)


def measure(bench: Bench, builds: list[Build], arguments: argparse.Namespace) -> None:
    """Let all take turns, and report."""
    start = weights(bench.networks()[0])
    variants = {build.__name__: build(bench) for build in builds}
    seconds: Seconds = {name: [] for name in variants}
    gaps: dict[str, float] = {}
    gc.disable()
    for number in range(arguments.rounds + 1):
        for name in rotated([*variants], number):
            clock = variants[name][1](arguments.steps if number else 1, number)
            seconds[name].append(clock.seconds())
        gc.collect()
        if number == 0:  # was to warm up, and is short because rounding errors grow
            gaps = compare({name: student for name, (student, _) in variants.items()}, start)
            seconds = {name: [] for name in variants}
    gc.enable()

    print(f'\n{arguments.student} from {arguments.teacher}, {arguments.samples} images, {arguments.device}: medians of')
    print(f'{arguments.rounds} rounds of {arguments.steps} steps\n\n{"": <20}{"s/step": >10}{"CPU s": >10}')
    for name, (wall, cpu) in medians(seconds).items():
        gap = f'   its weights differ by {gaps[name]:.1e} of the way' if name in gaps else ''
        print(f'{name: <20}{wall: >10.4f}{cpu: >10.4f}{gap}')
    present = {name: sides for name, sides in RATIOS.items() if {*sides[0], *sides[1]} <= {*variants}}
    figures = compare_times(seconds, present)
    folders = {name: bench.folder / name.removeprefix('record_') for name in variants}
    size = {name: bytes_per_sample(folders[name], arguments.samples) for name in variants if folders[name].is_dir()}
    for name, stored in size.items():
        print(f'{name: <20}{stored: >10.1f} bytes a sample, all files counted')
    recording = compare_times(
        time_recording(bench, arguments.rounds), {'forward / recording': (['forward'], ['recording'])}
    )
    unsaid = tell_what_is_unsaid(bench, variants['online'][0], (1.0, TEMPERATURE))
    print()
    more = {'bytes_per_sample': size, 'recording': recording, 'unsaid': unsaid, 'gaps': gaps}
    print(row('record', **figures, **more, setting=vars(arguments)))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Measures what recorded outputs cost, ours and those of others.')
    networks = [name for name in models.__all__ if 'resn' in name]  # no dropout: all must do the same
    parser.add_argument('--quick', action='store_true', help='see in seconds that it works; the figures mean nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--student', choices=networks, help='default: resnet50 on a GPU, cifar_resnet20 on a CPU')
    parser.add_argument('--teacher', choices=networks, help='default: resnet101 on a GPU, cifar_resnet56 on a CPU')
    parser.add_argument('--samples', type=int, help='images; default: 8192 on a GPU, 2048 on a CPU')
    parser.add_argument('--batch-size', type=int, help='default: 256 on a GPU, 64 on a CPU')
    parser.add_argument('--image-size', type=int, help='default: 224 on a GPU, 32 on a CPU')
    parser.add_argument('--workers', type=int, help='that fetch images; default: 8 on a GPU, 0 on a CPU')
    parser.add_argument('--rounds', type=int, help='default: 10')
    arguments = parser.parse_args()
    # A shard is a sixteenth of a small data set, and is recorded in whole batches: as many as there are fit in it.
    defaults = {
        **{'student': 'cifar_resnet20', 'teacher': 'cifar_resnet56', 'samples': 2048},
        **{'batch_size': 64, 'image_size': 32, 'workers': 0},
    }
    if arguments.device == 'cuda':
        defaults = {
            **{'student': 'resnet50', 'teacher': 'resnet101', 'samples': 8192},
            **{'batch_size': 256, 'image_size': 224, 'workers': 8},
        }
    if arguments.quick:
        defaults |= {'samples': 32, 'batch_size': 8, 'image_size': 16}
    for name, value in {**defaults, 'rounds': 2 if arguments.quick else 10}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.steps = arguments.samples // arguments.batch_size - 1  # an epoch
    if arguments.rounds < 2 or arguments.steps < 1:
        parser.error('it takes at least 2 rounds, and 2 batches')
    return arguments


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries, of which there are many
    main()
