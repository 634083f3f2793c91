"""Distillation losses: pure functions of a student's and a teacher's logits, in torch alone.

One convention holds for all. Logits have any shape; `axis` is the class axis, the others are positions, and the result
is the mean over the positions that `where` marks. Losses with a temperature T carry the factor T^2, which keeps the
gradient about as large for every T (Hinton et al. 2015, arXiv 1503.02531). No gradient reaches the teacher. The work is
done in float32, or float64 if either side is float64. Below, p = softmax(teacher_logits / T) and
q = softmax(student_logits / T); the student's logits are finite.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ['cosine', 'jsd', 'kl', 'mse', 'reverse_kl', 'topk', 'topk_bias', 'topk_kl', 'topk_tail']


def kl(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    where: Tensor | None = None,
    axis: int = -1,
) -> Tensor:
    """Forward KL divergence, `T^2 KL(p || q) = T^2 sum_c p_c (log p_c - log q_c)`.

    Source: Hinton et al. 2015, arXiv 1503.02531. A class the teacher rules out by a logit of -inf adds nothing.

    Args:
        student_logits: Shape (..., C).
        teacher_logits: Same shape.
        temperature: T > 0; divides the logits of both sides. Default: 1.
        where: Boolean, broadcastable to the logits' shape without `axis`: the positions that count. Values elsewhere,
            NaN included, have no effect; with no position left the loss and its gradient are 0. Default: all.
        axis: The class axis. Default: the last.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: Shapes differ, `where` does not fit, or the temperature is not positive and finite.
    """
    student, teacher = _prepare(student_logits, teacher_logits, where, axis)
    # Targets as probabilities, not as `log_target`: only then does torch take 0 log 0 as 0.
    log_q, p = _soft(student, temperature).log_softmax(-1), _soft(teacher, temperature).softmax(-1)
    total = F.kl_div(log_q, p, reduction='sum')
    return _mean(total, student) * temperature * temperature


def reverse_kl(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    where: Tensor | None = None,
    axis: int = -1,
) -> Tensor:
    """Reverse KL divergence, `T^2 KL(q || p)`.

    Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543. Infinite where the teacher rules out a class. Arguments, result
    and errors as for `kl`.
    """
    student, teacher = _prepare(student_logits, teacher_logits, where, axis)
    log_p, log_q = _soft(teacher, temperature).log_softmax(-1), _soft(student, temperature).log_softmax(-1)
    total = F.kl_div(log_p, log_q, reduction='sum', log_target=True)
    return _mean(total, student) * temperature * temperature


def jsd(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    where: Tensor | None = None,
    axis: int = -1,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`.

    `m = beta p + (1 - beta) q`, and `beta`, the teacher's weight, lies between 0 and 1 (default: 0.5, where both sides
    count alike). At most T^2 times the entropy of (beta, 1 - beta). Divided by beta it tends to `kl` as beta -> 0,
    divided by 1 - beta to `reverse_kl` as beta -> 1. Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649. Other
    arguments, result and errors as for `kl`.
    """
    if not 0 < beta < 1:
        raise ValueError(f'beta must lie between 0 and 1, not {beta}; for the two ends take kl and reverse_kl.')
    student, teacher = _prepare(student_logits, teacher_logits, where, axis)
    log_p, log_q = _soft(teacher, temperature).log_softmax(-1), _soft(student, temperature).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_teacher = F.kl_div(log_m, log_p.exp(), reduction='sum')
    of_student = F.kl_div(log_m, log_q, reduction='sum', log_target=True)
    return _mean(beta * of_teacher + (1 - beta) * of_student, student) * temperature * temperature


def mse(*, student_logits: Tensor, teacher_logits: Tensor, where: Tensor | None = None, axis: int = -1) -> Tensor:
    """Mean squared error of the logits, `sum_c (student_c - teacher_c)^2 / C`.

    Averaged over classes too, as by `torch.nn.MSELoss`. A temperature would cancel against its factor T^2, so there is
    none. Source: Ba and Caruana 2013, arXiv 1312.6184. Arguments, result and errors as for `kl`; the teacher's logits
    must be finite.
    """
    student, teacher = _prepare(student_logits, teacher_logits, where, axis)
    return F.mse_loss(student, teacher, reduction='sum') / max(student.numel(), 1)


