"""Several teachers as one signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from composer.utils import dist

from composer_kd.teachers.stopwatch import Stopwatch
from composer_kd.teachers.teacher import Teacher, TeacherError
from composer_kd.vocabulary import DeferredLogits, Logits, MeanLogits

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel


class TeacherPool:
    """Teachers, whose signals are averaged, and the account of what they cost.

    Args:
        teachers: At least one.

    Attributes:
        forwards: How often a teacher was asked, on this rank, since the run began.
        released: Whether the teachers have left the device for good.
    """

    def __init__(self, teachers: Teacher | Sequence[Teacher]):
        self.teachers = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        if not self.teachers:
            raise ValueError('teachers is empty: distillation needs at least one')
        for teacher in self.teachers:
            if not isinstance(teacher, Teacher):
                raise TypeError(f'{type(teacher).__name__} is not a teacher; wrap a network as NetworkTeacher(network)')
        self.forwards = 0
        self.released = False
        self._stopwatch = Stopwatch()
        self._sound: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.teachers)

    @property
    def seconds(self) -> float:
        """Seconds of device time that this rank's teachers took since the run began; never waits for the device."""
        return self._stopwatch.seconds

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if one of the teachers cannot teach ``student``."""
        for teacher in self.teachers:
            teacher.check(student)

    def prepare(self, state: State) -> None:
        """Get every teacher ready on the student's device."""
        for teacher in self.teachers:
            teacher.prepare(state)

    def release(self) -> None:
        """Take every teacher off the device for good."""
        for teacher in self.teachers:
            teacher.release()
        self.released = True

    def signal(self, batch: Batch, speakers: Sequence[int], student_logits: torch.Tensor | DeferredLogits) -> Logits:
        """The mean of the logits of the teachers in ``speakers``.

        Args:
            batch: The device microbatch.
            speakers: Which teachers are asked, by their index.
            student_logits: What the student said to it, shape (N, ..., C).

        Returns:
            Logits, shape (N, ..., C). One teacher's as they are, a mean in fp32 or more; deferred if the student's are.

        Raises:
            TeacherError: A teacher's logits have another shape than the student's.
        """
        mean, deferred = None, []
        for index in speakers:
            teacher = self.teachers[index]
            with self._stopwatch.running(student_logits.device):
                logits = teacher.signal(batch)
            self.forwards += 1
            if logits.shape != student_logits.shape:
                raise TeacherError(
                    f'teacher {teacher.name} (number {index}) gives logits of shape {list(logits.shape)}, the student '
                    f'{list(student_logits.shape)}: they must be the same'
                )
            if isinstance(logits, DeferredLogits):
                logits = logits.detach()  # cast here, the projection is not cast again for the loss
                sound = logits.are_sound()
            else:
                sound = (logits < torch.inf).all()  # not so for NaN; -inf rules out a class
            self._sound[index] = self._sound[index] & sound if index in self._sound else sound
            if isinstance(student_logits, DeferredLogits):
                deferred.append(logits)
                continue
            logits = logits if isinstance(logits, torch.Tensor) else logits.part()
            if len(speakers) == 1:
                return logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / len(speakers)
            mean = logits if mean is None else mean + logits
        if deferred:
            return deferred[0] if len(deferred) == 1 else MeanLogits(deferred)
        assert mean is not None, 'no teacher was named'
        return mean

    def raise_if_unsound(self, batch: int) -> None:
        """Raise :class:`TeacherError` on all ranks if a teacher has said NaN or infinity on one since the last time.

        To be asked on all ranks, after the same teachers were heard on each, and when the device has nothing left to
        do: a flag per teacher is read from it.
        """
        flags, self._sound = self._sound, {}
        if not flags:
            return
        sound = torch.stack([*flags.values()]).to(torch.uint8)
        dist.all_reduce(sound, 'MIN')
        for index, is_sound in zip(flags, sound.tolist(), strict=True):
            if not is_sound:
                name = self.teachers[index].name
                raise TeacherError(f'teacher {name} (number {index}) gave NaN or infinity at batch {batch}')

    def manifest(self) -> list[dict[str, Any]]:
        """The manifests of the teachers, in order."""
        return [teacher.manifest() for teacher in self.teachers]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pool: its manifests and what it has cost."""
        return {
            'teachers': self.manifest(),
            'seconds': self.seconds,
            'forwards': self.forwards,
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
        self._stopwatch = Stopwatch(state['seconds'])
        self.forwards = state['forwards']
        if state['released']:
            self.release()
