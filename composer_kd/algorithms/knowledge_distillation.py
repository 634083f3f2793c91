"""Learn from teachers as well as from labels."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import ensure_tuple

from composer_kd import losses
from composer_kd.algorithms.inputs import mixes_samples, refuse_changed_inputs
from composer_kd.teachers import RecordedTeacher, RecordingTeacher, Teacher, TeacherError, TeacherPool, logits_of
from composer_kd.teachers.batches import samples_in
from composer_kd.teachers.schedule import BEGIN, END, Schedule
from composer_kd.topk import TopKLogits, topk_loss
from composer_kd.vocabulary import DeferredLogits, EachLogits, Logits, over_sequences

_LOOK_AHEAD = 32  # batches in which the next that distills is looked for
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


def distills(seed: int, batch: int, *, interval: int = 1, probability: float = 1.0) -> bool:
    """Whether a batch distills, as a function of the arguments alone.

    Args:
        seed: The run's seed.
        batch: The batch's number in the run.
        interval: Only every ``interval``-th may. Default: ``1``.
        probability: Of those, this share does. Default: ``1.0``.
    """
    if batch % interval != 0:
        return False
    # `random()` of Python's generator, seeded with a string, is the same on every platform and version.
    return probability >= 1.0 or random.Random(f'composer_kd.distills {seed} {batch}').random() < probability


class KnowledgeDistillation(Algorithm):
    r"""Distillation (`Hinton et al, 2015 <https://arxiv.org/abs/1503.02531>`_) from one teacher or several.

    The student learns from :math:`w_{label} L_{label} + w_{kd} L_{kd}`, where :math:`L_{label}` is the loss of its own
    model, and :math:`L_{kd}` compares its logits with the mean of its teachers' logits, given the same inputs: those
    that the student's forward pass saw, whatever MixUp, ProgressiveResizing and the like have made of them. Teachers
    that were recorded know the samples as they came from the loader, and beside them such algorithms are refused.

    Runs on :attr:`.Event.INIT` to take its place behind all other algorithms, so that the losses are blended after
    MixUp and CutMix have done their work; on :attr:`.Event.FIT_START` to move the teachers to the device; on
    :attr:`.Event.BATCH_START` to settle weights and teachers of the batch; on :attr:`.Event.BEFORE_TRAIN_BATCH` to
    count its microbatches from the start; on :attr:`.Event.AFTER_FORWARD` to ask the teachers; on
    :attr:`.Event.BEFORE_BACKWARD` to blend the losses; on :attr:`.Event.BATCH_END` to look for NaN; and, if it records,
    on that and on :attr:`.Event.EPOCH_END` and :attr:`.Event.FIT_END` to store what the teachers said.

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
        probability: Distill in a batch with this probability, drawn as a function of the run's seed and the batch's
            number; of those that ``interval`` leaves. Default: ``1.0``.
        softmax_axis: What the distributions that a loss with a temperature compares lie over: ``'vocabulary'``, one
            distribution for each labelled position; or, for models of tokens, ``'sequence'``, one for each word, over
            the labelled positions of a sequence. Default: ``'vocabulary'``.
        weights: Of the teachers in an average: one number above 0 for each; or ``'random'``: in each batch others,
            drawn uniformly among all that sum to 1. Default: ``None``, the same for all.
        average: What is averaged where several teachers are heard: ``'logits'``; the ``'probabilities'`` that they
            give at ``temperature`` (at 1 if the loss has none); or the ``'losses'``, one for each of them.
            Default: ``'logits'``.
        only_correct: Average, for each sample, only those of the teachers that are heard whose largest logit is that of
            its label; all of them, where there is none. Default: ``False``.
        residency: Where the teachers' weights are. ``'device'``: all of them on the device. ``'host'``: in the host's
            memory, and on the device only those that are heard in the present batch or in the next one that distills,
            which are copied meanwhile. ``'auto'``: on the device if they take up to a quarter of what is free there,
            and always so on a CPU and where there is one teacher. Default: ``'auto'``.
        record: Keep what the teachers say as a record in this folder (in its folders ``0``, ``1`` and so on, if there
            are several), and ask their networks only about what is not in it. Default: ``None``, no record.
        record_top: How many of a teacher's logits to keep, the largest. Default: ``None``, as in the record that is
            there; else all of up to 32 classes, and 10 of more.
        record_dtype: ``'float16'`` or ``'float32'``. Default: ``None``, as in the record that is there; else
            ``'float32'`` where all logits are kept, and ``'float16'`` where some are.

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
        probability: float = 1.0,
        weights: Sequence[float] | Literal['random'] | None = None,
        average: Literal['logits', 'probabilities', 'losses'] = 'logits',
        only_correct: bool = False,
        residency: Literal['device', 'host', 'auto'] = 'auto',
        record: str | Path | None = None,
        record_top: int | None = None,
        record_dtype: Literal['float16', 'float32'] | None = None,
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
        if not 0 < probability <= 1:
            raise ValueError(f'probability must be above 0 and at most 1, not {probability}')
        if softmax_axis not in ('vocabulary', 'sequence'):
            raise ValueError(f"softmax_axis must be 'vocabulary' or 'sequence', not {softmax_axis!r}")
        if softmax_axis == 'sequence' and loss in ('mse', 'cosine'):
            raise ValueError(f"{loss} compares no distributions, so it knows no softmax_axis: leave 'vocabulary'")
        if softmax_axis == 'sequence' and callable(loss) and 'axis' not in inspect.signature(loss).parameters:
            raise ValueError("softmax_axis='sequence' needs a loss that takes the axis of the classes, `axis`")
        self._over_sequences = softmax_axis == 'sequence'
        if self._over_sequences and (average == 'probabilities' or only_correct):
            option = "average='probabilities'" if average == 'probabilities' else 'only_correct'
            raise ValueError(f"{option} compares distributions over classes, which softmax_axis='sequence' has none of")
        if average == 'losses' and only_correct:
            raise ValueError("only_correct chooses whose logits are averaged: leave it out, or average='losses'")
        if record is None and (record_top, record_dtype) != (None, None):
            raise ValueError('record_top and record_dtype are for a record: give its folder, `record`, too')
        self._loss = _LOSSES[loss] if isinstance(loss, str) else loss
        self._own_loss = not isinstance(loss, str)
        has_temperature = 'temperature' in inspect.signature(self._loss).parameters
        self._axis: int = getattr(self._loss, 'keywords', {}).get('axis', -1)
        #: Of ``kl`` over classes, the one loss that the largest logits of a teacher are enough for; None for others.
        self.kl_temperature = float(temperature) if self._loss is losses.kl and not self._over_sequences else None
        if has_temperature:
            self._loss = functools.partial(self._loss, temperature=temperature)
        if record is not None:
            teachers = _recording(teachers, Path(record), record_top, record_dtype, float(temperature))
        self.pool = TeacherPool(
            teachers,
            weights=weights,
            average=average,
            only_correct=only_correct,
            residency=residency,
            temperature=temperature if has_temperature else 1.0,
            axis=self._axis,
        )
        self.average = average
        self.kd_weight = kd_weight
        self.label_weight = label_weight
        self.interval = interval
        self.probability = probability
        #: Share of the distillation that is switched on at the present time, 0 to 1; set by EarlyStopDistillation.
        self.share: Callable[[State], float] = lambda state: 1.0
        #: From when to when it is switched on; set by EarlyStopDistillation.
        self.window = BEGIN, END
        #: Whether the teachers have nothing to say yet, so that nothing distills; set by Codistillation.
        self.waits: Callable[[State], bool] = lambda state: False
        #: What is drawn at random is a function of this and of the batch's number; set by Codistillation.
        self.seed: Callable[[State], int] = lambda state: state.rank_zero_seed
        #: Which teachers are heard in the batch of this number; set by TeacherSampling.
        self.speakers: Callable[[State, int], tuple[int, ...]] = lambda state, batch: tuple(range(len(self.pool)))
        #: Which teachers each sample hears, shape (samples, m), of samples numbered from first to last of those of this
        #: rank in the present batch; set by TeacherSampling. Default: ``None``, those of the batch.
        self.speakers_of_samples: Callable[[State, range], torch.Tensor] | None = None
        self._recording = [teacher for teacher in self.pool.teachers if isinstance(teacher, RecordingTeacher)]
        self._shifts_labels = False
        self._now = _Batch()
        self._keys: torch.Tensor | None = None
        self._samples_asked = 0
        self._signal: Logits | TopKLogits | EachLogits | None = None

    @property
    def asks(self) -> bool:
        """Whether teachers are asked in the present batch."""
        return bool(self._now.speakers)

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if one of the teachers cannot teach ``student``; costs no forward pass."""
        self.pool.check(student)
        for kept in self.pool.partial_formats:
            assert kept.k is not None
            self._check_largest(kept.k)
            if kept.k < kept.classes and self.kl_temperature not in kept.temperatures:
                known = ', '.join(f'{temperature:g}' for temperature in kept.temperatures)
                raise TeacherError(
                    f'the logits that a record leaves out are known in sum at temperatures {known}, not at '
                    f'{self.kl_temperature:g}: distill at one of these, or record anew with this one'
                )

    def rehearse(self, state: State) -> None:
        """Raise what is wrong with the run as far as it can be known before its teachers are trained.

        To be asked after all algorithms have been called at :attr:`.Event.INIT`; of ``state`` only the algorithms, the
        seed and the dataloader are looked at.
        """
        self._check_heard(state)
        for teacher in self.pool.teachers:
            if isinstance(teacher, RecordedTeacher | RecordingTeacher):
                teacher.look(state.dataloader)

    def match(self, event: Event, state: State) -> bool:
        """Whether this algorithm has anything to do."""
        if event in (Event.BEFORE_TRAIN_BATCH, Event.AFTER_FORWARD, Event.BEFORE_BACKWARD):
            return self._now.distills
        if event in (Event.EPOCH_END, Event.FIT_END):
            return bool(self._recording)
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what the event is for, see the class."""
        if event == Event.INIT:
            self._begin(state)
        elif event == Event.FIT_START:
            if not self.pool.released:
                self._check_heard(state)
                for teacher in self.pool.teachers:
                    if isinstance(teacher, RecordedTeacher):
                        teacher.schedule = self._schedule(state)
                self.pool.prepare(state)
        elif event == Event.BATCH_START:
            self._now = self._settle(state)
            self._keys = self._keys_of(state)
            if self.pool.waits_on_host:
                self.pool.place(self._now.speakers, self._coming(state))
            logger.log_metrics(self._now.metrics())
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._samples_asked = 0
        elif event == Event.AFTER_FORWARD and self.asks:
            self._ask(state)
        elif event == Event.BEFORE_BACKWARD:
            state.loss = self._blended(state)
            self._signal = None
        elif event == Event.BATCH_END:
            # The weights of this batch are not saved yet, and the device is idle: Composer has just read the loss.
            self.pool.raise_if_unsound(state.timestamp.batch.value - 1)
            if self._keys is not None:
                _check_count(self._keys, self._samples_asked)
            for teacher in self._recording:
                teacher.flush()
            logger.log_metrics({'time/teacher': self.pool.seconds})
        elif event in (Event.EPOCH_END, Event.FIT_END):
            for teacher in self._recording:
                teacher.seal()

    def state_dict(self) -> dict[str, Any]:
        """Manifests of the teachers, never their weights, and what they have cost so far."""
        return {**super().state_dict(), **self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Go on from a checkpoint; raises :class:`TeacherError` if that run had other teachers."""
        self.pool.load_state_dict(state)

    def _begin(self, state: State) -> None:
        """See whether all goes together, and take the place behind all other algorithms."""
        find_distiller(state, self)
        assert isinstance(state.model, ComposerModel)
        self.check(state.model)
        for teacher in self.pool.teachers:
            if teacher.replays:
                refuse_changed_inputs(state.algorithms, teacher.name)
        for algorithm in filter(mixes_samples, state.algorithms):
            if self.pool.only_correct:
                name = type(algorithm).__name__
                raise ValueError(
                    f'{name} makes one sample of two, so that no one label is right: leave out only_correct'
                )
        self._shifts_labels = bool(getattr(state.model, 'shift_labels', False))
        own = next(algorithm for algorithm in state.algorithms if [*distillers([algorithm])])
        state.algorithms.remove(own)
        state.algorithms.append(own)

    def _check_heard(self, state: State) -> None:
        if self.speakers_of_samples is None:
            self.pool.check_average(self.speakers(state, 0))
        elif self.average == 'losses' and self.pool.weights is not None:
            raise TeacherError(
                'each sample has teachers of its own, whose losses are not averaged by `weights`: leave these out, '
                "or take another average than 'losses'"
            )

    def _schedule(self, state: State) -> Schedule:
        """When each teacher is asked, as far as that is known."""
        hears_all = self.speakers_of_samples is None and len(self.speakers(state, 0)) == len(self.pool)
        is_known = hears_all and self.probability == 1.0 and self.kd_weight > 0.0
        return Schedule(*self.window, interval=self.interval if is_known else None)

    def _check_largest(self, k: int) -> None:
        if self.kl_temperature is None:
            raise TeacherError(
                f"only a teacher's {k} largest logits are recorded, which are enough for loss='kl' over the vocabulary "
                'alone: take that, or record whole vectors'
            )

    def _keys_of(self, state: State) -> torch.Tensor | None:
        """Sample id and view of the samples of the batch, if a teacher must know them."""
        if not (self._now.speakers and self.pool.replays):
            return None
        keys = getattr(state.dataloader, 'keys', None)
        if not isinstance(keys, torch.Tensor):
            raise TeacherError(
                'a recorded teacher needs to know which samples a batch has: make the training loader with '
                'composer_kd.data.data_spec'
            )
        _check_count(keys, samples_in(state.batch))
        return keys

    def _coming(self, state: State) -> tuple[int, ...]:
        """Who is heard in the next batch that distills, if it is near."""
        if self.pool.released or self.kd_weight == 0.0 or self.share(state) == 0.0:
            return ()
        following = state.timestamp.batch.value + 1
        for batch in range(following, following + _LOOK_AHEAD):
            if self._distills(state, batch):
                return self.speakers(state, batch)
        return ()

    def _distills(self, state: State, batch: int) -> bool:
        return distills(self.seed(state), batch, interval=self.interval, probability=self.probability)

    def _settle(self, state: State) -> _Batch:
        batch = state.timestamp.batch.value
        if self.pool.released or self.waits(state) or not self._distills(state, batch):
            return _Batch()
        share = self.share(state)
        if share == 0.0:
            return _Batch()
        kd_weight = share * self.kd_weight
        # As the distillation fades, the weight of the labels goes back to the 1 that it has without distillation.
        label_weight = 1.0 + share * (self.label_weight - 1.0) if share < 1.0 else self.label_weight
        speakers = self.speakers(state, batch) if kd_weight > 0.0 else ()
        return _Batch(True, kd_weight, label_weight, speakers, self.pool.batch_weights(self.seed(state), batch))

    def _ask(self, state: State) -> None:
        """Ask the teachers about the microbatch; of a token model, about the positions that its outputs are of."""
        outputs: Any = state.outputs
        batch, student_logits = state.batch, logits_of(outputs)
        first = self._samples_asked
        self._samples_asked += samples_in(batch)
        samples = range(first, self._samples_asked)
        positions = outputs.get('positions') if isinstance(outputs, Mapping) else None
        if isinstance(batch, Mapping):  # the loader may know positions that the student has no eye for
            batch = {key: value for key, value in batch.items() if key != 'positions'}
            batch |= {} if positions is None else {'positions': positions}
        signal = self.pool.signal(
            batch,
            self._now.speakers if self.speakers_of_samples is None else self.speakers_of_samples(state, samples),
            student_logits,
            keys=self._keys_at(samples),
            labels=self._labels(state.batch, student_logits, positions) if self.pool.only_correct else None,
            weights=self._now.weights,
        )
        for one in signal.members if isinstance(signal, EachLogits) else [signal]:
            if isinstance(one, TopKLogits):
                self._check_largest(one.values.shape[-1])
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

    def _keys_at(self, samples: range) -> torch.Tensor | None:
        if self._keys is None:
            return None
        if samples.stop > len(self._keys):
            _check_count(self._keys, samples.stop)
        return self._keys[samples.start : samples.stop]

    def _labels(
        self, batch: Any, student_logits: torch.Tensor | DeferredLogits, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """The class that is right at each position of the logits."""
        if isinstance(batch, Mapping):
            labels = batch.get('labels')
            if isinstance(labels, torch.Tensor):
                labels = labels.flatten()[positions] if positions is not None else self._own_labels(labels)
        else:
            labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        shape = list(student_logits.shape)
        del shape[self._axis]
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or list(labels.shape) != shape:
            has = f'{labels.dtype} {list(labels.shape)}' if isinstance(labels, torch.Tensor) else 'none'
            raise TeacherError(
                f'only_correct needs a class as the label of each position, whole numbers of shape {shape}; this batch '
                f'has {has}: leave only_correct out'
            )
        return labels

    def _own_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """At each position the label that the logits there are for: of a causal model, that of the next."""
        if self._shifts_labels and labels.ndim > 1:
            return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_NO_LABEL)
        return labels

    def _blended(self, state: State) -> Any:
        if isinstance(state.outputs, Mapping) and 'lesson' in state.outputs:
            return state.loss
        if self._signal is None:  # kd_weight is 0, so no teacher was asked
            return state.loss if self._now.label_weight == 1.0 else self._now.label_weight * _total(state.loss)
        student_logits = logits_of(state.outputs)
        assert isinstance(student_logits, torch.Tensor) and isinstance(
            self._signal, torch.Tensor | TopKLogits | EachLogits
        )
        kd_loss = self._kd_loss(state, student_logits, self._signal)
        return blend(state.loss, kd_loss, kd_weight=self._now.kd_weight, label_weight=self._now.label_weight)

    def _kd_loss(
        self, state: State, student_logits: torch.Tensor, teacher_logits: torch.Tensor | TopKLogits | EachLogits
    ) -> torch.Tensor:
        if isinstance(teacher_logits, EachLogits):
            each = [self._kd_loss(state, student_logits, one) for one in teacher_logits.members]  # pyright: ignore
            return functools.reduce(
                torch.add, (weight * loss for weight, loss in zip(teacher_logits.weights, each, strict=True))
            )
        where = self._that_count(state.batch, student_logits)
        if self._over_sequences:
            assert isinstance(teacher_logits, torch.Tensor), 'was checked'
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
        if isinstance(teacher_logits, torch.Tensor):
            return self._loss(student_logits=student_logits, teacher_logits=teacher_logits, where=where)
        assert self.kl_temperature is not None, 'was checked'
        return topk_loss(
            student_logits=student_logits, teacher=teacher_logits, temperature=self.kl_temperature, where=where
        )

    def _that_count(self, batch: Any, logits: torch.Tensor) -> torch.Tensor | None:
        """Which positions of a token model's batch have a label; None where every sample is one position."""
        labels = batch.get('labels') if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.shape != logits.shape[:-1]:
            return None
        return self._own_labels(labels) != _NO_LABEL


@dataclass(frozen=True)
class _Batch:
    """What was settled for one batch."""

    distills: bool = False
    kd_weight: float = 0.0
    label_weight: float = 1.0
    speakers: tuple[int, ...] = ()
    weights: Sequence[float] | None = None

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
    found = [*distillers(state.algorithms)]
    if not found:
        raise ValueError(
            f'{type(asked_by).__name__} changes how a run distills: add KnowledgeDistillation or Codistillation to its '
            'algorithms'
        )
    if len(found) > 1:
        raise ValueError('a run distills by one algorithm: give one KnowledgeDistillation all the teachers')
    return found[0]


def distillers(algorithms: Iterable[Algorithm]) -> Iterable[KnowledgeDistillation]:
    """Those that distill, on their own or held by another one as its ``distillation``."""
    for algorithm in algorithms:
        algorithm = getattr(algorithm, 'distillation', algorithm)
        if isinstance(algorithm, KnowledgeDistillation):
            yield algorithm


def _total(loss: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One scalar of whatever a model's ``loss`` returned, as Composer makes it."""
    if isinstance(loss, Mapping) and 'total' in loss:
        return loss['total'].mean()
    parts: Any = ensure_tuple(loss)
    return functools.reduce(torch.add, (part.mean() for part in parts))


def _check_count(keys: torch.Tensor, number: int) -> None:
    """Raise :class:`TeacherError` if a batch has another number of samples than the loader said."""
    if len(keys) != number:
        raise TeacherError(
            f'a batch has {number} samples, but came from the loader with {len(keys)}: something has changed it since, '
            'which a recorded teacher cannot follow; leave that out'
        )


def _recording(
    teachers: Teacher | Sequence[Teacher], path: Path, top: int | None, dtype: str | None, temperature: float
) -> Sequence[Teacher]:
    """Teachers whose signals are kept."""
    teachers = list(teachers) if isinstance(teachers, Sequence) else [teachers]
    paths = [path] if len(teachers) == 1 else [path / str(index) for index in range(len(teachers))]
    return [
        RecordingTeacher(teacher, path, top=top, dtype=dtype, temperatures=(temperature,))
        for teacher, path in zip(teachers, paths, strict=True)
    ]


def _sequences(batch: Any, positions: torch.Tensor | None) -> torch.Tensor:
    """To which sequence of the batch each of the flattened positions belongs."""
    if positions is None:
        raise ValueError("softmax_axis='sequence' is for models of tokens, whose batch has a label for each of them")
    return positions // batch['input_ids'].shape[1]
