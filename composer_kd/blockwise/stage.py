"""A stage of a pipeline as a Composer run: its model, what it is fed, and the teacher's blocks that run ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Algorithm, DataSpec, Event, State, get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn

from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.relay import Inlet, Message, Outlet, Word
from composer_kd.teachers import TeacherError

Batch = dict[str, Tensor]  # `boundary<b>`: what block b takes, and block b - 1 is to give; `labels`


class StageModel(ComposerModel):
    """Some of the student's blocks, as a model whose batches are the teacher's activations.

    What blocks draw at random, as by dropout, is a function of the seed, the block, the batch and the microbatch: the
    same however blocks are dealt out.

    Args:
        pairs: All blocks.
        blocks: Numbers of those that are trained here.
        seed: Of what they draw.

    Attributes:
        step: Number of the batch; set by :class:`TeacherRelay`.
    """

    def __init__(self, pairs: BlockPairs, blocks: Sequence[int], seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): pairs.student[number] for number in blocks})
        self.step = 0
        self._pairs, self._seed, self._microbatch = pairs, seed, 0

    def begin(self, step: int) -> None:
        """Get ready for a batch."""
        self.step, self._microbatch = step, 0

    def forward(self, batch: Batch) -> list[Tensor]:
        """What each block gives, shape of what it is to give."""
        given = []
        for name, block in self.blocks.items():
            x = batch[f'boundary{name}']
            version = x._version
            with _drawing_from(self._seed, name, self.step, self._microbatch, device=x.device):
                given.append(block(x))
            if x._version != version:
                raise TeacherError(f'block {name} of the student writes into what it is given: cut elsewhere')
        self._microbatch += 1
        return given

    def loss(self, outputs: list[Tensor], batch: Batch, *_: Any) -> dict[str, Tensor]:
        """The loss of each block, and their sum: no gradient of one reaches another."""
        found = {}
        for name, given in zip(self.blocks, outputs, strict=True):
            wanted, labels = batch[f'boundary{int(name) + 1}'], batch.get('labels')
            found[f'block{name}'] = self._pairs.losses(int(name), student=given, teacher=wanted, labels=labels)
        return found | {'total': torch.stack([*found.values()]).sum()}


class TeacherRelay(Algorithm):
    """Runs the teacher's blocks on each batch before the student's, and hands on what the next stage needs at once.

    Runs on :attr:`.Event.FIT_START` to move the teacher's blocks to the device; on :attr:`.Event.BEFORE_DATALOADER` to
    tell the loader that batches are for training now; on :attr:`.Event.BATCH_START`, where it gives the batch to the
    blocks, sends on, and leaves in its place what the student's blocks take; on :attr:`.Event.EPOCH_END` and
    :attr:`.Event.FIT_END`, to say so to the next stage.

    Args:
        pairs: All blocks.
        teachers: Numbers of the teacher's blocks that run here: neighbours.
        students: Numbers of the student's blocks that are trained here.
        data: What batches come from, if they are data; its transforms are used. Default: ``None``, from ``inlet``.
        inlet: From the stage before. Default: ``None``, this stage is the first one.
        outlet: To the next stage. Default: ``None``, this stage is the last one.

    Attributes:
        runs: For each of the teacher's blocks, how often it has run.
    """

    def __init__(
        self,
        pairs: BlockPairs,
        teachers: range,
        students: Sequence[int],
        *,
        data: DataSpec | None = None,
        inlet: Inlet | None = None,
        outlet: Outlet | None = None,
    ):
        self.runs = dict.fromkeys(teachers, 0)
        self._pairs, self._teachers, self._students = pairs, teachers, students
        self._data, self._inlet, self._outlet = data, inlet, outlet
        self._with_labels = pairs.label_weight > 0
        self.loader: RelayedBatches | None = None

    def match(self, event: Event, state: State) -> bool:
        """Whether there is anything to do."""
        return event in (
            *(Event.FIT_START, Event.BEFORE_DATALOADER, Event.BATCH_START, Event.EPOCH_END, Event.FIT_END),
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what the event is for, see the class."""
        batch = state.timestamp.batch.value
        if event == Event.FIT_START:
            for number in self._teachers:
                state.device.module_to_device(self._pairs.teacher[number])
        elif event == Event.BEFORE_DATALOADER and self.loader is not None:
            self.loader.begin(state)
        elif event == Event.BATCH_START:
            state.batch = self._relay(state, batch)
        elif event == Event.EPOCH_END and self._outlet is not None:
            self._outlet.end(Word.END_OF_EPOCH, batch)
        elif event == Event.FIT_END and self._outlet is not None:
            self._outlet.flush()  # what follows is not waited for, since a stage that is done takes nothing more
            self._outlet.end(Word.STOP, batch)

    def _relay(self, state: State, number: int) -> Batch:
        x, labels, samples = self._inputs(state)
        boundaries = {self._teachers.start: x}
        with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
            for block in self._teachers:
                version = x._version
                given = self._pairs.teacher[block](x)
                if x._version != version:
                    raise TeacherError(f'block {block} of the teacher writes into what it is given: cut elsewhere')
                self.runs[block] += 1
                boundaries[block + 1] = x = given
        rest = [] if labels is None else [labels]
        if self._outlet is not None:
            self._outlet.send([x, *rest], number=number, samples=samples)
        model: Any = getattr(state.model, 'module', state.model)  # within DDP
        model.begin(number)
        needed = {*self._students, *(block + 1 for block in self._students)}
        batch = {f'boundary{block}': boundary for block, boundary in boundaries.items() if block in needed}
        return batch if labels is None else batch | {'labels': labels}

    def _inputs(self, state: State) -> tuple[Tensor, Tensor | None, int]:
        """What the first of the teacher's blocks here takes; labels, if they are wanted; samples of all processes."""
        if isinstance(state.batch, Message):
            x, *rest = state.device.batch_to_device(state.batch.tensors)
            return x, rest[0] if rest else None, state.batch.samples
        assert self._data is not None
        batch = self._data.microbatch_transforms(state.device.batch_to_device(state.batch))
        x, labels = batch
        return x, labels if self._with_labels else None, len(x) * dist.get_world_size()


