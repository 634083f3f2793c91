"""What one stage of a pipeline hands on to the next: tensors of a batch, from process to process."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, Store

from composer_kd.channel import absent, peer_lost
from composer_kd.packing import Packing
from composer_kd.teachers.teacher import TeacherError

_SECONDS_BETWEEN_LOOKS = 1.0  # at what other threads have, between which Python heeds signals
_HEADER = torch.zeros(
    3, dtype=torch.int64
)  # what the message is, the number of its batch, and how many samples that has


class Word(IntEnum):
    """What a message is."""

    BATCH = 0
    END_OF_EPOCH = 1
    STOP = 2


@dataclass(frozen=True)
class Message:
    """What a stage is handed: the end of an epoch, the end of training, or this process's share of a batch.

    Args:
        word: Which of the three.
        number: Of the batch.
        samples: In all shares of the batch.
        tensors: This share, each of shape (samples of the share, ...); none at an end.
    """

    word: Word
    number: int
    samples: int
    tensors: list[Tensor]


@dataclass(frozen=True)
class Hop:
    """Between two stages: all of their processes, of which each has an equal share of a batch.

    Args:
        name: Of this link, the same on both sides.
        senders: Ranks, in the group of all stages, of the processes of the one stage.
        receivers: Likewise of the next.
        who: What errors call each rank.
    """

    name: str
    senders: range
    receivers: range
    who: Callable[[int], str]

    def shares(self, samples: int, sender: int, receiver: int) -> range:
        """Of the samples that one sender has, counted from its first, those that one receiver needs."""
        has, needs = share(samples, len(self.senders), sender), share(samples, len(self.receivers), receiver)
        return range(max(has.start, needs.start) - has.start, max(has.start, min(has.stop, needs.stop)) - has.start)

    def of_sender(self, sender: int) -> list[int]:
        """The receivers that one sender sends to."""
        return [index for index in range(len(self.receivers)) if self._share(sender, index)]

    def of_receiver(self, receiver: int) -> list[int]:
        """The senders that one receiver hears from."""
        return [index for index in range(len(self.senders)) if self._share(index, receiver)]

    def _share(self, sender: int, receiver: int) -> range:
        # Where a batch can be shared evenly on both sides, all pairs that have anything in common have it.
        return self.shares(len(self.senders) * len(self.receivers), sender, receiver)


def share(samples: int, parts: int, index: int) -> range:
    """The samples of one of so many parts of a batch: neighbouring ones, and as many for each as can be."""
    return range(samples * index // parts, samples * (index + 1) // parts)


def join(store: Store, rank: int, size: int, timeout: float) -> Any:
    """The group of all processes of all stages, by which they send.

    Args:
        store: What they meet at.
        rank: Of this process.
        size: How many there are.
        timeout: Seconds, after which whoever does not come is given up.

    Raises:
        PeerLost: Somebody does not come.
    """
    try:
        return torch.distributed.ProcessGroupGloo(PrefixStore('relay', store), rank, size, timedelta(seconds=timeout))
    except RuntimeError as error:
        raise peer_lost('joining the stages', ['a process'], timeout) from error


class Outlet:
    """Hands on what one process of a stage has of each batch.

    A message lies in one of `depth` buffers until it has gone out, so that its tensors may be freed or changed at once.
    `send` waits only where all buffers are on their way.

    Args:
        group: Of all processes of all stages.
        store: What they meet at.
        hop: To the next stage.
        index: Of this process in its stage.
        depth: Buffers for each receiver.
        most: Samples of the largest batch, in all shares.
        dtype: Of floating point numbers on their way. Default: None, as they are.
        timeout: Seconds, after which a receiver is given up that takes nothing.
    """

    def __init__(
        self,
        group: Any,
        store: Store,
        hop: Hop,
        index: int,
        *,
        depth: int,
        most: int,
        dtype: torch.dtype | None = None,
        timeout: float,
    ):
        self._group, self._store, self._hop, self._index = group, store, hop, index
        self._depth, self._most, self._dtype, self._timeout = depth, most, dtype, timeout
        self._rings: dict[int, _Ring] = {}
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def send(self, tensors: Sequence[Tensor], *, number: int, samples: int) -> None:
        """Hand on this process's share of a batch.

        Args:
            tensors: Each of shape (samples of this share, ...), in every batch of the same shapes but for the first
                dimension.
            number: Of the batch.
            samples: In all shares of the batch.

        Raises:
            TeacherError: The shapes or dtypes are others than those of the first batch, or it has too many samples.
            PeerLost: A receiver takes nothing, or is gone.
        """
        self._begin(tensors)
        if [(tensor.shape[1:], tensor.dtype) for tensor in tensors] != self._kinds:
            raise TeacherError(
                f'batch {number} has samples of other shapes or dtypes than the first one; a pipeline hands on what is '
                'of one size: make all samples alike'
            )
        for receiver, ring in self._rings.items():
            rows = self._hop.shares(samples, self._index, receiver)
            ring.send(Word.BATCH, number, samples, [tensor[rows.start : rows.stop] for tensor in tensors])

    def end(self, word: Word, number: int) -> None:
        """Hand on that there is nothing more of an epoch, or at all."""
        for ring in self._rings.values():
            ring.send(word, number, 0, [])

    def flush(self) -> None:
        """Wait until all has gone out."""
        for ring in self._rings.values():
            ring.flush()

    def _begin(self, tensors: Sequence[Tensor]) -> None:
        """Say, once, what is to be sent, so that the other side has room for it."""
        if self._kinds:
            return
        self._kinds = [(tensor.shape[1:], tensor.dtype) for tensor in tensors]
        receivers = self._hop.of_sender(self._index)
        for receiver in receivers:
            rows = len(self._hop.shares(self._most, self._index, receiver))
            on_the_way = [(shape, self._cast(dtype)) for shape, dtype in self._kinds]
            rank = self._hop.receivers[receiver]
            self._rings[receiver] = _Ring(
                self._group, rank, _Slots(on_the_way, rows, self._depth), self._hop.who(rank), self._timeout
            )
        if self._index == 0:
            kinds = [([*shape], str(dtype), str(self._cast(dtype))) for shape, dtype in self._kinds]
            self._store.set(f'{self._hop.name}/kinds', json.dumps({'samples': self._most, 'kinds': kinds}))

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype and dtype.is_floating_point else dtype


class Inlet:
    """Takes what the stage before hands on.

    Up to `depth` batches arrive while this process is at work. Made before anything is sent; `take` blocks.

    Args:
        group: Of all processes of all stages.
        store: What they meet at.
        hop: From the stage before.
        index: Of this process in its stage.
        depth: Buffers for each sender.
        timeout: Seconds, after which a sender is given up that sends nothing.
    """

    def __init__(self, group: Any, store: Store, hop: Hop, index: int, *, depth: int, timeout: float):
        self._group, self._store, self._hop, self._index = group, store, hop, index
        self._depth, self._timeout = depth, timeout
        self._senders = hop.of_receiver(index)
        self._slots: dict[int, _Slots] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._dtypes: list[torch.dtype] = []
        self._taken = 0

    def take(self) -> Message:
        """What comes next.

        Raises:
            PeerLost: A sender sends nothing, or is gone.
        """
        self._begin()
        slot = self._taken % self._depth
        parts: list[list[Tensor]] = []
        header = (0, 0, 0)
        for sender in self._senders:
            self._waiting[sender].next()
            header, views = self._slots[sender].read(slot)
            rows = len(self._hop.shares(header[2], sender, self._index))
            parts.append([view[:rows] for view in views])
        word, number, samples = header
        tensors = [
            torch.cat(same).to(dtype) if len(same) > 1 else same[0].to(dtype, copy=True)
            for same, dtype in zip(map(list, zip(*parts, strict=True)), self._dtypes, strict=True)
        ]
        self._taken += 1
        for sender in self._senders:
            self._post(sender, slot)
        return Message(Word(word), number, samples, tensors if word == Word.BATCH else [])

    def _begin(self) -> None:
        """Hear, once, what is to come, and make room for it."""
        if self._slots:
            return
        key = f'{self._hop.name}/kinds'
        who = self._hop.who(self._hop.senders[0])
        begin = time.monotonic()
        if missing := absent(self._store, {key: who}, self._timeout):
            is_late = time.monotonic() - begin > 0.9 * self._timeout
            raise peer_lost(f'{self._hop.name}, the first batch', missing, self._timeout if is_late else None)
        said = json.loads(self._store.get(key))
        self._dtypes = [_dtype(name) for _, name, _ in said['kinds']]
        on_the_way = [(torch.Size(shape), _dtype(name)) for shape, _, name in said['kinds']]
        for sender in self._senders:
            rows = len(self._hop.shares(said['samples'], sender, self._index))
            self._slots[sender] = _Slots(on_the_way, rows, self._depth)
            self._waiting[sender] = _Waiting(self._hop.who(self._hop.senders[sender]), self._timeout)
            for slot in range(self._depth):
                self._post(sender, slot)

    def _post(self, sender: int, slot: int) -> None:
        """Let the next message come into a buffer."""
        buffer = self._slots[sender].buffers[slot]
        self._waiting[sender].add(self._group.recv([buffer], self._hop.senders[sender], 0))


class _Slots:
    """Buffers for messages of one size.

    Args:
        kinds: Shape of a sample and dtype of each tensor.
        rows: How many samples a message may have.
        depth: How many buffers.
    """

    def __init__(self, kinds: Sequence[tuple[torch.Size, torch.dtype]], rows: int, depth: int):
        tensors = [torch.empty(rows, *shape, dtype=dtype, device='meta') for shape, dtype in kinds]
        packing = Packing([_HEADER, *tensors])
        self.rows = rows
        self.buffers = [torch.zeros(packing.bytes, dtype=torch.uint8) for _ in range(depth)]
        self._views = [packing.unpack(buffer) for buffer in self.buffers]

    def write(self, slot: int, header: tuple[int, int, int], tensors: Sequence[Tensor]) -> None:
        """Fill a buffer."""
        of_header, *views = self._views[slot]
        of_header.copy_(torch.tensor(header))
        for view, tensor in zip(views, tensors, strict=False):
            view[: len(tensor)].copy_(tensor)

    def read(self, slot: int) -> tuple[tuple[int, int, int], list[Tensor]]:
        """What is in a buffer, as views of it."""
        header, *views = self._views[slot]
        word, number, samples = header.tolist()
        return (word, number, samples), views


class _Ring:
    """Sends messages to one receiver, each from the next buffer once that has gone out."""

    def __init__(self, group: Any, rank: int, slots: _Slots, who: str, timeout: float):
        self._group, self._rank, self._slots = group, rank, slots
        self._waiting = _Waiting(who, timeout)
        self._sent = self._on_the_way = 0

    def send(self, word: Word, number: int, samples: int, tensors: Sequence[Tensor]) -> None:
        if any(len(tensor) > self._slots.rows for tensor in tensors):
            raise TeacherError(f'batch {number} has more samples than a batch is to have')
        depth = len(self._slots.buffers)
        if self._on_the_way == depth:
            self._arrive()
        slot = self._sent % depth
        self._slots.write(slot, (word, number, samples), tensors)
        self._waiting.add(self._group.send([self._slots.buffers[slot]], self._rank, 0))
        self._sent += 1
        self._on_the_way += 1

    def flush(self) -> None:
        while self._on_the_way:
            self._arrive()

    def _arrive(self) -> None:
        self._waiting.next()
        self._on_the_way -= 1


class _Waiting:
    """Waits for sends or receives, in order, in a thread of its own: what waits for Gloo is deaf to signals."""

    def __init__(self, who: str, timeout: float):
        self._who, self._timeout = who, timeout
        self._works: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[tuple[RuntimeError | None, float]] = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True).start()

    def add(self, work: Any) -> None:
        self._works.put(work)

    def next(self) -> None:
        """Return once the next one is done.

        Raises:
            PeerLost: It came to no end, or to a bad one.
        """
        while True:
            with suppress(queue.Empty):
                error, seconds = self._ends.get(timeout=_SECONDS_BETWEEN_LOOKS)
                break
        if error is not None:
            is_late = seconds > 0.9 * self._timeout
            raise peer_lost('the relay', [self._who], self._timeout if is_late else None) from error

    def _wait(self) -> None:
        error = None
        while error is None:
            work, begin = self._works.get(), time.monotonic()
            try:
                work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as failed:
                error = failed
            self._ends.put((error, time.monotonic() - begin))


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix('torch.'))
