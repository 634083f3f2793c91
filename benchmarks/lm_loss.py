"""What both losses of distillation over a large vocabulary cost in time and memory: ours, plain ones, other libraries'.

    python benchmarks/lm_loss.py [--quick] [--masked 1.0] [--chunk-size 128 ...]

What is measured lies behind the encoders of a masked language model: from the hidden states of all positions, and the
projections of both networks, to the gradients of the student's hidden states, weight and bias. The gradients' own
memory counts, for everyone alike. All must come to the same loss and gradients, or there is no result. They take turns
within one process, in another order every round, with Python's garbage collector off; a ratio is the median over the
rounds of the ratios within a round. On CPU cores that others use too, set OMP_NUM_THREADS=1.
"""

import argparse
import ctypes
import gc
import importlib.util
import inspect
import re
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_parts import compare_times, keep_freed_memory, medians, rotated
from row import row
from torch import Tensor

from composer_kd.losses import kl
from composer_kd.vocabulary import DeferredLogits, vocabulary_loss

TEMPERATURE, KD_WEIGHT, LABEL_WEIGHT = 2.0, 0.9, 0.1
NO_LABEL = -100
SPREAD = 2 * TEMPERATURE  # of the logits of both sides: as far apart as a trained network's
LARGEST_GAP = {'cpu': 1e-4, 'cuda': 0.05}  # of loss and gradients, as a share of them: fp32, bf16
BASE = 'dense_then_select'
CLEAR = Path('/proc/self/clear_refs')