class RelayedBatches:
    """What comes from the stage before, as a loader: messages, of which :class:`TeacherRelay` makes batches.

    Args:
        inlet: Where they come from.
        batch_size: Samples of this process in a batch.
        length: Batches of an epoch. Default: None, it is not known.
    """

    def __init__(self, inlet: Inlet, batch_size: int, length: int | None = None):
        self.batch_size = batch_size
        self._inlet, self._length = inlet, length
        self._state: State | None = None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError('how many batches come is not known')
        return self._length

    def begin(self, state: State) -> None:
        """From now on whoever asks wants to train."""
        self._state = state

    def __iter__(self) -> Iterator[Message | None]:
        if (
            self._state is None
        ):  # Composer asks for a batch of each past epoch, to have samplers draw what they drew then
            yield None
            return
        left_out = self._state.timestamp.batch_in_epoch.value  # of a resumed epoch; Composer asks for them
        for _ in range(left_out):
            yield None
        has_begun = left_out > 0
        while True:
            message = self._inlet.take()
            if message.word == Word.END_OF_EPOCH and not has_begun:
                continue  # of the last epoch, whose batches Composer has counted
            if message.word != Word.BATCH:
                break
            has_begun = True
            yield message
        if message.word == Word.STOP:
            self._state.stop_training()


def stage(
    pairs: BlockPairs,
    blocks: Sequence[int],
    *,
    teachers: range | None = None,
    data: DataSpec | None = None,
    inlet: Inlet | None = None,
    outlet: Outlet | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a Trainer of one stage is made with: `model`, `train_dataloader` and `algorithms`.

    Args:
        pairs: All blocks.
        blocks: Numbers of those that are trained in this stage.
        teachers: Numbers of the teacher's blocks that run in it. Default: None, the same.
        data: Of the first stage. Default: None.
        inlet: Of the others. Default: None.
        outlet: Of all but the last. Default: None.
        batch_size: Samples of this process in a batch from an inlet. Default: None.
        length: Batches of an epoch from an inlet. Default: None, it is not known.
        seed: Of what blocks draw at random. Default: 0.
    """
    teachers = range(blocks[0], blocks[-1] + 1) if teachers is None else teachers
    relay = TeacherRelay(pairs, teachers, blocks, data=data, inlet=inlet, outlet=outlet)
    options: dict[str, Any] = {'get_num_samples_in_batch': samples_in, 'get_num_tokens_in_batch': lambda batch: 0}
    if data is not None:
        spec = DataSpec(data.dataloader, batch_transforms=data.batch_transforms, **options)
    else:
        assert inlet is not None and batch_size is not None
        relay.loader = RelayedBatches(inlet, batch_size, length)
        spec = DataSpec(relay.loader, **options)
    return {'model': StageModel(pairs, blocks, seed), 'train_dataloader': spec, 'algorithms': [relay]}


def samples_in(batch: Message | Batch | Sequence[Tensor]) -> int:
    """How many samples a batch has, as it comes or as the student's blocks take it."""
    if isinstance(batch, Message):
        return len(batch.tensors[0])
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


@contextmanager
def _drawing_from(*source: object, device: torch.device) -> Iterator[None]:
    """Draw what is random as a function of these alone, and leave the generators as they were."""
    seed = int.from_bytes(hashlib.sha256(repr(source).encode()).digest()[:7], 'big')
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        yield
