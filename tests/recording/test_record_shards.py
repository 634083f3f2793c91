"""What is written to a record against what is read."""

import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_parts import SAMPLES, count_of, create, entries_of, every, found, rows_of, write_shard

from composer_kd.files import unfinished
from composer_kd.recording import Record, RecordError, RecordLock


@pytest.fixture
def record(tmp_path):
    """Ten samples in shards of four; view 0 is whole, view 2 lacks samples 5 and 6, and its third shard."""
    record = create(tmp_path / 'record')
    for shard in range(3):
        write_shard(record, 0, shard)
    write_shard(record, 2, 0)
    write_shard(record, 2, 1, {4, 7})
    return record


HAS = [*every(1), *((sample, 2) for sample in (0, 1, 2, 3, 4, 7))]


@settings(deadline=None, max_examples=60)
@given(keys=st.lists(st.tuples(st.integers(0, SAMPLES - 1), st.integers(0, 3)), max_size=12))
def test_lookup_against_a_dict(tmp_path_factory, keys):
    path = tmp_path_factory.getbasetemp() / 'dict' / 'record'
    if not path.exists():
        record = create(path)
        for shard in range(3):
            write_shard(record, 0, shard)
        write_shard(record, 2, 0)
        write_shard(record, 2, 1, {4, 7})
    record = Record.open(path)
    rows, counts = record.lookup(np.array(keys, dtype=np.int64).reshape(-1, 2))
    assert (rows.dtype, rows.shape, rows.flags.c_contiguous) == (np.uint8, (counts.sum(), 20), True)
    assert (counts.dtype, counts.tolist()) == (np.int64, [count_of(*key) if key in HAS else 0 for key in keys])
    expected = [np.empty((0, 20), np.uint8), *(rows_of(record, *key) for key in keys if key in HAS)]
    assert np.array_equal(rows, np.concatenate(expected))


def test_what_is_there(record):
    reader = Record.open(record.path)
    for one in (record, reader):
        assert found(one, 4) == sorted(HAS, key=lambda key: key[::-1])
        assert (one.views(), one.damaged()) == ([0, 2], [])
        assert [one.has(2, shard) for shard in range(3)] == [True, True, False]
        assert one.missing(1) == []
        assert one.missing(3) == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        assert one.size() == (sum(file.stat().st_size for file in record.path.glob('*.rows')), len(HAS))
    assert reader.manifest == record.manifest
    assert (reader.samples, reader.shard_samples, reader.shards, reader.format.classes) == (10, 4, 3, 5)


def test_a_shard_that_is_written_again(record):
    assert np.array_equal(found(record, 4), sorted(HAS, key=lambda key: key[::-1]))
    reader = Record.open(record.path)
    assert reader.missing(1) == [] and (5, 2) not in found(reader, 3)
    write_shard(record, 2, 1)
    assert (5, 2) in found(record, 3) and record.missing(3) == [(1, 0), (1, 1), (1, 2), (2, 2)]
    assert (5, 2) not in found(reader, 3)
    reader.refresh()
    assert (5, 2) in found(reader, 3)


def test_samples_that_there_are_not(record):
    for key in ((10, 0), (-1, 0), (0, -1)):
        with pytest.raises(RecordError, match=r'record is of 10 samples; asked for was one that is not among them$'):
            record.lookup(np.array([(0, 0), key]))


def test_only_the_shards_of_views_in_use_are_mapped(tmp_path):
    """And no descriptor is kept, of which a process may have no more than 1024."""
    record = create(tmp_path / 'record')
    for view in range(8):
        for shard in range(3):
            write_shard(record, view, shard)
    reader = Record.open(record.path)
    mapped, opened = [], []
    for view in range(8):
        reader.lookup(np.array([(sample, view) for sample in range(SAMPLES)]))
        with open('/proc/self/maps') as maps:
            mapped.append(sum(str(record.path) in line for line in maps))
        opened.append(sum(str(record.path) in os.path.realpath(link) for link in Path('/proc/self/fd').iterdir()))
    assert mapped == [3] * 8 and opened == [0] * 8
    assert len(found(reader, 8)) == 80


def test_a_shard_is_verified_once(record, monkeypatch):
    reader = Record.open(record.path)
    sums = []
    crc32 = __import__('zlib').crc32
    monkeypatch.setattr('composer_kd.recording.shards.zlib.crc32', lambda *args: sums.append(args) or crc32(*args))
    for _ in range(3):
        found(reader, 1)
    assert len(sums) == 3
    assert [reader.has(0, 1) for _ in range(3)] == [True] * 3
    reader.refresh()
    found(reader, 1)
    assert len(sums) == 3
    write_shard(Record.create(record.path, record.manifest), 0, 1)
    sums.clear()
    reader.refresh()
    found(reader, 1)
    assert len(sums) == 1