@dataclass
class Head:
    """The end of a network: hidden states, (positions, size), and the projection that makes logits of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def random(cls, positions: int, size: int, words: int, device: str) -> 'Head':
        """One whose logits are about as far apart as a trained network's."""
        weight = torch.randn(words, size, device=device) * SPREAD / size**0.5
        return cls(torch.randn(positions, size, device=device), weight, torch.randn(words, device=device))

    def logits(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """Of all positions, or of some."""
        return F.linear(self.hidden[positions], self.weight, self.bias)


@dataclass
class Problem:
    """What all have in common."""

    student: Head
    teacher: Head
    labels: Tensor
    chunk_size: int

    def positions(self) -> Tensor:
        """Those that count."""
        return (self.labels != NO_LABEL).nonzero().squeeze(1)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision: bf16 where it can on a GPU, fp32 on a CPU."""
        return torch.autocast('cuda', torch.bfloat16) if self.labels.is_cuda else nullcontext()


def plain(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Both losses as one writes them by hand."""
    kd_loss = F.kl_div(*soft(logits, teacher_logits), reduction='batchmean') * TEMPERATURE**2
    return LABEL_WEIGHT * F.cross_entropy(logits, labels) + KD_WEIGHT * kd_loss


def soft(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """What `kl_div` takes."""
    return (logits / TEMPERATURE).log_softmax(-1), (teacher_logits / TEMPERATURE).softmax(-1)


def dense(problem: Problem) -> Tensor:
    """Logits and losses everywhere; a mask says which losses count."""
    logits, teacher_logits, where = problem.student.logits(), problem.teacher.logits(), problem.labels != NO_LABEL
    each = F.kl_div(*soft(logits, teacher_logits), reduction='none').sum(-1)
    kd_loss = each.masked_fill(~where, 0).sum() / where.sum() * TEMPERATURE**2
    return LABEL_WEIGHT * F.cross_entropy(logits, problem.labels) + KD_WEIGHT * kd_loss


def dense_then_select(problem: Problem) -> Tensor:
    """Logits everywhere, losses of those that count: what one comes to with networks as they are."""
    positions, logits, teacher_logits = problem.positions(), problem.student.logits(), problem.teacher.logits()
    return plain(logits[positions], teacher_logits[positions], problem.labels[positions])


def select_then_dense(problem: Problem) -> Tensor:
    """Only the logits that count, all at once."""
    positions = problem.positions()
    logits, teacher_logits = problem.student.logits(positions), problem.teacher.logits(positions)
    return plain(logits, teacher_logits, problem.labels[positions])


def torchtune_style(problem: Problem, chunks: int = 8) -> Tensor:
    """Logits of all positions in a list of chunks, a masked loss of each: the way of torchtune, not its code."""
    student, teacher = (
        [F.linear(hidden, head.weight, head.bias) for hidden in head.hidden.chunk(chunks)]
        for head in (problem.student, problem.teacher)
    )
    label_loss, kd_loss = torch.zeros((), device=problem.labels.device), 0
    for logits, teacher_logits, labels in zip(student, teacher, problem.labels.chunk(chunks), strict=True):
        each = F.kl_div(*soft(logits, teacher_logits), reduction='none').sum(-1)
        kd_loss += each.masked_fill(labels == NO_LABEL, 0).sum() * TEMPERATURE**2
        label_loss += F.cross_entropy(logits, labels, reduction='sum')
    return (LABEL_WEIGHT * label_loss + KD_WEIGHT * kd_loss) / (problem.labels != NO_LABEL).sum()


def trl(problem: Problem) -> Tensor:
    """The loss of its GKDTrainer, whose beta = 0 is this KL."""
    from trl import GKDTrainer  # pyright: ignore[reportMissingImports]

    logits, teacher_logits = problem.student.logits()[None], problem.teacher.logits()[None]
    kd_loss = GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, labels=problem.labels[None], beta=0, temperature=TEMPERATURE
    )
    return LABEL_WEIGHT * F.cross_entropy(logits[0], problem.labels) + KD_WEIGHT * TEMPERATURE**2 * kd_loss


def liger(problem: Problem, select: bool = True) -> Tensor:
    """Its fused projection and loss, whose beta = 0 is this KL; given the positions that count, and our chunk size."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=LABEL_WEIGHT,
        weight_soft_loss=KD_WEIGHT * TEMPERATURE**2,
        beta=0,
        ignore_index=NO_LABEL,
        temperature=TEMPERATURE,
        compiled=False,
        chunk_size=problem.chunk_size,
    )
    student, teacher, positions = problem.student, problem.teacher, problem.positions() if select else slice(None)
    return loss(
        student.hidden[positions],
        student.weight,
        teacher.hidden[positions],
        teacher.weight,
        problem.labels[positions],
        student.bias,
        teacher.bias,
    )


def liger_everywhere(problem: Problem) -> Tensor:
    """The same given all positions, with its own mask."""
    return liger(problem, select=False)


def ours(problem: Problem) -> Tensor:
    """`vocabulary_loss` of the positions that count."""
    positions = problem.positions()
    student, teacher = (
        DeferredLogits(head.hidden[positions], head.weight, head.bias) for head in (problem.student, problem.teacher)
    )
    losses = vocabulary_loss(
        student_logits=student,
        labels=problem.labels[positions],
        teacher_logits=teacher,
        kd_loss=partial(kl, temperature=TEMPERATURE),
        kd_weight=KD_WEIGHT,
        label_weight=LABEL_WEIGHT,
        chunk_size=problem.chunk_size,
    )
    return losses['total']


Loss = Callable[[Problem], Tensor]
LOSSES: tuple[Loss, ...] = (dense, dense_then_select, select_then_dense, torchtune_style, ours)
PEERS: dict[str, tuple[Loss, ...]] = {'trl': (trl,), 'liger_kernel': (liger, liger_everywhere)}


def step(loss: Loss, problem: Problem) -> list[Tensor]:
    """The loss, and the gradients of the student's three."""
    inputs = vars(problem.student).values()
    with problem.autocast():
        value = loss(problem)
    value.backward()
    result = [value.detach(), *(x.grad for x in inputs)]
    for x in inputs:
        x.grad = None
    return result


def seconds_of(run: Callable[[], object], on_gpu: bool) -> tuple[float, float]:
    """By the clock, and of the CPU."""
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    wait()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del result  # whose end is nobody's time
    return wall, cpu


def peak_of(run: Callable[[], object], on_gpu: bool) -> int:
    """Bytes in use at the height of a run, above those in use before it."""
    peak = torch.cuda.max_memory_allocated if on_gpu else resident_at_most
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text('5')  # sets the peak to what is resident now
    before = peak()
    run()
    return peak() - before


def resident_at_most() -> int:
    """Bytes, by Linux's account of this process."""
    found = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text(encoding='utf-8'))
    assert found is not None
    return int(found[1]) * 1024


