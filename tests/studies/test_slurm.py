"""Jobs of Slurm, of which stand-ins of its commands really run all; in most, a script takes the place of Composer."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm_stand_in
from study_parts import POPEN, ForkedLauncher

from composer_kd import cli
from composer_kd.recipes import RecipeError
from composer_kd.studies import slurm
from composer_kd.studies.rows import read_rows
from composer_kd.studies.slurm import SlurmLauncher

RECIPE = """\
seed: 3
max_duration: 2ep
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: digits, split: train, batch_size: 640}
eval_data: {name: digits, split: test, batch_size: 500}
optimizer: {name: decoupled_sgdw, lr: 0.1}
device: cpu
"""
SWEEP = """\
metric: metrics/eval/MulticlassAccuracy
grid: {max_duration: [1ep]}
methods:
  baseline: {recipe: plain.yaml, baseline: true}
"""
LOST = '  lost: {recipe: plain.yaml, overrides: {train_data: {name: fashion_mnist, split: train, batch_size: 8}}}\n'
RUN = ('--launcher', 'slurm', '--slurm', 'timeout_min=1')
SLEEPS = 'touch at-work; sleep 99'


@pytest.fixture(autouse=True)
def cluster(tmp_path, monkeypatch):
    (tmp_path / 'bin').mkdir()
    slurm_stand_in.install(tmp_path / 'bin')
    monkeypatch.setenv('SLURM_STAND_IN', str(tmp_path / 'bin' / 'state'))
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, '_SECONDS_BETWEEN_LOOKS', 0.2)
    monkeypatch.setattr(slurm, '_SECONDS_BETWEEN_QUESTIONS', 0.5)
    Path('plain.yaml').write_text(RECIPE)
    Path('s.yaml').write_text(SWEEP)
    Path('runs/s').mkdir(parents=True)
    yield
    if active := [job for job, facts in slurm_stand_in.jobs().items() if facts['state'] in slurm_stand_in.WAITING]:
        subprocess.run(['scancel', *active], check=True)


def calls(command):
    lines = Path('bin/state/calls.txt').read_text().splitlines()
    return [line for line in lines if line.startswith(command)]


def wait_for(condition):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def metrics(folder):
    return {
        row['cell']: {k: v for k, v in row['metrics'].items() if 'time' not in k} for row in read_rows(Path(folder))
    }


def cell(name, *arguments):
    """As much of a cell as a launcher looks at; it is finished when a file of its name is there."""
    return SimpleNamespace(
        name=name,
        arguments=[*arguments],
        log=Path(f'runs/s/{name}.log'),
        finished=lambda: {} if Path(name).exists() else None,
        is_at_work=lambda: False,
    )


def launcher(jobs=None, *options):
    return SlurmLauncher(Path('runs/s'), jobs, None, ['timeout_min=1', *options])


def all_ended(starter, count=1):
    ended = []
    wait_for(lambda: ended.extend(starter.ended()) or len(ended) >= count)
    return ended


def fork(work):
    """Do some work in a process of its own, as a driver that can be killed."""
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def test_a_sweep(capsys, monkeypatch):
    """One array; of what fails, the log's end; and the rows are those of the local launcher."""
    Path('s.yaml').write_text(SWEEP + LOST)
    assert cli.main(['sweep', 's.yaml', *RUN]) == 1
    said = capsys.readouterr()
    assert 'Slurm says FAILED of job 1000_' in said.out
    assert len(calls('sbatch')) == 1
    rows = {row['cell']: row for row in read_rows(Path('runs/s'))}
    assert [(row['method'], row['status']) for row in rows.values()] == [('baseline', 'finished'), ('lost', 'failed')]
    (lost,) = (row for row in rows.values() if row['status'] == 'failed')
    assert lost['cell'] in said.err and 'train_data' in lost['error']
    Path('runs/s').rename('on_slurm')
    monkeypatch.setattr(subprocess, 'Popen', ForkedLauncher)
    Path('s.yaml').write_text(SWEEP)
    pid = fork(lambda: cli.main(['sweep', 's.yaml']))
    os.waitpid(pid, 0)
    monkeypatch.setattr(subprocess, 'Popen', POPEN)
    assert metrics('runs/s') == {'baseline-1ep-seed17': metrics('on_slurm')['baseline-1ep-seed17']}


def test_two_nodes(capsys):
    assert cli.main(['sweep', 's.yaml', *RUN, '--slurm', 'nodes=2']) == 0, capsys.readouterr()
    (row,) = read_rows(Path('runs/s'))
    assert (row['status'], row['world_size']) == ('finished', 2)
    assert Path(f'runs/s/{row["cell"]}.node1.log').is_file()


SECOND_TIME = """
import pathlib, sys, time
if not pathlib.Path('at-work').exists():
    pathlib.Path('at-work').touch()
    time.sleep(99)
print(sys.argv)
pathlib.Path('x').touch()
"""


