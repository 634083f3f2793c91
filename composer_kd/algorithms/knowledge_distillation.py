"""Learn from teachers as well as from labels."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import ensure_tuple

from composer_kd import losses
from composer_kd.teachers import Teacher, TeacherPool, logits_of
from composer_kd.vocabulary import DeferredLogits, Logits, over_sequences

_NO_LABEL = -100  # torch's and Hugging Face's mark of a position without one
_LOSSES = {loss.__name__: loss for loss in (losses.kl, losses.reverse_kl, losses.jsd, losses.mse, losses.cosine)}


def blend(
    label_loss: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    kd_loss: torch.Tensor,
    *,
    kd_weight: float,
    label_weight: float,
) -> dict[str, torch.Tensor]:
    """Weighted sum of a model's own loss and a distillation loss, in the form in which Composer logs its parts.

    Args:
        label_loss: What the model's ``loss`` returned. Several are summed, or only ``'total'`` counts where there is
            one, as Composer does.
        kd_loss: The distillation loss, a scalar.
        kd_weight: Weight of the distillation loss.
        label_weight: Weight of the model's own loss.

    Returns:
        ``'total'``, which is trained on, and its parts before weighting: ``'label'``, ``'kd'``, and the single losses
        where ``label_loss`` has several.

    Raises:
        ValueError: ``label_loss`` has a part that is called ``'label'`` or ``'kd'``.
    """
    if isinstance(label_loss, Mapping):
        parts = dict(label_loss)
    else:  # as Composer calls them
        parts = {f'loss{i}': loss for i, loss in enumerate(ensure_tuple(label_loss))}
        parts = parts if len(parts) > 1 else {}
    if clash := parts.keys() & {'label', 'kd'}:
        raise ValueError(f"the model's loss has a part {clash.pop()!r}, a name that distillation logs under: rename it")
    label = _total(label_loss)
    return {**parts, 'label': label, 'kd': kd_loss, 'total': label_weight * label + kd_weight * kd_loss}


class KnowledgeDistillation(Algorithm):
    r"""Distillation (`Hinton et al, 2015 <https://arxiv.org/abs/1503.02531>`_) from one teacher or several.

    The student learns from :math:`w_{label} L_{label} + w_{kd} L_{kd}`, where :math:`L_{label}` is the loss of its own
    model, and :math:`L_{kd}` compares its logits with the mean of its teachers' logits, given the same inputs: those
    that the student's forward pass saw, whatever MixUp, ProgressiveResizing and the like have made of them.

    Runs on :attr:`.Event.INIT` to take its place behind all other algorithms, so that the losses are blended after
    MixUp and CutMix have done their work; on :attr:`.Event.FIT_START` to move the teachers to the device; on
    :attr:`.Event.BATCH_START` to settle weights and teachers of the batch; on :attr:`.Event.AFTER_FORWARD` to ask the
    teachers; on :attr:`.Event.BEFORE_BACKWARD` to blend the losses; and on :attr:`.Event.BATCH_END` to look for NaN.

    Combine it with :class:`.TeacherSampling` and :class:`.EarlyStopDistillation`. In batches that do not distill, and
    with ``kd_weight=0`` and ``label_weight=1``, the run is that of the student alone, bit for bit.

    Logs ``loss/train/kd`` and ``loss/train/label`` (before weighting), ``distillation/active``,
    ``distillation/kd_weight``, ``distillation/teacher_index`` (where one teacher is heard), and ``time/teacher``:
    seconds that this rank's device has spent on teachers since the run began.

    Args:
        teachers: The teachers.
        loss: ``'kl'``, ``'reverse_kl'``, ``'jsd'``, ``'mse'``, ``'cosine'``, or a function of
            ``student_logits``, ``teacher_logits`` and ``where`` (keywords all) that returns a mean over positions.
            Default: ``'kl'``.
        temperature: Temperature of the losses that have one (``kl``, ``reverse_kl``, ``jsd``), which multiply
            by its square. Default: ``4.0``.
        kd_weight: Weight of the distillation loss; with 0, no teacher is asked. Default: ``0.9``.
        label_weight: Weight of the student's own loss in batches that distill; it is 1 in all others.
            Default: ``0.1``.
        interval: Distill in every ``interval``-th batch. Default: ``1``.
        softmax_axis: What the distributions that a loss with a temperature compares lie over: ``'vocabulary'``, one
            distribution for each labelled position; or, for models of tokens, ``'sequence'``, one for each word, over
            the labelled positions of a sequence. Default: ``'vocabulary'``.

    Raises:
        ValueError: An argument is out of range.
        TeacherError: A teacher cannot teach this student, or says NaN.

    Example:
        .. code-block:: python

            trainer = Trainer(
                model=student,
                algorithms=[
                    KnowledgeDistillation([NetworkTeacher(resnet101), NetworkTeacher(resnet152)]),
                    TeacherSampling(num_teachers=1),
                    EarlyStopDistillation(stop='0.3dur'),
                ],
                ...
            )
    """

    def __init__(
        self,
        teachers: Teacher | Sequence[Teacher],
        loss: str | Callable[..., torch.Tensor] = 'kl',
        temperature: float = 4.0,
        kd_weight: float = 0.9,
        label_weight: float = 0.1,
        interval: int = 1,
        softmax_axis: str = 'vocabulary',
    ):
        if isinstance(loss, str) and loss not in _LOSSES:
            raise ValueError(f'unknown loss {loss!r}; known: {", ".join(_LOSSES)}')
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f'temperature must be above 0, not {temperature}')
        for name, weight in (('kd_weight', kd_weight), ('label_weight', label_weight)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f'{name} must be 0 or more, not {weight}')
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a whole number of batches, 1 or more, not {interval}')
        if softmax_axis not in ('vocabulary', 'sequence'):
            raise ValueError(f"softmax_axis must be 'vocabulary' or 'sequence', not {softmax_axis!r}")
        if softmax_axis == 'sequence' and loss in ('mse', 'cosine'):
            raise ValueError(f"{loss} compares no distributions, so it knows no softmax_axis: leave 'vocabulary'")
        if softmax_axis == 'sequence' and callable(loss) and 'axis' not in inspect.signature(loss).parameters:
            raise ValueError("softmax_axis='sequence' needs a loss that takes the axis of the classes, `axis`")
        self.pool = TeacherPool(teachers)
        self.kd_weight = kd_weight
        self.label_weight = label_weight
        self.interval = interval
        #: Share of the distillation that is switched on at the present time, 0 to 1; set by EarlyStopDistillation.
        self.share: Callable[[State], float] = lambda state: 1.0
        #: Which teachers are heard in the present batch; set by TeacherSampling.
        self.speakers: Callable[[State], tuple[int, ...]] = lambda state: tuple(range(len(self.pool)))
        self._loss = _LOSSES[loss] if isinstance(loss, str) else loss
        self._own_loss = not isinstance(loss, str)
        if 'temperature' in inspect.signature(self._loss).parameters:
            self._loss = functools.partial(self._loss, temperature=temperature)
        self._over_sequences = softmax_axis == 'sequence'
        self._shifts_labels = False
        self._now = _Batch()
        self._signal: Logits | None = None

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if one of the teachers cannot teach ``student``; costs no forward pass."""
        self.pool.check(student)

    def match(self, event: Event, state: State) -> bool:
        """Whether this algorithm has anything to do."""
        if event in (Event.AFTER_FORWARD, Event.BEFORE_BACKWARD):
            return self._now.distills
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what the event is for, see the class."""
        if event == Event.INIT:
            find_distiller(state, self)
            assert isinstance(state.model, ComposerModel)
            self.check(state.model)
            self._shifts_labels = bool(getattr(state.model, 'shift_labels', False))
            state.algorithms.remove(self)
            state.algorithms.append(self)
        elif event == Event.FIT_START:
            if not self.pool.released:
                self.pool.prepare(state)
        elif event == Event.BATCH_START:
            self._now = self._settle(state)
            logger.log_metrics(self._now.metrics())
        elif event == Event.AFTER_FORWARD and self._now.speakers:
            self._ask(state)
        elif event == Event.BEFORE_BACKWARD:
            state.loss = self._blended(state)
            self._signal = None
        elif event == Event.BATCH_END:
            # The weights of this batch are not saved yet, and the device is idle: Composer has just read the loss.
            self.pool.raise_if_unsound(state.timestamp.batch.value - 1)
            logger.log_metrics({'time/teacher': self.pool.seconds})

    def state_dict(self) -> dict[str, Any]:
        """Manifests of the teachers, never their weights, and what they have cost so far."""
        return {**super().state_dict(), **self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Go on from a checkpoint; raises :class:`TeacherError` if that run had other teachers."""
        self.pool.load_state_dict(state)

    def _settle(self, state: State) -> _Batch:
        if self.pool.released or state.timestamp.batch.value % self.interval != 0:
            return _Batch()
        share = self.share(state)
        if share == 0.0:
            return _Batch()
        kd_weight = share * self.kd_weight
        # As the distillation fades, the weight of the labels goes back to the 1 that it has without distillation.
        label_weight = 1.0 + share * (self.label_weight - 1.0) if share < 1.0 else self.label_weight
        return _Batch(True, kd_weight, label_weight, self.speakers(state) if kd_weight > 0.0 else ())

    def _ask(self, state: State) -> None:
        """Ask the teachers about the microbatch; of a token model, about the positions that its outputs are of."""
        outputs: Any = state.outputs
        batch, student_logits = state.batch, logits_of(outputs)
        positions = outputs.get('positions') if isinstance(outputs, Mapping) else None
        if isinstance(batch, Mapping):  # the loader may know positions that the student has no eye for
            batch = {key: value for key, value in batch.items() if key != 'positions'}
            batch |= {} if positions is None else {'positions': positions}
        signal = self.pool.signal(batch, self._now.speakers, student_logits)
        if not isinstance(student_logits, DeferredLogits):
            self._signal = signal
            return
        lesson = {
            'teacher_logits': signal,
            'kd_loss': functools.partial(self._loss, where=None),
            'kd_weight': self._now.kd_weight,
            'label_weight': self._now.label_weight,
            'sequences': _sequences(state.batch, positions) if self._over_sequences else None,
        }
        # The model's own loss takes it in: both losses of a chunk of logits are computed while the chunk is there.
        state.outputs = {**outputs, 'lesson': lesson}  # pyright: ignore[reportAttributeAccessIssue]

    def _blended(self, state: State) -> Any:
        if isinstance(state.outputs, Mapping) and 'lesson' in state.outputs:
            return state.loss
        if self._signal is None:  # kd_weight is 0, so no teacher was asked
            return state.loss if self._now.label_weight == 1.0 else self._now.label_weight * _total(state.loss)
        student_logits = logits_of(state.outputs)
        assert isinstance(student_logits, torch.Tensor) and isinstance(self._signal, torch.Tensor)
        kd_loss = self._kd_loss(state, student_logits, self._signal)
        return blend(state.loss, kd_loss, kd_weight=self._now.kd_weight, label_weight=self._now.label_weight)

    def _kd_loss(self, state: State, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        where = _that_count(state.batch, student_logits, self._shifts_labels)
        if self._over_sequences:
            positions = state.outputs.get('positions') if isinstance(state.outputs, Mapping) else None
            if positions is None and where is not None:
                positions = where.flatten().nonzero().squeeze(1)
                student_logits, teacher_logits = (x.flatten(0, 1)[positions] for x in (student_logits, teacher_logits))
            loss = over_sequences(self._loss, _sequences(state.batch, positions))
            return loss(student_logits=student_logits, teacher_logits=teacher_logits)
        if where is None and student_logits.ndim != 2 and not self._own_loss:
            raise ValueError(
                f'which axis of logits of shape {list(student_logits.shape)} has the classes? Pass it with the loss: '
                'loss=functools.partial(kl, axis=1)'
            )
        return self._loss(student_logits=student_logits, teacher_logits=teacher_logits, where=where)


@dataclass(frozen=True)
class _Batch:
    """What was settled for one batch."""

    distills: bool = False
    kd_weight: float = 0.0
    label_weight: float = 1.0
    speakers: tuple[int, ...] = ()

    def metrics(self) -> dict[str, float]:
        metrics = {'distillation/active': float(bool(self.speakers)), 'distillation/kd_weight': self.kd_weight}
        if len(self.speakers) == 1:
            metrics['distillation/teacher_index'] = self.speakers[0]
        return metrics


def find_distiller(state: State, asked_by: Algorithm) -> KnowledgeDistillation:
    """The run's one distilling algorithm.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [algorithm for algorithm in state.algorithms if isinstance(algorithm, KnowledgeDistillation)]
    if not found:
        raise ValueError(
            f'{type(asked_by).__name__} changes how a run distills: add KnowledgeDistillation to its algorithms'
        )
    if len(found) > 1:
        raise ValueError('a run distills by one algorithm: give one KnowledgeDistillation all the teachers')
    return found[0]


def _total(loss: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One scalar of whatever a model's ``loss`` returned, as Composer makes it."""
    if isinstance(loss, Mapping) and 'total' in loss:
        return loss['total'].mean()
    parts: Any = ensure_tuple(loss)
    return functools.reduce(torch.add, (part.mean() for part in parts))


def _that_count(batch: Any, logits: torch.Tensor, shifts_labels: bool) -> torch.Tensor | None:
    """Which positions of a token model's batch have a label; None where every sample is one position."""
    labels = batch.get('labels') if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.shape != logits.shape[:-1]:
        return None
    if shifts_labels:  # a causal model: the logits at a position are for the label of the next
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_NO_LABEL)
    return labels != _NO_LABEL


def _sequences(batch: Any, positions: torch.Tensor | None) -> torch.Tensor:
    """To which sequence of the batch each of the flattened positions belongs."""
    if positions is None:
        raise ValueError("softmax_axis='sequence' is for models of tokens, whose batch has a label for each of them")
    return positions // batch['input_ids'].shape[1]
