"""What teams say to each other: values, order, and what becomes of those whose partner is gone."""

import signal
import subprocess
import sys

import pytest

from helpers import in_teams, launched

pytestmark = pytest.mark.dist

TALK = """
import torch

channel = team.channel('talk', 'cpu')
me = 10 * team.index + team.rank
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64):
    tensor = (torch.arange(6).reshape(2, 3) + me).to(dtype)
    said = channel.gather(tensor.T)  # which is not contiguous
    assert [one.dtype for one in said] == [dtype] * 2
    for index, one in enumerate(said):
        assert torch.equal(one, (torch.arange(6).reshape(2, 3) + 10 * index + team.rank).to(dtype).T)
    assert torch.equal(tensor, (torch.arange(6).reshape(2, 3) + me).to(dtype))
for shape in ((), (0, 3), (1,)):
    assert [one.shape for one in channel.gather(torch.ones(shape, requires_grad=True))] == [shape] * 2

first, second = channel.post(torch.tensor(me)), channel.post(torch.full((1000,), float(me)))
third = channel.gather(torch.tensor([me, me]))
assert [one.tolist() for one in third] == [2 * [team.rank], 2 * [10 + team.rank]]
assert [one[0].item() for one in second.wait()] == [one.item() for one in first.wait()] == [team.rank, 10 + team.rank]
assert first.done() and second.done() and first.wait() is first.wait()

other = team.channel('other', torch.device('cpu'))  # independent of the first, whatever the order of their calls
if team.index:
    late = channel.post(torch.ones(1))
[one.item() for one in other.gather(torch.tensor(me))]
if not team.index:
    late = channel.post(torch.zeros(1))
assert [one.item() for one in late.wait()] == [0, 1]

assert channel.agree('names', {'me': me, 'pair': (1, None)}) == [
    {'me': 10 * index + team.rank, 'pair': [1, None]} for index in range(2)
]
try:
    channel.agree('names', 1)
except ValueError as error:
    print(error)
assert team.channel('talk', 'cpu').agree('names', 1) == [1, 1]  # one of its own
channel.post(torch.ones(1))  # goes out when the channel is closed
channel.close()
channel.close()
try:
    channel.gather(torch.ones(1))
except ValueError as error:
    print(error)
"""


def test_what_is_said_is_heard_by_the_processes_of_equal_rank():
    said = in_teams(2, TALK, ranks=4)
    assert said == 4 * [
        "the channel 'talk' has had the topic 'names' already; choose another one\nthe channel 'talk' is closed\n"
    ]


LOSE = """
import os
import signal
import time

import torch

from composer_kd.channel import PeerLost

channel = team.channel('talk', 'cpu')
channel.gather(torch.zeros(1))
begin = time.monotonic()
try:
    if (team.index, team.rank) == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    channel.gather(torch.zeros(1000))
except PeerLost as error:
    assert time.monotonic() - begin < 20
    print(error)
if (team.index, team.rank) == (0, 0):
    time.sleep(4)  # the store ends with this process, and the others want to look
"""


@pytest.mark.parametrize('victim', [(1, 0), (0, 0)])  # the second keeps the store, too
def test_a_killed_process_is_named(victim):
    codes = [-signal.SIGKILL if index == victim[0] else 0 for index in range(3)]
    said = in_teams(3, LOSE.replace('VICTIM', str(victim)), ranks=3, codes=codes)
    gone = f'team {victim[0]} rank 0'
    line = f"channel 'talk', call 2: {gone} is gone; look for what went wrong there first\n"
    assert said == [line if code == 0 else '' for code in codes]


def test_only_its_partners_miss_a_killed_process():
    """The process of team 1 that is left waits for nobody, and neither does its partner."""
    said = in_teams(2, LOSE.replace('VICTIM', '(1, 1)'), ranks=4, codes=[0, 0, 0, -signal.SIGKILL])
    assert said == [
        *('', "channel 'talk', call 2: team 1 rank 1 is gone; look for what went wrong there first\n"),
        *('', ''),
    ]


LATE = """
import time

import torch

from composer_kd.channel import PeerLost

channel = team.channel('talk', 'cpu')
channel.gather(torch.zeros(1))
arrival = channel.post(torch.zeros(1))
arrival.wait()
if team.index == 1:
    time.sleep(5)
begin = time.monotonic()
try:
    if team.index != 1:
        CALL
except PeerLost as error:
    assert 2 < time.monotonic() - begin < 4.8, time.monotonic() - begin
    print(error)
"""


@pytest.mark.parametrize(
    ('call', 'name'),
    [
        ('channel.gather(torch.zeros(1))', 'call 3'),
        ("channel.agree('names', 0)", "topic 'names'"),
        ("team.channel('new', 'cpu').gather(torch.zeros(1))", 'the first call'),
    ],
)
def test_a_late_team_is_named(call, name):
    said = in_teams(3, LATE.replace('CALL', call), ranks=3, timeout=3)
    channel = 'new' if 'new' in call else 'talk'
    todo = 'look for what went wrong there first; if nothing did, allow more time'
    line = f'channel {channel!r}, {name}: team 1 rank 0 did not come within 3 s; {todo}\n'
    assert said == [line, '', line]


LEAVE = """
import os
import torch
from composer_kd.teams import split

team = split(2, timeout=10)
channel = team.channel('talk', 'cpu')
channel.gather(torch.zeros(1))
if team.index == 0:
    channel.post(torch.zeros(1))  # to which nobody will ever answer
else:
    os._exit(0)
"""


def test_python_ends_though_something_is_on_its_way():
    processes = [subprocess.Popen([sys.executable, '-c', LEAVE], env=environment) for environment in launched(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
