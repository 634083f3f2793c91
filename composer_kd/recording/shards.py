"""One shard: what is recorded of some samples that follow one another, in one view.

The file has a header, `ends` (for each sample, how many rows there are up to its last one), the rows, and a checksum of
all before. A sample that has no rows is missing.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from composer_kd.files import write
from composer_kd.recording.errors import RecordError
from composer_kd.recording.formats import RowFormat

_HEADER = struct.Struct('<8sIIIIII')  # magic and format, record, view, shard, samples, row_bytes, rows
_MAGIC = b'ckdrows1'
_CHECKSUM = struct.Struct('<I')
_MOST_ROWS = 2**32 - 1


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


def read_shard(path: Path, place: Place, row_format: RowFormat) -> tuple[np.ndarray, np.ndarray] | None:
    """Map a shard, and verify all of it.

    Returns:
        `ends`, uint32, shape (samples,), and the rows, uint8, shape (rows, row_bytes), for as long as they are held;
        None if there is no file.

    Raises:
        RecordError: It is damaged, or belongs elsewhere.
    """
    try:
        with path.open('rb') as file:
            file.seek(0, 2)
            size = file.tell()
            if size < _HEADER.size:
                raise _damaged(path, f'{size} bytes are too few')
            mapped = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f'cannot read {path}: {error.strerror}') from error
    magic, record, view, shard, samples, row_bytes, count = _HEADER.unpack_from(mapped)
    if magic != _MAGIC:
        raise _damaged(path, 'it does not begin as a shard does')
    ends_end = _HEADER.size + 4 * samples
    rows_end = ends_end + count * row_bytes
    if size != rows_end + _CHECKSUM.size:
        raise _damaged(path, f'it has {size} bytes instead of {rows_end + _CHECKSUM.size}')
    if _CHECKSUM.unpack_from(mapped, rows_end)[0] != zlib.crc32(mapped[:rows_end]):
        raise _damaged(path, 'its checksum is wrong')
    if Place(record, view, shard, samples) != place or row_bytes != row_format.row_bytes:
        raise _damaged(path, 'it belongs to another record, or to another place in this one')
    ends = np.frombuffer(mapped, '<u4', samples, _HEADER.size)
    rows = np.frombuffer(mapped, np.uint8, count * row_bytes, ends_end).reshape(count, row_bytes)
    if samples and (ends[-1] != count or (ends[1:] < ends[:-1]).any()):
        raise _damaged(path, 'its samples do not have as many rows as there are')
    try:
        row_format.check(rows)
    except RecordError as error:
        raise _damaged(path, str(error)) from error
    return ends, rows


def _damaged(path: Path, what: str) -> RecordError:
    return RecordError(f'{path} is damaged: {what}; run composer-kd record again, which rewrites it')
