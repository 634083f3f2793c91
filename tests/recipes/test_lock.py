"""Launches that meet in one folder."""

import errno
import fcntl
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from composer_kd import cli
from composer_kd.recipes import RecipeError, load, run
from composer_kd.recipes.lock import FolderLock
from helpers import in_a_fork

TEACHER = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256, num_workers: 1}
max_duration: 1ep
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
device: cpu
callbacks: {parts.Gate: {}}
"""
GATE = 'callbacks: {parts.Gate: {}}\n'
STUDENT = """\
teachers: [{name: network, recipe: teacher.yaml}]
algorithms: {knowledge_distillation: {}}
"""


def _launch():
    sys.exit(cli.run_recipe('teacher.yaml', ()))


@pytest.fixture
def other_launch(write):
    """Another process, which has trained the first two batches of a teacher and goes on when there is a file `go`."""
    write('', 'teacher.yaml', TEACHER)
    write('', 'x.yaml', TEACHER.replace(GATE, STUDENT))
    patience = time.monotonic() + 120
    with in_a_fork(_launch) as process:
        while not Path('stopped').exists() and process.is_alive() and time.monotonic() < patience:
            time.sleep(0.01)
        yield process


@pytest.fixture
def looks(monkeypatch):
    """What to do between looks at a folder, instead of sleeping: a list of functions, used up."""
    todo = []
    module = importlib.import_module('composer_kd.recipes.run')
    monkeypatch.setattr(module, 'time', SimpleNamespace(sleep=lambda _: todo.pop(0)()))
    return todo


def test_a_live_run_is_left_alone_and_its_teacher_waited_for(other_launch, looks, capsys):
    with pytest.raises(RecipeError) as error:
        run('teacher.yaml', ['autoresume=true'])
    todo = 'wait until it is done, or choose another run_name'
    assert str(error.value) == f'teacher.yaml:1: another process is at work in runs/teacher; {todo}'
    assert error.value.exit_code == 1
    with pytest.raises(RecipeError, match='runs/teacher is there already; choose another run_name'):
        run('teacher.yaml', ['run_name=teacher'])
    assert run('teacher.yaml', ['callbacks={}', 'max_duration=1ba'])['run_name'] == 'teacher-2'

    looks += [lambda: None, lambda: (Path('go').touch(), other_launch.join())]
    run('x.yaml')
    printed = capsys.readouterr().out
    assert printed.count('waiting for another launch, which is at work in runs/teacher\n') == 1
    assert 'found the teacher' in printed and 'training the teacher' not in printed
    assert (looks, other_launch.exitcode) == ([], 0)
    assert json.loads(Path('runs/teacher/summary.json').read_text())['batches'] == 5
    assert sorted(path.name for path in Path('runs').iterdir()) == ['teacher', 'teacher-2', 'x']


def test_a_lock_ends_with_its_process(other_launch, looks, capsys):
    """Even though the loader's worker, which was forked while the lock was held, notices only seconds later."""
    looks += [lambda: (Path('go').touch(), other_launch.kill(), other_launch.join())]
    run('x.yaml')
    printed = capsys.readouterr().out
    assert 'waiting for another launch' in printed and 'training the teacher' in printed
    assert json.loads(Path('runs/teacher/summary.json').read_text())['batches'] == 5
    assert sorted(path.name for path in Path('runs').iterdir()) == ['teacher', 'x']


def test_a_lock_that_is_taken_away_while_it_is_looked_at(write, monkeypatch):
    """Between opening the file and locking it, its holder may have ended and removed it."""
    recipe, path = load(write()), Path('runs/.x.lock')
    path.parent.mkdir()
    real = fcntl.flock

    def flock(descriptor, operation):
        monkeypatch.setattr(fcntl, 'flock', real)
        path.unlink()
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, 'flock', flock)
    with FolderLock(recipe) as lock:
        assert lock.take(Path('runs/x'))
        assert path.exists()
    assert not path.exists()


def test_a_file_system_without_locks(write, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    with FolderLock(load(write())) as lock:
        assert lock.take(Path('runs/x'))
    assert not Path('runs').exists()


def test_a_teacher_in_the_folder_of_its_student(write):
    """Which would wait for itself for ever."""
    write('', 'first.yaml', TEACHER.replace(GATE, 'run_name: same\n'))
    taught = TEACHER.replace(GATE, STUDENT)
    write('run_name: same\n', 'second.yaml', taught.replace('teacher.yaml', 'first.yaml'))
    write('', 'x.yaml', taught.replace('teacher.yaml', 'second.yaml'))
    with pytest.raises(
        RecipeError, match=r'^first.yaml:6: run_name: runs/same is also the folder of the run that it t'
    ):
        run('x.yaml')
    assert not Path('runs').exists()
