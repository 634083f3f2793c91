"""Teachers that speak from a record, and teachers whose words go into one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from composer.utils import dist

from composer_kd.recording import Journal, Record, RecordError, RecordLock, RowFormat, differences, seal
from composer_kd.recording.manifest import read as read_manifest
from composer_kd.teachers.batches import pick
from composer_kd.teachers.schedule import Schedule, surely_asks
from composer_kd.teachers.teacher import Signal, Teacher, TeacherError
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.devices import Device
    from composer.models import ComposerModel

_FEW_CLASSES = 32
_TOP = 10
_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)

_Found = TypeVar('_Found')

# Of the records that this process writes: a run that failed leaves them to the next one in the same process.
_locks: dict[Path, RecordLock] = {}
_journals: dict[Path, Journal] = {}


class _Gap(NamedTuple):
    """A shard that lacks samples: how many, and whether all."""

    view: int
    shard: int
    missing: int
    is_whole: bool


class RecordedTeacher:
    """A teacher that is not there: it says what a record holds of the very samples and views of a batch.

    Nothing may change the inputs between the loader and the student, as MixUp does.

    Args:
        path: The folder of the record, as ``composer-kd record`` or ``KnowledgeDistillation(record=...)`` made it.
        name: What errors call it. Default: its path.

    Attributes:
        format: What the record keeps of each vector of logits.
        schedule: When the run asks, as far as that is known; set by :class:`.KnowledgeDistillation`.

    Raises:
        TeacherError: There is no record, or its manifest cannot be used.
    """

    forwards = 0
    replays = True

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or str(path)
        self._record: Record | None = _or_teacher_error(lambda: Record.open(path))
        self.format = self._record.format
        self._manifest = {'name': self.name, 'source': str(path), 'sha256': self._record.manifest['checksum']}
        self._device: Device | None = None
        self.schedule = Schedule()

    def check(self, student: ComposerModel) -> None:
        """Raise :class:`TeacherError` if the record is of another number of classes than ``student`` has."""
        has, wants = self.format.classes, getattr(student, 'num_classes', None)
        if isinstance(wants, int) and has != wants:
            raise TeacherError(f'the record {self.path} has {has} classes, the student {wants}: they must be the same')

    def look(self, loader: Any) -> None:
        """Raise :class:`TeacherError` if the record is of other data than ``loader`` gives."""
        found = differences(self._live_record().manifest, {'data': loader_with_keys(loader).identity()}, ['data'])
        if found:
            raise TeacherError(f'the record {self.path} is of other training data: {"; ".join(found)}')

    def prepare(self, state: State) -> None:
        """See whether the record is of this run's training data, and has all that the run is sure to ask for.

        All ranks look at a part of it each.
        """
        loader = loader_with_keys(state.dataloader)
        self._device = state.device

        def look() -> list[_Gap]:
            self.look(loader)
            return self._gaps(self._views_asked_for(state, loader))

        gaps = [gap for found in on_all_ranks(look) for gap in found]
        asked = self._views_asked_for(state, loader)
        self._check_gaps(gaps, asked, getattr(loader.sampler, 'shuffle', True))
        recorded = self._live_record().views()
        lacking = [view for view in asked if view not in recorded]
        parts = [f'samples in {len(gaps)} of its shards'] if gaps else []
        parts += [f'all of {len(lacking)} {"view" if len(lacking) == 1 else "views"}'] if lacking else []
        if parts and dist.get_global_rank() == 0:
            warnings.warn(
                f'the record {self.path} lacks {" and ".join(parts)}, and a run that asks for one of them ends there: '
                'composer-kd record adds them',
                stacklevel=2,
            )

    @torch.no_grad()
    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> Signal:
        """What the record holds for a device microbatch, of which only the shape is looked at."""
        record, keys = self._live_record(), _known(keys)
        if self._device is None:
            raise TeacherError(f'teacher {self.name} was asked before prepare()')
        rows, counts = _or_teacher_error(lambda: record.lookup(keys.numpy()))
        if not counts.all():
            sample, view = keys[int(np.flatnonzero(counts == 0)[0])].tolist()
            raise TeacherError(
                f'the record {self.path} lacks sample {sample} in view {view}: composer-kd record adds it'
            )
        _check_number(self.path, len(rows), batch, len(keys))
        return self.format.decode(_to_device(rows, self._device))

    def release(self) -> None:
        """Close the record."""
        self._record = None

    def manifest(self) -> dict[str, Any]:
        """Name, source, and a SHA-256 over what the record is of: its teacher, its data and its format."""
        return dict(self._manifest)

    def _live_record(self) -> Record:
        if self._record is None:
            raise TeacherError(
                f'teacher {self.name} was released when distillation stopped; make a new one to distill again'
            )
        return self._record

    def _views_asked_for(self, state: State, loader: Any) -> dict[int, list[int]]:
        """As of :meth:`.Schedule.asked`; raises TeacherError if the record has too few views."""
        recorded = self._live_record().views()
        has = next(view for view in itertools.count() if view not in recorded)
        what = f'the record {self.path} has {has} {"view" if has == 1 else "views"}'
        asked = self.schedule.asked(state, loader)
        if asked is None and loader.views is not None:
            asked = {view: [] for view in range(loader.views)}
        if not recorded:
            raise TeacherError(f'{what} of the training data: run composer-kd record, which adds them')
        if asked is not None:
            lacking = [view for view in asked if view not in recorded]
            if not any(any(asked[view]) for view in lacking) and (not asked or len(lacking) < len(asked)):
                return asked
            if not has:
                lacks = f'the record {self.path} lacks view {lacking[0]} of the training data'
                raise TeacherError(f'{lacks}: run composer-kd record, which adds it')
        if loader.views is None:
            raise TeacherError(f'{what}, this run makes new ones each epoch: set train_data.views={has}')
        todo = f'set train_data.views={has}, or run composer-kd record --views {loader.views}, which adds them'
        raise TeacherError(f'{what}, this run asks for {len(asked or ())}: {todo}')

    def _gaps(self, views: Iterable[int]) -> list[_Gap]:
        """Of this rank's part of the shards of those views that the record has, those that lack samples."""
        record = self._live_record()
        recorded = record.views()
        places = [(view, shard) for view in views if view in recorded for shard in range(record.shards)]
        gaps = []
        for view, shard in places[dist.get_global_rank() :: dist.get_world_size()]:
            counts, _ = record.shard(view, shard)
            if not counts.all():
                gaps.append(_Gap(view, shard, int((counts == 0).sum()), not counts.any()))
        return gaps

    def _check_gaps(self, gaps: Sequence[_Gap], asked: Mapping[int, Sequence[int]], shuffles: bool) -> None:
        """Raise TeacherError if the run is sure to ask for a sample that is missing."""
        samples = self._live_record().samples
        for view, numbers in asked.items():
            missing = sum(gap.missing for gap in gaps if gap.view == view)
            if not surely_asks(samples, missing, numbers if shuffles else numbers[:1]):
                continue
            absent = [gap for gap in gaps if gap.is_whole]
            if any(gap.view == view for gap in absent):
                first = min((gap.view, gap.shard) for gap in absent)
                raise TeacherError(
                    f'the record {self.path} lacks {len(absent)} of its shards, the first of them shard {first[1]} of '
                    f'view {first[0]}: run composer-kd record again, which adds them'
                )
            raise TeacherError(
                f'the record {self.path} lacks {missing} of {samples} samples in view {view}, and this run is to ask '
                'for some of them: run composer-kd record, which adds them'
            )


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
        self.format = _or_teacher_error(lambda: row_format(self.path, classes, **self._options))

    def look(self, loader: Any) -> None:
        """Raise :class:`TeacherError` if this data cannot be recorded, or not there; the teacher is not looked at."""
        if self.format is None:
            raise TeacherError(f'teacher {self.name} was to be looked at before check()')
        data = loader_with_keys(loader).identity()
        there = _or_teacher_error(lambda: read_manifest(self.path))
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
                try:
                    seal(Record.create(self.path, fields))
                except RecordError:
                    unlock_record(self.path)
                    raise

        def follow() -> None:
            self._record = Record.create(self.path, fields)
            self._journal = _journals[self.path.absolute()] = Journal(self._record, dist.get_global_rank())

        on_all_ranks(look)
        on_all_ranks(begin)
        on_all_ranks(follow)

    @torch.no_grad()
    def signal(self, batch: Batch, keys: torch.Tensor | None = None) -> Signal:
        """What the record holds for a device microbatch, once the teacher has said what it lacked."""
        keys = _known(keys)
        if self._record is None or self._state is None:
            raise TeacherError(f'teacher {self.name} was asked before prepare()')
        record, device = self._record, self._state.device
        recorded, counts = _or_teacher_error(lambda: record.lookup(keys.numpy()))
        missing = torch.from_numpy(np.flatnonzero(counts == 0))
        if not len(missing):
            _check_number(self.path, len(recorded), batch, len(keys))
            return record.format.decode(_to_device(recorded, device))
        is_whole = len(missing) == len(keys)
        part, places = (batch, None) if is_whole else pick(batch, device.tensor_to_device(missing))
        logits = one_per_row(self.teacher.signal(part, keys[missing]), self.name)
        sound = (logits < torch.inf).all() if isinstance(logits, torch.Tensor) else None
        rows = _or_teacher_error(lambda: record.format.encode(logits))
        _check_number(self.path, len(rows), part, len(missing))
        self._said.append(_Said(keys[missing].numpy(), rows_per_sample(part, len(missing), rows.device), rows, sound))
        if places is not None:
            _check_number(self.path, len(rows) + len(recorded), batch, len(keys))
            rows = _woven(rows, places, _to_device(recorded, device))
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
            on_all_ranks(lambda: _seal_what_is_left(self.path))

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

        def make_shards() -> None:
            if dist.get_global_rank() == 0:
                seal(record)
                if is_last:
                    _tell_what_is_missing(record)

        on_all_ranks(close)
        on_all_ranks(make_shards)
        if is_last:
            unlock_record(self.path)
            self._record = self._journal = self._state = None
        elif dist.get_global_rank() != 0:  # which knows what it wrote
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


