"""Label and distillation loss over a large vocabulary, in chunks: no (positions x vocabulary) matrix is ever alive.

The logits of a vocabulary are by far the largest tensors in a language model's step. Here they stay what they are made
of, hidden states and a projection, until a loss asks for a chunk of them; and the gradient of that loss is taken while
the chunk is there, so that every logit is computed once, forward and backward. The idea of taking the gradient in the
forward pass is that of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_kd import losses
from composer_kd.averages import Mean
from composer_kd.topk import TopKLogits

KDLoss = Callable[..., Tensor]  # of `student_logits` and `teacher_logits`, keywords both; a mean over positions

_ALL = slice(None)
_HEADROOM = 16.0  # by which float16 leaves room for the sum of a chunk's gradients
_NOTHING = -1e9  # a logit so low that its exponential is 0, and finite, so that 0 times it is 0


@dataclass(eq=False)
class DeferredLogits:
    """Logits that are not computed yet: `hidden @ weight.T + bias`, shape (M, V).

    They are computed in autocast's dtype if it is on where the object is made, else in that of `hidden`.

    Args:
        hidden: Shape (M, H), a row for each position.
        weight: Shape (V, H).
        bias: Shape (V,). Default: none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self):
        device = self.hidden.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Where they will be."""
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        """(M, V)."""
        return torch.Size((self.hidden.shape[0], self.weight.shape[0]))

    def are_sound(self) -> Tensor:
        """Whether neither NaN nor infinity is in them, as far as the first row shows that of the projection.

        A word that is ruled out, by -inf in `bias`, is none of it.
        """
        return self.hidden.isfinite().all() & (self.part(slice(1)) < torch.inf).all()

    def detach(self) -> DeferredLogits:
        """The same, without gradient and with all that the product needs in its dtype."""
        hidden, weight = (x.detach().to(self.dtype) for x in (self.hidden, self.weight))
        detached = DeferredLogits(hidden, weight, None if self.bias is None else self.bias.detach().to(self.dtype))
        detached.dtype = self.dtype
        return detached

    def part(self, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
        """Compute some of them, or all."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias[columns].to(self.dtype)
            return F.linear(self.hidden[rows].to(self.dtype), self.weight[columns].to(self.dtype), bias)


