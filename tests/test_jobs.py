"""Jobs are real processes here, but for the launcher: another script takes its place, which starts in no time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from composer.cli import launcher

from composer_kd import jobs
from composer_kd.jobs import Jobs, is_at_work, tail
from composer_kd.recipes import RecipeError

POPEN = subprocess.Popen
PATIENCE = 30.0


@pytest.fixture(autouse=True)
def work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, '_SECONDS_BETWEEN_LOOKS', 0.01)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)


@pytest.fixture
def scripts(monkeypatch):
    """What is started runs the code that is its last argument; the commands, and what they had in their environment."""
    started = []

    def start(command, *, env, **more):
        started.append((command, env))
        return POPEN([sys.executable, '-S', '-c', command[-1]], env=env, **more)

    monkeypatch.setattr(subprocess, 'Popen', start)
    return started


def wait_until(what):
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def is_alive(process):
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


# GPUs here, jobs, GPUs per job: the ranks of a job, the GPUs of each of the jobs that are started at once.
GPUS = {
    'all for one': (4, None, None, 4, ['0,1,2,3']),
    'divided': (4, 2, None, 2, ['0,1', '2,3']),
    'as many as fit': (5, None, 2, 2, ['0,1', '2,3']),
    'one each': (3, None, 1, 1, ['0', '1', '2']),
    'fewer than there is room for': (4, 1, 2, 2, ['0,1']),
    'shared': (2, 3, 1, 1, ['0', '1', '0']),
    'none': (0, None, None, 1, [None]),
    'none, several': (0, 3, None, 1, [None] * 3),
}


@pytest.mark.parametrize('case', GPUS)
def test_gpus(case, scripts, monkeypatch):
    gpus, at_once, per_job, ranks, visible = GPUS[case]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    with Jobs(at_once, per_job) as processes:
        assert processes.free == len(visible)
        for index in range(len(visible)):
            assert processes.start(['pass'], Path(f'{index}.log'))
        assert processes.free == 0
    assert [env.get('CUDA_VISIBLE_DEVICES') for _, env in scripts] == visible
    if ranks > 1:
        assert [command[command.index('-n') + 1] for command, _ in scripts] == [str(ranks)] * len(visible)
        ports = [command[command.index('--master_port') + 1] for command, _ in scripts]
    else:
        assert [command[1:] for command, _ in scripts] == [['pass']] * len(visible)
        ports = [env['MASTER_PORT'] for _, env in scripts]
    assert len({*ports}) == len(visible)


def test_one_rank_is_told_what_the_launcher_would_tell_it(monkeypatch):
    Path('x.py').write_text('import json, os, sys; json.dump([sys.argv, dict(os.environ)], open("said", "w"))')
    monkeypatch.setenv('FOLDER', 'there')
    for name, value in (('OMP_NUM_THREADS', '1'), ('COLUMNS', '80'), ('LINES', '24')):  # the tests' own doing
        monkeypatch.setenv(name, value)
    arguments = ['x.py', 'a=$FOLDER', 'b=~', 'c=${seed}']
    with Jobs() as processes:
        processes.start(arguments, Path('x.log'))
        wait_until(processes.ended)
    words, ours = json.loads(Path('said').read_text())
    monkeypatch.setattr(sys, 'argv', ['composer', '-n', '1', *arguments])
    assert launcher.main() == 0
    assert json.loads(Path('said').read_text())[0] == words == ['x.py', 'a=there', 'b=~', 'c=${seed}']
    theirs = json.loads(Path('said').read_text())[1]
    assert ours.pop('MASTER_PORT') != theirs.pop('MASTER_PORT') and ours == theirs


def test_gpus_that_are_named(scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-abc,6')
    with Jobs(gpus_per_job=2) as processes:
        processes.start(['pass'], Path('x.log'))
    assert scripts[0][1]['CUDA_VISIBLE_DEVICES'] == '4,GPU-abc'


def test_cores_are_shared(scripts, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    with Jobs(3) as processes:
        processes.start(['pass'], Path('x.log'))
    assert scripts[0][1]['OMP_NUM_THREADS'] == '2'
    with Jobs(2, ranks=2) as processes:
        processes.start(['pass'], Path('x.log'))
    command, environment = scripts[1]
    assert command[command.index('-n') + 1] == '2' and environment['OMP_NUM_THREADS'] == '2'


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ((0, None), '--jobs must be 1 or more, not 0'),
        ((None, -1), '--gpus-per-job must be 1 or more, not -1'),
        ((None, None, 0), '--ranks must be 1 or more, not 0'),
        ((None, None, 2), '--ranks 2: a job has as many ranks as GPUs; take --gpus-per-job'),
        ((None, 5), '--gpus-per-job 5: there are only 4 GPUs here'),
        (
            (3, 2),
            '--jobs 3 --gpus-per-job 2: there are 4 GPUs; give less of either, since jobs of several GPUs share none',
        ),
    ],
)
def test_mistakes(given, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    with pytest.raises(RecipeError, match=f'^{message}$'):
        Jobs(*given)


def test_a_job_has_a_log_and_an_exit_code(scripts):
    log = Path('folder/x.log')
    for code in (0, 3):
        with Jobs() as processes:
            job = processes.start([f'print({code}, flush=True); import os; os._exit({code})'], log)
            assert processes.running == [job] and processes.free == 0
            assert wait_until(processes.ended) == [job]
            assert job.process.returncode == code
            assert processes.running == [] and processes.free == 1
    assert log.read_text() == '0\n3\n' and tail(log) == '0\n3'


def test_the_end_of_a_long_log():
    Path('x.log').write_bytes(b'\xff\n' * 100_000 + b'last\n')
    assert tail(Path('gone.log')) == ''
    assert tail(Path('x.log')).splitlines() == ['\ufffd'] * 11 + ['last']


# A child that has the log, too, and says where it is.
PARENT = """
import subprocess, sys, time
child = 'import os, time; open("pid.tmp", "w").write(str(os.getpid())); os.rename("pid.tmp", "pid"); time.sleep(99)'
subprocess.Popen([sys.executable, '-S', '-c', child])
time.sleep(99)
"""
OF_ITS_OWN = PARENT.replace('child])', 'child], start_new_session=True)')


def test_what_is_left_of_a_job_is_ended(scripts):
    """Where its first process alone is killed, it would have the GPUs of the next one."""
    with Jobs() as processes:
        job = processes.start([PARENT], Path('x.log'))
        child = int(wait_until(lambda: Path('pid').exists() and Path('pid').read_text()))
        os.kill(job.process.pid, signal.SIGKILL)
        assert wait_until(processes.ended) == [job]
        wait_until(lambda: not is_alive(child))


def test_what_is_at_work_is_not_started_twice(scripts):
    """Not even if its parent is gone, and it has a session of its own."""
    log = Path('x.log')
    assert not is_at_work(log)
    with Jobs(2) as processes:
        job = processes.start([OF_ITS_OWN], log)
        assert is_at_work(log)
        assert processes.start(['pass'], log) is None and processes.free == 1
        child = int(wait_until(lambda: Path('pid').exists() and Path('pid').read_text()))
        os.kill(job.process.pid, signal.SIGKILL)
        assert wait_until(processes.ended) == [job]
        assert is_at_work(log)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not is_at_work(log))
        assert processes.start(['pass'], log)


DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open('pid.tmp', 'w').write(str(os.getpid()))
os.rename('pid.tmp', 'pid')
time.sleep(99)
"""


