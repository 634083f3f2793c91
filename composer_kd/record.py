"""`composer-kd record`: the teachers of a recipe go over its training data once, and what they say is written down."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.algorithms import AugMix, ColOut, RandAugment
from composer.core import DataSpec, Precision, State
from composer.utils import dist, get_device, reproducibility
from torch import Tensor
from tqdm import tqdm

from composer_kd.algorithms.inputs import refuse_changed_inputs
from composer_kd.comparison import Comparison, rounding
from composer_kd.data.text_files import TextError
from composer_kd.recipes.bind import signature
from composer_kd.recipes.check import Call, Plan, TeacherRun, check, takes_teachers
from composer_kd.recipes.folder import finished_run, on_rank_zero, run_folder
from composer_kd.recipes.load import COMMAND_LINE, load
from composer_kd.recipes.report import circumstances
from composer_kd.recipes.run import assemble, start
from composer_kd.recording import Journal, Record, RecordError, RowFormat, differences, seal
from composer_kd.recording.cost import Cost
from composer_kd.recording.manifest import PARTS, shard_samples
from composer_kd.recording.manifest import read as read_manifest
from composer_kd.teachers import Teacher, TeacherError, TeacherPool
from composer_kd.teachers.batches import samples_in
from composer_kd.teachers.recorded import RecordedTeacher
from composer_kd.teachers.recording import (
    classes_of,
    lock_record,
    manifest_fields,
    one_per_row,
    row_format,
    unlock_record,
)
from composer_kd.teachers.rows import loader_with_keys, on_all_ranks, rows_per_sample
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import part

VERIFIED = 256  # samples that are looked at again

# Composer's algorithms that add a transform to the data set as a run begins.
_TRANSFORM_DATA_SETS = (AugMix, ColOut, RandAugment)

_SECONDS_BETWEEN_LINES = 30.0
_LONGEST_WAIT = 7 * 24 * 3600.0  # of one rank for another, which may have a shard more to record

Key = tuple[int, int]


def record(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    views: int | None = None,
    out: str | Path | None = None,
    top: int | None = None,
    dtype: str | None = None,
    verify: bool = False,
) -> None:
    """Record what the teachers of a recipe say about its training data, as far as it is not recorded yet.

    Teachers that are to be trained are trained first. On several ranks each has its part of the shards. A shard appears
    when it is whole: whatever breaks this off, the next time it goes on.

    Args:
        path: The recipe.
        overrides: `key.sub=value`.
        views: `train_data.views`. Default: None, as in the recipe.
        out: The folder of the record; of several teachers, that of folders `0`, `1` and so on. Default: None, the one
            that the recipe records into as it trains, or else `records/<name of the recipe>`.
        top: See `composer_kd.teachers.recording.RecordingTeacher`.
        dtype: See there.
        verify: Whether to record nothing, and to ask the teachers again about some of the samples that are recorded.

    Raises:
        RecipeError: If that cannot be done; or, with `verify`, if the teachers say something else.
    """
    plan = check(load(path, [*overrides, *([] if views is None else [f'train_data.views={views}'])]))
    distiller = _distiller(plan)
    own = {name: distiller.arguments.pop(name, None) for name in ('record', 'record_top', 'record_dtype')}
    folder = Path(out or own['record'] or Path('records', plan.recipe.path.stem))
    options = {'top': own['record_top'] if top is None else top, 'dtype': dtype or own['record_dtype']}
    of_top = (*distiller.key, 'record_top') if top is None else ('--top',)
    plan.recipe.lines['--top',] = COMMAND_LINE
    folders = [folder] if len(plan.teachers) == 1 else [folder / str(index) for index in range(len(plan.teachers))]
    plan.trainer.setdefault('dist_timeout', _LONGEST_WAIT)
    start(plan)
    try:
        if not verify:
            on_all_ranks(lambda: _lock(folders))
        fields: list[dict[str, Any]] = []

        def look(keywords: dict[str, Any]) -> None:
            if not fields:
                fields.extend(_look(plan, keywords, folders, options, of_top, writes=not verify))

        if verify:
            for folder in folders:
                Record.open(folder)
            _refuse_untrained(plan)
        keywords = assemble(plan, look)
        work = _Work.of(plan, keywords, folders, fields, writes=not verify)
        if verify:
            _verify(work)
        else:
            _record(work)
    except (TeacherError, RecordError) as error:
        raise plan.recipe.error(('teachers',), str(error), exit_code=1) from error
    except TextError as error:
        raise plan.recipe.error(('train_data',), str(error), exit_code=1) from error
    finally:
        for folder in folders:
            unlock_record(folder)


def _distiller(plan: Plan) -> Call:
    """The algorithm that the teachers are for."""
    if not plan.teachers:
        raise plan.recipe.error((), 'there is no teacher to record; add a `teachers` section')
    for teacher in plan.teachers:
        if teacher.call.target is RecordedTeacher:
            raise plan.recipe.error(teacher.call.key, 'speaks from a record already; there is nothing to record')
    return next(call for call in plan.algorithms if takes_teachers(call))


def _lock(folders: Iterable[Path]) -> None:
    if dist.get_global_rank() == 0:
        for folder in folders:
            lock_record(folder)


def _refuse_untrained(plan: Plan) -> None:
    """To compare what a teacher says, none is trained."""
    for teacher in plan.teachers:
        if (
            teacher.recipe is not None
            and on_rank_zero(lambda recipe=teacher.recipe.recipe: finished_run(recipe)) is None
        ):
            todo = 'run the same without --verify, which trains it'
            raise plan.recipe.error(teacher.call.key, f'the teacher is still to be trained: {todo}', exit_code=1)


def _look(
    plan: Plan,
    keywords: dict[str, Any],
    folders: Sequence[Path],
    options: dict[str, Any],
    of_top: tuple[object, ...],
    writes: bool,
) -> list[dict[str, Any]]:
    """See whether what was built can be recorded, before anything is trained.

    Returns:
        The manifests that the records are to have, but for their teachers.
    """
    recipe = plan.recipe
    try:
        loader = loader_with_keys(keywords['train_dataloader'].dataloader)
    except TeacherError as error:
        raise recipe.error(('train_data',), str(error)) from error
    if loader.views is None:
        what = 'makes new views of the samples in each epoch'
        todo = 'say how many to record by --views N, or by train_data.views=N (1 if nothing is drawn at random)'
        raise recipe.error(('train_data',), f'{what}; {todo}')
    asked = recipe.config['train_data'].get('views')
    if asked is not None and asked > loader.views:
        what = f'nothing is drawn at random for a sample of this data set, so one view is all there is, not {asked}'
        raise recipe.error(('train_data',), f'{what}: leave out --views and train_data.views')
    pool = _pool(keywords)
    for call, algorithm in zip(plan.algorithms, keywords['algorithms'], strict=True):
        try:
            refuse_changed_inputs([algorithm], pool.teachers[0].name)
        except ValueError as error:
            raise recipe.error(call.key, str(error)) from error
        if isinstance(algorithm, _TRANSFORM_DATA_SETS):
            what = f'{type(algorithm).__name__} adds a transform to the data set only when a run begins'
            todo = 'record as a run learns, by algorithms.knowledge_distillation.record=PATH'
            raise recipe.error(call.key, f'{what}: {todo}, or leave it out')
    try:
        classes = classes_of(keywords['model'])
    except TeacherError as error:
        raise recipe.error(('model',), str(error)) from error
    for folder in folders:
        read_manifest(folder)  # raises what is wrong with it
    temperatures = (_temperature(plan),)
    try:
        formats = [row_format(folder, classes, **options, temperatures=temperatures) for folder in folders]
    except RecordError as error:
        raise recipe.error(of_top, str(error)) from error
    precision = _state(plan, keywords['model']).precision.value
    of_shard = {'shard_samples': shard_samples(loader.samples, loader.batch_size * dist.get_world_size())}
    data = loader.identity()
    fields = [manifest_fields(row, {}, data, precision) | of_shard for row in formats]
    for folder, field in zip(folders, fields, strict=True):
        _compare(folder, field, writes, [part for part in PARTS if part != 'teacher'])
    return fields


def _compare(folder: Path, fields: dict[str, Any], writes: bool, parts: Iterable[str] = PARTS) -> None:
    """Raise RecordError if there is another record, or if there is none that could be read."""
    if writes and read_manifest(folder) is None:
        return
    if found := differences(Record.open(folder).manifest, fields, parts):
        todo = '; choose another path, or delete it' if writes else ''
        raise RecordError(f'{folder} is another record: {"; ".join(found)}{todo}')


def _pool(keywords: dict[str, Any]) -> TeacherPool:
    pools = (getattr(algorithm, 'pool', None) for algorithm in keywords['algorithms'])
    return next(pool for pool in pools if isinstance(pool, TeacherPool))


def _temperature(plan: Plan) -> float:
    """That of the run which is to learn from the record."""
    call = _distiller(plan)
    default = signature(call.target).get('temperature')
    return float(call.arguments.get('temperature', default.default if default else 1.0))


@dataclass(frozen=True)
class _Work:
    """Teachers, their records, and the data to ask them about."""

    plan: Plan
    spec: DataSpec
    teachers: Sequence[Teacher]
    records: Sequence[Record]
    state: State

    @classmethod
    def of(
        cls, plan: Plan, keywords: dict[str, Any], folders: Sequence[Path], fields: list[dict[str, Any]], writes: bool
    ) -> _Work:
        """Get the teachers ready, and open their records, which are made if they are to be written."""
        spec, teachers = keywords['train_dataloader'], _pool(keywords).teachers
        state = _state(plan, keywords['model'])
        for teacher in teachers:
            teacher.prepare(state)
        whole = [part | {'teacher': teacher.manifest()} for part, teacher in zip(fields, teachers, strict=True)]
        pairs = list(zip(folders, whole, strict=True))
        if writes:
            on_all_ranks(lambda: _make(pairs))
        records = [_opened(folder, field, writes) for folder, field in pairs]
        return cls(plan, spec, teachers, records, state)

    @property
    def loader(self) -> Any:
        """Of the training data."""
        return self.spec.dataloader

    @property
    def batch_size(self) -> int:
        """Samples that are asked about at once, as in a run on as many ranks."""
        return self.loader.batch_size

    @property
    def views(self) -> int:
        """How many there are to record."""
        return self.loader.views

    @property
    def temperature(self) -> float:
        """That of the run which is to learn from the record."""
        return _temperature(self.plan)


def _make(pairs: Iterable[tuple[Path, dict[str, Any]]]) -> None:
    if dist.get_global_rank() == 0:
        for folder, fields in pairs:
            seal(Record.create(folder, fields))


def _opened(folder: Path, fields: dict[str, Any], writes: bool) -> Record:
    if writes:
        return Record.create(folder, fields)
    _compare(folder, fields, writes)
    return Record.open(folder)


def _state(plan: Plan, model: Any) -> State:
    """As the Trainer of a run has it, as far as teachers look at it."""
    device, settings = get_device(plan.trainer.get('device')), plan.trainer
    precision = Precision(settings.get('precision') or ('amp_fp16' if device.name == 'gpu' else 'fp32'))
    if device.name == 'cpu' and precision != Precision.FP32:
        raise plan.recipe.error(('precision',), f'{precision.value} needs a GPU; on a CPU there is fp32 alone')
    if settings.get('deterministic_mode'):
        reproducibility.configure_deterministic_mode()
    return State(
        model=model,
        rank_zero_seed=settings['seed'],
        run_name='record',
        device=device,
        precision=precision,
        precision_config=settings.get('precision_config'),
    )


def _record(work: _Work) -> None:
    """Record what is missing, each rank its part, and tell what there is."""
    started = time.monotonic()
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    todo = on_all_ranks(lambda: _shards_to_do(work) if rank == 0 else [])[0]
    units = [_Unit.of(work, *place) for place in todo[rank::ranks]]
    journals = [Journal(record, rank) for record in work.records]
    costs = [Cost(record.path) for record in work.records] if rank == 0 else []
    with _Progress(sum(len(unit.ids) for unit in units), f'{work.records[0].path}') as progress:
        for unit, counts, rows in _said(work, units, progress):
            unit.write(work, journals, counts, rows)
            _charge(work, costs, started)
    for journal in journals:
        journal.close()
    samples = sum(on_all_ranks(lambda: sum(len(unit.ids) for unit in units)))
    on_all_ranks(lambda: _seal(work))
    if rank == 0:
        if samples:
            _charge(work, costs, started)
        print(_report(work, samples, time.monotonic() - started), flush=True)
        for index, cost in enumerate(costs):
            cost.close(_summary(work, index))


def _charge(work: _Work, costs: Sequence[Cost], started: float) -> None:
    """Each record is charged an equal part of the time."""
    seconds = (time.monotonic() - started) / len(work.records)
    for cost, teacher in zip(costs, work.teachers, strict=False):  # there is none but on rank 0
        cost.add(seconds, teacher.forwards)


def _summary(work: _Work, index: int) -> dict[str, Any]:
    """What there is to know about one of the records beside what it cost."""
    record, teacher, recipe = work.records[index], work.plan.teachers[index], work.plan.recipe
    run = teacher.run
    if teacher.recipe is not None and (found := finished_run(teacher.recipe.recipe)):
        run = TeacherRun.of(found, run_folder(teacher.recipe.recipe))
    return {
        'teacher_training_seconds': run.seconds if run else 0.0,
        'samples': record.samples,
        'views': work.views,
        'bytes': record.size()[0],
        **circumstances(work.state),
        'config': recipe.config,
    }


def _seal(work: _Work) -> None:
    for record in work.records:
        if dist.get_global_rank() == 0:
            seal(record)
        record.refresh()


def _shards_to_do(work: _Work) -> list[tuple[int, int]]:
    return sorted({place for record in work.records for place in record.missing(work.views)})


@dataclass(frozen=True)
class _Unit:
    """Samples of a shard that one record or another lacks.

    Args:
        view: The view.
        shard: The number of the shard.
        ids: The samples.
        lacking: Of each record, which of these samples it lacks, shape (samples,).
    """

    view: int
    shard: int
    ids: np.ndarray
    lacking: Sequence[np.ndarray]

    @classmethod
    def of(cls, work: _Work, view: int, shard: int) -> _Unit:
        """All that is to be said about a shard."""
        missing = [record.shard(view, shard)[0] == 0 for record in work.records]
        wanted = np.logical_or.reduce(missing)
        ids = np.flatnonzero(wanted) + shard * work.records[0].shard_samples
        return cls(view, shard, ids, [lacks[wanted] for lacks in missing])

    def batches(self, size: int) -> Iterator[list[Key]]:
        """Its samples in batches of one size; the last one is filled up by repetition."""
        keys = [(sample, self.view) for sample in self.ids.tolist()]
        for begin in range(0, len(keys), size):
            yield _filled_up(keys[begin : begin + size], size)

    def write(self, work: _Work, journals: Sequence[Journal], counts: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Write down what was said: as a shard, or where there is a part of it already, as more of that.

        Args:
            work: Where to.
            journals: One for each record.
            counts: How many rows each sample has, shape (samples,).
            rows: For each record, those rows.
        """
        keys = np.stack([self.ids, np.full_like(self.ids, self.view)], 1)
        for index, (record, lacks) in enumerate(zip(work.records, self.lacking, strict=True)):
            own = counts[lacks], rows[index][np.repeat(lacks, counts)]
            try:
                if lacks.sum() == len(record.shard(self.view, self.shard)[0]):
                    record.write(self.view, self.shard, *own)
                elif lacks.any():
                    journals[index].append(keys[lacks], *own)
            except RecordError as error:
                where = f'samples {self.ids[0]} to {self.ids[-1]} in view {self.view}'
                raise TeacherError(f'teacher {work.teachers[index].name}, {where}: {error}') from error


