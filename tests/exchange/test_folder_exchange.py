"""Launches that know of each other by a folder alone: what they find there, and what others have left."""

import multiprocessing
import random
import time

import pytest
import torch
from composer import Callback

from composer_kd import Codistillation, EarlyStopDistillation, TeacherError
from composer_kd.exchange import FolderExchange
from composer_kd.exchange.folder import _Place
from settings import classifier, logged, train, weights

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


def test_one_learns_from_what_another_has_left(tmp_path):
    first = run(0, tmp_path)
    assert set(logged(first, 'distillation/active').values()) == {0.0}  # nobody else was there
    left = _Place(str(tmp_path)).read(0)
    assert left is not None and left['batch'] == 8 and left['run_name'] == 'run0'
    second = run(1, tmp_path)
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
    with pytest.raises(TeacherError, match='has a snapshot of team 0 by another run, run0: exchange through another'):
        run(0, tmp_path, run_name='another')
    run(0, tmp_path, max_duration='2ba')  # the same one, begun again


@pytest.mark.parametrize('spoil', ['empty', 'cut', 'flipped', 'foreign'])
def test_what_is_not_whole_is_as_good_as_not_there(tmp_path, spoil):
    place, file = _Place(str(tmp_path)), tmp_path / 'team0.pt'
    place.write(0, ABOUT, torch.arange(200, dtype=torch.uint8))
    content = bytearray(file.read_bytes())
    assert place.read(0)['batch'] == 4
    if spoil == 'foreign':
        torch.save({'weights': torch.ones(1)}, file)
    else:
        content[content.index(bytes(range(50, 100)))] ^= 1
        file.write_bytes({'empty': b'', 'cut': bytes(content[: len(content) // 2]), 'flipped': bytes(content)}[spoil])
    assert place.read(0) is None and place.read(1) is None


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
