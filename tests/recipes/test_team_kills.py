"""Codistillation that is killed at any moment: a clear end within the time-out, and the same bits once it goes on."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from composer_kd import cli
from composer_kd.checkpoints import find_checkpoint
from helpers import in_forks, launched

pytestmark = pytest.mark.dist

RECIPE = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 64, shuffle_seed: '${seed}'}
eval_data: {name: digits, split: test, batch_size: 256}
max_duration: 4ep
save_interval: 3ba
seed: 3
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
device: cpu
dist_timeout: 10
teams: 2
algorithms: {codistillation: {exchange: EXCHANGE}}
"""
KILLS = int(os.environ.get('COMPOSER_KD_KILLS', '1'))  # of each case; more of them take minutes
SECONDS = 60  # in which a launch ends after a kill: the time-out, and what it takes to begin where cores are few


def _run(*overrides):
    cli.SECONDS_FOR_TEAM_ZERO = cli.SECONDS_FOR_RANK_ZERO = 0
    sys.stderr = sys.stdout
    sys.exit(cli.run_recipe('x.yaml', overrides))


def launch(ranks, *overrides, **options):
    return in_forks(_run, ranks * [overrides], launched(ranks), 150, **options)


def kept(run):
    """The weights of all teams."""
    paths = [find_checkpoint(Path('runs', run, team)) for team in ('team0', 'team1')]
    return [torch.load(path, weights_only=False)['state']['model'] for path in paths]


@pytest.mark.parametrize(
    ('exchange', 'ranks', 'kind'),
    [
        ('predictions', 2, 'first'),
        ('{name: weights, interval: 2ba}', 2, 'launch'),
        ('{name: weights, interval: 2ba}', 4, 'rank'),
    ],
)
def test_killed_at_any_moment(exchange, ranks, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('x.yaml').write_text(RECIPE.replace('EXCHANGE', exchange))
    launch(ranks, 'run_name=unbroken')
    chance = random.Random(f'{exchange} {ranks}')
    kinds = {'rank': [ranks - 1], 'first': [0], 'team': [*range(ranks // 2, ranks)], 'launch': [*range(ranks)]}
    for number in range(KILLS):
        victims, killed_at = kinds[chance.choice([*kinds]) if number else kind], []

        def kill(forks, victims=victims, killed_at=killed_at):
            end = time.monotonic() + 20
            while not Path('runs/broken/team1/metrics.jsonl').exists() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(chance.random() * 2)
            for rank in victims:
                if forks[rank].is_alive():
                    os.kill(forks[rank].pid, signal.SIGKILL)
            killed_at.append(time.monotonic())

        again = ('run_name=broken', 'autoresume=true')
        codes = []
        said = launch(ranks, *again, codes=lambda ended: codes.extend(ended) or None not in ended, meanwhile=kill)
        assert time.monotonic() - killed_at[0] < SECONDS, said
        # Who misses a partner says so, in a line; only team-mates of who has ended end with torch's own error. Who was
        # done with its work when the others were killed misses nobody.
        assert ranks > 2 or not any('Traceback' in one for one in said), said
        if any(code > 0 for code in codes):
            assert any('is gone' in one or 'did not come' in one for one in said), said
        if not Path('runs/broken/summary.json').exists():
            launch(ranks, *again)
        for ours, theirs in zip(kept('broken'), kept('unbroken'), strict=True):
            assert all(torch.equal(ours[name], value) for name, value in theirs.items()), victims
        shutil.rmtree('runs/broken')