def loader_with_keys(loader: Any) -> Any:
    """The loader, if it knows which samples are in a batch; raises TeacherError otherwise."""
    if not all(hasattr(loader, name) for name in ('keys', 'views', 'identity')):
        raise TeacherError(
            'the training data does not say which samples are in a batch, which a record needs to know: streams never '
            'do; other data does if composer_kd.data.data_spec deals it out'
        )
    return loader


def one_per_row(logits: Signal, name: str) -> torch.Tensor | DeferredLogits:
    """Logits of which each row is to be recorded; raises TeacherError if these are not."""
    if not isinstance(logits, torch.Tensor | DeferredLogits) or len(logits.shape) != 2:
        raise TeacherError(
            f'teacher {name} gives logits of shape {list(logits.shape)}: recorded are one vector for each sample, or '
            'for each labelled position of a text'
        )
    return logits


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


def lock_record(path: Path) -> None:
    """Take the right to write a record, unless this process has it already.

    Raises:
        RecordError: Another job has it, or nothing can be written there.
    """
    if path.absolute() not in _locks:
        lock = RecordLock(path)
        lock.take()
        _locks[path.absolute()] = lock


def unlock_record(path: Path) -> None:
    """Let go of what :func:`lock_record` took, if it did."""
    lock = _locks.pop(path.absolute(), None)
    if lock is not None:
        lock.release()


