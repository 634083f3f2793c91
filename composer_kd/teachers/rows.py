"""What teachers that speak from a record, and those whose words go into one, have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from composer.utils import dist
from torch.utils.data import IterableDataset

from composer_kd.recording import RecordError
from composer_kd.teachers.teacher import TeacherError

if TYPE_CHECKING:
    from composer.core import Batch
    from composer.devices import Device

_Found = TypeVar('_Found')


def on_all_ranks(work: Callable[[], _Found]) -> list[_Found]:
    """What each rank finds; where it fails on one, all raise its error, so that none waits for it."""
    found, message = None, None
    try:
        found = work()
    except (RecordError, TeacherError) as error:
        message = str(error)
    outcomes: list[Any] = dist.all_gather_object((found, message))
    for _, message in outcomes:
        if message is not None:
            raise TeacherError(message)
    return [found for found, _ in outcomes]


def or_teacher_error(work: Callable[[], _Found]) -> _Found:
    """What is found; an error of the record becomes one of its teacher."""
    try:
        return work()
    except RecordError as error:
        raise TeacherError(str(error)) from error


def loader_with_keys(loader: Any) -> Any:
    """The loader, if it knows which samples are in a batch; raises TeacherError otherwise."""
    if not all(hasattr(loader, name) for name in ('keys', 'views', 'identity')):
        is_stream = isinstance(getattr(loader, 'dataset', None), IterableDataset)
        todo = 'set split=train, or let composer_kd.data.data_spec(train=True) deal it out'
        raise TeacherError(
            'the training data does not say which samples are in a batch, which a record needs to know: '
            + ('streams never do' if is_stream else todo)
        )
    return loader


def known_keys(keys: torch.Tensor | None) -> torch.Tensor:
    """The samples of a batch and their views; raises TeacherError if nobody knows them."""
    if keys is None:
        raise TeacherError('the training data does not say which samples are in a batch, which a record needs to know')
    return keys


def to_device(rows: np.ndarray, device: Device) -> torch.Tensor:
    """One copy, which the host does not wait for."""
    tensor = torch.from_numpy(rows)
    return device.tensor_to_device(tensor.pin_memory() if device.name == 'gpu' else tensor)


def rows_per_sample(batch: Batch, samples: int, device: torch.device) -> torch.Tensor:
    """How many rows each of a batch's samples has, int32, on the device, which is not waited for."""
    positions = _positions(batch)
    if positions is None:
        return torch.ones(samples, dtype=torch.int32, device=device)
    assert isinstance(batch, Mapping)
    counts = torch.zeros(samples, dtype=torch.int32, device=device)
    return counts.index_add_(0, positions // batch['input_ids'].shape[1], torch.ones_like(positions, dtype=torch.int32))


def check_number(path: Path, rows: int, batch: Batch, samples: int) -> None:
    """See whether there are as many rows as there should be; never waits for the device."""
    positions = _positions(batch)
    wanted = samples if positions is None else len(positions)
    if rows != wanted:
        where = 'samples' if positions is None else 'labelled positions'
        raise TeacherError(f'for a batch with {wanted} {where} the record {path} has {rows}: it is of other masks')


def _positions(batch: Batch) -> torch.Tensor | None:
    """The labelled positions of a text whose logits are wanted; None where each sample has one vector of logits."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get('labels')
    if 'positions' not in batch and isinstance(labels, torch.Tensor) and labels.ndim > 1:
        raise TeacherError(
            'the student gives logits for all positions of a text, and a record has those of the labelled positions: '
            'take one that scores these alone, as composer_kd.models.masked_lm does'
        )
    return batch.get('positions')