def hand_back_freed_memory() -> None:
    """Have the C library hand back to the system what is freed: then what is resident is in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):  # glibc
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 2**16)
        libc.mallopt(mmap_threshold, 2**16)


def compare(results: dict[str, list[Tensor]]) -> dict[str, float]:
    """How far loss and gradients of each are from those of the base, as a share of them."""
    gaps, goals = {}, results[BASE]
    for name, result in results.items():
        gaps[name] = max(float((x - goal).norm() / goal.norm()) for x, goal in zip(result, goals, strict=True))
        if not gaps[name] <= LARGEST_GAP[goals[0].device.type]:
            raise SystemExit(f'{name} does other work than {BASE}: loss or gradients differ by {gaps[name]:.2g}')
    return gaps


def main() -> None:
    arguments = options()
    on_gpu = arguments.device == 'cuda'
    hand_back_freed_memory()
    torch.manual_seed(17)
    shape = arguments.positions, arguments.hidden, arguments.words, arguments.device
    student, teacher = Head.random(*shape), Head.random(*shape)
    for x in vars(student).values():
        x.requires_grad_()
    labels = torch.randint(arguments.words, (arguments.positions,), device=arguments.device)
    unmasked = torch.randperm(arguments.positions)[round(arguments.masked * arguments.positions) :]
    labels[unmasked.to(labels.device)] = NO_LABEL
    problem = Problem(student, teacher, labels, arguments.chunk_size)

    losses = list(LOSSES)
    for peer, of_peer in PEERS.items():
        if importlib.util.find_spec(peer) is None:
            print(f'{peer} is not installed: left out')
        else:
            losses += of_peer
    runs = {loss.__name__: partial(step, loss, problem) for loss in losses}
    gaps = compare({name: run() for name, run in runs.items()})
    gc.disable()
    weigh = on_gpu or CLEAR.exists()
    if not weigh:
        print('no /proc/self/clear_refs here: memory is left out')
    peaks = take_turns(runs, partial(peak_of, on_gpu=on_gpu), 3 if weigh else 0)
    keep_freed_memory()
    take_turns(runs, partial(seconds_of, on_gpu=on_gpu), 1)  # warms up
    seconds = take_turns(runs, partial(seconds_of, on_gpu=on_gpu), arguments.rounds)
    memory = {name: median(found) / 2**20 for name, found in peaks.items() if found}

    print(
        f'\n{arguments.masked:.0%} of {arguments.positions} positions, {arguments.words} words, hidden size '
        f'{arguments.hidden}, chunks of {arguments.chunk_size}, {arguments.device}, {torch.get_num_threads()} threads: '
        f'medians of {arguments.rounds} rounds'
    )
    print(f'\n{"": <20}{"s/step": >10}{"CPU s": >10}{"peak MiB": >10}{"gradients differ by": >22}')
    middle = medians(seconds)
    for name, (wall, cpu) in middle.items():
        peak = f'{memory[name]:.1f}' if memory else ''
        print(f'{name: <20}{wall: >10.4f}{cpu: >10.4f}{peak: >10}{gaps[name]: >22.1e}')
    fastest, leanest = (min(found.keys() - {'ours'}, key=found.__getitem__, default='') for found in (middle, memory))
    pairs = {f'{a} / {b}': ([a], [b]) for a, b in [*((name, BASE) for name in runs if name != BASE), ('ours', fastest)]}
    figures = compare_times(seconds, pairs)
    memory_ratios = {f'ours / {b}': round(memory['ours'] / memory[b], 4) for b in dict.fromkeys((BASE, leanest)) if b}
    for name, ratio in memory_ratios.items():
        print(f'{f"memory, {name}": <52}{ratio: >14.3f}')
    figures |= {'memory_ratios': memory_ratios, 'peak_memory_mib': {k: round(v, 2) for k, v in memory.items()}}
    print(row('lm_loss', **figures, gaps=gaps, setting=vars(arguments)))


def take_turns(runs: dict[str, Any], measure: Callable[[Any], Any], rounds: int) -> dict[str, list[Any]]:
    """Measure each once in every round."""
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in rotated([*runs], number):
            found[name].append(measure(runs[name]))
        gc.collect()
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Weighs label and distillation loss over a large vocabulary.')
    chunk_size = inspect.signature(vocabulary_loss).parameters['chunk_size'].default
    parser.add_argument('--quick', action='store_true', help='see in seconds that it works; the figures mean nothing')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--masked', type=float, default=0.15, help='share of the positions that count; default: 0.15')
    parser.add_argument('--chunk-size', type=int, default=chunk_size, help='of ours, and Liger; default: %(default)s')
    parser.add_argument('--positions', type=int, help='default: 65536 (512 x 128) on a GPU, 1024 on a CPU')
    parser.add_argument('--hidden', type=int, help='size of the hidden states; default: 768 on a GPU, 256 on a CPU')
    parser.add_argument('--words', type=int, help='default: 30522')
    parser.add_argument('--rounds', type=int, help='default: 20')
    arguments = parser.parse_args()
    defaults = {'positions': 1024, 'hidden': 256, 'words': 30522, 'rounds': 20}
    if arguments.device == 'cuda':
        defaults |= {'positions': 512 * 128, 'hidden': 768}
    if arguments.quick:
        defaults |= {'positions': 256, 'hidden': 32, 'words': 4000, 'rounds': 2}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    counted = round(arguments.masked * arguments.positions)
    if not 1 <= counted <= arguments.positions or arguments.rounds < 2 or arguments.chunk_size < 1:
        parser.error('it takes a share of the positions, at least 2 rounds, and chunks of at least 1 position')
    return arguments


if __name__ == '__main__':
    warnings.simplefilter('ignore')  # those of other libraries
    main()
