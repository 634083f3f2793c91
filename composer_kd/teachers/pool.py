"""Several teachers as one signal."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from composer.utils import dist
from torch import nn

from composer_kd.averages import Mean
from composer_kd.teachers.batches import pick, samples_in
from composer_kd.teachers.recording import RecordingTeacher
from composer_kd.teachers.residency import Residency, can_wait, shares_tensors, weight_bytes
from composer_kd.teachers.stopwatch import Stopwatch
from composer_kd.teachers.teacher import Signal, Teacher, TeacherError
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits, EachLogits, Logits, MeanLogits

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

    from composer_kd.recording import RowFormat

_SHARE_OF_DEVICE = 4  # residency 'auto' leaves the teachers on the device while they take a quarter of what is free


def convex_weights(seed: int, batch: int, number: int) -> tuple[float, ...]:
    """Weights above 0 that sum to 1, drawn uniformly among all such, as a function of the arguments alone.

    Args:
        seed: The run's seed.
        batch: The batch's number in the run.
        number: How many.
    """
    # `random()` of Python's generator, seeded with a string, is the same on every platform and version.
    uniform = random.Random(f'composer_kd.convex_weights {seed} {batch}').random
    draws = [max(-math.log(1.0 - uniform()), 1e-300) for _ in range(number)]
    return tuple(draw / sum(draws) for draw in draws)


class TeacherPool:
    """Teachers, whose signals are averaged, and the account of what they cost.

    Args:
        teachers: At least one.
        weights: Of the teachers in an average, one number above 0 for each; or ``'random'``: others in each batch,
            drawn uniformly among all that sum to 1. Default: ``None``, the same for all.
        average: ``'logits'``: the mean of the logits. ``'probabilities'``: logits that give, at ``temperature``, the
            mean of the teachers' probabilities. ``'losses'``: their logits one by one, for the mean of the losses.
            Default: ``'logits'``.
        only_correct: Average only those teachers, for each sample, whose largest logit is that of its label; all, where
            there is none. Default: ``False``.
        residency: Where the teachers' weights are. ``'device'``: all on the device. ``'host'``: in the host's memory,
            and on the device only those that are heard in the present batch or in the next. ``'auto'``: on the device
            if they take up to a quarter of what is free there, and always so on a CPU and where there is one teacher.
            Default: ``'auto'``.
        temperature: Of the probabilities that are averaged. Default: ``1.0``.
        axis: The class axis of the logits. Default: ``-1``.

    Attributes:
        heard: How often a teacher was heard, on this rank, since the run began.
        samples_heard: On how many samples, each teacher's summed up.
        released: Whether the teachers have left the device for good.
    """

    def __init__(
        self,
        teachers: Teacher | Sequence[Teacher],
        *,
        weights: Sequence[float] | Literal['random'] | None = None,
        average: Literal['logits', 'probabilities', 'losses'] = 'logits',
        only_correct: bool = False,
        residency: Literal['device', 'host', 'auto'] = 'auto',
        temperature: float = 1.0,
        axis: int = -1,
    ):
        self.teachers = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        if not self.teachers:
            raise ValueError('teachers is empty: distillation needs at least one')
        for teacher in self.teachers:
            if not isinstance(teacher, Teacher):
                raise TypeError(f'{type(teacher).__name__} is not a teacher; wrap a network as NetworkTeacher(network)')
        if weights is not None and not isinstance(weights, str):
            weights = [float(weight) for weight in weights]
        _check_weights(weights, len(self.teachers))
        if average not in ('logits', 'probabilities', 'losses'):
            raise ValueError(f"average must be 'logits', 'probabilities' or 'losses', not {average!r}")
        if residency not in ('device', 'host', 'auto'):
            raise ValueError(f"residency must be 'device', 'host' or 'auto', not {residency!r}")
        self.weights = weights
        self.only_correct = only_correct
        self.residency = residency
        self.heard = 0
        self.samples_heard = 0
        self.released = False
        self._temperature = temperature if average == 'probabilities' else None
        self._one_by_one = average == 'losses'
        self._axis = axis
        self._stopwatch = Stopwatch()
        self._earlier_forwards = -self._forwards_of_teachers()
        self._sound: torch.Tensor | None = None
        self._residency: Residency | None = None

    def __len__(self) -> int:
        return len(self.teachers)

    @property
    def seconds(self) -> float:
        """Seconds of device time that this rank's teachers took since the run began; never waits for the device."""
        return self._stopwatch.seconds

    @property
    def forwards(self) -> int:
        """Passes through the teachers' networks, on this rank, since the run began."""
        return self._earlier_forwards + self._forwards_of_teachers()

    @property
    def replays(self) -> bool:
        """Whether a teacher must know which samples it is asked about."""
        return any(teacher.replays for teacher in self.teachers)

    @property
    def partial_formats(self) -> list[RowFormat]:
        """Of those teachers of which only the largest logits are recorded, what is recorded; after :meth:`check`."""
        formats = (getattr(teacher, 'format', None) for teacher in self.teachers)
        return [kept for kept in formats if kept is not None and kept.k is not None]

    @property
    def waits_on_host(self) -> bool:
        """Whether the teachers' weights wait on the host, so that it helps to know who is heard next."""
        return self._residency is not None

    @property
    def bytes_on_device(self) -> int:
        """What the weights of the teachers' networks take on the device at present."""
        if self._residency is not None:
            return self._residency.bytes
        networks = (getattr(teacher, 'network', None) for teacher in self.teachers)
        return 0 if self.released else sum(weight_bytes(network) for network in networks if network is not None)

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if one of the teachers cannot teach ``student``."""
        for teacher in self.teachers:
            teacher.check(student)
        if self.only_correct and getattr(student, 'num_classes', None) == 1:
            raise TeacherError(
                'only_correct is for classes, of which one is right; the student gives one number, so leave it out'
            )

    def check_average(self, speakers: Sequence[int]) -> None:
        """Raise :class:`TeacherError` if these teachers cannot be heard together."""
        if len(speakers) > 1 and self.partial_formats and not self._one_by_one:
            raise TeacherError(_TOO_FEW)

    def prepare(self, state: State) -> None:
        """Get every teacher ready on the student's device, or on the host, see ``residency``."""
        if self._residency is not None:
            self._residency.end()
            self._residency = None
        device = state.device.tensor_to_device(torch.empty(0)).device
        room, taken = self._room(device), 0
        given = {index: getattr(teacher, 'network', None) for index, teacher in enumerate(self.teachers)}
        given = {index: network for index, network in given.items() if network is not None}
        shared = {
            index
            for index, network in given.items()
            if shares_tensors(network, [other for number, other in given.items() if number != index])
        }
        networks: dict[int, nn.Module] = {}
        waiting: set[int] = set()
        for index, teacher in enumerate(self.teachers):
            teacher.prepare(state)
            network = getattr(teacher, 'network', None)
            if network is None:
                continue
            taken += weight_bytes(network)
            if index not in shared and can_wait(network):
                networks[index] = network
            elif self.residency == 'host':
                raise TeacherError(
                    f"residency='host' is not for teacher {teacher.name} (number {index}): its weights are of a type "
                    'that stays on the device, or those of another teacher too; take another residency'
                )
            if taken > room:
                self._residency = self._residency or Residency(device)
                for number in networks.keys() - waiting:
                    self._residency.take(number, networks[number])
                waiting.update(networks)

    def place(self, present: Iterable[int], coming: Iterable[int]) -> None:
        """At the start of a batch, say who is heard in it, and who next: no others' weights stay on the device."""
        if self._residency is not None:
            self._residency.settle(present, coming)

    def release(self) -> None:
        """Take every teacher off the device for good."""
        if self._residency is not None:
            self._residency.end()
            self._residency = None
        for teacher in self.teachers:
            teacher.release()
        self.released = True

    def batch_weights(self, seed: int, batch: int) -> Sequence[float] | None:
        """The weights of the teachers in an average of this batch; ``None`` if they are the same for all."""
        return convex_weights(seed, batch, len(self)) if isinstance(self.weights, str) else self.weights

    def signal(
        self,
        batch: Batch,
        speakers: Sequence[int] | torch.Tensor,
        student_logits: torch.Tensor | DeferredLogits,
        *,
        keys: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: Sequence[float] | None = None,
    ) -> Logits | TopKLogits | EachLogits:
        """The mean of the logits of the teachers in ``speakers``, or, for a mean of losses, the logits of each.

        Args:
            batch: The device microbatch, of N samples.
            speakers: Which teachers are asked, by their index; or, int64 on the CPU, shape (N, m), which are asked
                about each sample.
            student_logits: What the student said to it, shape (N, ..., C).
            keys: Sample id and view of each sample, shape (N, 2). Default: ``None``, not known.
            labels: The classes that are right, shape (N, ...), which ``only_correct`` needs. Default: ``None``.
            weights: One for each teacher of the pool. Default: ``None``, the same for all.

        Returns:
            Logits, shape (N, ..., C). One teacher's as they are, a mean in fp32 or more; deferred if the student's are
            and the same teachers are asked about all samples.

        Raises:
            TeacherError: A teacher's logits have another shape than the student's, or are too few to be averaged.
        """
        labels = labels if self.only_correct else None
        if isinstance(speakers, torch.Tensor):
            return self._of_samples(batch, speakers, student_logits, keys, labels, weights)
        assert speakers, 'no teacher was named'
        shares = _shares(speakers, weights)
        is_deferred = isinstance(student_logits, DeferredLogits)
        if is_deferred or len(speakers) == 1 or self._one_by_one:
            said = [self._ask(index, batch, keys, student_logits) for index in speakers]
            if not is_deferred:
                said = [one.part() if isinstance(one, DeferredLogits) else one for one in said]
            if len(said) == 1:
                return said[0]
            if self._one_by_one:
                return EachLogits(said, shares)
            if any(isinstance(logits, TopKLogits) for logits in said):
                raise TeacherError(_TOO_FEW)
            return MeanLogits(said, shares, temperature=self._temperature, labels=labels)  # pyright: ignore
        mean = Mean(temperature=self._temperature, labels=labels, axis=self._axis)
        for index, share in zip(speakers, shares, strict=True):
            mean.add(_whole(self._ask(index, batch, keys, student_logits)), share)
        return mean.result()

    def raise_if_unsound(self, batch: int) -> None:
        """Raise :class:`TeacherError` on all ranks if a teacher has said NaN or infinity on one since the last time.

        To be asked on all ranks, after teachers were heard on each, and when the device has nothing left to do: a flag
        per teacher is read from it.
        """
        sound, self._sound = self._sound, None
        if sound is None:
            return
        dist.all_reduce(sound, 'MIN')
        for index, is_sound in enumerate(sound.tolist()):
            if not is_sound:
                teacher = self.teachers[index]
                what = f'teacher {teacher.name} (number {index}) gave'
                if isinstance(teacher, RecordingTeacher) and teacher.overflowed():
                    what = f'{what} logits at batch {batch} that float16 cannot hold'
                    raise TeacherError(f"{what}: record with record_dtype='float32', into another folder")
                raise TeacherError(f'{what} NaN or infinity at batch {batch}')

    def manifest(self) -> list[dict[str, Any]]:
        """The manifests of the teachers, in order."""
        return [teacher.manifest() for teacher in self.teachers]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pool: its manifests and what it has cost."""
        return {
            'teachers': self.manifest(),
            'seconds': self.seconds,
            'forwards': self.forwards,
            'heard': self.heard,
            'samples_heard': self.samples_heard,
            'released': self.released,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the account of ``state``.

        Raises:
            TeacherError: The run was taught by other teachers.
        """
        then, now = state['teachers'], self.manifest()
        if len(then) != len(now):
            raise TeacherError(f'the run to be resumed had {len(then)} teachers, this one has {len(now)}')
        for index, (was, is_) in enumerate(zip(then, now, strict=True)):
            if was['sha256'] != is_['sha256']:
                raise TeacherError(
                    f'the run to be resumed had another teacher number {index}: {was["name"]} with weights '
                    f'{was["sha256"][:12]}, not {is_["name"]} with {is_["sha256"][:12]}; '
                    'give it the teachers it began with'
                )
            options = is_.get('options')
            if was.get('options', options) != options:  # which older checkpoints do not have
                raise TeacherError(
                    f'the run to be resumed had other options for teacher number {index}, {is_["name"]}: '
                    f'{was["options"]}, not {options}; give it those it began with'
                )
        self._stopwatch = Stopwatch(state['seconds'])
        self._earlier_forwards = state['forwards'] - self._forwards_of_teachers()
        self.heard, self.samples_heard = state['heard'], state['samples_heard']
        if state['released']:
            self.release()

    def _forwards_of_teachers(self) -> int:
        return sum(teacher.forwards for teacher in self.teachers)

    def _room(self, device: torch.device) -> float:
        """How many bytes the teachers may take on the device before they have to wait on the host."""
        if self.residency == 'host':
            return -1.0
        if self.residency == 'device' or device.type != 'cuda' or len(self) == 1:
            return math.inf
        return torch.cuda.mem_get_info(device)[0] / _SHARE_OF_DEVICE

    def _ask(
        self,
        index: int,
        batch: Batch,
        keys: torch.Tensor | None,
        student_logits: torch.Tensor | DeferredLogits,
        number: int | None = None,
    ) -> Signal:
        """What one teacher says, of the student's shape but for the number of positions; its soundness is noted."""
        teacher = self.teachers[index]
        with self._stopwatch.running(student_logits.device):
            if self._residency is not None:
                self._residency.arrive(index)
            logits = teacher.signal(batch, keys)
        self.heard += 1
        self.samples_heard += samples_in(batch)
        shape = list(student_logits.shape)
        if number is not None:
            shape[0] = number
        if list(logits.shape) != shape:
            raise TeacherError(
                f'teacher {teacher.name} (number {index}) gives logits of shape {list(logits.shape)}, the student '
                f'{shape}: they must be the same'
            )
        if isinstance(logits, DeferredLogits):
            logits = logits.detach()  # cast here, the projection is not cast again for the loss
        if isinstance(logits, torch.Tensor):
            sound = (logits < torch.inf).all()  # not so for NaN; -inf rules out a class
        else:
            sound = logits.are_sound()
        if self._sound is None:
            self._sound = torch.ones(len(self), dtype=torch.uint8, device=sound.device)
        self._sound[index] *= sound
        return logits

    def _of_samples(
        self,
        batch: Any,
        heard: torch.Tensor,
        student_logits: torch.Tensor | DeferredLogits,
        keys: torch.Tensor | None,
        labels: torch.Tensor | None,
        weights: Sequence[float] | None,
    ) -> torch.Tensor | TopKLogits | EachLogits:
        """The mean of the logits of those teachers that each sample hears; each is asked about its own samples."""
        number, *classes = student_logits.shape
        said = []
        for index in heard.unique().tolist():
            samples = (heard == index).any(1).nonzero().squeeze(1)
            part, rows = pick(batch, samples)
            of_samples = None if keys is None else keys[samples]
            logits = self._ask(index, part, of_samples, student_logits, len(rows))
            said.append((index, rows, logits.part() if isinstance(logits, DeferredLogits) else logits))
        positions = batch.get('positions') if isinstance(batch, Mapping) else None
        if positions is not None:
            heard = heard.to(positions.device)[positions // batch['input_ids'].shape[1]]
        each = [_joined(said, column, number) for column in heard.unbind(1)]
        if len(each) == 1:
            return each[0]
        if self._one_by_one:
            return EachLogits(each, [1 / len(each)] * len(each))
        shares = torch.full(heard.shape, 1.0) if weights is None else torch.tensor(weights)[heard.cpu()]
        shares = (shares / shares.sum(1, keepdim=True)).to(student_logits.device)
        mean = Mean(temperature=self._temperature, labels=labels, axis=self._axis)
        for logits, share in zip(each, shares.unbind(1), strict=True):
            mean.add(_whole(logits), share.view(-1, *[1] * len(classes)))
        return mean.result()


_TOO_FEW = (
    "only the largest logits of the teachers are known, which cannot be averaged: take average='losses', hear one of "
    'them per batch (TeacherSampling), or record whole vectors'
)


def _check_weights(weights: Sequence[float] | Literal['random'] | None, number: int) -> None:
    if weights is None or weights == 'random':
        return
    if isinstance(weights, str):
        raise ValueError(f"weights are numbers, or 'random', not {weights!r}")
    if len(weights) != number:
        raise ValueError(f'weights has {len(weights)} numbers for {number} teachers: give one for each')
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f'weights must be above 0 each, not {list(weights)}; leave out a teacher that is not to count')


