"""One shard: what is recorded of some samples that follow one another, in one view.

The file has a header, `ends` (for each sample, how many rows there are up to its last one), the rows, and a checksum of
all before. A sample that has no rows is missing.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from composer_kd.files import write
from composer_kd.recording.errors import DamagedShard, RecordError
from composer_kd.recording.formats import RowFormat

_HEADER = struct.Struct('<8sIIIIII')  # magic and format, record, view, shard, samples, row_bytes, rows
_MAGIC = b'ckdrows1'
_CHECKSUM = struct.Struct('<I')
_MOST_ROWS = 2**32 - 1

#: Paths of shards that were found to be whole: what their files were then.
Verified: TypeAlias = MutableMapping[Path, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where a shard belongs.

    Args:
        record: The identity of its record.
        view: The view of its samples.
        shard: Its number.
        samples: How many samples it is of.
    """

    record: int
    view: int
    shard: int
    samples: int


def write_shard(path: Path, place: Place, counts: np.ndarray, rows: np.ndarray) -> None:
    """Write a shard, whole.

    Args:
        path: The file.
        place: Where it belongs.
        counts: How many rows each sample has, shape (samples,).
        rows: Those rows, in the order of samples, uint8, shape (rows, row_bytes).
    """
    ends = np.cumsum(counts, dtype=np.int64)
    if len(counts) != place.samples or ends[-1] != len(rows) or (counts < 0).any():
        raise ValueError(f'{len(rows)} rows of {len(counts)} samples do not make a shard of {place.samples}')
    if len(rows) > _MOST_ROWS:
        raise RecordError(f'{path}: {len(rows)} rows are too many for one shard; make shard_samples smaller')
    numbers = place.record, place.view, place.shard, place.samples, rows.shape[1], len(rows)
    parts = _HEADER.pack(_MAGIC, *numbers), ends.astype('<u4').data, np.ascontiguousarray(rows).data
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    write(path, *parts, _CHECKSUM.pack(checksum))


def read_shard(
    path: Path, place: Place, row_format: RowFormat, verified: Verified
) -> tuple[np.ndarray, np.ndarray] | None:
    """Map a shard, and verify all of it, unless that was done already.

    Args:
        path: The file.
        place: Where it should belong.
        row_format: What its rows should be.
        verified: Which ones need not be looked through again; it is added to them.

    Returns:
        `ends`, uint32, shape (samples,), and the rows, uint8, shape (rows, row_bytes), for as long as they are held;
        None if there is no file.

    Raises:
        DamagedShard: It is damaged, or belongs elsewhere.
        RecordError: It cannot be read.
    """
    try:
        with path.open('rb') as file:
            stat = os.fstat(file.fileno())
        size, state = stat.st_size, (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if size < _HEADER.size:
            raise _damaged(path, f'{size} bytes are too few')
        mapped = _mapped(path, size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_read(path, error) from error
    magic, record, view, shard, samples, row_bytes, count = _HEADER.unpack_from(mapped)
    if magic != _MAGIC:
        raise _damaged(path, 'it does not begin as a shard does')
    ends_end = _HEADER.size + 4 * samples
    rows_end = ends_end + count * row_bytes
    if size != rows_end + _CHECKSUM.size:
        raise _damaged(path, f'it has {size} bytes instead of {rows_end + _CHECKSUM.size}')
    is_new = verified.get(path) != state
    if is_new and _CHECKSUM.unpack_from(mapped, rows_end)[0] != zlib.crc32(mapped[:rows_end]):
        raise _damaged(path, 'its checksum is wrong')
    if Place(record, view, shard, samples) != place or row_bytes != row_format.row_bytes:
        raise _damaged(path, 'it belongs to another record, or to another place in this one')
    ends = np.frombuffer(mapped, '<u4', samples, _HEADER.size)
    rows = np.frombuffer(mapped, np.uint8, count * row_bytes, ends_end).reshape(count, row_bytes)
    if is_new and samples and (ends[-1] != count or (ends[1:] < ends[:-1]).any()):
        raise _damaged(path, 'its samples do not have as many rows as there are')
    try:
        if is_new:
            row_format.check(rows)
    except RecordError as error:
        raise _damaged(path, str(error)) from error
    verified[path] = state
    return ends, rows


def cannot_read(path: Path, error: OSError) -> RecordError:
    """What a person is told when a file is there, but cannot be read now."""
    todo = '; let this process open more, by ulimit -n' if error.errno == errno.EMFILE else ''
    return RecordError(f'cannot read {path}: {error.strerror}{todo}')


def _mapped(path: Path, size: int) -> memoryview:
    """The bytes of a file, mapped without a descriptor, of which Python's mmap would keep one for each shard."""
    try:
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise RecordError(f'cannot map {path}: {error}') from error
    mapped.flags.writeable = False
    return mapped.data


def _damaged(path: Path, what: str) -> DamagedShard:
    return DamagedShard(f'{path} is damaged: {what}; run composer-kd record again for {path.parent}, which rewrites it')
