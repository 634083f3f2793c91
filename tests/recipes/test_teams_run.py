"""Recipes of several teams: N lone runs in one launch, that begin and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from composer_kd import cli
from composer_kd.checkpoints import find_checkpoint
from composer_kd.recipes import RecipeError, check, load, run
from composer_kd.recipes.metrics_logger import read_metrics
from composer_kd.recipes.team_run import TeamRun, best
from helpers import in_forks, launched

HEAD = """\
model: {name: small_convnet, num_classes: 10, width: 4}
train_data: {name: digits, split: train, batch_size: 256, shuffle_seed: '${seed}'}
eval_data: {name: digits, split: test, batch_size: 256}
max_duration: 3ep
seed: 3
optimizer: {name: decoupled_sgdw, lr: 0.1, momentum: 0.9}
device: cpu
"""

TEAMS = ('team0', 'team1')


def _run(*overrides):
    """Run the recipe on this rank; errors are printed where the rest is."""
    sys.stderr = sys.stdout
    _run_apart(*overrides)


def _run_apart(*overrides):
    """Run the recipe on this rank."""
    cli.SECONDS_FOR_TEAM_ZERO = 0
    sys.exit(cli.run_recipe('x.yaml', overrides))


def launch(ranks, *overrides, codes=None, work=_run):
    """A launch of the recipe; what each rank printed."""
    return in_forks(work, ranks * [overrides], launched(ranks), 120, codes)


def launch_lone(ranks, *overrides):
    """Two launches of the recipe at the same time, each without teams, with the seeds of two teams."""
    calls = [(f'run_name=lone{index}', f'seed={3 + index}', *overrides) for index in range(2) for _ in range(ranks)]
    in_forks(_run, calls, [*launched(ranks), *launched(ranks)], 120)


def summary(folder):
    return json.loads(Path(folder, 'summary.json').read_text())


def weights(folder):
    return torch.load(Path(folder, summary(folder)['checkpoint']), weights_only=False)['state']['model']


def rows(folder):
    """What was logged, but for what the clock says."""
    return [
        {name: value for name, value in row.items() if name != 'seconds'}
        for row in read_metrics(Path(folder, 'metrics.jsonl'))
    ]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.dist
def test_two_teams_are_two_lone_runs_however_often_they_are_killed(write):
    """Team 1 is killed in the third epoch, team 0 goes on to its end; resumed, team 1 does, too."""
    write('callbacks: {parts.KilledOnce: {}}\n', 'x.yaml', HEAD)
    both = ('teams=2', 'dist_timeout=10')
    said = launch(2, *both, codes=[1, -signal.SIGKILL])
    lines = said[0].splitlines()
    assert lines[-1].startswith('command line: teams: the end of the launch: team 1 did not come within 9 s; look for')
    assert not Path('runs/x/summary.json').exists()
    kept = {path: sorted(one.name for one in Path('runs/x', path, 'checkpoints').glob('ep*')) for path in TEAMS}
    assert kept == {
        'team0': ['ep2-ba10-rank0.pt', 'ep3-ba15-rank0.pt'],
        'team1': ['ep1-ba5-rank0.pt', 'ep2-ba10-rank0.pt'],
    }

    said = launch(2, *both, 'autoresume=true')
    assert all(line.startswith('team1: ') for line in said[1].splitlines()) and 'x-team1: 3 epochs' in said[1]
    launch_lone(1)
    for index in range(2):
        assert same(weights(f'runs/x/team{index}'), weights(f'runs/lone{index}'))
        assert rows(f'runs/x/team{index}') == rows(f'runs/lone{index}')
    assert not same(weights('runs/x/team0'), weights('runs/x/team1'))
    kept = [sorted(one.name for one in Path('runs/x', path, 'checkpoints').glob('ep*')) for path in TEAMS]
    assert kept == 2 * [['ep2-ba10-rank0.pt', 'ep3-ba15-rank0.pt']]

    found, teams = summary('runs/x'), [summary(f'runs/x/{name}') for name in TEAMS]
    accuracy = 'metrics/eval/MulticlassAccuracy'
    number = max(range(2), key=lambda index: teams[index]['metrics'][accuracy])
    assert (found['best_team'], found['best_by'], found['run_name']) == (number, accuracy, 'x')
    assert found['teams'] == {name: one['metrics'] for name, one in zip(TEAMS, teams, strict=True)}
    assert found['metrics'] == teams[number]['metrics']
    assert found['checkpoint'] == f'team{number}/{teams[number]["checkpoint"]}'
    assert f'x: team{number} is the best of 2 by {accuracy}' in said[0]
    assert find_checkpoint('runs/x') == Path('runs/x', found['checkpoint']).resolve()

    # The best is a teacher, each team a run, and a launch of another number another launch.
    knows = ['teachers=[{name: network, runs: runs/x}]', 'algorithms.knowledge_distillation={}', 'max_duration=1ba']
    assert run('x.yaml', [*knows, 'run_name=taught'])['teacher_forwards'] == 1
    assert run('runs/x/team1/recipe.yaml', ['autoresume=true'])['run_name'] == 'team1'
    with pytest.raises(RecipeError, match='runs/x is of 2 teams, not 1; give teams=2, or choose another run_name'):
        run('x.yaml', ['autoresume=true'])


@pytest.mark.dist
def test_two_teams_of_two_ranks_are_two_lone_runs_of_two(write):
    write('', 'x.yaml', HEAD)
    launch(4, 'teams=2', 'run_name=both', 'max_duration=1ep')
    launch_lone(2, 'max_duration=1ep')
    for index in range(2):
        assert same(weights(f'runs/both/team{index}'), weights(f'runs/lone{index}'))
        assert summary(f'runs/both/team{index}')['world_size'] == 2
    assert sorted(path.name for path in Path('runs/both').iterdir()) == [
        *('checkpoints', 'recipe.yaml', 'summary.json', 'team0', 'team1')
    ]


@pytest.mark.dist
def test_one_team_trains_the_teacher_of_all(write):
    write('', 'teacher.yaml', HEAD)
    write(
        'teams: 2\nteachers: [{name: network, recipe: teacher.yaml}]\nalgorithms: {knowledge_distillation: {}}\n',
        'x.yaml',
        HEAD,
    )
    said = launch(2, 'max_duration=1ep', work=_run_apart)
    assert sum(out.count('training the teacher teacher.yaml in runs/teacher') for out in said) == 1
    assert sum(out.count('found the teacher') for out in said) <= 1
    assert all(line.startswith('team1: ') for line in said[1].splitlines()) and 'x-team1: 1 epochs' in said[1]
    assert 'x: team' in said[0] and 'team1: ' not in said[0]
    assert sorted(path.name for path in Path('runs').iterdir()) == ['teacher', 'x']
    assert [summary(f'runs/x/{name}')['teacher_forwards'] for name in TEAMS] == [5, 5]


@pytest.mark.dist
def test_the_error_of_a_team_ends_the_launch(write):
    """With Composer's own launcher."""
    write('teams: 2\ncallbacks: {parts.MeetsUntilOneFails: {}}\n', 'x.yaml', HEAD)
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parent), 'PYTHONWARNINGS': 'ignore'}
    command = [sys.executable, '-m', 'composer', '-n', '2', '-m', 'composer_kd', 'x.yaml']
    begin = time.monotonic()
    done = subprocess.run(
        command, env=environment | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=200
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0 and time.monotonic() - begin < 100
    assert 'ZeroDivisionError: team 1 has had enough' in said
    assert 'is gone' not in said.split('team 1 has had enough')[0]


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ('teams: 0\n', '4: teams: must be how many teams there are, 1 or more, not 0'),
        ('teams: true\n', '4: teams: must be how many teams there are, 1 or more, not True'),
        ("teams: '2'\n", "4: teams: must be how many teams there are, 1 or more, not '2'"),
        ('teams: 2\nseed: 4294967294\n', '5: seed: must be from 0 to 2**32 - 3, not 4294967294'),
        (
            'teachers: [{name: network, recipe: two.yaml}]\nalgorithms: {knowledge_distillation: {}}\n',
            '4: teachers.0.recipe: two.yaml is a recipe of 2 teams; let them train first and give their folder as',
        ),
    ],
)
def test_what_cannot_be(write, more, message):
    write('teams: 2\n', 'two.yaml')
    with pytest.raises(RecipeError) as error:
        check(load(write(more)))
    assert str(error.value).startswith(f'x.yaml:{message}')
    assert check(load('two.yaml', ['teams=1'])).recipe.config.get('teams') is None


