"""The weighted mean of several logits, which are taken in one after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mean:
    """A weighted mean of logits z, `sum_i w_i z_i`; or of what they say of the classes; or of those that are right.

    Where a temperature T is given, the mean is taken of probabilities: its logits z fulfil
    `softmax(z / T) = sum_i w_i softmax(z_i / T)`. Where labels are given, each position has the mean of those logits
    alone whose largest is that of its label, and of all where there are none. It is computed in float32 or more.

    Args:
        temperature: T > 0. Default: none, the mean is of the logits themselves.
        labels: The classes that are right, int64, the logits' shape without `axis`. Default: none, all count.
        axis: The class axis. Default: the last.
    """

    def __init__(self, *, temperature: float | None = None, labels: Tensor | None = None, axis: int = -1):
        self.temperature = temperature
        self.labels = labels
        self.axis = axis
        # Sums of terms; those of probabilities are kept as their logarithms.
        self._all: Tensor | None = None
        self._right: Tensor | None = None
        self._share_of_right: Tensor | None = None

    def add(self, logits: Tensor, weight: float | Tensor) -> None:
        """Take in one member.

        Args:
            logits: The same shape for all members.
            weight: Above 0; those of all members sum to 1. As a tensor it has the axes of `logits`.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if isinstance(weight, Tensor):
            weight = weight.to(logits.dtype)
        if self.temperature is None:
            terms = logits * weight
        else:
            log_weight = weight.log() if isinstance(weight, Tensor) else math.log(weight)
            terms = (logits / self.temperature).log_softmax(self.axis) + log_weight
        self._all = self._sum(self._all, terms)
        if self.labels is not None:
            is_right = (logits.argmax(self.axis) == self.labels).unsqueeze(self.axis)
            share = is_right * torch.as_tensor(weight, dtype=terms.dtype, device=terms.device)
            self._share_of_right = share if self._share_of_right is None else self._share_of_right + share
            nothing = 0.0 if self.temperature is None else -math.inf
            self._right = self._sum(self._right, torch.where(is_right, terms, nothing))

    def result(self) -> Tensor:
        """The mean of what was taken in."""
        mean, right, share = self._all, self._right, self._share_of_right
        assert mean is not None, 'nothing was taken in'
        if right is not None and share is not None:
            mean = torch.where(share > 0, right / share if self.temperature is None else right - share.log(), mean)
        return mean if self.temperature is None else mean * self.temperature

    def _sum(self, some: Tensor | None, terms: Tensor) -> Tensor:
        if some is None:
            return terms
        return some + terms if self.temperature is None else torch.logaddexp(some, terms)
