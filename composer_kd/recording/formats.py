"""What a teacher says about one position, as a row of bytes of fixed size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from composer_kd.recording.errors import RecordError
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits, part

_DTYPES = {'float16': torch.float16, 'float32': torch.float32}
_LOGITS_AT_ONCE = 2**20
_POSITIONS_AT_ONCE = 256


@dataclass(frozen=True)
class RowFormat:
    """Whole vectors of logits, or the k largest, their classes, and one logit for all others at each temperature.

    A row is `values`, in `dtype`, and with k `indices`, two bytes each (four if there are more than 65536 classes),
    and `tails`, float32. No logit is divided by a temperature.

    Args:
        classes: How many classes there are.
        k: How many logits are kept; None: all.
        dtype: Of the logits, `float16` or `float32`.
        temperatures: At which the tails are taken; none if all logits are kept.

    Raises:
        RecordError: One of them is out of range.
    """

    classes: int
    k: int | None = None
    dtype: str = 'float32'
    temperatures: tuple[float, ...] = ()

    def __post_init__(self):
        if self.classes < 1:
            raise RecordError(f'a record is of 1 class or more, not {self.classes}')
        if self.k is not None and not 1 <= self.k <= self.classes:
            raise RecordError(f'a record holds from 1 to all {self.classes} logits of a position, not {self.k}')
        if self.dtype not in _DTYPES:
            raise RecordError(f'a record holds float16 or float32, not {self.dtype}')
        if not all(0 < temperature < math.inf for temperature in self.temperatures):
            raise RecordError(f'temperatures must be positive and finite, not {[*self.temperatures]}')
        if (self.k is None) != (not self.temperatures) or len({*self.temperatures}) < len(self.temperatures):
            raise RecordError(
                'with k a record holds tails at one or more temperatures, each once, and without k at none'
            )

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self._layout.itemsize

    @functools.cached_property
    def _layout(self) -> np.dtype:
        value = {'float16': '<f2', 'float32': '<f4'}[self.dtype]
        if self.k is None:
            return np.dtype([('values', value, (self.classes,))])
        index = '<u2' if self.classes <= 2**16 else '<i4'
        tails = ('tails', '<f4', (len(self.temperatures),))
        return np.dtype([('values', value, (self.k,)), ('indices', index, (self.k,)), tails])

    @torch.no_grad()
    def encode(self, logits: Tensor | DeferredLogits) -> Tensor:
        """Rows of logits, shape (M, row_bytes), uint8, on the same device, which is not made to wait.

        Of deferred logits, those of 256 positions are computed at once.

        Args:
            logits: Shape (M, classes).
        """
        positions, classes = logits.shape
        if classes != self.classes:
            raise RecordError(f'the teacher speaks of {classes} classes, its record is of {self.classes}')
        rows = torch.empty((positions, self.row_bytes), dtype=torch.uint8, device=logits.device)
        step = max(_POSITIONS_AT_ONCE, 0 if isinstance(logits, DeferredLogits) else _LOGITS_AT_ONCE // classes)
        for begin in range(0, positions, step):
            chunk = slice(begin, begin + step)
            fields = self._fields(part(logits, chunk))
            rows[chunk] = torch.cat([field.contiguous().view(torch.uint8) for field in fields], -1)
        return rows

    def decode(self, rows: Tensor) -> Tensor | TopKLogits:
        """What is in rows, on their device: logits in float32, shape (M, classes), or the k largest.

        Args:
            rows: Shape (M, row_bytes), uint8.
        """
        values = self._field(rows, 'values', _DTYPES[self.dtype]).float()
        if self.k is None:
            return values
        indices = self._field(rows, 'indices', torch.uint16 if self.classes <= 2**16 else torch.int32).long()
        tails = self._field(rows, 'tails', torch.float32).unbind(-1)
        return TopKLogits(values, indices, dict(zip(self.temperatures, tails, strict=True)), self.classes)

    def check(self, rows: np.ndarray) -> None:
        """See whether rows, which are on the host, can teach.

        Args:
            rows: Shape (M, row_bytes), uint8, contiguous.

        Raises:
            RecordError: There is NaN or infinity in them, which `encode` leaves where a logit does not fit the dtype,
                or a class that there is not.
        """
        fields = rows.view(self._layout)
        if not _no_nan_or_infinity(fields['values']):
            todo = ', or too large for float16: record it in float32' if self.dtype == 'float16' else ''
            raise RecordError(f'a logit of the teacher is NaN or infinite{todo}')
        if self.k is not None and not _no_nan_or_infinity(fields['tails']):
            raise RecordError('the logits of the teacher are too large for a record')
        if (
            self.k is not None
            and rows.size
            and not 0 <= fields['indices'].min() <= fields['indices'].max() < self.classes
        ):
            raise RecordError(f'there are classes beyond the {self.classes} of the record')

    def _fields(self, logits: Tensor) -> list[Tensor]:
        if self.k is None:
            return [self._stored(logits)]
        values, indices = logits.topk(self.k)
        packed = indices.to(torch.uint16 if self.classes <= 2**16 else torch.int32)
        work = torch.promote_types(logits.dtype, torch.float32)
        rest = logits.to(work, copy=True, memory_format=torch.contiguous_format).scatter_(-1, indices, -math.inf)
        return [self._stored(values), packed, _tails(rest, self.temperatures).float()]

    def _stored(self, logits: Tensor) -> Tensor:
        """In the record's dtype, with NaN where a logit does not fit: -inf is for classes that are ruled out."""
        stored = logits.to(_DTYPES[self.dtype])
        if torch.promote_types(logits.dtype, stored.dtype) == stored.dtype:
            return stored
        return stored.masked_fill(stored.isinf() & logits.isfinite(), math.nan)

    def _field(self, rows: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        fields: Any = self._layout.fields
        field, begin = fields[name][:2]
        # A copy, because what begins at any byte cannot be seen as another type.
        return rows[:, begin : begin + field.itemsize].clone(memory_format=torch.contiguous_format).view(dtype)


def _tails(rest: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """`T logsumexp(rest / T)` at each temperature, over the rest itself, as in `losses`; overwrites it."""
    largest = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)  # finite, where nothing is left
    rest.sub_(largest)
    scaled = torch.empty_like(rest)
    sums = [torch.div(rest, temperature, out=scaled).exp_().sum(-1) for temperature in temperatures]
    return torch.stack([t * total.log() for t, total in zip(temperatures, sums, strict=True)], -1) + largest


def _no_nan_or_infinity(values: np.ndarray) -> bool:
    return bool((values < np.inf).all())