def test_processes_that_cannot_be_so_many_teams(write, monkeypatch):
    write('', 'x.yaml', HEAD)
    for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.setenv(name, '4')
    with pytest.raises(RecipeError) as error:
        run('x.yaml', ['teams=3'])
    assert str(error.value).startswith('command line: teams: 4 processes cannot be 3 teams, but 1 or 2 or 4: ')
    assert error.value.exit_code == 2
    assert not Path('runs').exists()


LOSS, ENTROPY, ACCURACY = 'loss/train/total', 'metrics/eval/CrossEntropy', 'metrics/eval/MulticlassAccuracy'


@pytest.mark.parametrize(
    ('metrics', 'decision'),
    [
        ([{LOSS: 1, ENTROPY: 1, ACCURACY: 0.5}, {LOSS: 2, ENTROPY: 2, ACCURACY: 0.6}], (1, ACCURACY)),
        ([{LOSS: 1, ENTROPY: 2}, {LOSS: 2, ENTROPY: 1}], (1, ENTROPY)),
        ([{LOSS: 3}, {LOSS: 2}, {LOSS: 1}, {LOSS: 1}], (2, LOSS)),
        ([{ACCURACY: 'nan'}, {ACCURACY: 0.1}], (1, ACCURACY)),
        ([{LOSS: 'nan'}, {LOSS: 5}], (1, LOSS)),
        ([{}, {}], (0, LOSS)),
    ],
)
def test_the_best(metrics, decision):
    assert best(metrics) == decision


