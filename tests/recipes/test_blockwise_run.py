"""Recipes whose students learn block by block: one student, however its blocks are dealt out."""

import json
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
from composer_kd.recipes import RecipeError, check, load, run
from helpers import in_forks, launched

BLOCKWISE = """\
model: {name: small_convnet, num_classes: 10, width: 4}
teachers: [{name: network, model: {name: small_convnet, num_classes: 10, width: 8}}]
train_data: {name: digits, split: train, batch_size: 256, shuffle_seed: '${seed}', drop_last: false}
eval_data: {name: digits, split: test, batch_size: 256}
max_duration: 3ep
seed: 3
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
schedulers: {cosine_annealing: {}}
device: cpu
blockwise: {cut: [stage1, stage2], loss: normalized_mse, label_weight: 0.5}
"""


KILLS = int(os.environ.get('COMPOSER_KD_KILLS', '1'))  # more of them take minutes
SECONDS = 60  # in which a launch ends after a kill: the time-out, and what it takes to begin where cores are few


def _run(*overrides):
    sys.stderr = sys.stdout
    cli.SECONDS_FOR_TEAM_ZERO = cli.SECONDS_FOR_RANK_ZERO = 0
    sys.exit(cli.run_recipe('x.yaml', overrides))


def launch(ranks, *overrides, **options):
    """A launch of the recipe; what each rank printed."""
    return in_forks(_run, ranks * [overrides], launched(ranks), 150, **options)


def student(folder):
    """The weights of the assembled student."""
    return torch.load(find_checkpoint(folder), weights_only=False)['state']['model']


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def recipe(write):
    return write('', 'x.yaml', BLOCKWISE)


@pytest.mark.dist
def test_the_student_is_the_same_however_its_blocks_are_dealt_out(recipe):
    (said,) = launch(1, 'run_name=joint')
    joint = student('runs/joint')
    summary = json.loads(Path('runs/joint/summary.json').read_text())
    assert 0 < summary['metrics']['metrics/eval/MulticlassAccuracy'] < 1
    assert {f'loss/train/block{number}' for number in range(3)} <= summary['metrics'].keys()
    assert summary['batches'] == 18 and summary['world_size'] == 1 and summary['stages'] == {'blocks0-2': 1}
    assert 'joint: 3 blocks, 18 batches, ' in said and 'checkpoint  runs/joint/checkpoints/latest-rank0.pt' in said
    # It fits the network of the recipe as it stands, and is what was evaluated.
    model = check(load('x.yaml')).model()
    model.load_state_dict(joint)

    ways = {
        'two': (2, 'blockwise.stages=[[1, 1], [2, 1]]'),
        'three': (3, 'blockwise.stages=[[1, 1], [1, 1], [1, 1]]'),
        'by_block': (1, 'blockwise.schedule=data_parallel'),
        'dealt': (2, 'blockwise.schedule=layer_split'),
    }
    for name, (ranks, override) in ways.items():
        said = launch(ranks, f'run_name={name}', override)
        assert same(student(f'runs/{name}'), joint), name
        own = json.loads(Path(f'runs/{name}/summary.json').read_text())
        for metric, value in summary['metrics'].items():
            assert own['metrics'][metric] == pytest.approx(value, rel=1e-6), (name, metric)
        assert own['world_size'] == ranks
        often = 3 if 'stages' in override else 1 + 2 + 3  # each of the teacher's blocks once, or all before each block
        assert own['teacher_block_runs'] == 18 * often
    assert json.loads(Path('runs/two/summary.json').read_text())['stages'] == {'block0': 1, 'blocks1-2': 1}
    assert {path.name for path in Path('runs/two').iterdir()} == {
        *('block0', 'blocks1-2', 'checkpoints', 'deal.json', 'recipe.yaml', 'summary.json'),
    }


