"""What a record holds of some samples, and what its teacher says about them now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from composer.core import Precision
from torch import Tensor

from composer_kd.losses import topk_tail
from composer_kd.recording import Record


def rounding(dtype: str, precision: Precision, on_gpu: bool) -> float:
    """How far two logits may be apart that are the same but for rounding, in proportion to the largest one.

    Args:
        dtype: In which one of them was stored.
        precision: In which both were computed.
        on_gpu: Whether they were computed on a GPU, where products of float32 may have the digits of TF32.
    """
    stored = {'float16': 11, 'float32': 24}[dtype]
    computed = {Precision.FP32: 10 if on_gpu else 20, Precision.AMP_FP16: 10}.get(precision, 7)
    return 2.0**-stored + 4 * 2.0**-computed  # of several layers, one after another


@dataclass
class Comparison:
    """How far a record, and its teacher now, are apart.

    Args:
        samples: How many were compared.
        rows: How many vectors of logits they have.
        difference: The largest between a logit that is recorded and the teacher's of the same class, or rank.
        largest: The largest logit, by its absolute value.
        other_classes: In how many vectors the largest logits are of other classes.
        other_counts: Of how many samples there are more vectors, or fewer.
    """

    samples: int = 0
    rows: int = 0
    difference: float = 0.0
    largest: float = 0.0
    other_classes: int = 0
    other_counts: int = 0

    @classmethod
    def of(cls, parts: Sequence[Comparison]) -> Comparison:
        """Several, as one."""
        counts = (sum(getattr(x, name) for x in parts) for name in ('samples', 'rows', 'other_classes', 'other_counts'))
        samples, rows, other_classes, other_counts = counts
        difference, largest = max(x.difference for x in parts), max(x.largest for x in parts)
        return cls(samples, rows, difference, largest, other_classes, other_counts)

    def add(self, record: Record, keys: np.ndarray, counts: np.ndarray, logits: Tensor) -> None:
        """Compare some samples.

        Args:
            record: The record.
            keys: Of the samples, shape (samples, 2).
            counts: How many vectors the teacher gives for each, shape (samples,).
            logits: Those vectors, shape (rows, classes).
        """
        stored, recorded = record.lookup(keys)
        self.samples += len(keys)
        self.rows += len(logits)
        if (recorded != counts).any():
            self.other_counts += int((recorded != counts).sum())
            return
        said, logits = record.format.decode(torch.from_numpy(stored)), logits.float().cpu()
        if isinstance(said, Tensor):
            pairs = [(said, logits)]
        else:
            largest, classes = logits.topk(said.values.shape[-1])
            pairs = [(said.values, logits.gather(-1, said.indices)), (said.values, largest)]
            pairs += [(tail, topk_tail(logits, said.indices, T).squeeze(-1)) for T, tail in said.tails.items()]
            is_other = said.indices.sort(-1).values != classes.sort(-1).values
            self.other_classes += int(is_other.any(-1).sum())
        for one, other in pairs:
            apart = torch.where(one == other, 0.0, one - other).abs()  # -inf, where both rule a class out, is the same
            self.difference = max(self.difference, float(apart.nan_to_num(torch.inf).max()))
        self.largest = max(self.largest, float(pairs[0][0].masked_fill(pairs[0][0].isinf(), 0.0).abs().max()))

    def agrees(self, rounding: float) -> bool:
        """Whether the teacher says what is recorded."""
        return self.other_counts == 0 and self.difference <= self._explained(rounding)

    def line(self, record: Record, rounding: float) -> str:
        """What was found, for people."""
        said = f'{record.path}: {self.samples} samples, with {self.rows} vectors of logits, were asked about again: '
        if self.other_counts:
            return f'{said}{self.other_counts} of them have more vectors now, or fewer'
        said += f'logits differ by up to {self.difference:.2g}, rounding explains {self._explained(rounding):.2g}'
        if record.format.k is not None:
            said += f'; the {record.format.k} largest are of the same classes in {self.rows - self.other_classes}'
        return said

    def _explained(self, rounding: float) -> float:
        return max(1.0, self.largest) * rounding