CODISTILLED = """\
algorithms: {codistillation: {exchange: EXCHANGE}}
teams: 2
"""


def test_the_store_is_gone_at_the_end(write):
    def is_gone(*_):
        raise RuntimeError('Broken pipe')

    team = SimpleNamespace(index=0, number=2, rank=0, timeout=1, store=HashStore(), channel=lambda *_: None)
    run_of_team = TeamRun(team, load(write('teams: 2\n')), in_step=True)
    run_of_team._store = SimpleNamespace(set=lambda *_: None, wait=is_gone, check=is_gone, add=is_gone)
    with pytest.raises(RecipeError, match='teams: the end of the launch: team 0 rank 0 is gone; look for'):
        run_of_team.conclude({})


@pytest.mark.dist
def test_teams_that_teach_each_other(write):
    """The same batches for predictions, disjoint halves for weights; each ends like its twin that was broken off."""
    write(CODISTILLED.replace('EXCHANGE', 'predictions'), 'x.yaml', HEAD)
    again = ('run_name=again', f'save_folder={Path("saved").absolute()}')
    launch(2)
    launch(2, *again, 'max_duration=1ep')
    launch(2, *again, 'max_duration=3ep', 'autoresume=true')
    for name in TEAMS:
        assert same(weights(f'runs/x/{name}'), weights(f'runs/again/{name}'))
        assert check(load(f'runs/x/{name}/recipe.yaml'))  # as a teacher, say
    assert not same(weights('runs/x/team0'), weights('runs/x/team1'))
    assert any('codistillation/bytes' in row for row in rows('runs/x/team1'))

    # They go on from the latest batch of which both have a checkpoint, if there is one.
    def lose_the_last():
        Path('saved/team1/ep3-ba15-rank0.pt').unlink()
        Path('saved/team1/latest-rank0.pt').unlink()

    lose_the_last()
    said = launch(2, *again, 'autoresume=true')
    assert 'going back from batch 15 to 10, which all teams have a checkpoint of' in said[0]
    assert same(weights('runs/x/team1'), weights('runs/again/team1'))
    lose_the_last()
    Path('saved/team0/ep2-ba10-rank0.pt').unlink()
    folders = ['runs/again', *(f'runs/again/{name}' for name in TEAMS)]
    before = [summary(folder) for folder in folders]
    said = launch(2, *again, 'autoresume=true', codes=[1, 1])
    line = (
        'x.yaml:9: teams: the teams have no checkpoints of the same batch (team0: 15; team1: 10); delete them to start '
        'anew\n'
    )
    assert said == [line, f'team1: {line}'] and [summary(folder) for folder in folders] == before

    weights_exchange = '{name: weights, interval: 2ba}'
    write(CODISTILLED.replace('EXCHANGE', weights_exchange), 'x.yaml', HEAD.replace('256', '128'))
    launch(2, 'run_name=weights', 'max_duration=2ep')
    parts = [load(f'runs/weights/{name}/recipe.yaml').config['train_data']['part'] for name in TEAMS]
    assert parts == [[0, 2], [1, 2]]
    assert summary('runs/weights/team0')['batches'] == 2 * (1437 // 2 // 128)
    assert summary('runs/weights/team0')['teacher_forwards'] > 0


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ('algorithms: {codistillation: {}}\n', '4: algorithms.codistillation: codistillation needs two teams or more'),
        (CODISTILLED.replace('EXCHANGE', 'gossip'), "4: algorithms.codistillation: unknown exchange 'gossip'; known: "),
        ('teams: 2\nteam_data: all\n', "5: team_data: must be one of same, shared, disjoint, not 'all'"),
        ('team_data: same\n', '4: team_data: is for several teams; add `teams: 2`, or leave it out'),
        (
            CODISTILLED.replace('EXCHANGE', 'predictions') + 'team_data: shared\n',
            '6: team_data: predictions are exchanged about the same batches',
        ),
        (
            CODISTILLED.replace('EXCHANGE', 'predictions') + 'save_num_checkpoints_to_keep: 1\n',
            '6: save_num_checkpoints_to_keep: teams that learn from each other need their last two, to go on from',
        ),
        (
            CODISTILLED.replace('EXCHANGE', 'predictions') + 'save_interval: 600sec\n',
            '6: save_interval: 600sec comes in another batch in each team; give it in batches, samples or epochs',
        ),
        (
            CODISTILLED.replace('EXCHANGE', 'weights') + 'save_interval: 9tok\n',
            '6: save_interval: 9tok comes in another batch in each team; give it in batches, samples or epochs',
        ),
        (
            CODISTILLED.replace('EXCHANGE', '{name: folder, path: x, team: 0, teams: 2}'),
            '4: algorithms.codistillation: a folder joins launches that are one team each',
        ),
        (
            CODISTILLED.replace('EXCHANGE', 'predictions').replace(
                'codistillation', 'knowledge_distillation: {}, codistillation'
            ),
            "4: algorithms.codistillation: one distilling algorithm per run; there is 'knowledge_distillation' already",
        ),
        (
            CODISTILLED.replace('EXCHANGE', 'predictions') + 'teachers: [{name: network, model: {name: resnet18}}]\n',
            '6: teachers: nothing learns from them; add knowledge_distillation',
        ),
    ],
)
def test_codistillation_that_cannot_be(write, more, message):
    with pytest.raises(RecipeError) as error:
        check(load(write(more)))
    assert str(error.value).startswith(f'x.yaml:{message}')
