"""In every batch that distills, the teams tell each other what they say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from composer.utils import dist
from torch import Tensor

from composer_kd.channel import Channel
from composer_kd.exchange.exchange import peers_in_launch
from composer_kd.packing import Packing
from composer_kd.teachers.batches import samples_in
from composer_kd.teachers.peer import PeerTeacher
from composer_kd.teachers.teacher import Signal, TeacherError
from composer_kd.teams import Team
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits, part

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

    from composer_kd.algorithms.knowledge_distillation import KnowledgeDistillation

_ALL_UP_TO = 4096  # classes, whose logits are all sent unless it is said how many
_OF_MORE = 128
_ROWS = 256  # of which all logits are there at once, where some of them are sent
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - 2**64


class PredictionsExchange:
    """The logits of each microbatch go to the processes of equal rank in all other teams.

    So all teams train on the same batches, which is verified: where inputs differ, a TeacherError says so. No network
    has to pass forward twice.

    Args:
        top: How many logits to send of each position, the largest, with what the others weigh together; for the loss
            ``'kl'`` alone. Default: None, all of up to 4,096 classes, and 128 of more.
    """

    name = 'predictions'
    in_launch = True

    def __init__(self, top: int | None = None):
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ValueError(f'top must be how many logits to send, 1 or more, not {top!r}')
        self.top = top
        self._team: Team | None = None
        self._channel: Channel | None = None
        self._temperature: float | None = None
        self._starts = 0
        self._is_verified = False
        self._own: tuple[Batch, Signal] | None = None
        self._said: list[Signal] | None = None
        self._bytes = 0
        self._differs: Tensor | None = None

    def peers(self, team: Team | None) -> Sequence[PeerTeacher]:
        """A teacher for each of the other teams."""
        self._team, self._peers = team, peers_in_launch(team, self.name)
        return self._peers

    def facts(self, state: State, student: ComposerModel) -> dict[str, Any]:
        """See `Exchange`."""
        if state.auto_microbatching:
            raise TeacherError(
                'predictions are exchanged by microbatches, which must be the same in all teams: give '
                "device_train_microbatch_size as a number, not 'auto'"
            )
        return {'top': self.top, 'device_train_microbatch_size': state.device_train_microbatch_size}

    def start(self, state: State, student: ComposerModel, distillation: KnowledgeDistillation) -> None:
        """See `Exchange`."""
        assert self._team is not None
        self._temperature = distillation.kl_temperature
        if self.top is not None and self._temperature is None:
            raise TeacherError("only the largest logits are sent, which are enough for loss='kl' alone: leave out top")
        classes, several = getattr(student, 'num_classes', None), len(distillation.speakers(state, 0)) > 1
        if several and distillation.average != 'losses' and self._top(classes or 0) < (classes or 0):
            todo = "take average='losses', or TeacherSampling"
            raise TeacherError(f'the largest logits of several peers are sent, which cannot be averaged: {todo}')
        if distillation.speakers_of_samples is not None:
            raise TeacherError("predictions come for whole batches: sample teachers per='batch', or exchange weights")
        if self._channel is None:
            device = state.device.tensor_to_device(torch.empty(0)).device
            self._channel = self._team.channel('predictions', device)
        self._starts += 1
        self._is_verified = False
        for peer in self._peers:
            peer.answer = lambda batch, team=peer.team: self._of(team)

    def has_come(self) -> bool:
        """See `Exchange`."""
        return True

    def tell(self, batch: Batch, logits: Signal) -> None:
        """See `Exchange`."""
        self._own, self._said = (batch, logits), None

    def batch_end(self, state: State) -> dict[str, float]:
        """Log how many bytes this rank has sent in the batch.

        Raises:
            TeacherError: Teams have seen different inputs in this batch.
        """
        self._own = self._said = None
        differs, self._differs = self._differs, None
        if differs is not None:
            dist.all_reduce(differs, 'MAX')
            if bool(differs):
                raise self._apart(state.timestamp.batch.value - 1)
        sent, self._bytes = self._bytes, 0
        return {'codistillation/bytes': sent} if sent else {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each batch speaks for itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

    def release(self) -> None:
        """See `Exchange`."""
        self._own = self._said = None
        if self._channel is not None:
            self._channel.close()

    def _of(self, team: int) -> Signal:
        """What a team says of the present microbatch. The first to ask has all teams tell."""
        if self._said is None:
            assert self._own is not None, 'was told'
            self._said, self._own = self._exchanged(*self._own), None
        return self._said[team]

    @torch.no_grad()
    def _exchanged(self, batch: Batch, logits: Signal) -> list[Signal]:
        assert self._channel is not None and self._team is not None
        own = self._shortened(logits)
        prints = fingerprints(batch).to(logits.device)
        tensors = [prints, *_tensors(own)]
        if not self._is_verified:  # of what differs in size nobody would hear
            self._verify(tensors)
        packing = Packing(tensors)
        said = [packing.unpack(packed) for packed in self._channel.gather(packing.pack(tensors))]
        self._bytes += packing.bytes
        differs = torch.stack([(one[0] != prints).any() for one in said]).any().to(torch.uint8)
        self._differs = differs if self._differs is None else self._differs | differs
        return [_signal(own, one[1:]) for one in said]

    def _shortened(self, logits: Signal) -> Tensor | TopKLogits:
        """The logits, or the largest of them where there are many."""
        assert not isinstance(logits, TopKLogits), 'those of a student are all known'
        classes, logits = logits.shape[-1], logits.detach()
        top = self._top(classes)
        if top >= classes:
            return logits.part() if isinstance(logits, DeferredLogits) else logits
        assert self._temperature is not None, 'was checked'
        begins = range(0, max(1, logits.shape[0]), _ROWS)
        parts = [TopKLogits.of(part(logits, slice(begin, begin + _ROWS)), top, [self._temperature]) for begin in begins]
        tails = {self._temperature: torch.cat([one.tail(self._temperature) for one in parts])}
        values, indices = torch.cat([one.values for one in parts]), torch.cat([one.indices for one in parts])
        return TopKLogits(values, indices.int(), tails, classes)

    def _top(self, classes: int) -> int:
        """How many logits of so many are sent."""
        return self.top or (classes if classes <= _ALL_UP_TO or self._temperature is None else _OF_MORE)

    def _verify(self, tensors: Sequence[Tensor]) -> None:
        """See whether all teams are about to send the same kind of thing about the same inputs."""
        assert self._channel is not None
        prints, *others = tensors
        kinds = [f'{str(one.dtype).removeprefix("torch.")} {[*one.shape]}' for one in others]
        every = self._channel.agree(f'first batch {self._starts}', {'kinds': kinds, 'inputs': prints.tolist()})
        if any(one['inputs'] != every[0]['inputs'] for one in every):
            raise self._apart()
        for index, one in enumerate(every):
            if one['kinds'] != every[0]['kinds']:
                first, other = every[0]['kinds'][0], one['kinds'][0]
                raise TeacherError(
                    f'team0 has logits {first}, team{index} {other}: teams that exchange predictions need the same '
                    'classes, and the same precision'
                )
        self._is_verified = True

    def _apart(self, batch: int | None = None) -> TeacherError:
        where = 'the first batch that distills' if batch is None else f'batch {batch}'
        return TeacherError(
            f'the teams see other inputs than each other in {where}: predictions are exchanged about the same samples, '
            'so give all teams the same loader (the same shuffle_seed, view_seed, mask_seed), and leave out what '
            'changes samples at random after it, such as MixUp'
        )


def fingerprints(batch: Any) -> Tensor:
    """A number for each sample of a batch, int64, shape (samples,): another one if its tensors are others."""
    number = samples_in(batch)
    tensors = [tensor for tensor in _leaves(batch) if tensor.ndim and len(tensor) == number and tensor.numel()]
    total = torch.zeros(number, dtype=torch.int64, device=tensors[0].device if tensors else None)
    for place, tensor in enumerate(tensors):
        columns = tensor.shape[-1] if tensor.ndim > 1 else 1
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.dtype.itemsize]).reshape(number, -1, columns)
        # By row and by column, so that a sample that is mirrored or shifted is another one.
        for dim, sums in enumerate((bits.sum(2, dtype=torch.int64), bits.sum(1, dtype=torch.int64))):
            weights = torch.arange(1, sums.shape[1] + 1, device=sums.device) * (2 * (2 * place + dim) + 1)
            total = (total + (sums * weights).sum(1)) * _ODD
    return total


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch):
            yield from _leaves(batch[key])
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)


def _tensors(logits: Tensor | TopKLogits) -> list[Tensor]:
    return [logits] if isinstance(logits, Tensor) else [logits.values, logits.indices, *logits.tails.values()]


def _signal(own: Tensor | TopKLogits, tensors: list[Tensor]) -> Tensor | TopKLogits:
    """What another team says, in the form of what one says oneself."""
    if isinstance(own, Tensor):
        return tensors[0]
    values, indices, *tails = tensors
    return TopKLogits(values, indices, dict(zip(own.tails, tails, strict=True)), own.classes)