def _close_journal(path: Path) -> None:
    """Close the journal of this rank, which a run that failed may have left open."""
    journal = _journals.pop(path.absolute(), None)
    if journal is not None:
        journal.close()


def _seal_what_is_left(path: Path) -> None:
    """Make shards of what a run that was broken off has left in journals, unless another job is at it; on rank 0."""
    manifest = read_manifest(path) if dist.get_global_rank() == 0 else None
    if manifest is None or not any(path.glob('journal-*.bin')):
        return
    try:
        lock_record(path)
    except RecordError:  # who has it sees to the journals
        return
    try:
        seal(Record.create(path, manifest))
    finally:
        unlock_record(path)


def _tell_what_is_missing(record: Record) -> None:
    views = record.views()
    missing = record.samples * len(views) - record.size()[1]
    if missing:
        where = '1 view' if len(views) == 1 else f'{len(views)} views'
        wanted = record.samples * len(views)
        print(f'the record {record.path} lacks {missing} of {wanted} samples in {where}: composer-kd record adds them')


def _or_teacher_error(work: Callable[[], _Found]) -> _Found:
    try:
        return work()
    except RecordError as error:
        raise TeacherError(str(error)) from error


def _known(keys: torch.Tensor | None) -> torch.Tensor:
    if keys is None:
        raise TeacherError('the training data does not say which samples are in a batch, which a record needs to know')
    return keys


def _to_device(rows: np.ndarray, device: Device) -> torch.Tensor:
    """One copy, which the host does not wait for."""
    tensor = torch.from_numpy(rows)
    return device.tensor_to_device(tensor.pin_memory() if device.name == 'gpu' else tensor)


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


def rows_per_sample(batch: Batch, samples: int, device: torch.device) -> torch.Tensor:
    """How many rows each of a batch's samples has, int32, on the device, which is not waited for."""
    positions = _positions(batch)
    if positions is None:
        return torch.ones(samples, dtype=torch.int32, device=device)
    assert isinstance(batch, Mapping)
    counts = torch.zeros(samples, dtype=torch.int32, device=device)
    return counts.index_add_(0, positions // batch['input_ids'].shape[1], torch.ones_like(positions, dtype=torch.int32))


def _woven(rows: torch.Tensor, places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`rows` at their places, and `others` in order at those that are left."""
    woven = rows.new_empty((len(rows) + len(others), rows.shape[1]))
    is_other = torch.ones(len(woven), dtype=torch.bool, device=rows.device)
    is_other[places] = False
    woven[places], woven[is_other] = rows, others
    return woven


def _check_number(path: Path, rows: int, batch: Batch, samples: int) -> None:
    """See whether there are as many rows as there should be; never waits for the device."""
    positions = _positions(batch)
    wanted = samples if positions is None else len(positions)
    if rows != wanted:
        where = 'samples' if positions is None else 'labelled positions'
        raise TeacherError(f'for a batch with {wanted} {where} the record {path} has {rows}: it is of other masks')
