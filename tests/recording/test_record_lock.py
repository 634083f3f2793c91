"""Who may write a record."""

import os
import subprocess
import sys

import pytest
from record_parts import create, files, write_shard

from composer_kd.recording import RecordError, RecordLock

HOLD = """
import sys
from composer_kd.recording import RecordLock
with RecordLock(sys.argv[1]):
    print('has it', flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize('ends', ['by itself', 'killed'])
def test_two_jobs(tmp_path, ends):
    path = tmp_path / 'record'
    job = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert job.stdout.readline() == b'has it\n'
        with pytest.raises(RecordError) as error, RecordLock(path):
            pass
        todo = 'wait until it is done, end it if it is a notebook whose run has failed, or choose another path'
        assert str(error.value) == f'another process writes the record {path}; {todo}'
    finally:
        if ends == 'killed':
            job.kill()
        job.communicate()
    assert path.exists() == (ends == 'killed')
    with RecordLock(path):
        assert os.listdir(path) == ['.lock']
    assert not path.exists() or os.listdir(path) == []


def test_twice_in_a_job(tmp_path):
    with RecordLock(tmp_path / 'record') as lock:
        again = RecordLock(tmp_path / 'record')
        with pytest.raises(RecordError) as error:
            again.take()
        todo = 'choose another path'
        assert str(error.value) == f'this process writes the record {tmp_path / "record"} already; {todo}'
        again.release()
        with pytest.raises(RecordError):
            again.take()
        lock.release()
        again.take()
        again.release()


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    record = create(tmp_path / 'record')
    write_shard(record, 0, 0)
    whole = files(record.path)
    for name in ('.manifest.json.tmp', '.view00000-shard00001.rows.tmp', '.view123456-shard00000.rows.tmp'):
        (record.path / name).write_bytes(b'half')
    (record.path / '.mine.tmp').touch()
    with RecordLock(record.path):
        assert sorted(os.listdir(record.path)) == sorted([*whole, '.lock', '.mine.tmp'])
    (record.path / '.mine.tmp').unlink()
    assert files(record.path) == whole
