"""Files that are not what was written: an error or the right rows, never wrong ones."""

import errno
import os
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_parts import create, entries_of, every, files, found, write_shard

from composer_kd.recording import Journal, Record, RecordError, seal

TODO = 'run composer-kd record again for .*record, which rewrites it'
SHARD = 'view00000-shard00001.rows'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """View 0 in shards; view 1 in a journal, and a sample of it in a shard."""
    record = create(tmp_path_factory.mktemp('whole') / 'record', k=2, dtype='float16', temperatures=[1, 4])
    for shard in range(3):
        write_shard(record, 0, shard)
    write_shard(record, 1, 0, {3})
    journal = Journal(record, 0)
    for begin in range(0, 10, 5):
        journal.append(*entries_of(record, every(2)[10 + begin : 15 + begin]))
    journal.close()
    return record.path


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / 'record')


def mutations(draw, content):
    """The content of a file, with a few bytes changed, cut off, put in or added."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(['flip', 'cut', 'insert', 'zeros', 'remove']))
        if kind == 'flip' and at < len(content):
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif kind == 'cut':
            content = content[:at]
        elif kind == 'insert':
            content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
        elif kind == 'zeros':
            content = content[:at] + bytes(len(content) - at)
        elif kind == 'remove':
            content = content[:at] + content[at + draw(st.integers(1, 8)) :]
    return content


def damage(draw, whole, folder):
    """A copy with one file damaged, and the name of that file."""
    path = shutil.copytree(whole, folder / 'record')
    name = draw(st.sampled_from(sorted(os.listdir(whole))))
    (path / name).write_bytes(mutations(draw, (path / name).read_bytes()))
    return path, name


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_reader_of_what_is_damaged_anywhere(whole, tmp_path_factory, data):
    path, _ = damage(data.draw, whole, tmp_path_factory.mktemp('damaged'))
    try:
        assert found(Record.open(path), 2) == [*every(1), (3, 1)]
    except RecordError as error:
        assert str(path) in str(error) and '\n' not in str(error)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_writer_of_what_is_damaged_anywhere(whole, tmp_path_factory, data):
    path, name = damage(data.draw, whole, tmp_path_factory.mktemp('damaged'))
    fields = Record.open(whole).manifest
    try:
        record = Record.create(path, fields)
    except RecordError as error:
        assert name == 'manifest.json' and str(path) in str(error) and '\n' not in str(error)
        return
    seal(record)
    # A sample of the shard of view 1 is in the journal as well.
    lost = {
        'view00000-shard00000.rows': every(1)[:4],
        SHARD: every(1)[4:8],
        'view00000-shard00002.rows': every(1)[8:],
        'journal-0.bin': [key for key in every(2)[10:] if key != (3, 1)],
    }
    assert {*every(2)} - {*lost.get(name, [])} <= {*found(record, 2)}
    for view, shard in record.missing(2):
        write_shard(record, view, shard)
    assert found(Record.open(path), 2) == every(2)


def test_every_bit_of_a_shard_is_guarded(damaged):
    file = damaged / SHARD
    content = file.read_bytes()
    reader = Record.open(damaged)
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        reader.refresh()
        with pytest.raises(RecordError, match=f'{SHARD} is damaged: .*; {TODO}$'):
            reader.lookup(np.array([(4, 0)]))


def test_every_bit_of_a_journal_is_guarded(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    journal.append(*entries_of(record, [(0, 0)]))
    journal.close()
    file = record.path / 'journal-0.bin'
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        seal(record)
        assert found(record, 1) == [] and not file.exists()


@pytest.mark.parametrize('size', [0, 31, 32, 100, -1])
def test_a_shard_that_is_cut_off(damaged, size):
    file = damaged / SHARD
    length = file.stat().st_size
    os.truncate(file, size if size >= 0 else length + size)
    what = f'{size} bytes are too few' if 0 <= size < 32 else f'it has {size % length} bytes instead of {length}'
    check(damaged, what)


def check(path, what, error_path=SHARD):
    """A reader says what is wrong, once it needs that shard; to a writer its samples are missing."""
    reader = Record.open(path)
    reader.lookup(np.array([(0, 0), (8, 0)]))
    with pytest.raises(RecordError) as error:
        reader.lookup(np.array([(0, 0), (4, 0)]))
    todo = f'run composer-kd record again for {path}, which rewrites it'
    assert str(error.value) == f'{path / error_path} is damaged: {what}; {todo}'
    assert reader.damaged() == [path / error_path] and not reader.has(0, 1) and (0, 1) in reader.missing(1)
    writer = Record.create(path, reader.manifest)
    assert found(writer, 1) == [key for key in every(1) if not 4 <= key[0] < 8]
    assert writer.size()[1] == 10 - 4 + 1
    write_shard(writer, 0, 1)
    assert writer.damaged() == [] and writer.missing(1) == [] and found(Record.open(path), 1) == every(1)


def test_a_shard_in_the_place_of_another(damaged):
    shutil.copy(damaged / 'view00000-shard00000.rows', damaged / SHARD)
    check(damaged, 'it belongs to another record, or to another place in this one')


def test_a_shard_of_another_record(damaged, tmp_path):
    other = create(tmp_path / 'other', k=2, dtype='float16', temperatures=[1, 4], precision='amp_bf16')
    write_shard(other, 0, 1)
    shutil.copy(other.path / SHARD, damaged / SHARD)
    check(damaged, 'it belongs to another record, or to another place in this one')


def test_another_file(damaged):
    (damaged / SHARD).write_bytes(b'PK' + bytes(400))
    check(damaged, 'it does not begin as a shard does')


def forge(path, change):
    """Change a shard and give it the checksum that it then should have."""
    content = bytearray(path.read_bytes())
    change(content)
    content[-4:] = struct.pack('<I', zlib.crc32(content[:-4]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    'at, number, what',
    [
        (32, 2**31, 'its samples do not have as many rows as there are'),
        (44, 1, 'its samples do not have as many rows as there are'),
        (48, 0x7E007E00, 'a logit of the teacher is NaN or infinite, or too large for float16'),
        (52, 0x00050005, 'there are classes beyond the 5 of the record'),
    ],
)
def test_a_shard_that_somebody_forged(damaged, at, number, what):
    forge(damaged / SHARD, lambda content: struct.pack_into('<I', content, at, number))
    with pytest.raises(RecordError, match=f'{SHARD} is damaged: {what}.*; {TODO}$'):
        found(Record.open(damaged), 1)


@pytest.mark.parametrize('number', [errno.EMFILE, errno.EIO])
def test_a_writer_leaves_what_it_cannot_read_now(damaged, monkeypatch, number):
    before = files(damaged)
    record = Record.create(damaged, Record.open(damaged).manifest)
    path_open = Path.open

    def failing(path, *args, **options):
        if path.suffix == '.rows':
            raise OSError(number, os.strerror(number))
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, 'open', failing)
    todo = '; let this process open more, by ulimit -n' if number == errno.EMFILE else ''
    message = f'cannot read .*-shard0000..rows: {os.strerror(number)}{todo}$'
    for use in (seal, lambda record: record.shard(0, 1), lambda record: record.has(0, 1), lambda r: r.missing(2)):
        with pytest.raises(RecordError, match=message):
            use(record)
    monkeypatch.undo()
    assert files(damaged) == before and record.has(0, 1)
    seal(record)
    assert found(record, 2) == every(2)


def test_a_writer_without_descriptors_leaves_all_as_it_is(damaged):
    before = files(damaged)
    record = Record.create(damaged, Record.open(damaged).manifest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, limits[1]))
        try:
            with pytest.raises(RecordError, match=r'Too many open files; let this process open more, by ulimit -n$'):
                record.shard(0, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert files(damaged) == before and record.has(0, 1)


def test_a_folder_in_the_place_of_a_shard(damaged):
    (damaged / SHARD).unlink()
    (damaged / SHARD).mkdir()
    with pytest.raises(RecordError, match=f'^cannot read .*{SHARD}: Is a directory$'):
        found(Record.open(damaged), 1)


@pytest.mark.parametrize('body', [b'', b'\x01\0\0\0', struct.pack('<Iqq', 1, 0, 0), struct.pack('<I', 2**32 - 1)])
def test_entries_that_somebody_forged(whole, damaged, body):
    _check_forged(damaged, body)


@pytest.mark.parametrize('sample, view, count', [(10, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2**31, 1), (0, 1, 2)])
def test_entries_of_samples_that_there_are_not(damaged, sample, view, count):
    _, _, rows = entries_of(Record.open(damaged), [(0, 0)])
    _check_forged(damaged, struct.pack('<IqqI', 1, sample, view, count) + bytes(rows))


def test_entries_that_cannot_teach(damaged):
    _, _, rows = entries_of(Record.open(damaged), [(0, 1)])
    _check_forged(damaged, struct.pack('<IqqI', 1, 0, 1, len(rows)) + b'\xff' * rows.size)


def _check_forged(path, body):
    journal = path / 'journal-0.bin'
    journal.write_bytes(journal.read_bytes()[:16] + struct.pack('<II', len(body), zlib.crc32(body)) + body)
    record = Record.create(path, Record.open(path).manifest)
    before = files(path)
    seal(record)
    assert found(record, 2) == [*every(1), (3, 1)]
    assert files(path) == {name: content for name, content in before.items() if name != 'journal-0.bin'}


def test_files_that_are_none_of_a_record(damaged):
    for name in ('view0-shard1.rows', 'view00000-shard00009.rows', 'viewx-shard00001.rows', 'journal-x.bin'):
        (damaged / name).touch()
    record = Record.open(damaged)
    assert record.views() == [0, 1] and record.damaged() == [damaged / 'view00000-shard00009.rows']
    assert found(record, 1) == every(1)
