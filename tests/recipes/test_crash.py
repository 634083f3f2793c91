"""A run that is killed in the middle goes on to the weights that it would have had."""

import signal
import time
from pathlib import Path

import torch

from composer_kd.recipes import run
from helpers import in_a_fork

RECIPE = """\
seed: 3
max_duration: 6ep
model: {name: small_convnet, num_classes: 10, width: 4}
teachers: [{name: network, model: {name: small_convnet, num_classes: 10, width: 8, depth: 2}}]
train_data: {name: digits, split: train, batch_size: 64}
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
algorithms: {knowledge_distillation: {}, early_stop_distillation: {stop: 0.7dur, ramp: 0.3dur}}
save_interval: 3ba
device: cpu
"""


def test_killed_and_resumed_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('run.yaml').write_text(RECIPE)
    Path('killed.yaml').write_text(RECIPE)
    checkpoints = Path('runs/killed/checkpoints')
    patience = time.monotonic() + 120
    with in_a_fork(run, 'killed.yaml') as process:
        while not any(checkpoints.glob('ep*.pt')) and time.monotonic() < patience:
            time.sleep(0.01)
    assert process.exitcode == -signal.SIGKILL, 'it ended before it could be killed'
    assert not Path('runs/killed/summary.json').exists()

    unbroken, resumed = run('run.yaml'), run('killed.yaml', ['autoresume=true'])
    assert resumed['teacher_forwards'] == unbroken['teacher_forwards'] > 0
    states = [
        torch.load(Path('runs', name, summary['checkpoint']), weights_only=False)['state']['model']
        for name, summary in (('run', unbroken), ('killed', resumed))
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
