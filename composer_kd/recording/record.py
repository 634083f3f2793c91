"""A record: a folder with what one teacher says about the samples of a data set."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from composer_kd.recording import manifest as manifests
from composer_kd.recording.errors import DamagedShard, RecordError
from composer_kd.recording.shards import Place, Verified, read_shard, write_shard

_SHARD = re.compile(r'view(\d+)-shard(\d+)\.rows')
MOST_VIEWS = 2**31


class Record:
    """What one teacher says about the samples of a data set, in any number of views.

    Made by :meth:`open` to read, and by :meth:`create` to write as well. Samples that are not there are missing; to
    who writes, so are those of a damaged shard, while to who only reads that is an error.

    Attributes:
        path: The folder.
        manifest: What it is of.
        format: What a row is.
        samples: Length of the data set.
        shard_samples: How many samples a shard is of; the last one may be of less.
        shards: How many shards a view has.
        verified: Shards that were found to be whole; those that another process has looked through may be added.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], writes: bool):
        self.path = path
        self.manifest = manifest
        self.format = manifests.row_format(manifest)
        self.samples: int = manifest['data']['samples']
        self.shard_samples: int = manifest['shard_samples']
        self.shards = -(-self.samples // self.shard_samples)
        self._writes = writes
        self._views: dict[int, _View] = {}
        self._stored: dict[tuple[int, int], int | None] = {}  # samples in shards that were looked at; None if damaged
        self.verified: Verified = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """A record that is there, to read.

        Raises:
            RecordError: There is none, or its manifest cannot be used.
        """
        manifest = manifests.read(Path(path))
        if manifest is None:
            raise RecordError(f'{path}: there is no record; composer-kd record makes one')
        return cls(Path(path), manifest, writes=False)

    @classmethod
    def create(cls, path: str | Path, fields: Mapping[str, Any]) -> Self:
        """A record to write, a new one or one that is there: for who has its lock, and then for the ranks of that job.

        Args:
            path: The folder.
            fields: The manifest: `classes`, `k`, `dtype`, `temperatures`, `data`, `teacher`, `precision`, and if need
                be `shard_samples`.

        Raises:
            RecordError: It is another one, its manifest cannot be used, or nothing can be written there.
        """
        path = Path(path)
        manifest = manifests.read(path)
        if manifest is None:
            manifest = manifests.complete(fields)
            try:
                if path.is_dir() and any(not _is_of_a_record(entry.name) for entry in path.iterdir()):
                    raise RecordError(f'{path} is there, but is no record; choose another path')
                manifests.save(path, manifest)
            except OSError as error:
                raise cannot_write(path, error) from error
        elif found := manifests.differences(manifest, fields):
            raise RecordError(f'{path} is another record: {"; ".join(found)}; choose another path, or delete it')
        return cls(path, manifest, writes=True)

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is recorded of some samples.

        Args:
            keys: Sample ids and views, integers, shape (B, 2).

        Returns:
            The rows, uint8, shape (M, row_bytes), in the order of the samples, and how many of them each sample has,
            int64, shape (B,): 0 if it is missing.

        Raises:
            RecordError: There is no such sample, a shard cannot be read, or, to who only reads, it is damaged.
        """
        ids, views = keys[:, 0], keys[:, 1]
        if len(ids) and (ids.min() < 0 or ids.max() >= self.samples or views.min() < 0):
            raise RecordError(f'{self.path} is of {self.samples} samples; asked for was one that is not among them')
        shards = ids // self.shard_samples
        begins, counts = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        for view in self._in_use(np.unique(views).tolist()):
            here = np.flatnonzero(views == view)
            view_begins, view_counts = self._views[view].of(ids[here], shards[here])
            begins[here], counts[here] = view_begins, view_counts
        places = np.repeat(views * self.shards + shards, counts)
        return self._gathered(places, ranges(begins, counts)), counts

    def shard(self, view: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """How many rows each sample of a shard has, int64, shape (samples of the shard,), and those rows, read-only.

        Raises:
            RecordError: It cannot be read, or, to who only reads, it is damaged.
        """
        try:
            found = self._read(view, shard)
        except DamagedShard:
            if not self._writes:
                raise
            found = None
        if found is None:
            samples = self._place(view, shard).samples
            return np.zeros(samples, dtype=np.int64), np.empty((0, self.format.row_bytes), dtype=np.uint8)
        ends, rows = found
        return np.diff(ends.astype(np.int64), prepend=0), rows

    def has(self, view: int, shard: int) -> bool:
        """Whether a shard is there and undamaged, which is found out once."""
        return self._stored_in(view, shard) is not None

    def missing(self, views: int) -> list[tuple[int, int]]:
        """View and number of the shards of the first `views` views in which samples are missing."""
        return [
            (view, shard)
            for view in range(views)
            for shard in range(self.shards)
            if (self._stored_in(view, shard) or 0) < self._place(view, shard).samples
        ]

    def damaged(self) -> list[Path]:
        """The shards that are damaged."""
        return [self._path_of(*place) for place in self._places() if not self.has(*place)]

    def views(self) -> list[int]:
        """The views of which there are shards."""
        return sorted({view for view, _ in self._places()})

    def rank_of(self, view: int, shard: int, ranks: int) -> int:
        """Which of several ranks sees to a shard, where they share the work."""
        return (view * self.shards + shard) % ranks

    def size(self, rank: int = 0, ranks: int = 1) -> tuple[int, int]:
        """Bytes on the disk, and how many samples are stored, each view of one counted.

        Args:
            rank: Which of the ranks this is. Default: 0.
            ranks: How many share the work, so that the answer is about the shards of this one alone. Default: 1.
        """
        places = [place for place in self._places() if self.rank_of(*place, ranks) == rank]
        total = sum(self._path_of(*place).stat().st_size for place in places)
        return total, sum(self._stored_in(*place) or 0 for place in places)

    def write(self, view: int, shard: int, counts: np.ndarray, rows: np.ndarray) -> None:
        """Write a shard, whole, in place of what is there.

        Args:
            view: The view.
            shard: Its number.
            counts: How many rows each of its samples has, integers, shape (samples of the shard,); 0 if it is missing.
            rows: Those rows, in the order of the samples, uint8, shape (M, row_bytes).

        Raises:
            RecordError: A row cannot teach, or the disk is full.
        """
        self.format.check(rows)
        try:
            write_shard(self._path_of(view, shard), self._place(view, shard), counts, rows)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._views.pop(view, None)
        self._stored[view, shard] = int(np.count_nonzero(counts))

    def refresh(self) -> None:
        """Look at the files anew, because another process may have written some; those that are as they were, are."""
        self._views.clear()
        self._stored.clear()

    def _gathered(self, places: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """Rows of shards that are mapped, given by `view * shards + shard` and their number there."""
        order = np.argsort(places, kind='stable')
        places, lines = places[order], lines[order]
        by_shard = np.empty((len(order), self.format.row_bytes), dtype=np.uint8)
        edges = [0, *(np.flatnonzero(places[1:] != places[:-1]) + 1).tolist(), len(order)]
        for begin, end in itertools.pairwise(edges) if len(order) else ():
            view, shard = divmod(int(places[begin]), self.shards)
            # Within bounds, as was seen when the shard was opened; other modes copy once more.
            self._views[view].rows[shard].take(lines[begin:end], axis=0, out=by_shard[begin:end], mode='clip')
        rows = np.empty_like(by_shard)
        rows[order] = by_shard
        return rows

    def _in_use(self, views: list[int]) -> list[int]:
        """Views whose shards are to be mapped now, and no others."""
        self._views = {view: self._views.get(view) or _View(self, view) for view in views}
        return views

    def _places(self) -> list[tuple[int, int]]:
        """View and number of the shards that there are."""
        names = {path.name for path in self.path.iterdir()}
        matches = (_SHARD.fullmatch(name) for name in names)
        found = sorted((int(match[1]), int(match[2])) for match in matches if match)
        return [(view, shard) for view, shard in found if self._path_of(view, shard).name in names]

    def _path_of(self, view: int, shard: int) -> Path:
        return self.path / f'view{view:05d}-shard{shard:05d}.rows'

    def _place(self, view: int, shard: int) -> Place:
        samples = min(self.shard_samples, self.samples - shard * self.shard_samples)
        return Place(manifests.identity(self.manifest), view, shard, samples)

    def _read(self, view: int, shard: int) -> tuple[np.ndarray, np.ndarray] | None:
        return read_shard(self._path_of(view, shard), self._place(view, shard), self.format, self.verified)

    def _stored_in(self, view: int, shard: int) -> int | None:
        """How many samples of a shard are stored; None if it is not there, or damaged."""
        if (view, shard) not in self._stored:
            try:
                found = self._read(view, shard)
            except DamagedShard:
                found = None
            stored = None if found is None else int(np.count_nonzero(np.diff(found[0], prepend=np.uint32(0))))
            self._stored[view, shard] = stored
        return self._stored[view, shard]


class _View:
    """One view of a record: its shards, each mapped when it is first asked for."""

    def __init__(self, record: Record, view: int):
        self._record, self._view = record, view
        self._is_open = np.zeros(record.shards, dtype=bool)
        self._begins = np.zeros(record.samples, dtype=np.uint32)
        self._counts = np.zeros(record.samples, dtype=np.uint32)
        self.rows: dict[int, np.ndarray] = {}

    def of(self, ids: np.ndarray, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample the number of its first row in its shard, and how many it has."""
        closed = shards[~self._is_open[shards]]
        for shard in np.unique(closed).tolist() if len(closed) else ():
            counts, self.rows[shard] = self._record.shard(self._view, shard)
            begin = shard * self._record.shard_samples
            part = slice(begin, begin + len(counts))
            self._counts[part], self._begins[part] = counts, counts.cumsum() - counts
            self._is_open[shard] = True
        return self._begins[ids], self._counts[ids]


def ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts[i]` numbers from `begins[i]` on, one range after another."""
    ends = counts.cumsum()
    return np.repeat(begins - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def cannot_write(folder: Path, error: OSError) -> RecordError:
    """What a person is told when the disk is full, or the folder may not be written."""
    return RecordError(f'cannot write the record {folder}: {error.strerror}; what is recorded already is kept')


def _is_of_a_record(name: str) -> bool:
    return name.startswith('.') or bool(_SHARD.fullmatch(name))
