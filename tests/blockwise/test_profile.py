"""Profiles of blocks: what they say, and files that hold them."""

import json
import math

import pytest
import torch
from torch import nn

from composer_kd.blockwise.blocks import cut
from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.plan import Device, best
from composer_kd.blockwise.profile import Link, Profile, ProfileError, fit, measure


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.fixture(scope='module')
def profile():
    torch.manual_seed(17)
    teacher, student = (
        nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))
        for width in (512, 16)
    )
    pairs = BlockPairs(cut(teacher, ['3']), cut(student, ['3']), torch.randn(2, 8))
    batch = torch.randn(12, 8)
    return measure(pairs, batch, 5, sgd, send=Link(0.5, 0.25), average=Link(1.0, 0.125), data=3.0)


def test_what_is_measured(profile):
    assert profile.batch_size == 12 and profile.shares == [12, 6, 4, 3] and profile.device == 'cpu'
    for rows in (profile.teacher, profile.student):
        assert [len(row) for row in rows] == [4, 4] and min(map(min, rows)) > 0
    assert profile.inputs == [32, 32]
    first, last = 4 * (8 * 16 + 16 + 16 * 8 + 8), 4 * (8 * 2 + 2)
    assert profile.gradients == [first, last]
    of_teacher = 4 * (8 * 512 + 512 + 512 * 8 + 8)
    assert profile.fixed == [of_teacher + 3 * first, 3 * last + last]  # with momentum
    # What a linear layer keeps is its input, a ReLU its output: 8, 16 and 8 numbers; and there are input and target.
    assert profile.activations == [4 * (8 + 16 + 8 + 8 + 8), 4 * (8 + 8 + 2)]


def test_costs_of_devices(profile):
    costs = profile.costs(5)
    assert costs.teacher[1] == [*profile.teacher[1], math.inf]  # twelve samples cannot be shared by five evenly
    assert costs.student[0][:4] == profile.student[0] and costs.student[0][4] == math.inf
    assert [row[0] for row in costs.average] == [0.0, 0.0]
    assert costs.average[0][2] == 1.0 + 0.125 * 2 * 2 / 3 * profile.gradients[0]
    assert costs.receive[0][:4] == [3.0] * 4
    assert costs.receive[1][1] == 0.5 + 0.25 * 6 * 32
    assert costs.memory[0][1] == profile.fixed[0] + 6 * profile.activations[0]
    assert best(costs, [Device()] * 2).step > 0


def test_a_file_gives_it_back(profile, tmp_path):
    profile.save(tmp_path / 'profile.json')
    assert Profile.load(tmp_path / 'profile.json') == profile


@pytest.mark.parametrize(
    'change',
    [
        {'teacher': [[1.0]]},
        {'student': [[1.0, 'x', 1.0, 1.0]] * 2},
        {'send': {'seconds': 1.0}},
        {'average': 3},
        {'shares': [0, 1, 2, 3]},
        {'more': 1},
        {'data': -1},
        {'device': 3},
    ],
)
def test_a_file_that_holds_something_else(profile, tmp_path, change):
    path = tmp_path / 'profile.json'
    profile.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProfileError, match=r'profile\.json: is no profile of blocks: write one with composer-kd plan'):
        Profile.load(path)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null'])
def test_a_file_that_is_none(tmp_path, text):
    path = tmp_path / 'profile.json'
    path.write_text(text)
    with pytest.raises(ProfileError, match=r'profile\.json: (cannot be read as a profile|is no profile)'):
        Profile.load(path)
    with pytest.raises(ProfileError, match='cannot be read as a profile'):
        Profile.load(tmp_path / 'other.json')


def test_links_are_fitted():
    link = fit([100, 200, 400], [2.0, 3.0, 5.0])
    assert link.takes(300) == pytest.approx(4.0)
    assert fit([1, 2], [2.0, 1.0]).per_byte == 0.0