def _said(
    work: _Work, units: Sequence[_Unit], progress: _Progress
) -> Iterator[tuple[_Unit, np.ndarray, list[np.ndarray]]]:
    """What the teachers say: each unit, how many rows each of its samples has, and for each teacher these rows."""
    batches = work.loader.batches(batch for unit in units for batch in unit.batches(work.batch_size))
    for unit in units:
        counts: list[Tensor] = []
        rows: list[list[Tensor]] = [[] for _ in work.teachers]
        for begin in range(0, len(unit.ids), work.batch_size):
            batch, keys = next(batches)
            samples = min(work.batch_size, len(unit.ids) - begin)
            for number, signals in _answers(work, batch, keys, samples):
                counts.append(number)
                wanted = int(number.sum())
                for index, (record, logits) in enumerate(zip(work.records, signals, strict=True)):
                    # On their way to the host while the device goes on.
                    rows[index].append(record.format.encode(logits)[:wanted].to('cpu', non_blocking=True))
            progress.add(samples)
        if work.state.device.name == 'gpu':
            torch.cuda.current_stream().synchronize()
        yield unit, torch.cat(counts).numpy(), [torch.cat(own).numpy() for own in rows]
    next(batches, None)  # lets its workers go


def _answers(work: _Work, batch: Any, keys: Tensor, samples: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """What the teachers say about the first samples of a batch, prepared as the Trainer does it.

    Returns:
        For each microbatch how many rows each of its samples has, on the host, and the logits of each teacher.
    """
    spec, begin = work.spec, 0
    size = work.plan.trainer.get('device_train_microbatch_size')
    batch = spec.batch_transforms(batch)
    for microbatch in spec.split_batch(batch, min(size, len(keys)) if isinstance(size, int) else len(keys)):
        number = samples_in(microbatch)
        counts = rows_per_sample(microbatch, number, torch.device('cpu'))
        microbatch = spec.microbatch_transforms(work.state.device.batch_to_device(microbatch))
        signals = []
        for teacher in work.teachers:
            logits = one_per_row(teacher.signal(microbatch, keys[begin : begin + number]), teacher.name)
            if logits.shape[0] != counts.sum():
                raise TeacherError(
                    f'teacher {teacher.name} gives {logits.shape[0]} vectors of logits for a batch that has '
                    f'{counts.sum()} samples, or labelled positions'
                )
            signals.append(logits)
        yield counts[: samples - begin], signals
        begin += number
        if begin >= samples:
            return


def _report(work: _Work, samples: int, seconds: float) -> str:
    """What a person is to know at the end."""
    lines = []
    for teacher, record in zip(work.teachers, work.records, strict=True):
        size, stored = record.size()
        lines.append(
            f'{record.path}: what {teacher.name} says about {record.samples:,} samples in '
            f'{work.views} {"view" if work.views == 1 else "views"}, {_described(record.format)}'
        )
        lines.append(f'  {size / 2**20:,.1f} MiB, {size / stored:,.1f} bytes for each sample and view')
        if record.format.k is not None:
            mass = _mean_mass_of_rest(record, work.views, work.temperature)
            lines.append(f'  the other classes weigh {mass:.2%} on average at temperature {work.temperature:g}')
    rate = f' in {seconds:,.1f} s, {samples / seconds:,.0f} a second' if samples else ', all were there already'
    paths = work.records[0].path if len(work.records) == 1 else work.records[0].path.parent / '*'
    lines.append(f'recorded {samples:,} samples{rate}; to learn from it without a network:')
    lines.append(f"  teachers: [{{name: recorded, path: '{paths}'}}]")
    if 'views' in work.plan.recipe.config['train_data']:
        lines.append(f'  train_data.views: {work.views}')
    return '\n'.join(lines)


def _described(row: RowFormat) -> str:
    if row.k is None:
        return f'all {row.classes:,} logits, {row.dtype}'
    return f'the {row.k} largest of {row.classes:,} logits, {row.dtype}'


def _mean_mass_of_rest(record: Record, views: int, temperature: float) -> float:
    rows, _ = record.lookup(np.array(_some_keys(record.samples, views)))
    said = record.format.decode(torch.from_numpy(rows))
    assert isinstance(said, TopKLogits)
    return said.tail_mass(temperature).mean().item()


def _some_keys(samples: int, views: int) -> list[Key]:
    """Some samples in some views, always the same ones."""
    total = samples * views
    drawn = np.random.default_rng(0).choice(total, min(VERIFIED, total), replace=False)
    return [(int(number) % samples, int(number) // samples) for number in np.sort(drawn)]


def _verify(work: _Work) -> None:
    """Ask the teachers again about some samples, each rank about its part, and compare."""
    for record in work.records:
        if missing := record.missing(work.views):
            todo = 'run the same without --verify, which'
            if damaged := record.damaged():
                others = f', and {len(damaged) - 1} more' if damaged[1:] else ''
                raise RecordError(f'{damaged[0]} is damaged{others}: {todo} rewrites {"them" if others else "it"}')
            shards = '1 shard' if len(missing) == 1 else f'{len(missing)} shards'
            raise RecordError(f'{record.path} lacks samples in {shards}: {todo} adds them')
    keys = _some_keys(work.records[0].samples, work.views)
    own = keys[dist.get_global_rank() :: dist.get_world_size()]
    comparisons = [Comparison() for _ in work.records]
    asked = [own[begin : begin + work.batch_size] for begin in range(0, len(own), work.batch_size)]
    batches = work.loader.batches(_filled_up(batch, work.batch_size) for batch in asked)
    for some, (batch, batch_keys) in zip(asked, batches, strict=True):
        for counts, signals in _answers(work, batch, batch_keys, len(some)):
            now, some = np.array(some[: len(counts)]), some[len(counts) :]
            for comparison, record, logits in zip(comparisons, work.records, signals, strict=True):
                comparison.add(record, now, counts.numpy(), part(logits, slice(int(counts.sum()))))
    everywhere = zip(*on_all_ranks(lambda: comparisons), strict=True)
    lines, agree = [], True
    for record, parts in zip(work.records, everywhere, strict=True):
        found = Comparison.of(parts)
        explained = rounding(record.format.dtype, work.state.precision, work.state.device.name == 'gpu')
        lines.append(found.line(record, explained))
        agree &= found.agrees(explained)
    if not agree:
        raise RecordError('; '.join(lines))
    if dist.get_global_rank() == 0:
        print('\n'.join(lines), flush=True)


def _filled_up(keys: list[Key], size: int) -> list[Key]:
    """A batch of this size: the keys, and then the same ones again."""
    return list(itertools.islice(itertools.cycle(keys), size))


class _Progress:
    """A bar on a terminal, else a line now and then; of rank 0, for all ranks.

    Args:
        samples: How many this rank is to do.
        what: What is recorded.
    """

    def __init__(self, samples: int, what: str):
        self._samples, self._what, self._done = samples, what, 0
        self._is_first = dist.get_global_rank() == 0
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        is_shown = self._is_first and sys.stderr.isatty() and samples > 0
        self._bar = tqdm(total=samples, desc=what, unit=' samples') if is_shown else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, samples: int) -> None:
        """Count samples that are done."""
        self._done += samples
        if self._bar is not None:
            self._bar.update(samples)
        elif self._is_first and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f'{self._what}: {self._done / self._samples:.0%} recorded', flush=True)