class MeanLogits:
    """A weighted mean of several logits, deferred or not, of one shape: an `averages.Mean` in parts.

    Args:
        members: At least one.
        weights: Above 0, one for each, and 1 in all. Default: the same for all.
        temperature: Of the probabilities that are averaged. Default: none, the logits are.
        labels: The classes that are right, int64, shape (M,). Default: none, all members count everywhere.
    """

    def __init__(
        self,
        members: Sequence[Logits],
        weights: Sequence[float] | None = None,
        *,
        temperature: float | None = None,
        labels: Tensor | None = None,
    ):
        self.members = members
        self.weights = weights or [1 / len(members)] * len(members)
        self.temperature = temperature
        self.labels = labels

    @property
    def shape(self) -> torch.Size:
        """(M, V)."""
        return self.members[0].shape

    def detach(self) -> MeanLogits:
        """The same without gradient."""
        members = [member.detach() for member in self.members]
        return MeanLogits(members, self.weights, temperature=self.temperature, labels=self.labels)

    def part(self, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
        """Compute some of them, or all, in float32 or more; with all columns if they are not means of logits alone."""
        mean = Mean(temperature=self.temperature, labels=None if self.labels is None else self.labels[rows])
        for member, weight in zip(self.members, self.weights, strict=True):
            mean.add(part(member, rows, columns), weight)
        return mean.result()


Logits = Tensor | DeferredLogits | MeanLogits


@dataclass(eq=False)
class EachLogits:
    """Several logits of one shape, of each of which a loss is taken by itself: the mean is that of the losses.

    Args:
        members: At least one.
        weights: Above 0, one for each, and 1 in all.
    """

    members: Sequence[Logits | TopKLogits]
    weights: Sequence[float]

    @property
    def shape(self) -> torch.Size:
        """(M, V)."""
        return self.members[0].shape

    def detach(self) -> EachLogits:
        """The same without gradient."""
        return EachLogits([member.detach() for member in self.members], self.weights)


def part(logits: Logits, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
    """Some of the logits, or all, whatever they are."""
    return logits[rows, columns] if isinstance(logits, Tensor) else logits.part(rows, columns)


def vocabulary_loss(
    *,
    student_logits: DeferredLogits,
    labels: Tensor,
    teacher_logits: Logits | TopKLogits | EachLogits | None = None,
    kd_loss: KDLoss = losses.kl,
    kd_weight: float = 0.0,
    label_weight: float = 1.0,
    sequences: Tensor | None = None,
    chunk_size: int = 256,
) -> dict[str, Tensor]:
    """`label_weight * cross_entropy + kd_weight * kd_loss`, equal to the same of dense logits.

    Args:
        student_logits: Shape (M, V).
        labels: Classes, int64, shape (M,); every position counts.
        teacher_logits: As the student's; no gradient reaches them. Of those of which the k largest are known, `kd_loss`
            is `kl`, which then stands for `losses.topk_kl`. Of `EachLogits`, the losses are averaged. Default: none,
            which leaves the cross entropy.
        kd_loss: One of `losses` with its options bound (`functools.partial(kl, temperature=2.0)`), or any function of
            `student_logits` and `teacher_logits` that is a mean over positions. Default: `kl`.
        kd_weight: Weight of the distillation loss. Default: 0.
        label_weight: Weight of the cross entropy. Default: 1.
        sequences: To which sequence each position belongs, ascending, shape (M,). If given, distributions are compared
            that lie over the positions of a sequence, one for each word of the vocabulary, in place of those over the
            vocabulary, one for each position. `kd_loss` is then called with `axis=1` and logits of shape (sequences,
            positions, words), filled up by -1e9. Default: none.
        chunk_size: How many positions' logits are alive at once. Default: 256.

    Returns:
        Scalars, 0 if M = 0: `'total'`, which has a gradient (once), and without weights and gradient `'label'` and,
        if there is a teacher, `'kd'`.

    Raises:
        ValueError: The shapes do not belong together, or the loss needs more than the k largest logits.
    """
    positions, words = student_logits.shape
    for name, shape in (('labels', labels.shape), ('teacher_logits', getattr(teacher_logits, 'shape', None))):
        if shape is not None and tuple(shape) != (positions, words)[: len(shape)]:
            raise ValueError(f'{name} {tuple(shape)} do not fit student_logits {(positions, words)}')
    for one in teacher_logits.members if isinstance(teacher_logits, EachLogits) else [teacher_logits]:
        if isinstance(one, TopKLogits):
            _check_topk(one, kd_loss, sequences)
    teacher = None if teacher_logits is None else teacher_logits.detach()
    by_rows = [(slice(i, i + chunk_size), _ALL) for i in range(0, positions, chunk_size)]
    by_columns: list[tuple[slice, slice]] = []
    if teacher is not None and sequences is not None and positions:
        kd_loss, width = over_sequences(kd_loss, sequences), max(1, chunk_size * words // positions)
        by_columns = [(_ALL, slice(i, i + width)) for i in range(0, words, width)]
    terms = _Terms(labels, label_weight, teacher, kd_loss, kd_weight)
    kd_by_rows = teacher is not None and sequences is None
    plan = [(*chunk, True, kd_by_rows) for chunk in by_rows] + [(*chunk, False, True) for chunk in by_columns]
    student = student_logits
    inputs = student.hidden, student.weight, student.bias, student.dtype
    total, label, kd = _InChunks.apply(*inputs, plan, terms)  # pyright: ignore[reportGeneralTypeIssues]
    return {'total': total, 'label': label} | ({} if teacher is None else {'kd': kd})


@dataclass(frozen=True)
class _Terms:
    """The two losses of a chunk of float logits: sums over positions, and the weighted gradient of these sums."""

    labels: Tensor
    label_weight: float
    teacher: Logits | TopKLogits | EachLogits | None
    kd_loss: KDLoss
    kd_weight: float

    @property
    def share_softmax(self) -> bool:
        """Whether the student's softmax is the same in both: of `kl` at temperature 1, from all logits of a teacher."""
        is_whole = self.teacher is not None and not isinstance(self.teacher, TopKLogits | EachLogits)
        return is_whole and _temperature_of_kl(self.kd_loss) == 1.0

    def both(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The cross entropy, `losses.kl`, and the gradient of their weighted sum, if they share the softmax."""
        assert self.teacher is not None and not isinstance(self.teacher, TopKLogits | EachLogits)
        labels = self.labels[rows, None]
        q, log_sum = _softmax(logits)
        label = (log_sum - logits.gather(-1, labels)).sum()
        teacher = _float(part(self.teacher, rows))
        p, teacher_log_sum = _softmax(teacher)
        gradient = q.mul_(self.label_weight + self.kd_weight).sub_(p, alpha=self.kd_weight)
        gradient.scatter_add_(-1, labels, torch.full_like(labels, -self.label_weight, dtype=logits.dtype))
        return label, _expectation(p, teacher - logits) + (log_sum - teacher_log_sum).sum(), gradient

    def label(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The cross entropy and its gradient, `softmax(logits) - onehot(labels)`."""
        labels = self.labels[rows, None]
        q, log_sum = _softmax(logits)
        value = (log_sum - logits.gather(-1, labels)).sum()
        gradient = q.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=logits.dtype))
        return value, gradient.mul_(self.label_weight)

    def kd(self, logits: Tensor, rows: slice, columns: slice, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """The distillation loss and its gradient, added to `gradient`; overwrites `logits`."""
        assert self.teacher is not None
        if gradient is None:
            gradient = torch.zeros_like(logits)
        if isinstance(self.teacher, EachLogits):
            value = logits.new_zeros(())
            for member, weight in zip(self.teacher.members, self.teacher.weights, strict=True):
                of_member = replace(self, teacher=member, kd_weight=self.kd_weight * weight)
                value += weight * of_member.kd(logits.clone(), rows, columns, gradient)[0]
            return value, gradient
        temperature = _temperature_of_kl(self.kd_loss)
        if isinstance(self.teacher, TopKLogits):
            assert temperature is not None, 'was checked'
            return self._topk_kl(logits, self.teacher.rows(rows), temperature, gradient), gradient
        teacher = _float(part(self.teacher, rows, columns))
        if temperature:
            teacher = teacher / temperature
            return self._kl(logits.div_(temperature), teacher, temperature, gradient), gradient
        positions = logits.numel() / self.teacher.shape[-1]
        with torch.enable_grad():
            mean = self.kd_loss(student_logits=logits.requires_grad_(), teacher_logits=teacher)
        (of_mean,) = torch.autograd.grad(mean, logits)
        return mean.detach() * positions, gradient.add_(of_mean, alpha=self.kd_weight * positions)

    def _kl(self, logits: Tensor, teacher: Tensor, temperature: float, gradient: Tensor) -> Tensor:
        """`losses.kl` of logits that are divided by T; the gradient is `T (softmax(logits) - p)`."""
        scale = self.kd_weight * temperature
        q, log_sum = _softmax(logits)
        gradient.add_(q, alpha=scale)
        del q
        p, teacher_log_sum = _softmax(teacher)
        gradient.add_(p, alpha=-scale)
        expectation = _expectation(p, teacher.sub_(logits))
        return (expectation + (log_sum - teacher_log_sum).sum()) * temperature * temperature

    def _topk_kl(self, logits: Tensor, teacher: TopKLogits, temperature: float, gradient: Tensor) -> Tensor:
        """`losses.topk_kl`: `losses.kl` of the chosen words, and of one that stands for the rest."""
        indices, values = teacher.indices.long(), teacher.values.to(logits.dtype) / temperature
        if values.shape == logits.shape:
            in_order = torch.empty_like(values).scatter_(-1, indices, values)
            return self._kl(logits.div_(temperature), in_order, temperature, gradient)
        tail = teacher.tail(temperature).to(logits.dtype).unsqueeze(-1) / temperature
        chosen = logits.gather(-1, indices) / temperature
        rest, log_sum = _softmax(logits.scatter_(-1, indices, -math.inf).div_(temperature))
        merged = torch.cat([chosen, log_sum], -1)
        of_merged = torch.zeros_like(merged)
        value = self._kl(merged, torch.cat([values, tail], -1), temperature, of_merged)
        # What is due to the rest is shared out by its own softmax, which is 0 at the words that were chosen.
        gradient.addcmul_(rest, of_merged[:, -1:]).scatter_add_(-1, indices, of_merged[:, :-1])
        return value


class _InChunks(torch.autograd.Function):
    """The weighted sum of the terms over all chunks. The gradient is there when the value is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        plan: list[tuple[slice, slice, bool, bool]],
        terms: _Terms,
    ) -> tuple[Tensor, ...]:
        student = DeferredLogits(hidden, weight, bias)
        student.dtype = dtype
        student = student.detach()
        ctx.gradients = [
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        d_hidden, d_weight, d_bias = ctx.gradients
        scale = _HEADROOM if dtype == torch.float16 else 1.0
        sums = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        for rows, columns, with_label, with_kd in plan:
            logits, gradient = _float(student.part(rows, columns)), None
            if with_label and with_kd and terms.share_softmax:
                label, kd, gradient = terms.both(logits, rows)
                sums += torch.stack([label, kd])
            else:
                if with_label:
                    value, gradient = terms.label(logits, rows)
                    sums[0] += value
                if with_kd:
                    value, gradient = terms.kd(logits, rows, columns, gradient)
                    sums[1] += value
            del logits
            assert gradient is not None, 'every chunk has a term'
            # Of sums over positions, not of means, and larger still in float16, whose digits end at 6e-8.
            if scale != 1.0:
                gradient.mul_(scale)
            if d_bias is not None:
                d_bias[columns] += gradient.sum(0)
            gradient = gradient.to(dtype)
            if d_hidden is not None:
                _add_product(d_hidden[rows], gradient, student.weight[columns])
            if d_weight is not None:
                _add_product(d_weight[columns], gradient.t(), student.hidden[rows])
        positions = max(student.shape[0], 1)
        ctx.scale = 1 / (positions * scale)
        label, kd = sums.div_(positions).unbind()
        ctx.mark_non_differentiable(label, kd)
        return terms.label_weight * label + terms.kd_weight * kd, label, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, ready, ctx.gradients = gradients[0] * ctx.scale, ctx.gradients, None
        return *(x if x is None else x.mul_(scale) for x in ready), None, None, None


def over_sequences(loss: KDLoss, sequences: Tensor) -> KDLoss:
    """`loss` of distributions over the positions of each sequence, one for each word, see `vocabulary_loss`."""
    _, index, counts = sequences.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index]

    def filled_up(logits: Tensor) -> Tensor:
        shape = len(counts), int(counts.max()), logits.shape[-1]
        return logits.new_full(shape, _NOTHING).index_put((index, place), logits)

    return lambda *, student_logits, teacher_logits: loss(
        student_logits=filled_up(student_logits), teacher_logits=filled_up(teacher_logits), axis=1
    )


def _check_topk(teacher: TopKLogits, loss: KDLoss, sequences: Tensor | None) -> None:
    """Raise ValueError if a loss needs more of a teacher than its largest logits."""
    temperature = _temperature_of_kl(loss)
    if temperature is None or sequences is not None:
        what = 'the loss is not kl' if temperature is None else 'distributions lie over sequences'
        k = teacher.values.shape[-1]
        raise ValueError(
            f'{what}, which takes all logits of the teacher, and only the {k} largest are known: take kl over the '
            'vocabulary, or a teacher whose logits are all known'
        )
    teacher.tail(temperature)


def _temperature_of_kl(loss: KDLoss) -> float | None:
    """The temperature, if `loss` is `losses.kl` with no other option."""
    if loss is losses.kl:
        return 1.0
    if isinstance(loss, functools.partial) and loss.func is losses.kl and not loss.args:
        options = {name: value for name, value in loss.keywords.items() if value is not None}
        return options['temperature'] if options.keys() == {'temperature'} else None
    return None


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if to.dtype == a.dtype:
        to.addmm_(a, b)  # without room for the product
    else:
        to += a @ b


def _expectation(p: Tensor, difference: Tensor) -> Tensor:
    """The sum of the products, which overwrites both: 0 where p is, and the difference -inf."""
    return p.mul_(difference.clamp_(min=torch.finfo(p.dtype).min)).sum()


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of each row, and the logarithm of the sum of its exponentials."""
    q = logits.softmax(-1)
    return q, logits.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
