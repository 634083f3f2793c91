"""Launches that know of each other by a folder alone: what they find there, and what others have left."""

import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from composer import Callback

from composer_kd import Codistillation, EarlyStopDistillation, TeacherError
from composer_kd.exchange import FolderExchange, folder
from composer_kd.exchange.folder import _Place
from helpers import on_two_ranks
from settings import classifier, logged, train, weights

pytestmark = pytest.mark.filterwarnings('ignore:no other team was heard')

ABOUT = {'run_name': 'other', 'seed': 1, 'teams': 2, 'fingerprint': 'x', 'batch': 4}


class Settles(Callback):
    """Waits before each batch until what goes on beside the training is done."""

    def batch_start(self, state, logger) -> None:
        settle(exchange_of(state))


def exchange_of(state):
    (exchange,) = (a.exchange for a in state.algorithms if isinstance(a, Codistillation))
    return exchange


def settle(exchange):
    for future in (exchange._writing, exchange._reading):
        if future is not None:
            future.exception()


def run(index, path, *algorithms, **options):
    """A whole run of a team."""
    exchange = FolderExchange(path, team=index, teams=2, interval='2ba')
    own = {'model': classifier(1 + index), 'seed': 3 + index, 'run_name': f'run{index}', 'callbacks': [Settles()]}
    done = train([Codistillation(exchange), *algorithms], **{**own, **options})
    settle(exchange)
    return done


