"""How much quicker a student learns block by block where stages relay what the teacher makes of a batch.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py [--quick] [--processes 2]

A depthwise-separable VGG-16 learns from a VGG-16 on images of noise, in four ways: as a relay; as a relay whose stages
wait for each other after each batch; one block after another on all processes; and with blocks dealt out to processes.
Each is a launch of `composer` on the same recipe; all take turns. A relay has a stage for each process, since stages of
several processes see other batches. Beside the ratios of their seconds of training stand those that the simulator
promises, from the profile of `composer-kd plan`. A ratio is the median over the rounds of the ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from row import row

from composer_kd.blockwise.forecast import Forecast, forecast
from composer_kd.blockwise.plan import Device, every, planned
from composer_kd.blockwise.profile import Profile
from composer_kd.teams import current

RECIPE = """\
seed: 17
max_duration: {batches}ba
model: {{name: cifar_vgg16, separable: true, width: {width}}}
teachers: [{{name: network, model: {{name: cifar_vgg16, width: {width}}}}}]
train_data:
  {{name: cifar10, split: train, batch_size: {batch_size}, synthetic: true, subset: {samples}, augment: false}}
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9}}
device: cpu
blockwise: {{cut: [stage1, stage2, stage3, stage4, stage5], loss: normalized_mse}}
"""
WAYS = {
    'relay': [],
    'relay with a barrier': ['callbacks={pipeline.Barrier: {}}'],
    'data parallel': ['blockwise.schedule=data_parallel'],
    'layer split': ['blockwise.schedule=layer_split'],
}


class Barrier(Callback):
    """Has all stages wait for each other after each batch."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """Join them."""
        team = current()
        assert team is not None
        self._channel = team.channel('barrier', 'cpu')
        self._channel.gather(torch.zeros(1))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Wait."""
        self._channel.gather(torch.zeros(1))


def promise(recipe: Path, processes: int, out: Path) -> Forecast:
    """The best plan with a stage for each process, and what it promises by the profile of `composer-kd plan`."""
    command = ['plan', str(recipe), '-n', str(processes), '--out', str(out)]
    subprocess.run([sys.executable, '-m', 'composer_kd', *command], check=True)
    costs, devices = Profile.load(out / 'profile.json').costs(processes), [Device()] * processes
    pipelines = [stages for stages in every(costs.blocks, processes) if len(stages) == processes]
    best = min((planned(costs, devices, stages) for stages in pipelines), key=lambda plan: plan.step)
    return forecast(costs, devices, best)


def launch(recipe: Path, processes: int, overrides: list[str]) -> float:
    """Seconds of training of a launch, for each batch."""
    command = [sys.executable, '-m', 'composer', '-n', str(processes), str(recipe), *overrides]
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parent)}  # for the barrier
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (folder,) = [each.partition('=')[2] for each in overrides if each.startswith('runs_dir=')]
    (name,) = [each.partition('=')[2] for each in overrides if each.startswith('run_name=')]
    summary = json.loads(Path(folder, name, 'summary.json').read_text())
    return summary['train_seconds'] / summary['batches']


def main() -> None:
    parser = argparse.ArgumentParser(description='Times the ways to learn block by block.')
    parser.add_argument('--quick', action='store_true', help='see that it works; the figures mean nothing')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--width', type=int, default=32)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--batches', type=int, default=40)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.width, arguments.batch_size, arguments.batches = 1, 4, 8, 3
    seconds = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, 'recipe.yaml')
        samples = arguments.batch_size * arguments.batches
        recipe.write_text(RECIPE.format(**vars(arguments), samples=samples))
        promised = promise(recipe, arguments.processes, Path(folder))
        stages = [[len(stage.blocks), 1] for stage in promised.plan.stages]
        for number in range(arguments.rounds):
            for name, overrides in WAYS.items():
                own = [f'run_name={name.replace(" ", "_")}-{number}', f'runs_dir={folder}/runs', *overrides]
                if name.startswith('relay'):
                    own.append(f'blockwise.stages={json.dumps(stages)}')
                seconds[name].append(launch(recipe, arguments.processes, own))
    ratios = {
        name: statistics.median(of / relay for of, relay in zip(seconds[name], seconds['relay'], strict=True))
        for name in WAYS
    }
    of_steps = {name: promised.steps[name] / promised.steps['relay'] for name in WAYS}
    print(f'\ncifar_vgg16 of width {arguments.width}, batches of {arguments.batch_size}, stages {stages}')
    print(f'{"": <24}{"s/step": >10}{"ratio": >8}{"promised": >10}')
    for name in WAYS:
        print(f'{name: <24}{statistics.median(seconds[name]): >10.4f}{ratios[name]: >8.3f}{of_steps[name]: >10.3f}')
    figures = {'seconds': seconds, 'ratios': ratios, 'promised': of_steps, 'stages': stages}
    print(row('pipeline', **figures, promised_seconds=promised.steps, setting=vars(arguments)))


if __name__ == '__main__':
    main()