def cosine(*, student_logits: Tensor, teacher_logits: Tensor, where: Tensor | None = None, axis: int = -1) -> Tensor:
    """One minus the cosine of the angle between the logits, `1 - student . teacher / (|student| |teacher|)`.

    From 0, the same direction, to 2. Scale has no effect, so there is no temperature. Logits that are all 0 have no
    direction: they count 1, and their gradient is huge. Source: Sanh et al. 2019 (DistilBERT; there on hidden states),
    arXiv 1910.01108. Arguments, result and errors as for `kl`; the teacher's logits must be finite.
    """
    student, teacher = _prepare(student_logits, teacher_logits, where, axis)
    return _mean((1 - F.cosine_similarity(student, teacher, dim=-1)).sum(), student)


def topk(*, teacher_logits: Tensor, k: int, temperature: float = 1.0, axis: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Give the k largest logits, and one logit that stands for all the rest: what `topk_kl` needs of a teacher.

    Args:
        teacher_logits: Shape (..., C).
        k: 1 <= k <= C.
        temperature: T > 0, the loss's own: the tail at one temperature does not give the tail at another. Default: 1.
        axis: The class axis. Default: the last.

    Returns:
        The logits, largest first and not divided by T, shape (..., k); their classes, int64, the same shape; the tail,
        `T logsumexp(rest / T)`, shape (...), -inf if k = C. At T = 1 it is the plain logsumexp of the rest.

    Raises:
        ValueError: k or the temperature is out of range.
    """
    _check(temperature)
    if not 1 <= k <= teacher_logits.shape[axis]:
        raise ValueError(f'k must lie between 1 and the number of classes, {teacher_logits.shape[axis]}, not {k}.')
    logits = teacher_logits.detach().movedim(axis, -1)
    values, indices = logits.topk(k)
    rest = topk_tail(logits, indices, temperature)
    return values.movedim(-1, axis), indices.movedim(-1, axis), rest.squeeze(-1)


def topk_tail(logits: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
    """`T logsumexp(rest / T)` of the logits that are not chosen, in float32 or more, -inf if there are none.

    It is taken over the rest itself: the whole less the chosen would cancel where the rest is small.

    Args:
        logits: Shape (..., C).
        indices: The classes that are chosen, int64, shape (..., k).
        temperature: T > 0. Default: 1.

    Returns:
        Shape (..., 1).
    """
    _check(temperature)
    rest = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).scatter_(-1, indices, -math.inf)
    largest = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)
    return rest.sub_(largest).div_(temperature).exp_().sum(-1, keepdim=True).log_().mul_(temperature).add_(largest)


def topk_kl(
    *,
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    teacher_tail: Tensor,
    temperature: float = 1.0,
    where: Tensor | None = None,
    axis: int = -1,
) -> Tensor:
    """Forward KL divergence from a teacher known by its k largest logits and the mass of its tail.

    It is `kl` over k + 1 classes, the teacher's k and one for all the others, whose logit is `T logsumexp(rest / T)` on
    either side. Merging classes never raises a divergence, so this is at most the dense `kl`; at k = C they are equal.
    What is between the two is `topk_bias`. It has no second derivative.

    Args:
        student_logits: Shape (..., C).
        teacher_values: The teacher's k logits, not divided by T; shape (..., k).
        teacher_indices: Their classes, of any integer type; shape (..., k).
        teacher_tail: `T logsumexp(rest / T)` of the teacher's other logits, at this very temperature, as `topk` gives
            it; shape (...). Not read at k = C.
        temperature: T > 0. Default: 1.
        where: As for `kl`; indices elsewhere need not be valid.
        axis: The axis of the C or k classes. Default: the last.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: As for `kl`.
    """
    _check(temperature)
    tensors = student_logits, teacher_values, teacher_indices, teacher_tail.unsqueeze(axis)
    student, values, indices, tail = (tensor.movedim(axis, -1) for tensor in tensors)
    classes, k = student.shape[-1], values.shape[-1]
    if k > classes or values.shape != indices.shape or not student.shape[:-1] == values.shape[:-1] == tail.shape[:-1]:
        raise ValueError(
            f'teacher_values {tuple(teacher_values.shape)}, teacher_indices {tuple(teacher_indices.shape)} and '
            f'teacher_tail {tuple(teacher_tail.shape)} do not fit student_logits {tuple(student_logits.shape)}: '
            f'the first two have its shape with k <= {classes} on axis {axis}, the third is without that axis.'
        )
    if where is not None:
        student, values, indices, tail = _select(where, student, values, indices, tail)
    indices = indices.long()
    if k == classes:
        return kl(student_logits=student.gather(-1, indices), teacher_logits=values, temperature=temperature)
    merged: Any = _Merged.apply(student, indices, temperature)
    return kl(student_logits=merged, teacher_logits=torch.cat([values, tail], -1), temperature=temperature)


def topk_bias(
    *, student_logits: Tensor, teacher_logits: Tensor, k: int, temperature: float = 1.0, axis: int = -1
) -> Tensor:
    """What `topk_kl` leaves out of `kl` at each position: `T^2 p_rest KL(p over the rest || q over the rest)`.

    By the chain rule this is exactly `kl` less `topk_kl`, with no difference of two large numbers. Arguments and errors
    as for `kl` and `topk`; no gradient reaches either side.

    Returns:
        Shape (...), 0 or more, in nats; 0 at k = C.
    """
    student, teacher = _prepare(student_logits.detach(), teacher_logits, None, axis)
    values, indices, rest = topk(teacher_logits=teacher, k=k, temperature=temperature)
    if k == teacher.shape[-1]:
        return torch.zeros_like(rest)
    of_rest = torch.cat([values, rest.unsqueeze(-1)], -1).div(temperature).softmax(-1)[..., -1]
    log_p, log_q = ((x / temperature).scatter(-1, indices, -math.inf).log_softmax(-1) for x in (teacher, student))
    # Among the rest, a class that was chosen, or ruled out by the teacher, has p = 0 and adds nothing.
    divergence = (log_p.exp() * (log_p - log_q).where(log_p > -math.inf, 0.0)).sum(-1)
    return of_rest.mul(divergence).where(of_rest > 0, 0.0) * temperature * temperature


class _Merged(torch.autograd.Function):
    """The logits of some classes, and last, one logit for all the rest: shape (..., k + 1).

    Beside the logits themselves, as many numbers are alive once in the forward pass and once, as the gradient, in the
    backward pass. At the rest the gradient is shared out by the rest's own softmax, however small its mass is.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
        rest = topk_tail(logits, indices, temperature)
        ctx.save_for_backward(logits, indices, rest)
        ctx.temperature = temperature
        return torch.cat([logits.gather(-1, indices).to(rest.dtype), rest], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, indices, rest = ctx.saved_tensors
        chosen, of_rest = gradients[0][..., :-1], gradients[0][..., -1:]
        gradient = logits.sub(rest).div_(ctx.temperature).exp_().mul_(of_rest)
        return gradient.scatter_(-1, indices, chosen).to(logits.dtype), None, None


def _prepare(student: Tensor, teacher: Tensor, where: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
    """Put the classes last, keep the positions that count, cast."""
    if student.shape != teacher.shape:
        raise ValueError(
            f'student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} differ in shape: '
            'both networks must score the same classes at the same positions.'
        )
    teacher = teacher.detach()
    if axis != -1:
        student, teacher = student.movedim(axis, -1), teacher.movedim(axis, -1)
    if where is not None:
        student, teacher = _select(where, student, teacher)
    # Autocast lowers matrix products alone, and the losses have none: after this cast it changes nothing.
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    return student.to(dtype), teacher.to(dtype)


def _soft(logits: Tensor, temperature: float) -> Tensor:
    _check(temperature)
    return logits if temperature == 1 else logits / temperature


def _check(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature must be positive and finite, not {temperature}.')


def _select(where: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy the positions that count, so that what stands at the others cannot reach the loss or its gradient."""
    positions = tensors[0].shape[:-1]
    try:
        mask = where.broadcast_to(positions)
    except RuntimeError:
        mask = None
    if mask is None or mask.dtype != torch.bool:
        raise ValueError(
            f'where, {where.dtype} {tuple(where.shape)}, must be a boolean mask that broadcasts to {tuple(positions)}, '
            'the shape of the logits without the class axis.'
        )
    index = mask.reshape(-1).nonzero().squeeze(1)
    return tuple(tensor.reshape(-1, tensor.shape[-1]).index_select(0, index) for tensor in tensors)


def _mean(total: Tensor, logits: Tensor) -> Tensor:
    return total / max(logits.shape[:-1].numel(), 1)
