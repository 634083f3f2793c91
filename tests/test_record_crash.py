"""Processes that are killed while they record, or learn from a record, lose nothing and end with the same bits.

The processes are forked from this one, which has imported everything, so that each lives for no longer than its work
takes. This one must not train: torch's threads do not survive a fork.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from composer_kd.recipes import run
from composer_kd.record import record
from composer_kd.recording import Record

RECIPE = """\
seed: 3
max_duration: 3ep
model: {name: small_convnet, num_classes: 10, width: 2}
teachers: [{name: network, model: {name: small_convnet, num_classes: 10, width: 4, depth: 2}}]
train_data:
  {name: fashion_mnist, split: train, batch_size: 16, synthetic: true, subset: 170, augment: true, views: 2}
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
algorithms: {knowledge_distillation: {temperature: 3.0}}
save_interval: 3ba
autoresume: true
device: cpu
"""
RECORDED = ['teachers=[{name: recorded, path: whole}]', 'run_name=killed']
ON_THE_FLY = ['algorithms.knowledge_distillation={temperature: 3.0, record: killed}', 'run_name=killed']
PATIENCE = 300.0  # for cores that others use too

# Composer gives them where a run goes on at the very end of an epoch.
pytestmark = pytest.mark.filterwarnings('ignore:No batches were trained', 'ignore:The ``compute`` method of metric')


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Path('x.yaml').write_text(RECIPE)
    yield
    torch.set_num_threads(threads)


def fork(work):
    """Do some work in a process of its own; its id."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open('log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def finish(work):
    """Do some work to its end in a process of its own; how long it took."""
    began = time.monotonic()
    _, status = os.waitpid(fork(work), 0)
    assert status == 0, Path('log.txt').read_text()
    return time.monotonic() - began


def killed(work, after):
    """Start some work, and kill it after some seconds; whether it was still at it."""
    process = fork(work)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, Path('log.txt').read_text()
    return False


def kill_again_and_again(work, times, seconds):
    """Kill some work at random moments; each time it goes on with what the time before has left, until it is done."""
    moments, done, patience = random.Random(5), 0, time.monotonic() + PATIENCE
    while done < times:
        assert time.monotonic() < patience, f'{done} kills'
        if killed(work, seconds * moments.random()):
            done += 1
        else:
            yield  # it was finished before it could be killed
    finish(work)
    yield


def shards(path):
    return {file.name: file.read_bytes() for file in Path(path).glob('view*')}


def weights():
    (checkpoint,) = Path('runs/killed/checkpoints').glob('*-ba30-rank0.pt')
    return torch.load(checkpoint, weights_only=False)['state']['model']


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def remove(path):
    for file in sorted(Path(path).rglob('*'), reverse=True):
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()


def test_killed_while_recording():
    seconds = finish(lambda: record('x.yaml', out='whole'))
    whole = shards('whole')
    assert not Record.open('whole').missing(2)
    for _ in kill_again_and_again(lambda: record('x.yaml', out='killed'), 20, seconds):
        assert shards('killed') == whole
        assert sorted(path.name for path in Path('killed').iterdir()) == [
            'manifest.json',
            'summary.json',
            *sorted(whole),
        ]
        remove('killed')


def test_killed_while_learning_from_a_record():
    finish(lambda: record('x.yaml', out='whole'))
    seconds = finish(lambda: run('x.yaml', RECORDED))
    whole = weights()
    remove('runs')
    for _ in kill_again_and_again(lambda: run('x.yaml', RECORDED), 20, seconds):
        assert same(weights(), whole)
        remove('runs')


def test_killed_while_a_run_records():
    seconds = finish(lambda: run('x.yaml', ON_THE_FLY))
    whole, whole_shards = weights(), shards('killed')
    remove('runs')
    remove('killed')
    for _ in kill_again_and_again(lambda: run('x.yaml', ON_THE_FLY), 10, seconds):
        assert same(weights(), whole) and shards('killed') == whole_shards
        assert sorted(path.name for path in Path('killed').iterdir()) == ['manifest.json', *sorted(whole_shards)]
        remove('runs')
        remove('killed')
