"""Codistillation among real teams, against plain loops of several models in one process, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from composer_kd import Codistillation
from composer_kd.exchange import FolderExchange
from composer_kd.losses import kl
from helpers import in_teams
from settings import BATCHES, EPOCHS, data, network

pytestmark = pytest.mark.dist

START = """
import time
import warnings
from pathlib import Path

import torch
from composer import Callback
from composer.models import ComposerClassifier
from composer.core import Event

from composer_kd import Codistillation, EarlyStopDistillation, TeacherSampling
from composer_kd.data import data_spec
from composer_kd.teachers import TeacherError
from settings import classifier, data, logged, train, trainer, weights

warnings.simplefilter('ignore')
folder = Path({folder!r})
me = team.index

def normalized(seed):
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Flatten()]
    return ComposerClassifier(torch.nn.Sequential(*layers, torch.nn.Linear(108, 5)), num_classes=5)

def learned(run):
    # But for what ranks do not share.
    return {{name: value for name, value in weights(run).items() if 'running' not in name}}

def run(*algorithms, **options):
    options = {{'model': classifier(1 + me), 'seed': 3 + me, **options}}
    return train([*algorithms], **options)

def keep(run, name):
    torch.save(learned(run), folder / f'{{name}}-team{{me}}-rank{{team.rank}}.pt')

def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in others)
"""


def teams(code, folder, number=2, ranks=None):
    """Run code in each process of so many teams; what each printed."""
    return in_teams(number, START.format(folder=str(folder)) + code, ranks=ranks or number)


def kept(folder, name, team, rank=0):
    return torch.load(folder / f'{name}-team{team}-rank{rank}.pt', weights_only=True)


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in others)


def plain_loop(number, teach):
    """Models that learn side by side; `teach(models, images, logits, index, batch)` gives what one of them is told."""
    torch.set_num_threads(1)  # as the teams have
    models = [network(1 + index) for index in range(number)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    loader, batch = data(), 0
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            logits = [model(images) for model in models]
            losses = []
            for index in range(number):
                loss = F.cross_entropy(logits[index], labels)
                told = teach(models, images, [one.detach() for one in logits], index, batch)
                losses.append(
                    loss if told is None else 1.0 * loss + 1.0 * kl(student_logits=logits[index], teacher_logits=told)
                )
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            batch += 1
    assert batch == BATCHES
    return [{f'module.{name}': value for name, value in model.state_dict().items()} for model in models]


def test_predictions_are_those_of_the_same_batch(tmp_path):
    code = """
run = run(Codistillation())
keep(run, 'run')
sent = logged(run, 'codistillation/bytes')
assert [*sent.values()] == 8 * [32 * 5 * 4 + 32 * 8], sent  # logits, and a fingerprint of each sample
assert set(logged(run, 'distillation/active').values()) == {1.0}
assert run.state.algorithms[-1].distillation.pool.forwards == 0
"""
    teams(code, tmp_path)
    expected = plain_loop(2, lambda models, images, logits, index, batch: logits[1 - index])
    for index in range(2):
        assert same(kept(tmp_path, 'run', index), expected[index])


def test_weights_are_those_of_the_documented_batch(tmp_path):
    """Snapshots after batches 2, 4, 6 are in use after 4, 6, 8: nothing distills in the first four.

    Nor does a team wait for another one before it takes such a snapshot into use.
    """
    code = """
class Apart(Callback):
    # Once team 1 has told its weights after batch 2, it stops until team 0 has learned in all batches before the 6th.
    def batch_end(self, state, logger):
        if me == 0 and state.timestamp.batch == 5:
            (folder / 'far ahead').touch()

    def batch_start(self, state, logger):
        while me == 1 and state.timestamp.batch == 2 and not (folder / 'far ahead').exists():
            time.sleep(0.01)

run = run(Codistillation(exchange={'name': 'weights', 'interval': '2ba'}), callbacks=[Apart()])
keep(run, 'run')
size = sum(tensor.nbytes for tensor in weights(run).values())
assert logged(run, 'codistillation/bytes') == dict.fromkeys((2, 4, 6, 8), size), logged(run, 'codistillation/bytes')
assert [*logged(run, 'distillation/active').values()] == [0, 0, 0, 0, 1, 1, 1, 1]
assert [*logged(run, 'codistillation/staleness').values()][:4] == [2, 3, 2, 3]
pool = run.state.algorithms[-1].distillation.pool
assert pool.forwards == 4
for teacher in pool.teachers:
    assert not teacher.copy.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.copy.parameters())
