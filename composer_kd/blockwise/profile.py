"""What blocks cost on a device: measured, kept in a file, and made into the costs of a plan."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.plan import Costs
from composer_kd.files import write

_LEAST_RUNS, _LEAST_SECONDS = 3, 0.1  # of what is measured


class ProfileError(ValueError):
    """A file that is no profile; one line says what is wrong with it."""


@dataclass(frozen=True)
class Link:
    """How long bytes are on their way.

    Args:
        seconds: Of any message.
        per_byte: More seconds for each byte.
    """

    seconds: float
    per_byte: float

    def takes(self, size: float) -> float:
        """Seconds for so many bytes."""
        return self.seconds + self.per_byte * size


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        device: Its name.
        batch_size: Samples of a whole batch.
        shares: Parts of a batch, in samples, for which the blocks were timed: for 1 device, 2, and so on, those that
            share it evenly.
        data: Seconds until a batch is loaded.
        teacher: Seconds of each of the teacher's blocks, for each share.
        student: Likewise of the student's: forward, backward and update.
        inputs: Bytes of each sample that a block is given.
        gradients: Bytes of the gradients of each block of the student.
        fixed: Bytes that each block needs for any batch: weights, gradients, state of the optimizer.
        activations: More bytes for each sample.
        send: From one process to another.
        average: Of gradients over all processes, by the bytes that each sends and receives.
    """

    device: str
    batch_size: int
    shares: list[int]
    data: float
    teacher: list[list[float]]
    student: list[list[float]]
    inputs: list[int]
    gradients: list[int]
    fixed: list[int]
    activations: list[int]
    send: Link
    average: Link

    def costs(self, devices: int) -> Costs:
        """The costs of the blocks on up to so many devices."""
        column = {share: index for index, share in enumerate(self.shares)}

        def table(seconds: Callable[[int, int], float]) -> list[list[float]]:
            """Of blocks by devices, where `seconds` takes a block and a number of devices that share a batch evenly."""
            return [
                [
                    seconds(block, number)
                    if self.batch_size % number == 0 and self.batch_size // number in column
                    else math.inf
                    for number in range(1, devices + 1)
                ]
                for block in range(len(self.teacher))
            ]

        def share(number: int) -> int:
            return self.batch_size // number

        def exchanged(block: int, number: int) -> float:  # by a ring, which sends each byte twice, but for one part
            return 2 * (number - 1) / number * self.gradients[block]

        return Costs(
            teacher=table(lambda block, number: self.teacher[block][column[share(number)]]),
            student=table(lambda block, number: self.student[block][column[share(number)]]),
            average=table(lambda block, number: self.average.takes(exchanged(block, number)) if number > 1 else 0.0),
            receive=table(
                lambda block, number: self.send.takes(share(number) * self.inputs[block]) if block else self.data
            ),
            memory=table(lambda block, number: self.fixed[block] + share(number) * self.activations[block]),
        )

    def save(self, path: str | Path) -> None:
        """Write it to a file, which appears whole."""
        write(Path(path), json.dumps(asdict(self), indent=1) + '\n')

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read it from a file.

        Raises:
            ProfileError: It cannot be read, or holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise ProfileError(f'{path}: cannot be read as a profile: {error}') from error
        try:
            links = {name: Link(**found[name]) for name in ('send', 'average')}
            profile = cls(**{**found, **links})
            if _is_right(profile):
                return profile
        except (TypeError, KeyError, AttributeError):
            pass
        raise ProfileError(f'{path}: is no profile of blocks: write one with composer-kd plan --out')


def measure(
    pairs: BlockPairs,
    batch: Tensor,
    devices: int,
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    *,
    device: str | torch.device = 'cpu',
    labels: Tensor | None = None,
    data: float = 0.0,
    send: Link = Link(0.0, 0.0),
    average: Link = Link(0.0, 0.0),
) -> Profile:
    """Time all blocks on this device. The student's weights change.

    Args:
        pairs: The blocks.
        batch: A whole batch of inputs.
        devices: For parts of a batch for up to so many devices.
        optimizer: Makes that of some parameters.
        device: On which. Default: the CPU.
        labels: Of the batch, if blocks learn from them. Default: None.
        data: Seconds until a batch is loaded. Default: 0.
        send: From one process to another. Default: it takes no time.
        average: Of gradients. Default: likewise.
    """
    device, size = torch.device(device), len(batch)
    shares = [size // number for number in range(1, devices + 1) if size % number == 0]
    measured: dict[str, list[list[Any]]] = {name: [[] for _ in range(len(pairs))] for name in ('teacher', 'student')}
    inputs, gradients, fixed, activations = ([0] * len(pairs) for _ in range(4))
    x = batch.to(device)
    for number in range(len(pairs)):
        teacher, student = pairs.teacher[number].to(device), pairs.student[number].to(device).train()
        with torch.no_grad():
            target = teacher(x)
        stepped = optimizer(student.parameters())
        for share in shares:
            of_part = None if labels is None else labels[:share].to(device)
            train = partial(_train, pairs, number, stepped, x[:share], target[:share], of_part)
            measured['teacher'][number].append(_seconds(partial(_ask, teacher, x[:share]), device))
            measured['student'][number].append(_seconds(train, device))
        weights = sum(parameter.nbytes for parameter in student.parameters())
        states = (value for state in stepped.state.values() for value in state.values())
        of_state = sum(value.nbytes for value in states if isinstance(value, Tensor))
        of_teacher = sum(tensor.nbytes for tensor in (*teacher.parameters(), *teacher.buffers()))
        inputs[number], gradients[number] = x[:1].nbytes, weights
        fixed[number] = of_teacher + 2 * weights + of_state
        activations[number] = (_kept(student, x) + x.nbytes + target.nbytes) // size
        x = target
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)
    return Profile(
        name,
        size,
        shares,
        data,
        measured['teacher'],
        measured['student'],
        inputs,
        gradients,
        fixed,
        activations,
        send,
        average,
    )


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> Link:
    """The link that is nearest to what messages of some sizes took; at least two sizes."""
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return Link(max(0.0, intercept), max(0.0, slope))


@torch.no_grad()
def _ask(block: nn.Module, x: Tensor) -> None:
    block(x)


def _train(
    pairs: BlockPairs, number: int, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, labels: Tensor | None
) -> None:
    optimizer.zero_grad()
    pairs.losses(number, student=pairs.student[number](x), teacher=target, labels=labels).backward()
    optimizer.step()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The median of several runs, after one that does not count."""
    work()
    runs: list[float] = []
    while len(runs) < _LEAST_RUNS or sum(runs) < _LEAST_SECONDS:
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        runs.append(time.perf_counter() - begin)
    return statistics.median(runs)


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _kept(block: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, but for weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(kept.values())


def _is_right(profile: Profile) -> bool:
    """Whether all values are of the kind that they are to be."""
    blocks, shares = len(profile.teacher), len(profile.shares)
    tables = profile.teacher, profile.student
    rows = profile.inputs, profile.gradients, profile.fixed, profile.activations
    amounts = [profile.data, *itertools.chain(*profile.teacher, *profile.student, *rows)]
    amounts += [amount for link in (profile.send, profile.average) for amount in (link.seconds, link.per_byte)]
    return (
        blocks > 0
        and isinstance(profile.device, str)
        and all(type(number) is int and number > 0 for number in (profile.batch_size, *profile.shares))
        and all(len(table) == blocks and all(len(row) == shares for row in table) for table in tables)
        and all(len(row) == blocks for row in rows)
        and all(map(_is_amount, amounts))
    )


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
