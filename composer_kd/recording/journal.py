"""What a teacher said while a student learned, as far as no shard has it yet."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from composer_kd.files import is_at, lock, sync_folder, unlock_and_close
from composer_kd.recording.errors import RecordError
from composer_kd.recording.manifest import identity
from composer_kd.recording.record import MOST_VIEWS, Record, cannot_write, ranges
from composer_kd.recording.shards import cannot_read

_JOURNAL = re.compile(r'journal-(\d+)\.bin')
_HEADER = struct.Struct('<8sII')  # magic and format, record, row_bytes
_MAGIC = b'ckdjrnl1'
_ENTRY = struct.Struct('<II')  # bytes that follow, their checksum
_SAMPLES = struct.Struct('<I')


class Journal:
    """The file to which one rank appends, batch by batch; what is appended outlives the process.

    It is opened when something is appended, and an end that is torn is cut off then. While it is open it is locked, so
    that no two processes write it.

    Args:
        record: The record, to be written.
        rank: The rank of this process in its job.
    """

    def __init__(self, record: Record, rank: int):
        self._record = record
        self._path = record.path / f'journal-{rank}.bin'
        self._descriptor: int | None = None
        self._end = 0

    def append(self, keys: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
        """Note what the teacher said about the samples of a batch.

        Args:
            keys: Sample ids and views, shape (B, 2).
            counts: How many rows each has, shape (B,).
            rows: Those rows, in the order of the samples, uint8, shape (M, row_bytes).

        Raises:
            RecordError: A row cannot teach, the disk is full, or another process writes the journal.
        """
        if not len(keys):
            return
        if len(keys) != len(counts) or counts.sum() != len(rows):
            raise ValueError(f'{len(rows)} rows of {len(counts)} samples are not those of {len(keys)} samples')
        self._record.format.check(rows)
        parts = [_SAMPLES.pack(len(keys)), keys.astype('<i8'), counts.astype('<u4'), np.ascontiguousarray(rows)]
        body = b''.join(bytes(part) for part in parts)
        try:
            self._write(_ENTRY.pack(len(body), zlib.crc32(body)) + body)
        except OSError as error:
            raise cannot_write(self._record.path, error) from error

    def close(self) -> None:
        """Close the file, so that it may be sealed; the next entry opens it again, or another one."""
        if self._descriptor is not None:
            unlock_and_close(self._descriptor)
            self._descriptor = None

    def _write(self, entry: bytes) -> None:
        if self._descriptor is None:
            self._open()
        assert self._descriptor is not None
        _write_at(self._descriptor, entry, self._end)
        self._end += len(entry)

    def _open(self) -> None:
        descriptor = _locked(self._path)
        try:
            said = _read(self._path, self._record)
            os.ftruncate(descriptor, said.end)
            if not said.end:
                header = _HEADER.pack(_MAGIC, identity(self._record.manifest), self._record.format.row_bytes)
                _write_at(descriptor, header, 0)
        except BaseException:
            unlock_and_close(descriptor)
            raise
        self._descriptor, self._end = descriptor, said.end or _HEADER.size


def seal(record: Record) -> None:
    """Turn the journals of all ranks into shards, or into more of those that are there; for who has the lock.

    No rank has its journal open meanwhile. A sample that comes twice is what it was first. The journals go last:
    whenever this is broken off, doing it again ends with the same files.

    Raises:
        RecordError: The disk is full, or another process still writes a journal; then the journals stay.
    """
    with locked_journals(record) as journals:
        merge(record, journals)
        remove(record, journals)


@contextlib.contextmanager
def locked_journals(record: Record) -> Iterator[list[Path]]:
    """The journals of a record, which nobody appends to meanwhile; the first step of :func:`seal`."""
    descriptors: list[int] = []
    try:
        journals = _journals(record.path)
        with _writing(record):
            for path in journals:
                descriptors.append(_locked(path))
        yield journals
    finally:
        for descriptor in descriptors:
            unlock_and_close(descriptor)


def merge(record: Record, journals: Sequence[Path], rank: int = 0, ranks: int = 1) -> None:
    """Write the shards of what is in journals; the second step of :func:`seal`, which several ranks may share.

    Args:
        record: The record.
        journals: All its journals, which are locked.
        rank: Which of the ranks this is. Default: 0.
        ranks: How many share the work; shards are dealt to them as of :meth:`.Record.rank_of`. Default: 1.
    """
    with _writing(record):
        said = [_read(path, record) for path in journals]
        for view, shard, members in _by_shard(said, record.shard_samples):
            if record.rank_of(view, shard, ranks) == rank:
                _merge(record, view, shard, list(zip(said, members, strict=True)))


def remove(record: Record, journals: Sequence[Path]) -> None:
    """Remove journals whose shards are all written; the last step of :func:`seal`."""
    with _writing(record):
        for path in journals:
            path.unlink()
        if journals:
            sync_folder(record.path)


@contextlib.contextmanager
def _writing(record: Record) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(record.path, error) from error


def _locked(path: Path) -> int:
    """A journal, opened and locked; it is made if need be.

    Raises:
        OSError: It cannot be opened.
        RecordError: Another process writes it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(descriptor):
            os.close(descriptor)
            todo = 'end what is left of an earlier run, and start again'
            raise RecordError(f'another process still writes {path}: {todo}')
        if is_at(descriptor, path):
            return descriptor
        unlock_and_close(descriptor)  # it was sealed in between


