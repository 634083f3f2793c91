"""Files that appear whole, and locks."""

import errno
import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest

from composer_kd.files import FileLock, remove_unfinished, unfinished, write


def test_parts_of_a_file(tmp_path):
    path = tmp_path / 'file'
    for parts in (('ä', b'\0', np.arange(2, dtype='<u2'), memoryview(b'end')), ('other',), ()):
        write(path, *parts)
        expected = b''.join(part.encode() if isinstance(part, str) else bytes(part) for part in parts)
        assert path.read_bytes() == expected
        assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (done.append('folder' if is_folder(fd) else 'file'), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda *args: (done.append('name'), replace(*args)))
    write(tmp_path / 'file', 'text')
    assert done == ['file', 'name', 'folder']


def is_folder(descriptor):
    return os.path.isdir(f'/proc/self/fd/{descriptor}')


@pytest.mark.parametrize('parts', [('x',), ('x' * 10**6,)])
def test_a_disk_that_is_full(tmp_path, parts):
    write(tmp_path / 'file', 'before')
    unfinished(tmp_path / 'file').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left'):
        write(tmp_path / 'file', *parts)
    assert os.listdir(tmp_path) == ['file'] and (tmp_path / 'file').read_text() == 'before'


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(TypeError):
        write(tmp_path / 'file', 'text', 3)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / 'none' / 'file', 'text')
    assert [*tmp_path.iterdir()] == []


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files(descriptor):
        if is_folder(descriptor):
            raise OSError(errno.EINVAL, 'Invalid argument')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', of_files)
    write(tmp_path / 'file', 'text')
    assert (tmp_path / 'file').read_text() == 'text'


def test_two_processes_that_write_one_file(tmp_path):
    """The file of one is whole, though another has begun to write it, and still does."""
    code = 'import sys; from composer_kd.files import *; print(unfinished(Path(sys.argv[1])))'
    path = tmp_path / 'file'
    others = [subprocess.check_output([sys.executable, '-c', code, str(path)], text=True).strip() for _ in range(2)]
    assert len({*others, str(unfinished(path))}) == 3
    with open(others[0], 'wb') as other:
        other.write(b'torn')
        write(path, 'text')
        other.write(b'more')
    assert path.read_text() == 'text'


def test_what_is_unfinished(tmp_path):
    for name in ('.a1.txt.tmp', '.a2.txt.tmp', '.b.txt.tmp', 'a3.txt', '.a4.txt'):
        (tmp_path / name).touch()
    unfinished(tmp_path / 'a5.txt').touch()
    remove_unfinished(tmp_path, 'a*.txt')
    assert sorted(os.listdir(tmp_path)) == ['.a4.txt', '.b.txt.tmp', 'a3.txt']


def test_a_lock(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'lock'
    one, other = FileLock(path), FileLock(path)
    assert not one.is_ours() and one.take()
    assert other.is_ours() and not other.take()
    other.release()
    assert one.is_ours() and path.exists()
    one.release()
    assert not one.is_ours() and not path.parent.exists() and path.parent.parent.exists()
    assert other.take()
    (path.parent / 'file').touch()
    other.release()
    assert os.listdir(path.parent) == ['file']


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
def test_a_forked_process_has_no_lock(tmp_path):
    """So that a loader's worker, which outlives its killed parent for a while, does not keep it."""
    lock = FileLock(tmp_path / 'lock')
    assert lock.take()
    child = os.fork()
    if not child:
        lock.release()
        os._exit(lock.is_ours() or not (tmp_path / 'lock').exists())
    assert os.waitpid(child, 0)[1] == 0
    with open(tmp_path / 'lock') as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()