def test_one_learns_from_what_another_has_left(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match='no other team was heard in this run, which has learned from labels alone'):
        first = run(0, tmp_path)
    assert set(logged(first, 'distillation/active').values()) == {0.0}  # nobody else was there
    left = _Place(str(tmp_path)).read(0)
    assert left is not None and left['batch'] == 8 and left['run_name'] == 'run0'
    reads = []
    monkeypatch.setattr(_Place, 'read', lambda place, team, read=_Place.read: reads.append(team) or read(place, team))
    second = run(1, tmp_path)
    assert reads == [1, 0]  # what has not changed since is not read again
    assert [*logged(second, 'distillation/active').values()] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [*logged(second, 'codistillation/staleness').values()] == [2 - 8, 3 - 8, 4 - 8, 5 - 8, 6 - 8, 7 - 8, 0]
    (peer,) = second.state.algorithms[-1].distillation.pool.teachers
    snapshots = exchange_of(second.state)._copies.snapshots
    assert torch.equal(snapshots.of(peer.copy), left['snapshot'])
    assert torch.equal(snapshots.of(first.state.model), left['snapshot'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['team0.pt', 'team1.pt']


def test_one_that_died_comes_back_to_what_it_had(tmp_path):
    run(0, tmp_path)
    unbroken = run(
        1, tmp_path, save_folder=str(tmp_path / 'run1'), save_interval='1ba', save_num_checkpoints_to_keep=-1
    )
    (tmp_path / 'team0.pt').unlink()  # what it knew is in its own checkpoint
    resumed = run(1, tmp_path, model=classifier(50), load_path=str(tmp_path / 'run1' / 'ep1-ba5-rank0.pt'))
    assert weights(resumed).keys() == weights(unbroken).keys()
    assert all(torch.equal(value, weights(unbroken)[name]) for name, value in weights(resumed).items())


def test_over_is_over(tmp_path):
    run(0, tmp_path)
    second = run(1, tmp_path, EarlyStopDistillation('5ba'))
    assert [*logged(second, 'distillation/active').values()] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert _Place(str(tmp_path)).read(1)['batch'] == 4


@pytest.mark.parametrize(
    ('about', 'message'),
    [
        ({}, 'team0 .run other. has another architecture or dtype'),
        ({'teams': 3}, 'team0 .run other. has another number of teams'),
        ({'fingerprint': None, 'seed': 4}, 'team0 .run other. has the same seed, 4: choose another'),
        ({'fingerprint': None}, 'team0 .run other. has another architecture or dtype'),  # by its size
    ],
)
def test_peers_that_are_none(tmp_path, about, message):
    own = run(1, tmp_path / 'own')
    fingerprint = exchange_of(own.state)._copies.snapshots.fingerprint
    about = {**ABOUT, **{key: value or fingerprint for key, value in about.items()}}
    _Place(str(tmp_path)).write(0, about, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(TeacherError, match=message):
        run(1, tmp_path)


def test_a_folder_of_another_run(tmp_path):
    run(0, tmp_path, max_duration='2ba')
    with pytest.raises(TeacherError, match=r'has a snapshot of team 0 by another run, run0 \(seed 3\): exchange'):
        run(0, tmp_path, run_name='another')
    with pytest.raises(TeacherError, match=r'has a snapshot of team 0 by another run, run0 \(seed 3\): exchange'):
        run(0, tmp_path, seed=5)
    run(0, tmp_path, max_duration='2ba')  # the same one, begun again


FOREIGN = {
    'foreign': lambda said: {'weights': torch.ones(1)},
    'without a seed': lambda said: {key: value for key, value in said.items() if key != 'seed'},
    'of another type': lambda said: {**said, 'snapshot': torch.ones(8, dtype=torch.bfloat16)},
    'of another batch': lambda said: {**said, 'batch': 5},
}


@pytest.mark.parametrize('spoil', ['empty', 'cut', 'flipped', *FOREIGN])
def test_what_is_not_whole_is_as_good_as_not_there(tmp_path, spoil):
    place, file = _Place(str(tmp_path)), tmp_path / 'team0.pt'
    place.write(0, ABOUT, torch.arange(200, dtype=torch.uint8))
    content = bytearray(file.read_bytes())
    assert place.read(0)['batch'] == 4
    if spoil in FOREIGN:
        torch.save(FOREIGN[spoil](place.read(0)), file)
    else:
        content[content.index(bytes(range(50, 100)))] ^= 1
        file.write_bytes({'empty': b'', 'cut': bytes(content[: len(content) // 2]), 'flipped': bytes(content)}[spoil])
    assert place.read(0) is None and place.read(1) is None


class Store:
    """An object store in memory, which fails in calls that `fails` names: the so-manieth upload, or download."""

    def __init__(self, **fails):
        self.fails, self.calls, self.objects = fails, Counter(), {}

    def _call(self, kind):
        self.calls[kind] += 1
        if self.calls[kind] in self.fails.get(kind, ()):
            raise ArithmeticError('no route to the clouds')  # a type of its own, such as other libraries have

    def upload_object(self, name, filename):
        self._call('upload')
        self.objects[name] = Path(filename).read_bytes()

    def download_object(self, name, filename):
        self._call('download')
        if name not in self.objects:
            raise FileNotFoundError(name)
        Path(filename).write_bytes(self.objects[name])


def test_an_object_store_may_fail_now_and_then(monkeypatch):
    store = Store(upload=[1, 3], download=[3, 5, 9])
    monkeypatch.setattr(folder, 'maybe_create_object_store_from_uri', lambda uri: store)
    run(0, 's3://bucket/x')
    assert store.calls == {'upload': 4, 'download': 6} and _Place('s3://bucket/x').read(0)['batch'] == 8
    second = run(1, 's3://bucket/x')  # to which the first look at its peer is download 9
    assert [*logged(second, 'distillation/active').values()] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ('fails', 'what', 'calls'),
    [
        ({'download': [1]}, 'read', {'download': 1}),
        ({'download': [2, 3]}, 'read', {'download': 3, 'upload': 1}),
        ({'upload': [1, 2]}, 'written to', {'download': 4, 'upload': 2}),
    ],
)
def test_an_object_store_that_cannot_be_used(fails, what, calls, monkeypatch):
    store = Store(**fails)
    monkeypatch.setattr(folder, 'maybe_create_object_store_from_uri', lambda uri: store)
    with pytest.raises(TeacherError, match=f's3://bucket/x: cannot be {what}: no route to the clouds'):
        run(0, 's3://bucket/x')
    assert store.calls == calls


@pytest.mark.dist
def test_all_ranks_end_with_the_error_of_the_first(tmp_path):
    code = """
from composer_kd import TeacherError
from composer_kd.exchange import folder
from exchange.test_folder_exchange import Store, run

for fails in ([1], [2, 3]):
    folder.maybe_create_object_store_from_uri = lambda uri: Store(download=fails)
    try:
        run(0, 's3://bucket/x')
    except TeacherError as error:
        print(error)
"""
    assert on_two_ranks(code, tmp_path) == 2 * [2 * 's3://bucket/x: cannot be read: no route to the clouds\n']


def _write_for_ever(path, batch):
    place = _Place(path)
    while True:
        batch += 1
        place.write(0, {**ABOUT, 'batch': batch}, torch.full((1_000_000,), batch % 256, dtype=torch.uint8))


def test_a_writer_that_is_killed_leaves_nothing_torn(tmp_path):
    place, moments, seen = _Place(str(tmp_path)), random.Random(0), set()
    for first in range(0, 6_000_000, 1_000_000):
        writer = multiprocessing.get_context('forkserver').Process(target=_write_for_ever, args=(str(tmp_path), first))
        writer.start()
        end = None
        while end is None or time.monotonic() < end:
            said = place.read(0)
            if said is None or said['batch'] <= first:
                continue
            assert (said['snapshot'] == said['batch'] % 256).all() and len(said['snapshot']) == 1_000_000
            seen.add(said['batch'])
            end = end or time.monotonic() + moments.random() / 3
        writer.kill()
        writer.join()
        assert place.read(0) is not None
    assert len(seen) > 6
    place.clear_up(0)
    assert [path.name for path in tmp_path.iterdir()] == ['team0.pt']
