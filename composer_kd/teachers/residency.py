"""Networks whose weights wait on the host until they are needed on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ALIGNMENT = 512  # bytes, that of an allocation on a CUDA device: kernels choose their way by it


def weight_bytes(network: nn.Module) -> int:
    """What the parameters and buffers of a network take."""
    return sum(tensor.nbytes for tensor in _tensors(network))


def can_wait(network: nn.Module) -> bool:
    """Whether a network's weights can be moved about: those of types that packages for quantization make up cannot."""
    return all(type(x) in (nn.Parameter, torch.Tensor) and x.layout == torch.strided for x in _tensors(network))


def shares_tensors(network: nn.Module, others: Iterable[nn.Module]) -> bool:
    """Whether some of a network's weights are those of one of the ``others``, too."""
    own = {id(tensor) for tensor in _tensors(network)}
    return any(id(tensor) in own for other in others for tensor in _tensors(other))


class Residency:
    """Keeps the weights of networks on the host, and copies of those on the device that are used now or next.

    The networks must not change their weights. A network is always whole: whoever looks at one whose weights wait finds
    them on the host. On a CUDA device copies are made from page-locked memory, beside what the device is doing. On a
    CPU host and device are the same memory, and the copies are made all the same.

    Args:
        device: Where the networks are used.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self._weights: dict[int, _Weights] = {}

    def take(self, index: int, network: nn.Module) -> None:
        """Take a network that is on the device to the host; it is called ``index`` from then on."""
        self._weights[index] = _Weights.to_host(network, self._stream)

    @property
    def on_device(self) -> list[int]:
        """Which networks have a copy of their weights on the device, or on the way there."""
        return [index for index, weights in self._weights.items() if weights.copies]

    @property
    def bytes(self) -> int:
        """How large these copies are."""
        return sum(copy.nbytes for weights in self._weights.values() for copy in weights.copies)

    def settle(self, present: Iterable[int], coming: Iterable[int]) -> None:
        """Begin to copy the weights of the networks that are used now, and of those that are next; drop all others."""
        wanted = list(dict.fromkeys([*present, *coming]))  # those that are used now first
        self._drop_all_but(wanted)
        for index in wanted:
            if index in self._weights:
                self._weights[index].fetch(self.device, self._stream)

    def arrive(self, index: int) -> None:
        """Have the device wait for the copy of a network's weights, and let the network use it."""
        if index in self._weights:
            self._weights[index].fetch(self.device, self._stream)
            self._weights[index].use(self.device)

    def end(self) -> None:
        """Leave all networks on the host."""
        self._drop_all_but(())
        self._weights.clear()

    def _drop_all_but(self, wanted: Collection[int]) -> None:
        for index, weights in self._weights.items():
            if index not in wanted:
                weights.drop()


@dataclass
class _Weights:
    """The weights of a network: for each dtype one block on the host, and, for a while, a copy of it on the device.

    One block, because the copy of each of hundreds of tensors by itself takes the time of a small step.
    """

    tensors: list[list[torch.Tensor]]
    places: list[list[tuple[torch.Size, tuple[int, ...], int]]]
    blocks: list[torch.Tensor]
    copies: list[torch.Tensor]
    are_used: bool = False
    arrival: Any = None

    @classmethod
    def to_host(cls, network: nn.Module, stream: Any) -> _Weights:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in _tensors(network):
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        weights = cls(list(by_dtype.values()), [], [], [])
        for dtype, tensors in by_dtype.items():
            places, end = [], 0
            for tensor in tensors:
                # Those of a tensor without gaps, in its memory format.
                strides = torch.empty_like(tensor, device='meta').stride()
                places.append((tensor.shape, strides, end))
                step = max(1, _ALIGNMENT // dtype.itemsize)
                end += -(-tensor.numel() // step) * step
            weights.places.append(places)
            weights.blocks.append(torch.zeros(end, dtype=dtype, pin_memory=stream is not None))
        weights._put(weights.blocks, copy=True)
        return weights

    def fetch(self, device: torch.device, stream: Any) -> None:
        if self.copies:
            return
        with torch.cuda.stream(stream) if stream else nullcontext():
            self.copies = [block.to(device, non_blocking=True, copy=True) for block in self.blocks]
        self.arrival = stream.record_event() if stream else None

    def use(self, device: torch.device) -> None:
        if self.are_used:
            return
        if self.arrival is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.arrival)
            for copy in self.copies:
                copy.record_stream(stream)  # its memory is another's only when this stream, too, is done with it
        self._put(self.copies)
        self.are_used = True

    def drop(self) -> None:
        if self.are_used:
            self._put(self.blocks)
        self.copies, self.arrival, self.are_used = [], None, False

    def _put(self, blocks: list[torch.Tensor], copy: bool = False) -> None:
        """Let the network's tensors be parts of these blocks."""
        for tensors, places, block in zip(self.tensors, self.places, blocks, strict=True):
            for tensor, (shape, strides, begin) in zip(tensors, places, strict=True):
                part = block.as_strided(shape, strides, begin)
                if copy:
                    part.copy_(tensor.data)
                tensor.data = part


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
