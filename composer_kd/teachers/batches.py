"""Batches as Composer knows them: a tensor, a tuple or list of them, or a mapping to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor, 0 if there is none."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 0)


def pick(batch: Any, samples: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Some samples of a batch as a batch, and which rows of the outputs for the whole batch are theirs.

    These rows are the samples, unless the batch has ``positions``, shape (M,): then outputs are for those of the N L
    flattened positions, and the samples take theirs along.

    Args:
        batch: The batch.
        samples: Their indices, int64, ascending.
    """
    number = samples_in(batch)

    def picked(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: picked(each) for key, each in value.items()}
        if isinstance(value, tuple | list):
            parts = [picked(each) for each in value]
            return parts if isinstance(value, list) else tuple(parts)
        is_of_samples = isinstance(value, torch.Tensor) and value.ndim and len(value) == number
        return value[samples.to(value.device)] if is_of_samples else value

    if isinstance(batch, Mapping) and 'positions' in batch:
        part = picked({key: value for key, value in batch.items() if key != 'positions'})
        length, positions = batch['input_ids'].shape[1], batch['positions']
        new_place = positions.new_full((number,), -1)
        new_place[samples.to(positions.device)] = torch.arange(len(samples), device=positions.device)
        place = new_place[positions // length]
        rows = (place >= 0).nonzero().squeeze(1)
        return {**part, 'positions': place[rows] * length + positions[rows] % length}, rows
    return picked(batch), samples


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            if key != 'positions':  # of which there may be any number
                yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