def _shares(speakers: Sequence[int], weights: Sequence[float] | None) -> list[float]:
    """The weights of those teachers that are heard, made to sum to 1."""
    heard = [1.0 if weights is None else weights[index] for index in speakers]
    return [weight / sum(heard) for weight in heard]


def _whole(logits: Signal) -> torch.Tensor:
    if isinstance(logits, TopKLogits):
        raise TeacherError(_TOO_FEW)
    return logits.part() if isinstance(logits, DeferredLogits) else logits


def _joined(said: list[tuple[int, torch.Tensor, Any]], heard: torch.Tensor, number: int) -> Any:
    """One set of logits for all positions, at each those of the one teacher that is heard there.

    Args:
        said: Index of a teacher, the positions it was asked about, and what it said there.
        heard: Who is heard at each position.
        number: Of positions.
    """
    first = said[0][2]
    if any(isinstance(logits, TopKLogits) for _, _, logits in said):
        if len({logits.values.shape[1:] if isinstance(logits, TopKLogits) else None for _, _, logits in said}) > 1:
            raise TeacherError('of some teachers more logits are known than of others: record all of them alike')

        def field(get: Any) -> torch.Tensor:
            return _joined([(index, rows, get(logits)) for index, rows, logits in said], heard, number)

        known = [T for T in first.tails if all(T in logits.tails for _, _, logits in said)]
        tails = {T: field(lambda logits, T=T: logits.tail(T)) for T in known}
        return TopKLogits(field(lambda x: x.values), field(lambda x: x.indices), tails, first.classes)
    dtype = torch.float32 if first.dtype.is_floating_point else first.dtype
    for _, _, logits in said:
        dtype = torch.promote_types(dtype, logits.dtype)
    joined = torch.empty((number, *first.shape[1:]), dtype=dtype, device=first.device)
    for index, rows, logits in said:
        mine = (heard[rows.to(heard.device)] == index).nonzero().squeeze(1)
        mine = mine.to(logits.device)
        joined.index_copy_(0, rows.to(logits.device)[mine], logits[mine].to(dtype))
    return joined