def test_one_that_is_to_end_ends(scripts, monkeypatch):
    monkeypatch.setattr(jobs, '_SECONDS_TO_END', 0.1)
    with Jobs(2) as processes:
        deaf, other = processes.start([DEAF], Path('x.log')), processes.start([PARENT], Path('y.log'))
        wait_until(lambda: Path('pid').exists())
        processes.end(deaf)
        assert deaf.process.returncode == -signal.SIGKILL
        assert processes.running == [other] and processes.free == 1


def test_a_signal_that_is_ignored_stays_so(scripts, heeded):
    """As with nohup."""
    heeded(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Jobs() as processes:
        job = processes.start(['import time; time.sleep(0.2)'], Path('x.log'))
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(job.process.pid, signal.SIGHUP)
        assert wait_until(processes.ended) == [job] and job.process.returncode == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('moment', ['while it is at work', 'while it is started'])
def test_a_signal_ends_all(number, moment, heeded, monkeypatch):
    def start(command, **more):
        process = POPEN([sys.executable, '-S', '-c', command[-1]], **more)
        started.append(process)
        if moment == 'while it is started':
            os.kill(os.getpid(), number)
        return process

    started = []
    monkeypatch.setattr(subprocess, 'Popen', start)
    before = heeded(number)
    with pytest.raises(KeyboardInterrupt), Jobs(2) as processes:
        processes.start(['import time; time.sleep(99)'], Path('x.log'))
        os.kill(os.getpid(), number)
        time.sleep(PATIENCE)
    assert signal.getsignal(number) == before
    assert [process.returncode for process in started] == [-signal.SIGTERM]
    assert not is_at_work(Path('x.log'))


def test_an_error_ends_all(scripts):
    with pytest.raises(ZeroDivisionError), Jobs() as processes:
        processes.start([PARENT], Path('x.log'))
        child = int(wait_until(lambda: Path('pid').exists() and Path('pid').read_text()))
        raise ZeroDivisionError
    wait_until(lambda: not is_alive(child))
