"""Logits of which the largest are known, and what the others weigh together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_kd import losses


@dataclass(eq=False)
class TopKLogits:
    """A teacher's k largest logits at each position, and one for all the rest at each of some temperatures.

    Args:
        values: The logits, largest first and not divided by a temperature, shape (..., k).
        indices: Their classes, of any integer type, shape (..., k).
        tails: By temperature T, ``T logsumexp(rest / T)`` of the other logits, shape (...).
        classes: How many classes there are, C.
    """

    values: Tensor
    indices: Tensor
    tails: Mapping[float, Tensor]
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int, temperatures: Iterable[float]) -> TopKLogits:
        """Those of whole logits, shape (..., C), with a tail for each temperature.

        Raises:
            ValueError: k or a temperature is out of range, or there is no temperature.
        """
        first, *others = temperatures
        values, indices, tail = losses.topk(teacher_logits=logits, k=k, temperature=first)
        tails = {T: losses.topk_tail(logits, indices, T).squeeze(-1) for T in others}
        return cls(values, indices, {first: tail, **tails}, logits.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """(..., C)."""
        return torch.Size((*self.values.shape[:-1], self.classes))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    def rows(self, rows: slice) -> TopKLogits:
        """Some of the positions."""
        tails = {temperature: tail[rows] for temperature, tail in self.tails.items()}
        return TopKLogits(self.values[rows], self.indices[rows], tails, self.classes)

    def detach(self) -> TopKLogits:
        """Themselves, since they have no gradient."""
        return self

    def are_sound(self) -> Tensor:
        """Whether neither NaN nor infinity is in them; a class that is ruled out, by -inf, is none of it."""
        return (self.values < torch.inf).all()

    def tail(self, temperature: float) -> Tensor:
        """``T logsumexp(rest / T)`` of the other logits, shape (...); -inf where there are no others.

        Raises:
            ValueError: It is not known at this temperature.
        """
        if self.values.shape[-1] == self.classes:
            return self.values.new_full(self.values.shape[:-1], -torch.inf)
        if temperature not in self.tails:
            known = ', '.join(f'{known:g}' for known in sorted(self.tails))
            raise ValueError(
                f"the record's tails are at temperatures {known}, not {temperature:g}: distil at one of these, or "
                f'record anew with temperature {temperature:g}'
            )
        return self.tails[temperature]

    def tail_mass(self, temperature: float) -> Tensor:
        """What the others weigh together in softmax(logits / T), shape (...): what k classes leave unsaid."""
        merged = torch.cat([self.values, self.tail(temperature).unsqueeze(-1)], -1)
        return merged.div(temperature).softmax(-1)[..., -1]


def topk_loss(
    *, student_logits: Tensor, teacher: TopKLogits, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """`losses.topk_kl` from a teacher that may know its tail at several temperatures.

    Args:
        student_logits: Shape (..., C).
        teacher: Of the same shape.
        temperature: One at which it knows its tail, or any if it knows all classes. Default: 1.
        where: As for `losses.kl`.

    Raises:
        ValueError: The shapes do not fit, or the tail is not known at this temperature.
    """
    if student_logits.shape != teacher.shape:
        raise ValueError(
            f'student_logits {tuple(student_logits.shape)} and the logits of the teacher {tuple(teacher.shape)} differ '
            'in shape: both must score the same classes at the same positions'
        )
    return losses.topk_kl(
        student_logits=student_logits,
        teacher_values=teacher.values,
        teacher_indices=teacher.indices,
        teacher_tail=teacher.tail(temperature),
        temperature=temperature,
        where=where,
    )
