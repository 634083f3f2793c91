"""A teacher that speaks from a record."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from composer.utils import dist

from composer_kd.recording import Record, differences
from composer_kd.recording.shards import Verified
from composer_kd.teachers.rows import (
    check_number,
    known_keys,
    loader_with_keys,
    on_all_ranks,
    or_teacher_error,
    to_device,
)
from composer_kd.teachers.schedule import Schedule, surely_asks
from composer_kd.teachers.teacher import Signal, TeacherError

if TYPE_CHECKING:
    from composer.core import Batch, State
    from composer.devices import Device
    from composer.models import ComposerModel


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
        self._record: Record | None = or_teacher_error(lambda: Record.open(path))
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

        Each rank looks through a part of it, and the others need not do so again.
        """
        loader = loader_with_keys(state.dataloader)
        self._device = state.device

        def look() -> tuple[list[_Gap], Verified]:
            self.look(loader)
            return self._gaps(self._views_asked_for(state, loader)), self._live_record().verified

        gaps = []
        for found, verified in on_all_ranks(look):
            gaps += found
            self._live_record().verified.update(verified)
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
        record, keys = self._live_record(), known_keys(keys)
        if self._device is None:
            raise TeacherError(f'teacher {self.name} was asked before prepare()')
        rows, counts = or_teacher_error(lambda: record.lookup(keys.numpy()))
        if not counts.all():
            sample, view = keys[int(np.flatnonzero(counts == 0)[0])].tolist()
            raise TeacherError(
                f'the record {self.path} lacks sample {sample} in view {view}: composer-kd record adds it'
            )
        check_number(self.path, len(rows), batch, len(keys))
        return self.format.decode(to_device(rows, self._device))

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
