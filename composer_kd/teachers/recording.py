"""A teacher whose words go into a record."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from composer.utils import dist

from composer_kd.recording import (
    Journal,
    Record,
    RecordError,
    RecordLock,
    RowFormat,
    differences,
    locked_journals,
    merge,
    remove,
)
from composer_kd.recording.manifest import read as read_manifest
from composer_kd.teachers.batches import pick
from composer_kd.teachers.rows import (
    check_number,
    known_keys,
    loader_with_keys,
    on_all_ranks,
    or_teacher_error,
    rows_per_sample,
    to_device,
)
from composer_kd.teachers.teacher import Signal, Teacher, TeacherError
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.models import ComposerModel

_FEW_CLASSES = 32
_TOP = 10
_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)

# Of the records that this process writes: a run that failed leaves them to the next one in the same process.
_locks: dict[Path, RecordLock] = {}
_journals: dict[Path, Journal] = {}


class RecordingTeacher:
    """A teacher whose words go into a record, and are taken from there where they are in it already.

    The teacher itself is asked only about samples that the record lacks. What it says is always what the record gives
    back, so that it does not matter what was there before. One job at a time writes a record; all ranks of it do.

    Args:
        teacher: The teacher, any but one that speaks from a record.
        path: The folder of its record, which is made if need be.
        top: How many of the largest logits to keep. Default: ``None``, as in the record that is there; else all logits
            of up to 32 classes, and 10 where there are more.
        dtype: ``'float16'`` or ``'float32'``. Default: ``None``, as in the record that is there; else float32 for all
            logits, and float16 for some.
        temperatures: At which the weight of the other logits is to be known, beside 1, 2, 4 and 8.

    Attributes:
        format: What the record keeps of each vector of logits; known from :meth:`check` on.

    Raises:
        ValueError: The teacher speaks from a record.
    """

    replays = True

    def __init__(
        self,
        teacher: Teacher,
        path: str | Path,
        *,
        top: int | None = None,
        dtype: str | None = None,
        temperatures: Sequence[float] = (),
    ):
        if teacher.replays:
            raise ValueError(f'teacher {teacher.name} speaks from a record already: there is no need to record it')
        self.teacher = teacher
        self.path = Path(path)
        self._options: dict[str, Any] = {'top': top, 'dtype': dtype, 'temperatures': temperatures}
        self.format: RowFormat | None = None
        self._state: State | None = None
        self._record: Record | None = None
        self._journal: Journal | None = None
        self._said: list[_Said] = []

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The teacher's."""
        return self.teacher.name

    @property
    def forwards(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The teacher's."""
        return self.teacher.forwards

    @property
    def network(self) -> Any:
        """The teacher's, if it has one."""
        return getattr(self.teacher, 'network', None)

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if the teacher cannot teach ``student``, or nothing can be recorded."""
        self.teacher.check(student)
        classes = classes_of(student)
        self.format = or_teacher_error(lambda: row_format(self.path, classes, **self._options))

    def look(self, loader: Any) -> None:
        """Raise :class:`TeacherError` if this data cannot be recorded, or not there; the teacher is not looked at."""
        if self.format is None:
            raise TeacherError(f'teacher {self.name} was to be looked at before check()')
        data = loader_with_keys(loader).identity()
        there = or_teacher_error(lambda: read_manifest(self.path))
        if there is None:
            names = (entry.name for entry in self.path.iterdir()) if self.path.is_dir() else ()
            is_other = any(not name.startswith('.') and not name.endswith('.rows') for name in names)
            if is_other or (self.path.exists() and not self.path.is_dir()):
                raise TeacherError(f'{self.path} is there, but is no record; choose another path')
            return
        parts = ('data', 'classes', 'k', 'dtype', 'temperatures')
        if found := differences(there, manifest_fields(self.format, {}, data, ''), parts):
            raise TeacherError(f'{self.path} is another record: {"; ".join(found)}; choose another path, or delete it')

    def prepare(self, state: State) -> None:
        """Get the teacher ready, and open the record, which is made if need be, on all ranks."""
        if self.format is None:
            raise TeacherError(f'teacher {self.name} was to be prepared before check()')
        self.teacher.prepare(state)
        row, loader, fields = self.format, loader_with_keys(state.dataloader), {}
        self._state = state

        def look() -> None:
            self.look(loader)
            _close_journal(self.path)

        def begin() -> None:
            fields.update(manifest_fields(row, self.manifest(), loader.identity(), state.precision.value))
            if dist.get_global_rank() == 0:
                lock_record(self.path)
                Record.create(self.path, fields)

        on_all_ranks(look)
        try:
            on_all_ranks(begin)
            self._record = _sealed(self.path, fields)
        except TeacherError:
            unlock_record(self.path)
            raise
        self._journal = _journals[self.path.resolve()] = Journal(self._record, dist.get_global_rank())
        if dist.get_global_rank() == 0 and hasattr(loader, 'seems_fixed') and loader.seems_fixed():
            warnings.warn(
                'nothing seems to be drawn at random for a sample, and yet each epoch is recorded anew: give the data '
                'set an attribute has_views=False, or composer_kd.data.data_spec views=1, if that is so',
                stacklevel=2,
            )

    @torch.no_grad()
    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> Signal:
        """What the record holds for a device microbatch, once the teacher has said what it lacked."""
        keys = known_keys(keys)
        if self._record is None or self._state is None:
            raise TeacherError(f'teacher {self.name} was asked before prepare()')
        record, device = self._record, self._state.device
        recorded, counts = or_teacher_error(lambda: record.lookup(keys.numpy()))
        missing = torch.from_numpy(np.flatnonzero(counts == 0))
        if not len(missing):
            check_number(self.path, len(recorded), batch, len(keys))
            return record.format.decode(to_device(recorded, device))
        is_whole = len(missing) == len(keys)
        part, places = (batch, None) if is_whole else pick(batch, device.tensor_to_device(missing))
        logits = one_per_row(self.teacher.signal(part, keys[missing]), self.name)
        sound = (logits < torch.inf).all() if isinstance(logits, torch.Tensor) else None
        rows = or_teacher_error(lambda: record.format.encode(logits))
        check_number(self.path, len(rows), part, len(missing))
        self._said.append(_Said(keys[missing].numpy(), rows_per_sample(part, len(missing), rows.device), rows, sound))
        if places is not None:
            check_number(self.path, len(rows) + len(recorded), batch, len(keys))
            rows = _woven(rows, places, to_device(recorded, device))
        return record.format.decode(rows)

    def flush(self) -> None:
        """Write down what the teacher has said since the last time; to be asked when the device has nothing to do."""
        said, self._said = self._said, []
        if not said:
            return
        assert self._record is not None and self._journal is not None
        parts = [x.contiguous().view(torch.uint8).flatten() for one in said for x in (one.counts, one.rows)]
        content = torch.cat(parts).cpu().numpy()
        ends = np.cumsum([len(part) for part in parts])
        fields = np.split(content, ends[:-1])
        counts = np.concatenate([field.view(np.int32) for field in fields[::2]])
        rows = np.concatenate(fields[1::2]).reshape(-1, self._record.format.row_bytes)
        keys = np.concatenate([one.keys for one in said])
        # A batch that is run again, for SAM or with smaller microbatches, is learned from as it was said last.
        is_last = np.zeros(len(keys), dtype=bool)
        is_last[len(keys) - 1 - np.unique(keys[::-1], axis=0, return_index=True)[1]] = True
        try:
            self._journal.append(keys[is_last], counts[is_last], rows[np.repeat(is_last, counts)])
        except RecordError as error:
            raise TeacherError(f'teacher {self.name} cannot be recorded: {error}') from error

    def overflowed(self) -> bool:
        """Whether, of what was said since the last flush, logits that are unsound were sound before they were rounded.

        To be asked on all ranks.
        """
        if self.format is None or self.format.dtype != 'float16':
            return False
        were_sound = True
        for one in self._said:
            recorded = self.format.decode(one.rows)
            if one.sound is not None:
                were_sound &= bool(one.sound)
            elif isinstance(recorded, TopKLogits):  # more NaN than k are in the rest, too, which is never rounded so
                were_sound &= not any(bool(tail.isnan().any()) for tail in recorded.tails.values())
        outcomes: list[Any] = dist.all_gather_object(were_sound)
        return all(outcomes)

    def seal(self) -> None:
        """Make shards of what all ranks have written down, together with them; at the end of the run, let go of it."""
        state = self._state
        if state is not None:
            self._seal(is_last=state.max_duration is None or state.timestamp >= state.max_duration)

    def release(self) -> None:
        """Take the teacher off the device for good, on all ranks; what it said is kept, and the record let go of."""
        self.teacher.release()
        if self._state is not None:
            self._seal(is_last=True)
        else:
            on_all_ranks(lambda: _close_journal(self.path))
            _seal_what_is_left(self.path)

    def manifest(self) -> dict[str, Any]:
        """The teacher's."""
        return self.teacher.manifest()

    def _seal(self, is_last: bool) -> None:
        assert self._record is not None and self._journal is not None
        record, journal = self._record, self._journal

        def close() -> None:
            self.flush()
            journal.close()
            if is_last:
                _close_journal(self.path)

        on_all_ranks(close)
        _seal_together(record)
        if is_last:
            _tell_what_is_missing(record)
            unlock_record(self.path)
            self._record = self._journal = self._state = None
        elif dist.get_world_size() > 1:
            record.refresh()


@dataclass(frozen=True)
class _Said:
    """What a teacher said about some samples: their keys, how many rows each has, and these, on the device."""

    keys: np.ndarray
    counts: torch.Tensor
    rows: torch.Tensor
    sound: torch.Tensor | None  # whether the logits were, before they were rounded; None if not known


def row_format(
    path: str | Path,
    classes: int,
    *,
    top: int | None = None,
    dtype: str | None = None,
    temperatures: Sequence[float] = (),
) -> RowFormat:
    """The format of a record. What is not given is as in the record that is there, if one is.

    Args:
        path: The folder of the record.
        classes: How many classes there are.
        top: See :class:`RecordingTeacher`.
        dtype: See :class:`RecordingTeacher`.
        temperatures: See :class:`RecordingTeacher`.

    Raises:
        RecordError: An argument is out of range, or the manifest that is there cannot be used.
    """
    there = read_manifest(Path(path)) or {}
    if top is not None and not 1 <= top <= classes:
        raise RecordError(f'{top} logits cannot be recorded of {classes} classes')
    if top is None:
        k = there.get('k', None if classes <= _FEW_CLASSES else _TOP)
    else:
        k = None if top == classes else top
    is_alike = bool(there) and there['k'] == k
    own = {*map(float, temperatures)}
    if k is None:
        wanted = set()
    else:
        wanted = {*there['temperatures']} if is_alike and own <= {*there['temperatures']} else {*_TEMPERATURES, *own}
    own_dtype: str = there['dtype'] if is_alike else 'float32' if k is None else 'float16'
    return RowFormat(classes, k, dtype or own_dtype, tuple(sorted(wanted)))


def manifest_fields(
    row_format: RowFormat, teacher: Mapping[str, Any], data: Mapping[str, Any], precision: str
) -> dict[str, Any]:
    """The manifest of a record that is to be.

    Args:
        row_format: What a row of it is.
        teacher: The manifest of the teacher.
        data: The identity of the training data.
        precision: Composer's name of the precision that the teacher is asked in.
    """
    return {
        'classes': row_format.classes,
        'k': row_format.k,
        'dtype': row_format.dtype,
        'temperatures': list(row_format.temperatures),
        'data': dict(data),
        'teacher': dict(teacher),
        'precision': precision,
    }


def classes_of(student: Any) -> int:
    """How many classes a student tells apart; raises TeacherError if it does not say so."""
    classes = getattr(student, 'num_classes', None)
    if not isinstance(classes, int):
        raise TeacherError('a record needs to know the number of classes: give the student an attribute num_classes')
    return classes


def one_per_row(logits: Signal, name: str) -> torch.Tensor | DeferredLogits:
    """Logits of which each row is to be recorded; raises TeacherError if these are not."""
    if not isinstance(logits, torch.Tensor | DeferredLogits) or len(logits.shape) != 2:
        raise TeacherError(
            f'teacher {name} gives logits of shape {list(logits.shape)}: recorded are one vector for each sample, or '
            'for each labelled position of a text'
        )
    return logits


def lock_record(path: Path) -> None:
    """Take the right to write a record, unless this process has it already.

    Raises:
        RecordError: Another job has it, or nothing can be written there.
    """
    if path.resolve() not in _locks:
        lock = RecordLock(path)
        lock.take()
        _locks[path.resolve()] = lock


def unlock_record(path: Path) -> None:
    """Let go of what :func:`lock_record` took, if it did."""
    lock = _locks.pop(path.resolve(), None)
    if lock is not None:
        lock.release()


def _close_journal(path: Path) -> None:
    """Close the journal of this rank, which a run that failed may have left open."""
    journal = _journals.pop(path.resolve(), None)
    if journal is not None:
        journal.close()


def _sealed(path: Path, fields: Mapping[str, Any]) -> Record:
    """A record that is there, to be written, once there are shards of what an earlier run has left in journals."""
    opened: list[Record] = []
    on_all_ranks(lambda: opened.append(Record.create(path, fields)))
    _seal_together(opened[0])
    return opened[0]


def _seal_together(record: Record) -> None:
    """`composer_kd.recording.seal`, of which each rank does a part."""
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    with contextlib.ExitStack() as locks:
        journals = on_all_ranks(lambda: locks.enter_context(locked_journals(record)) if rank == 0 else [])[0]
        on_all_ranks(lambda: merge(record, journals, rank, ranks))
        on_all_ranks(lambda: remove(record, journals) if rank == 0 else None)


def _seal_what_is_left(path: Path) -> None:
    """Make shards of what a run that was broken off has left in journals, unless another job is at it."""
    manifest = on_all_ranks(lambda: _lock_what_is_left(path) if dist.get_global_rank() == 0 else None)[0]
    if manifest is not None:
        try:
            _sealed(path, manifest)
        finally:
            unlock_record(path)


def _lock_what_is_left(path: Path) -> dict[str, Any] | None:
    """Take the right to write a record of which there are journals; its manifest, or None."""
    manifest = read_manifest(path)
    if manifest is None or not any(path.glob('journal-*.bin')):
        return None
    try:
        lock_record(path)
    except RecordError:  # who has it sees to the journals
        return None
    return manifest


def _tell_what_is_missing(record: Record) -> None:
    views = record.views()
    sizes = on_all_ranks(lambda: record.size(dist.get_global_rank(), dist.get_world_size()))
    missing = record.samples * len(views) - sum(stored for _, stored in sizes)
    if missing and dist.get_global_rank() == 0:
        where = '1 view' if len(views) == 1 else f'{len(views)} views'
        wanted = record.samples * len(views)
        print(f'the record {record.path} lacks {missing} of {wanted} samples in {where}: composer-kd record adds them')


def _woven(rows: torch.Tensor, places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`rows` at their places, and `others` in order at those that are left."""
    woven = rows.new_empty((len(rows) + len(others), rows.shape[1]))
    is_other = torch.ones(len(woven), dtype=torch.bool, device=rows.device)
    is_other[places] = False
    woven[places], woven[is_other] = rows, others
    return woven