@dataclass
class _Said:
    """The samples in a journal: ids, views, how many rows each has, and at which byte of it they begin."""

    ids: np.ndarray
    views: np.ndarray
    counts: np.ndarray
    begins: np.ndarray
    content: memoryview
    end: int  # of what is whole; 0 if not even the header is

    def rows(self, numbers: np.ndarray, row_bytes: int) -> np.ndarray:
        """The rows of some of the samples."""
        counts = self.counts[numbers]
        of_sample = np.repeat(np.arange(len(numbers)), counts)
        lines = ranges(np.zeros_like(counts), counts)
        starts = self.begins[numbers][of_sample] + lines * row_bytes
        if not len(starts):
            return np.empty((0, row_bytes), dtype=np.uint8)
        return np.lib.stride_tricks.sliding_window_view(np.frombuffer(self.content, np.uint8), row_bytes)[starts]


def _by_shard(said: list[_Said], shard_samples: int) -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """View and number of each shard that journals have samples of, and for each journal the numbers of these in it.

    Of a sample that comes twice, the first.
    """
    if not any(len(one.ids) for one in said):
        return
    ids, views = np.concatenate([one.ids for one in said]), np.concatenate([one.views for one in said])
    numbers = np.concatenate([np.arange(len(one.ids)) for one in said])
    sources = np.repeat(np.arange(len(said)), [len(one.ids) for one in said])
    order = np.lexsort((ids, views))  # stable
    is_first = (np.diff(ids[order], prepend=-1) != 0) | (np.diff(views[order], prepend=-1) != 0)
    order = order[is_first]
    shards = ids[order] // shard_samples
    edges = np.flatnonzero((np.diff(shards) != 0) | (np.diff(views[order]) != 0)) + 1
    for group in np.split(order, edges):
        members = [numbers[group[sources[group] == source]] for source in range(len(said))]
        yield int(views[group[0]]), int(ids[group[0]]) // shard_samples, members


def _merge(record: Record, view: int, shard: int, parts: list[tuple[_Said, np.ndarray]]) -> None:
    """Write a shard of what is in it already, and of samples in journals, given by their numbers there."""
    stored, stored_rows = record.shard(view, shard)
    counts = stored.copy()
    new = []
    for said, numbers in parts:
        places = said.ids[numbers] - shard * record.shard_samples
        is_new = (stored[places] == 0) & (said.counts[numbers] > 0)
        places, numbers = places[is_new], numbers[is_new]
        counts[places] = said.counts[numbers]
        new.append((said, numbers, places))
    if (counts == stored).all():
        return
    begins = counts.cumsum() - counts
    rows = np.empty((counts.sum(), record.format.row_bytes), dtype=np.uint8)
    rows[ranges(begins[stored > 0], stored[stored > 0])] = stored_rows
    for said, numbers, places in new:
        rows[ranges(begins[places], counts[places])] = said.rows(numbers, record.format.row_bytes)
    record.write(view, shard, counts, rows)


def _journals(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _JOURNAL.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _read(path: Path, record: Record) -> _Said:
    """What is in a journal, up to where it is torn; nothing, if it is of another record."""
    try:
        with path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b''
    except FileNotFoundError:
        mapped = b''
    except OSError as error:
        raise cannot_read(path, error) from error
    content = memoryview(mapped)
    header = _HEADER.pack(_MAGIC, identity(record.manifest), record.format.row_bytes)
    end = len(header) if content[: len(header)] == header else 0
    keys: list[np.ndarray] = [np.empty((0, 2), dtype=np.int64)]
    counts: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    begins: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    while end and end + _ENTRY.size <= len(content):
        length, checksum = _ENTRY.unpack_from(content, end)
        body = content[end + _ENTRY.size : end + _ENTRY.size + length]
        if len(body) < length or zlib.crc32(body) != checksum or (entry := _entry(body, record)) is None:
            break
        rows_at = end + _ENTRY.size + entry[2]
        keys.append(entry[0])
        counts.append(entry[1])
        begins.append(rows_at + (entry[1].cumsum() - entry[1]) * record.format.row_bytes)
        end += _ENTRY.size + length
    all_keys = np.concatenate(keys)
    return _Said(all_keys[:, 0], all_keys[:, 1], np.concatenate(counts), np.concatenate(begins), content, end)


def _entry(body: memoryview, record: Record) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Keys and counts of the samples in an entry, and where in it their rows begin; None if it makes no sense."""
    if len(body) < _SAMPLES.size:
        return None
    (samples,) = _SAMPLES.unpack_from(body)
    counts_at = _SAMPLES.size + 16 * samples
    rows_at = counts_at + 4 * samples
    if rows_at > len(body):
        return None
    keys = np.frombuffer(body, '<i8', 2 * samples, _SAMPLES.size).reshape(samples, 2).astype(np.int64)
    counts = np.frombuffer(body, '<u4', samples, counts_at).astype(np.int64)
    rows = np.frombuffer(body, np.uint8, offset=rows_at)
    if counts.sum() * record.format.row_bytes != len(rows):
        return None
    if samples and not (keys.min() >= 0 and keys[:, 0].max() < record.samples and keys[:, 1].max() < MOST_VIEWS):
        return None
    with contextlib.suppress(RecordError):
        record.format.check(rows.reshape(-1, record.format.row_bytes))
        return keys, counts, rows_at
    return None


def _write_at(descriptor: int, content: bytes, begin: int) -> None:
    """Write all, or leave the file as it was."""
    try:
        view = memoryview(content)
        while view:
            view = view[os.pwrite(descriptor, view, begin + len(content) - len(view)) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, begin)
        raise
