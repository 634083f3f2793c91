"""Whether a run is sure to ask about a sample that is missing."""

import math
from types import SimpleNamespace

import pytest
from composer.core import Time
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.teachers.schedule import Schedule, surely_asks


def asked(start='0ba', stop='1dur', interval=1, end='3ep', views=None, samples=70):
    """Of a run with five batches of 16 in each epoch, the last of 6."""
    state = SimpleNamespace(max_duration=end and Time.from_input(end), dataloader_len=Time(5, 'ba'))
    loader = SimpleNamespace(batch_size=16, samples=samples, views=views)
    return Schedule(Time.from_input(start), Time.from_input(stop), interval).asked(state, loader)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, {0: [70], 1: [70], 2: [70]}),
        ({'views': 2}, {0: [70, 70], 1: [70]}),
        ({'stop': '0.5dur', 'end': '4ep'}, {0: [70], 1: [70]}),
        ({'stop': '6ba'}, {0: [70], 1: [6]}),
        ({'start': '1ep', 'end': '12ba'}, {1: [70], 2: [22]}),
        ({'interval': 2}, {0: [22], 1: [22], 2: [22]}),
        ({'interval': None}, {0: [0], 1: [0], 2: [0]}),
        ({'stop': '99ba', 'end': '1ep'}, {0: [70]}),
        ({'stop': '2ep', 'end': '999sp'}, {0: [0], 1: [0]}),
        ({'stop': '99sp', 'end': '1ep'}, {0: [0]}),
        ({'end': '999sp'}, None),
        ({'end': None}, None),
        ({'samples': 80}, {0: [80], 1: [80], 2: [80]}),
    ],
)
def test_what_is_asked_for(options, expected):
    assert asked(**options) == expected


@given(st.data(), st.integers(2, 200))
def test_one_epoch_is_never_sure_to_ask_about_what_it_may_leave_out(data, samples):
    number = data.draw(st.integers(1, samples))
    missing = data.draw(st.integers(1, samples))
    assert surely_asks(samples, missing, [number]) == (missing > samples - number)


def test_several_epochs():
    assert surely_asks(70, 6, [64, 64])
    assert not surely_asks(70, 1, [64, 64]), 'it may well be left out twice'
    assert surely_asks(70, 1, [64] * 9)
    assert not surely_asks(70, 1, []) and not surely_asks(70, 70, [0, 0]) and not surely_asks(70, 0, [70])
    chance = math.comb(70, 3) * (6 / 70) ** 9
    assert chance < 1e-3 and surely_asks(70, 3, [64] * 3)