def test_a_job_that_runs_out_of_time_goes_on():
    """Slurm tells a job when its time is nearly over, and is asked to put it back into the queue."""
    Path('x.py').write_text(SECOND_TIME)
    with launcher() as starter:
        x = cell('x', 'x.py', 'a=1')
        assert starter.start([x]) == [x]
        wait_for(Path('at-work').exists)
        subprocess.run(['scancel', '1000', '--signal', 'USR2'], check=True)
        assert all_ended(starter) == [(x, None)]
    assert calls('scontrol') == ['scontrol requeue 1000'] and len(calls('srun')) == 2
    assert x.log.read_text() == "['x.py', 'a=1']\n"


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_ended(number, monkeypatch):
    """Killed, it leaves its jobs, for which the next one waits; asked to end, it cancels them."""
    monkeypatch.setenv('SLURM_STAND_IN_TASK', SLEEPS)

    def drive():
        with launcher() as starter:
            starter.start([cell('x')])
            while True:
                starter.ended()

    driver = fork(drive)
    wait_for(lambda: Path('runs/s/slurm/jobs.json').is_file() and Path('at-work').exists())
    os.kill(driver, number)
    os.waitpid(driver, 0)
    is_killed = number == signal.SIGKILL
    assert (slurm_stand_in.jobs()['1000']['state'] == 'CANCELLED by 0') != is_killed
    with launcher() as starter:
        assert starter.is_at_work(cell('x')) == is_killed
        assert not starter.is_at_work(cell('y'))
        if is_killed:
            subprocess.run(['scancel', '1000'], check=True)
            wait_for(lambda: not starter.is_at_work(cell('x')))


def test_a_driver_that_is_killed_while_it_submits(monkeypatch):
    """Its jobs are at work, and nobody has written down which run each of them is."""
    monkeypatch.setenv('SLURM_STAND_IN_TASK', SLEEPS)

    def drive():
        SlurmLauncher._write = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        with launcher() as starter:
            starter.start([cell('x'), cell('y')])

    os.waitpid(fork(drive), 0)
    todo = 'see whether squeue --name=s shows jobs of this study, scancel them, and delete '
    with pytest.raises(RecipeError, match=f'nobody knows which runs 1000_0, 1000_1 are; {todo}'), launcher():
        pass
    subprocess.run(['scancel', '1000_0', '1000_1'], check=True)
    with launcher() as starter:
        assert not starter.is_at_work(cell('x'))
    assert not Path('runs/s/slurm/submitting').exists()


def test_so_many_at_the_same_time(monkeypatch):
    """An array has as many jobs; the next one is sent when all of these have ended."""
    monkeypatch.setenv('SLURM_STAND_IN_TASK', 'touch x y; exit 0')
    with launcher(2) as starter:
        cells = [cell('x'), cell('y')]
        starter.start(cells)
        assert starter.free == 0 and json.loads(Path('runs/s/slurm/jobs.json').read_text()).keys() == {'x', 'y'}
        assert sorted((one.name, problem) for one, problem in all_ended(starter, 2)) == [('x', None), ('y', None)]
        assert starter.free > 0 and Path('runs/s/slurm/jobs.json').read_text() == '{}\n'


BAD = {
    'no time': ([], '--launcher slurm: say how many minutes a job may take, for instance --slurm timeout_min=600'),
    'no value': (['timeout_min'], '--slurm timeout_min: is written key=value'),
    'unknown': (['timeout_min=1', 'slurm_partitoin=x'], "--slurm slurm_partitoin: Unknown argument 'partitoin'"),
    'type': (['timeout_min=long'], '--slurm timeout_min: Parameter "timeout_min" expected type'),
}


@pytest.mark.parametrize('case', BAD)
def test_wrong_options(case, capsys):
    options, message = BAD[case]
    arguments = [word for option in options for word in ('--slurm', option)]
    assert cli.main(['sweep', 's.yaml', '--launcher', 'slurm', *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count('\n') == 1
    assert not [*Path('runs/s').iterdir()]


def test_what_is_not_there(monkeypatch, capsys):
    Path('bin/sbatch').unlink()
    assert cli.main(['sweep', 's.yaml', *RUN]) == 2
    todo = 'start this on a machine from which jobs are submitted'
    assert capsys.readouterr().err == f'--launcher slurm: there is no sbatch here; {todo}\n'
    monkeypatch.setitem(sys.modules, 'submitit', None)
    assert cli.main(['sweep', 's.yaml', *RUN]) == 2
    assert capsys.readouterr().err == "--launcher slurm needs submitit: pip install 'composer-kd[slurm]'\n"


def test_jobs_that_are_not_taken(capsys):
    Path('bin/sbatch').write_text('#!/bin/sh\necho "sbatch: error: invalid partition specified: x" >&2; exit 1\n')
    assert cli.main(['sweep', 's.yaml', *RUN]) == 1
    assert capsys.readouterr().err.splitlines() == [
        'sbatch: error: invalid partition specified: x',  # submitit passes it on as it comes
        '--launcher slurm: the jobs were not taken: sbatch: error: invalid partition specified: x',
    ]