"""
    said = teams(code, tmp_path)
    assert said == ['', '']
    pending, in_use = [None, None], [None, None]

    def teach(models, images, logits, index, batch):
        nonlocal pending, in_use
        if batch % 2 == 0 and index == 0 and batch:
            pending, in_use = [{k: v.clone() for k, v in model.state_dict().items()} for model in models], pending
        if in_use[1 - index] is None:
            return None
        peer = network(0)
        peer.load_state_dict(in_use[1 - index])
        with torch.no_grad():
            return peer.eval()(images)

    expected = plain_loop(2, teach)
    for index in range(2):
        assert same(kept(tmp_path, 'run', index), expected[index])


EVERY = {
    'predictions': 'Codistillation()',
    'weights': "Codistillation(exchange={'name': 'weights', 'interval': '2ba'})",
    'bfloat16': "Codistillation({'name': 'weights', 'interval': '3ba', 'dtype': 'bfloat16'}, probability=0.56)",
    'window': "EarlyStopDistillation('6ba', start='1ba', ramp='2ba'), Codistillation(loss='mse')",
    'over': "Codistillation(exchange={'name': 'weights', 'interval': '1ba'}), EarlyStopDistillation('4ba')",
}


@pytest.mark.parametrize('setting', EVERY)
def test_resume_of_both_teams_is_bitwise_the_unbroken_run(setting, tmp_path):
    ranks = 4 if setting == 'weights' else 2
    code = f"""
classifier = normalized
saving = {{'save_folder': str(folder / f'team{{me}}'), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}}
unbroken = run({EVERY[setting]}, **saving)
assert any(logged(unbroken, 'distillation/active').values())
for batch in (1, 3, 5, 6):
    path = str(folder / f'team{{me}}' / f'ep{{batch // 4}}-ba{{batch}}-rank0.pt')
    resumed = run({EVERY[setting]}, model=classifier(50 + me), load_path=path)
    assert same(learned(resumed), learned(unbroken)), batch
"""
    teams(code, tmp_path, ranks=ranks)


def test_ranks_of_a_team_are_alike_and_teams_are_not(tmp_path):
    code = """
classifier = normalized
for name, exchange in (('predictions', 'predictions'), ('weights', {'name': 'weights', 'interval': '2ba'})):
    done = run(Codistillation(exchange=exchange), save_folder=str(folder / f'{name}{me}'), save_interval='6ba')
    keep(done, name)
    keep(run(Codistillation(exchange=exchange, kd_weight=0.0)), f'silent {name}')
    parts = trainer([Codistillation(exchange=exchange)], model=classifier(1 + me), seed=3 + me, max_duration='1ep')
    parts.fit()
    parts.fit(duration='1ep')
    parts.close()
    keep(parts, f'{name} in parts')
keep(run(), 'alone')
codistillation = done.state.algorithms[-1]
(peer,) = codistillation.distillation.pool.teachers
torch.save(peer.copy.state_dict(), folder / f'copy-team{me}-rank{team.rank}.pt')
assert (codistillation.exchange._own is None) == (team.rank > 0)  # rank 0 alone saves it
"""
    teams(code, tmp_path, ranks=4)
    for name in ('predictions', 'weights'):
        for index in range(2):
            assert same(kept(tmp_path, name, index, 0), kept(tmp_path, name, index, 1))
            assert not same(kept(tmp_path, name, index), kept(tmp_path, 'alone', index))
            assert same(kept(tmp_path, name, index), kept(tmp_path, f'{name} in parts', index))
            assert same(kept(tmp_path, f'silent {name}', index), kept(tmp_path, 'alone', index))
        assert not same(kept(tmp_path, name, 0), kept(tmp_path, name, 1))
    for index in range(2):  # snapshots are of all weights, and of what BatchNorm has counted
        saved = torch.load(tmp_path / f'weights{1 - index}' / 'ep1-ba6-rank0.pt', weights_only=False)['state']['model']
        assert any('running' in name for name in saved)
        assert all(same(kept(tmp_path, 'copy', index, rank), saved) for rank in range(2))


def test_three_teams_by_the_mean_of_probabilities_and_by_pairs(tmp_path):
    """Of kl both have the same gradient; sampled, a peer at a time is heard, though all tell."""
    code = """
for average in ('probabilities', 'losses'):
    keep(run(Codistillation(average=average), max_duration='2ba'), average)
