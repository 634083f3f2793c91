"""The weights of a network as one piece of memory."""

from __future__ import annotations

import hashlib
import json

import torch
from composer.utils import dist
from torch import Tensor, nn

from composer_kd.packing import Packing


class Snapshots:
    """Takes snapshots of networks of one architecture, and puts them into others.

    A snapshot holds parameters and buffers, those of BatchNorm too.

    Args:
        network: One of these networks.
        dtype: Of floating point numbers in a snapshot. Default: None, their own.

    Attributes:
        bytes: How large a snapshot is.
        fingerprint: The same for networks whose snapshots fit into each other.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None):
        self._dtype = dtype
        tensors = {name: self._cast(torch.empty_like(one, device='meta')) for name, one in _tensors(network).items()}
        self._packing = Packing([*tensors.values()])
        self.bytes = self._packing.bytes
        kinds = [(name, [*tensor.shape], str(tensor.dtype)) for name, tensor in tensors.items()]
        self.fingerprint = hashlib.sha256(json.dumps(kinds).encode()).hexdigest()

    def of(self, network: nn.Module) -> Tensor:
        """A snapshot, uint8, shape (bytes,), on the network's device."""
        return self._pack(_tensors(network))

    def of_team(self, network: nn.Module) -> Tensor:
        """Likewise, but the same on all ranks: where they have buffers of their own, those of rank 0 count."""
        tensors, buffers = _tensors(network), dict(network.named_buffers())
        if buffers and dist.get_world_size() > 1:
            packing = Packing([*buffers.values()])
            of_rank_zero = packing.pack([*buffers.values()])
            dist.broadcast(of_rank_zero, src=0)
            tensors |= zip(buffers, packing.unpack(of_rank_zero), strict=True)
        return self._pack(tensors)

    @torch.no_grad()
    def put(self, snapshot: Tensor, network: nn.Module) -> None:
        """Give a network the weights of a snapshot."""
        for tensor, value in zip(_tensors(network).values(), self._packing.unpack(snapshot), strict=True):
            tensor.copy_(value)

    def _pack(self, tensors: dict[str, Tensor]) -> Tensor:
        return self._packing.pack([self._cast(tensor) for tensor in tensors.values()])

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*network.named_buffers(), *network.named_parameters())}
