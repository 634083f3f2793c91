"""What is said on the way becomes shards."""

import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_parts import SAMPLES, create, entries_of, every, files, found, write_shard

from composer_kd import files as files_module
from composer_kd.files import unfinished
from composer_kd.recording import Journal, Record, RecordError, locked_journals, merge, seal

KEYS = st.tuples(st.integers(0, SAMPLES - 1), st.integers(0, 2))


@settings(deadline=None, max_examples=40)
@given(
    stored=st.sets(KEYS, max_size=8),
    said=st.lists(st.tuples(st.sampled_from([0, 1, 10]), st.lists(KEYS, max_size=6)), max_size=6),
)
def test_what_was_stored_and_what_was_said_is_there(tmp_path_factory, stored, said):
    record = create(tmp_path_factory.mktemp('record'))
    for view, shard in {(view, sample // 4) for sample, view in stored}:
        write_shard(record, view, shard, {sample for sample, of in stored if of == view})
    journals = {rank: Journal(record, rank) for rank in (0, 1, 10)}
    for rank, keys in said:
        journals[rank].append(*entries_of(record, keys))
    for journal in journals.values():
        journal.close()
    seal(record)
    expected = sorted({*stored, *(key for _, keys in said for key in keys)}, key=lambda key: key[::-1])
    for one in (record, Record.open(record.path)):
        assert found(one, 3) == expected
    assert not [*record.path.glob('journal-*')]


def test_what_was_first_stays(tmp_path):
    """In a shard, then in journals in the order of ranks."""
    record = create(tmp_path / 'record')
    write_shard(record, 0, 0, {0})
    other = record.format.encode(torch.zeros(1, 5)).numpy()
    keys, counts, rows = entries_of(record, [(1, 0)])
    for rank, entries in ((2, [((0, 0), other)]), (10, [((1, 0), other), ((2, 0), other)]), (9, [])):
        journal = Journal(record, rank)
        if rank == 9:
            journal.append(keys, counts, rows)
        for key, row in entries:
            journal.append(np.array([key]), np.ones(1, np.int64), row)
        journal.close()
    seal(record)
    rows, counts = record.lookup(np.array([(0, 0), (1, 0), (2, 0)]))
    expected = np.concatenate([entries_of(record, [(0, 0), (1, 0)])[2], other])
    assert np.array_equal(rows, expected) and counts.tolist() == [1, 2, 1]


def test_sealing_again_gives_the_same_bytes(tmp_path, monkeypatch):
    """After each step at which it may be broken off: a shard is renamed, a journal removed."""
    record = create(tmp_path / 'whole')
    _say_all(record)
    seal(record)
    whole = files(record.path)
    assert found(record, 2) == every(2) and len(whole) == 7

    steps = [0]

    def stops_after(step):
        steps[0] += 1
        if steps[0] > step:
            raise KeyboardInterrupt

    for step in range(9):
        path = tmp_path / f'record{step}'
        record = create(path)
        _say_all(record)
        steps[0] = 0
        with monkeypatch.context() as patch:
            replace, unlink = os.replace, os.unlink
            patch.setattr(os, 'replace', lambda *args: (replace(*args), stops_after(step)))
            patch.setattr(os, 'unlink', lambda *args, **kwargs: (unlink(*args, **kwargs), stops_after(step)))
            if step < 8:
                with pytest.raises(KeyboardInterrupt):
                    seal(record)
            else:
                seal(record)
        seal(create(path))
        assert files(path) == whole, step


def test_ranks_share_the_work(tmp_path):
    """Of three, one does not come to its part; then all do; then one alone sees what is left to do."""
    record = create(tmp_path / 'whole')
    _say_all(record)
    seal(record)
    whole = files(record.path)
    record = create(tmp_path / 'shared')
    _say_all(record)
    with locked_journals(record) as journals:
        for ranks in [(2, 0), (0, 1, 2)]:
            parts = {}
            for rank in ranks:
                before = {*files(record.path)}
                merge(create(record.path), journals, rank, 3)
                parts[rank] = {*files(record.path)} - before
            assert [len(parts[rank]) for rank in ranks] == {2: [2, 2], 3: [0, 2, 0]}[len(ranks)]
    seal(create(record.path))
    assert files(record.path) == whole
    assert sum(record.size(rank, 3)[1] for rank in range(3)) == record.size()[1] == 20


def _say_all(record):
    for rank in range(2):
        journal = Journal(record, rank)
        for begin in range(0, 20, 4):
            journal.append(*entries_of(record, every(2)[begin + 2 * rank : begin + 2 * rank + 2]))
        journal.close()


def test_an_end_that_is_torn_is_cut(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    journal.append(*entries_of(record, [(0, 0), (1, 0)]))
    file = record.path / 'journal-0.bin'
    first = file.stat().st_size  # what is appended is with the system at once
    journal.append(*entries_of(record, [(2, 0)]))
    journal.close()
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        journal = Journal(record, 0)
        journal.append(*entries_of(record, [(3, 0)]))
        journal.close()
        seal(record)
        samples = [0, 1, 2, 3] if cut == len(whole) else [0, 1, 3] if cut >= first else [3]
        assert found(record, 1) == [(sample, 0) for sample in samples]
        (record.path / 'view00000-shard00000.rows').unlink()


def test_a_journal_goes_on_after_it_was_sealed(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    for sample in range(3):
        journal.append(*entries_of(record, [(sample, 0)]))
        journal.close()
        seal(record)
        assert found(record, 1) == [(done, 0) for done in range(sample + 1)]


def test_a_journal_is_one_file_however_many_views(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    for view in range(50):
        journal.append(*entries_of(record, [(0, view)]))
    assert _open_files(record) == 1
    journal.close()
    journal.close()
    assert _open_files(record) == 0


def _open_files(record):
    return sum(os.path.realpath(link).startswith(str(record.path)) for link in Path('/proc/self/fd').iterdir())


def test_nothing_is_written_of_nothing(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    journal.append(*entries_of(record, []))
    journal.close()
    seal(record)
    assert [*files(record.path)] == ['manifest.json']


def test_what_cannot_teach_is_not_noted(tmp_path):
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    keys, counts, rows = entries_of(record, [(0, 0)])
    with pytest.raises(RecordError, match=r'^a logit of the teacher is NaN or infinite$'):
        journal.append(keys, counts, np.full_like(rows, 255))
    with pytest.raises(ValueError, match='1 rows of 1 samples are not those of 2 samples'):
        journal.append(np.concatenate([keys, keys]), counts, rows)
    assert [*files(record.path)] == ['manifest.json']


def test_the_journal_of_another_record(tmp_path):
    """Such as one that lay in this folder before."""
    other = create(tmp_path / 'other', precision='amp_bf16')
    _say_all(other)
    record = create(tmp_path / 'record')
    for rank in range(2):
        os.rename(other.path / f'journal-{rank}.bin', record.path / f'journal-{rank}.bin')
    journal = Journal(record, 0)
    journal.append(*entries_of(record, every(2)[:2]))  # as long as the first entry of the other record
    journal.close()
    seal(record)
    assert found(record, 2) == every(2)[:2]
    assert [*files(record.path)] == ['manifest.json', 'view00000-shard00000.rows']


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_disk_that_is_full(tmp_path):
    """In another process, whose files cannot grow beyond what two samples take."""
    record = create(tmp_path / 'record')
    child = multiprocessing.get_context('fork').Process(target=_until_full, args=(record,))
    child.start()
    child.join()
    assert child.exitcode == 0
    seal(record)
    assert found(record, 1) == [(0, 0), (3, 0)]


def _until_full(record):
    journal = Journal(record, 0)
    journal.append(*entries_of(record, [(0, 0)]))
    size = (record.path / 'journal-0.bin').stat().st_size
    for limit in (size, size + 7, size + 40):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(
            RecordError, match=r'^cannot write the record .*record: File too large; what is recorded al'
        ):
            journal.append(*entries_of(record, [(1, 0), (2, 0)]))
        assert (record.path / 'journal-0.bin').stat().st_size == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(*entries_of(record, [(3, 0)]))


def test_no_room_to_seal(tmp_path):
    record = create(tmp_path / 'record')
    _say_all(record)
    unfinished(record.path / 'view00001-shard00000.rows').symlink_to('/dev/full')
    with pytest.raises(RecordError, match=r'^cannot write the record .*record: No space left on device'):
        seal(record)
    assert len([*record.path.glob('journal-*')]) == 2
    seal(record)
    assert found(record, 2) == every(2)


def test_a_journal_that_another_process_writes(tmp_path):
    """As what is left of a job may whose first rank was killed, and with it the lock of the record."""
    record = create(tmp_path / 'record')
    left, new = Journal(record, 1), Journal(create(record.path), 1)
    left.append(*entries_of(record, [(0, 0)]))
    message = 'another process still writes .*journal-1.bin: end what is left of an earlier run, and start again$'
    with pytest.raises(RecordError, match=message):
        new.append(*entries_of(record, [(4, 0)]))
    with pytest.raises(RecordError, match=message):
        seal(record)
    left.append(*entries_of(record, [(1, 0)]))
    left.close()
    new.append(*entries_of(record, [(4, 0)]))
    new.close()
    seal(record)
    assert found(record, 1) == [(0, 0), (1, 0), (4, 0)]


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_forked_process_does_not_keep_a_journal(tmp_path):
    """Such as a loader's worker, which outlives its killed parent for a while."""
    record = create(tmp_path / 'record')
    journal = Journal(record, 0)
    journal.append(*entries_of(record, [(0, 0)]))
    began, ends = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(began[1], b'.')
        os.read(ends[0], 1)
        os._exit(0)
    os.read(began[0], 1)
    descriptor, journal._descriptor = journal._descriptor, None
    files_module._locked.remove(descriptor)
    os.close(descriptor)  # as the kernel does when the process ends, which unlocks nothing itself
    try:
        seal(record)
    finally:
        os.write(ends[1], b'.')
        os.waitpid(child, 0)
        for end in (*began, *ends):
            os.close(end)
    assert found(record, 1) == [(0, 0)]