try:
    run(Codistillation({'name': 'predictions', 'top': 2}))
except TeacherError as error:
    print(error)
done = run(Codistillation(), TeacherSampling())
chosen = [*logged(done, 'distillation/teacher_index').values()]
assert set(chosen) == {0, 1} and len(chosen) == 8
"""
    said = teams(code, tmp_path, number=3)
    assert all('the largest logits of several peers are sent, which cannot be averaged: take' in one for one in said)
    for index in range(3):
        pairs = kept(tmp_path, 'losses', index)
        for name, value in kept(tmp_path, 'probabilities', index).items():
            torch.testing.assert_close(value, pairs[name], rtol=1e-4, atol=1e-6)


def test_the_largest_logits_are_enough_where_there_are_many(tmp_path):
    code = """
done = run(Codistillation(exchange={'name': 'predictions', 'top': 2}), max_duration='2ba')
assert set(logged(done, 'codistillation/bytes').values()) == {32 * (2 * 4 + 2 * 4 + 4) + 32 * 8}
for algorithms in (
    [Codistillation(exchange={'name': 'predictions', 'top': 2}, loss='mse')],
    [Codistillation(), EarlyStopDistillation('600sec')],
):
    try:
        run(*algorithms)
    except TeacherError as error:
        print(error)
"""
    said = teams(code, tmp_path)
    assert said == 2 * [
        "only the largest logits are sent, which are enough for loss='kl' alone: leave out top\n"
        '600sec comes in another batch in each team: give it in batches, samples or epochs\n'
    ]


WRONG = {
    'seed': ('seed=3', 'Codistillation()', 'team0 and team1 both have the seed 3; models that are alike'),
    'weights': (
        'model=classifier(1)',
        'Codistillation()',
        'team0 and team1 begin with the same weights; they have nothing',
    ),
    'architecture': (
        'model=classifier(1 + me, width=6 + me)',
        "Codistillation(exchange='weights')",
        'as architecture, team1 has',
    ),
    'interval': ('', 'Codistillation(interval=1 + me)', 'team0 has 1 as interval, team1 has 2: make these the same'),
    'exchange': (
        '',
        "Codistillation(exchange=['predictions', 'weights'][me])",
        'team0 has predictions as exchange, team1 has weights: make these the same',
    ),
    'window': ('', "Codistillation(), EarlyStopDistillation(['4ba', '5ba'][me])", 'as stop, team1 has '),
    'temperature': (
        '',
        'Codistillation(temperature=1.0 + me)',
        'team0 has 1.0 as temperature of kl, team1 has 2.0: make these the same',
    ),
    'duration': ("max_duration=f'{2 + me}ep'", 'Codistillation()', 'as max_duration, team1 has '),
    'samplers': (
        'train_dataloader=data_spec(data().dataset.dataset, batch_size=32, train=True, shuffle_seed=me)',
        'Codistillation()',
        'the teams see other inputs than each other in the first batch that distills: predictions are exchanged about',
    ),
    'later': (
        'callbacks=[Spoiled()]',
        'Codistillation()',
        'the teams see other inputs than each other in batch 2: predictions are exchanged about the same',
    ),
}


def test_teams_that_do_not_go_together(tmp_path):
    cases = ''.join(
        f'({name!r}, lambda: dict({options}), lambda: [{algorithms}]),\n'
        for name, (options, algorithms, _) in WRONG.items()
    )
    code = f"""
class Spoiled(Callback):
    def before_forward(self, state, logger):
        if me == 1 and state.timestamp.batch == 2:
            state.batch = state.batch[0].flip(-1), state.batch[1]

for name, options, algorithms in [{cases}]:
    try:
        run(*algorithms(), **options())
    except TeacherError as error:
        print(name, error)
"""
    for said in teams(code, tmp_path):
        lines = said.splitlines()
        assert len(lines) == len(WRONG), said
        for line, (name, (_, _, message)) in zip(lines, WRONG.items(), strict=True):
            assert line.startswith(f'{name} ') and message in line, line


def test_peers_of_other_architectures_can_exchange_predictions(tmp_path):
    teams("run(Codistillation(), model=classifier(1 + me, width=6 + me), max_duration='2ba')", tmp_path)


def test_nobody_to_learn_from():
    with pytest.raises(ValueError, match='codistillation needs two teams or more: give a recipe `teams: 2`, or call'):
        Codistillation()
    assert len(Codistillation(FolderExchange('x', team=0, teams=3)).distillation.pool) == 2
