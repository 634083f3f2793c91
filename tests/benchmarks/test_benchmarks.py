import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_kd import models
from composer_kd.recipes import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def import_as_a_script_does(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))


def check(output: str, benchmark: str) -> dict:
    """The last line of a script's output."""
    row = json.loads(output.splitlines()[-1])
    assert row['benchmark'] == benchmark
    assert row['ratios'] and all(math.isfinite(ratio) and ratio > 0 for ratio in row['ratios'].values())
    assert row['hardware']['cpu'] and row['hardware']['threads'] >= 1
    assert row['versions']['torch'] == torch.__version__.split('+')[0]
    assert f'{benchmark}.py' in row['command'] and '--quick' in row['command']
    return row


def test_step_time():
    done = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / 'step_time.py', '--quick', '--device', 'cpu'],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    row = check(done.stdout, 'step_time')
    assert {'composer_kd / plain_loop', 'composer_kd / (composer_student + teacher_forward)'} <= set(row['ratios'])
    # The Trainer does what the plain loops do, to the last bit.
    assert row['gaps']['composer_student'] == row['gaps']['composer_kd'] == 0


def test_step_time_has_no_result_for_other_work(monkeypatch):
    import step_time

    student, teacher = (models.small_convnet(num_classes=10, in_channels=3, width=width) for width in (4, 8))
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
    step_time.settle(teacher.module, batches[0][0])
    setting = step_time.Setting(student, teacher, 8, torch.device('cpu'))
    start = step_time.Variant(step_time.student_step, setting).weights()

    def trained(build):
        variant = step_time.Variant(build, setting)
        variant.turn(batches, steps=1)
        return variant

    variants = {build.__name__: trained(build) for build in step_time.OURS}
    assert step_time.compare(variants, start) == {'composer_student': 0, 'composer_kd': 0}
    monkeypatch.setattr(step_time, 'KD_WEIGHT', 0.85)
    variants['composer_kd'] = trained(step_time.composer_kd)
    with pytest.raises(SystemExit, match='composer_kd does other work than plain_loop'):
        step_time.compare(variants, start)


def test_twins(tmp_path, monkeypatch, capsys):
    script, yamls = ROOT / 'benchmarks' / 'twins.py', ROOT / 'yamls'
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def twins(*arguments):
        command = [script, yamls / 'digits.yaml', yamls / 'digits_kd.yaml', 'model.width=2', '--quick', *arguments]
        monkeypatch.setattr(sys, 'argv', [*map(str, command), '--runs-dir', str(tmp_path)])
        runpy.run_path(str(script), run_name='__main__')

    # One of the two runs is there already; the other is started.
    overrides = ['model.width=2', 'seed=17', 'max_duration=2ba', f'runs_dir={tmp_path}', 'run_name=digits-seed17']
    baseline = run(yamls / 'digits.yaml', overrides)
    twins()
    output = capsys.readouterr().out
    row = check(output, 'twins')
    assert row['seeds'] == [17] and row['device'] and 0 < row['teacher_share'] < 1
    assert row['train_seconds']['digits'] == [baseline['train_seconds']]
    assert row['difference'] == pytest.approx(row['quality']['digits_kd'][0] - row['quality']['digits'][0], abs=1e-6)
    assert '| digits_kd | ' in output
    assert 'max_duration: 2ba' in (tmp_path / 'digits_kd-seed17' / 'recipe.yaml').read_text()

    with pytest.raises(SystemExit, match=r'is a run of another recipe, which differs in optimizer\.lr'):
        twins('optimizer.lr=0.2')
    with pytest.raises(SystemExit, match='has no metrics/eval/F1; --metric can be: metrics/eval/'):
        twins('--metric', 'metrics/eval/F1')
