"""Sweeps whose runs are jobs of Slurm, of which stand-ins of its commands really run all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_stand_in

from composer_kd import cli
from composer_kd.studies import slurm
from composer_kd.studies.rows import read_rows

RECIPE = """\
seed: 3
max_duration: 2ep
model: {name: small_convnet, num_classes: 10, width: 2}
train_data: {name: digits, split: train, batch_size: 640}
eval_data: {name: digits, split: test, batch_size: 500}
optimizer: {name: decoupled_sgdw, lr: 0.1}
device: cpu
"""
TAUGHT = f"""\
{RECIPE}
teachers: [{{name: network, recipe: teacher.yaml}}]
algorithms: {{knowledge_distillation: {{}}}}
"""
SWEEP = """\
metric: metrics/eval/MulticlassAccuracy
grid: {max_duration: [1ep]}
methods:
  baseline: {recipe: plain.yaml, baseline: true}
"""
TAUGHT_SWEEP = f"""\
{SWEEP}
  kd: {{recipe: kd.yaml}}
  lost: {{recipe: plain.yaml, overrides: {{train_data: {{name: fashion_mnist, split: train, batch_size: 8}}}}}}
"""
RUN = ('--launcher', 'slurm', '--slurm', 'timeout_min=1')
DRIVER = [sys.executable, '-c', 'from composer_kd.cli import main; raise SystemExit(main())', 'sweep', 's.yaml', *RUN]


@pytest.fixture(autouse=True)
def cluster(tmp_path, monkeypatch):
    (tmp_path / 'bin').mkdir()
    slurm_stand_in.install(tmp_path / 'bin')
    monkeypatch.setenv('SLURM_STAND_IN', str(tmp_path / 'bin' / 'state'))
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, '_SECONDS_BETWEEN_LOOKS', 0.2)
    monkeypatch.setattr(slurm, '_SECONDS_BETWEEN_QUESTIONS', 0.5)
    for name, text in (('plain', RECIPE), ('teacher', RECIPE), ('kd', TAUGHT), ('s', SWEEP), ('taught', TAUGHT_SWEEP)):
        Path(f'{name}.yaml').write_text(text)
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


def test_a_sweep(capsys):
    """Teachers first; of what fails, the log's end; and the rows are those of the local launcher."""
    assert cli.main(['sweep', 'taught.yaml', *RUN]) == 1
    said = capsys.readouterr()
    assert 'Slurm says FAILED of job 1000_' in said.out
    assert len(calls('sbatch')) == 2
    rows = {row['cell']: row for row in read_rows(Path('runs/taught'))}
    assert sorted((row['role'], row['method'], row['status']) for row in rows.values()) == [
        ('student', 'baseline', 'finished'),
        ('student', 'kd', 'finished'),
        ('student', 'lost', 'failed'),
        ('teacher', 'teacher', 'finished'),
    ]
    (lost,) = (row for row in rows.values() if row['status'] == 'failed')
    assert lost['cell'] in said.err and 'train_data' in lost['error']
    shutil.move('runs/taught', 'on_slurm')
    assert cli.main(['sweep', 'taught.yaml']) == 1
    assert metrics('runs/taught') == metrics('on_slurm')


def test_two_nodes(capsys):
    assert cli.main(['sweep', 's.yaml', *RUN, '--slurm', 'nodes=2']) == 0, capsys.readouterr()
    (row,) = read_rows(Path('runs/s'))
    assert (row['status'], row['world_size']) == ('finished', 2)
    assert Path(f'runs/s/{row["cell"]}.node1.log').is_file()


def test_a_job_that_runs_out_of_time_goes_on(capsys):
    """Slurm tells a job when its time is nearly over, and is asked to put it back into the queue."""
    Path('plain.yaml').write_text(RECIPE.replace('640', '8'))
    Path('s.yaml').write_text(SWEEP.replace('1ep', '8ep'))
    with subprocess.Popen(DRIVER, stdout=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: list(Path('runs/s').glob('*/checkpoints/ep*')))
        subprocess.run(['scancel', '1000', '--signal', 'USR2'], check=True)
        said, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, said
    assert calls('scontrol') == ['scontrol requeue 1000'] and len(calls('srun')) == 2
    (row,) = read_rows(Path('runs/s'))
    assert (row['status'], row['epochs']) == ('finished', 8)
    shutil.move('runs/s', 'on_slurm')
    assert cli.main(['sweep', 's.yaml']) == 0
    assert metrics('runs/s') == metrics('on_slurm')


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_ended(number, capsys):
    """Killed, it leaves its jobs, for which the next one waits; asked to end, it cancels them."""
    with subprocess.Popen(DRIVER, stdout=subprocess.PIPE, text=True) as driver:
        wait_for(
            lambda: Path('runs/s/slurm/jobs.json').is_file() and slurm_stand_in.jobs()['1000']['state'] == 'RUNNING'
        )
        driver.send_signal(number)
        driver.communicate(timeout=240)
    is_killed = number == signal.SIGKILL
    assert (slurm_stand_in.jobs()['1000']['state'] == 'CANCELLED by 0') != is_killed
    assert cli.main(['sweep', 's.yaml', *RUN]) == 0
    said = capsys.readouterr().out
    assert ('waiting for another process' in said) == is_killed
    assert len(calls('sbatch')) == (1 if is_killed else 2)
    assert [row['status'] for row in read_rows(Path('runs/s'))] == ['finished']


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
    assert not Path('runs').exists()


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
