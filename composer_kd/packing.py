"""Several tensors as one piece of memory, to be sent or kept as such, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """How tensors of some shapes and dtypes lie in one piece of memory, without gaps.

    Args:
        tensors: Such tensors; at least one.

    Attributes:
        bytes: How large the piece is.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        # Large items first, so that each lies where the processor wants it.
        self._order = sorted(range(len(tensors)), key=lambda index: -tensors[index].dtype.itemsize)
        self._ends = {}
        end = 0
        for index in self._order:
            end += tensors[index].nbytes
            self._ends[index] = end
        self.bytes = end

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of the tensors, uint8, shape (bytes,), on their device."""
        return torch.cat([_bytes(tensors[index]) for index in self._order])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The tensors that are in such a piece, which share its memory."""
        tensors = []
        for index, (shape, dtype) in enumerate(self._kinds):
            end = self._ends[index]
            tensors.append(packed[end - shape.numel() * dtype.itemsize : end].view(dtype).view(shape))
        return tensors


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