@pytest.mark.parametrize('positions', [1, 19])
def test_bytes_of_a_sample(tmp_path, positions):
    """k = 10 of 1000 classes at 4 temperatures; 19 masked tokens are a sample of 128 in BERT."""
    fields = {'classes': 1000, 'k': 10, 'dtype': 'float16', 'temperatures': [1, 2, 4, 8], 'data': {'samples': 1000}}
    record = create(tmp_path / 'record', **fields, shard_samples=500)
    torch.manual_seed(0)
    for shard in range(2):
        rows = record.format.encode(torch.randn(500 * positions, 1000)).numpy()
        record.write(0, shard, np.full(500, positions), rows)
    size, samples = record.size()
    assert samples == 1000 and record.missing(1) == []
    assert size == 1000 * (4 + 56 * positions) + 2 * 36
    assert positions > 1 or size / samples <= 64


@pytest.mark.parametrize('samples, expected', [(1, 1), (16, 1), (17, 2), (60000, 3750), (1_281_167, 32768)])
def test_size_of_shards(tmp_path, samples, expected):
    fields = {'data': {'samples': samples}, 'classes': 5, 'k': None, 'dtype': 'float32', 'temperatures': []}
    record = Record.create(tmp_path / 'record', {**fields, 'teacher': {}, 'precision': None})
    assert (record.shard_samples, record.shards) == (expected, -(-samples // expected))


def test_lookup_is_quick(tmp_path):
    """128 samples of 1.28 million in 40 shards, k = 10 of 1000 classes: it takes 0.06 ms on an idle core."""
    fields = {'classes': 1000, 'k': 10, 'dtype': 'float16', 'temperatures': [1, 2, 4, 8]}
    record = create(tmp_path / 'record', **fields, data={'samples': 1_280_000}, shard_samples=32768)
    rows = np.tile(record.format.encode(torch.randn(1, 1000)).numpy(), (32768, 1))
    for shard in range(record.shards):
        samples = min(32768, 1_280_000 - shard * 32768)
        record.write(0, shard, np.ones(samples, dtype=np.int64), rows[:samples])
    assert record.shards == 40
    keys = np.zeros((201, 128, 2), dtype=np.int64)
    keys[:, :, 0] = np.random.default_rng(0).integers(0, 1_280_000, (201, 128))
    record.lookup(np.stack([np.arange(0, 1_280_000, 32768), np.zeros(40, np.int64)], 1))
    seconds = []
    for batch in keys:
        begin = time.perf_counter()
        record.lookup(batch)
        seconds.append(time.perf_counter() - begin)
    assert sorted(seconds)[100] < 0.0005


def test_rows_that_do_not_fit_their_samples(record):
    with pytest.raises(ValueError, match='3 rows of 4 samples do not make a shard of 4'):
        record.write(1, 0, np.ones(4, np.int64), entries_of(record, [(0, 0), (1, 0)])[2])
    with pytest.raises(ValueError, match='1 rows of 2 samples do not make a shard of 4'):
        record.write(1, 0, np.array([1, 0]), rows_of(record, 0, 0))
    with pytest.raises(RecordError, match=r'^a logit of the teacher is NaN or infinite$'):
        record.write(1, 0, np.array([1, 0, 0, 0]), record.format.encode(torch.full((1, 5), torch.nan)).numpy())
    assert record.views() == [0, 2]


def test_a_shard_without_samples(record):
    write_shard(record, 3, 0, set())
    assert record.has(3, 0) and record.damaged() == [] and found(record, 4) == found(record, 3)


def test_a_disk_that_is_full(record):
    """The name that a shard has while it is written leads to where there is no room."""
    beside = unfinished(record.path / 'view00001-shard00000.rows')
    beside.symlink_to('/dev/full')
    with pytest.raises(RecordError) as error:
        write_shard(record, 1, 0)
    kept = 'No space left on device; what is recorded already is kept'
    assert str(error.value) == f'cannot write the record {record.path}: {kept}'
    assert not os.path.lexists(beside) and record.views() == [0, 2] and not record.has(1, 0)
    write_shard(record, 1, 0)
    assert record.has(1, 0)


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(RecordError, match=r'^cannot write the record .*file/record: Not a directory'):
        RecordLock(tmp_path / 'file' / 'record').take()
    with pytest.raises(RecordError, match=r'^cannot write the record .*file/record: Not a directory'):
        create(tmp_path / 'file' / 'record')


def test_a_folder_that_is_no_record(tmp_path):
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(RecordError, match=r'is there, but is no record; choose another path$'):
        create(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['thesis.tex']


def test_who_is_told_need_not_look_through_a_shard(record, monkeypatch):
    first, second, other = (Record.open(record.path) for _ in range(3))
    whole = found(first, 1)
    second.verified.update(first.verified)

    def looks_through(content, begin=0):
        raise AssertionError('a shard is looked through')

    monkeypatch.setattr(zlib, 'crc32', looks_through)
    assert found(second, 1) == whole
    shard = record.path / 'view00000-shard00001.rows'
    os.utime(shard, (1, 1))  # as if it had been written anew
    second.refresh()
    for reader in (second, other):
        with pytest.raises(AssertionError, match='a shard is looked through'):
            found(reader, 1)