@pytest.mark.dist
def test_a_pipeline_goes_on_from_where_it_was(recipe):
    stages, schedule = 'blockwise.stages=[[2, 1], [1, 1]]', 'schedulers={}'
    launch(2, 'run_name=whole', stages, schedule)
    # Of six batches in an epoch the last one is a small one.
    launch(2, 'run_name=parts', stages, schedule, 'max_duration=5ba', 'save_interval=1ba')
    launch(2, 'run_name=parts', stages, schedule, 'autoresume=true')
    assert same(student('runs/parts'), student('runs/whole'))
    launch(2, 'run_name=shared', 'blockwise.schedule=data_parallel', 'max_duration=2ba')
    assert json.loads(Path('runs/shared/summary.json').read_text())['world_size'] == 2


@pytest.mark.dist
def test_a_stage_that_is_killed_is_named_and_all_go_on_to_the_same_bits(recipe):
    chance = random.Random(17)
    own = (
        'blockwise.stages=[[1, 1], [1, 1], [1, 1]]',
        'train_data.batch_size=64',
        'save_interval=3ba',
        'dist_timeout=10',
    )
    launch(3, 'run_name=unbroken', *own)
    for number in range(KILLS):
        victim, killed_at = number % 3, []

        def kill(forks, victim=victim, killed_at=killed_at):
            end = time.monotonic() + 20
            while not Path('runs/broken/block2/metrics.jsonl').exists() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(chance.random())
            os.kill(forks[victim].pid, signal.SIGKILL)
            killed_at.append(time.monotonic())

        again, codes = ('run_name=broken', 'autoresume=true', *own), []
        said = launch(3, *again, codes=lambda ended: codes.extend(ended) or None not in ended, meanwhile=kill)
        assert time.monotonic() - killed_at[0] < SECONDS, said
        assert codes[victim] == -signal.SIGKILL and not any('Traceback' in one for one in said), said
        if any(code > 0 for code in codes):  # those who were done miss nobody
            names = f'stage {victim} rank 0', f'team {victim} rank 0'
            assert any(name in one and ('is gone' in one or 'did not come' in one) for name in names for one in said), (
                said
            )
        launch(3, *again)
        assert same(student('runs/broken'), student('runs/unbroken'))
        shutil.rmtree('runs/broken')


BAD = {
    'blockwise={cut: [stage9]}': r"blockwise: cut: teacher: there is no module 'stage9', after which to cut",
    'blockwise={cut: {teacher: [stage1]}}': r'cut has names for `teacher` and for `student`, not for teacher',
    'blockwise={cut: {teacher: [stage1], student: [stage1, stage2]}}': r'cut into 2 blocks, the student into 3',
    'blockwise={cut: {teacher: [stage1], student: [stage2]}}': r'after block 0 the teacher has samples of shape .* may',
    'blockwise={cut: [stage3]}': r'convolutions or linear layers that come next in the student, but something else',
    'blockwise={cut: [stage1], loss: l1}': r"blockwise\.loss: .*'l1'",
    'blockwise={cut: [stage1], depth: 0}': r'blockwise: depth must be 1 or more buffers, not 0',
    'blockwise={cut: [stage1], stages: [[3, 1]]}': r'stages: have 3 blocks together, but there are 2: change them',
    'blockwise={cut: [stage1], stages: [[1, 1], [1, 1]]}': r'have 2 devices .* there are 1: .* \(composer -n 2\)',
    'blockwise={cut: 9}': r'blockwise: the network can be cut into 1 to \d blocks, not 9',
    'blockwise={cut: [stage1], dtype: int8}': r'dtype must name a floating point dtype of torch',
    'algorithms={knowledge_distillation: {}}': r'algorithms are for networks as a whole; leave it out',
    'teachers=[]': r'one network teaches block by block',
    'teams=2': r'teams: blocks are dealt out to processes by a plan; leave it out',
}


@pytest.mark.parametrize(('override', 'message'), BAD.items(), ids=BAD)
def test_what_cannot_be(recipe, override, message):
    with pytest.raises(RecipeError, match=message) as error:
        run('x.yaml', [override, 'max_duration=1ba'])
    assert '\n' not in str(error.value) and not Path('runs').exists()
