"""What stages hand on to each other: every sample once, in order, to whoever needs it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.blockwise.relay import Hop, share
from helpers import in_teams


def hop_of(senders, receivers):
    return Hop('hop', range(senders), range(senders, senders + receivers), str)


@given(st.integers(0, 200), st.integers(1, 7))
def test_shares_are_a_batch_in_parts(samples, parts):
    dealt = [share(samples, parts, index) for index in range(parts)]
    assert [sample for part in dealt for sample in part] == [*range(samples)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 40))
def test_each_sample_reaches_the_process_whose_share_it_is_in(senders, receivers, of_each):
    """However many a batch has, and none goes between processes that have nothing in common in a full one."""
    hop, samples = hop_of(senders, receivers), senders * of_each  # a loader gives each process as many
    for receiver in range(receivers):
        heard = []
        for sender in hop.of_receiver(receiver):
            assert receiver in hop.of_sender(sender)
            first = share(samples, senders, sender).start
            heard += [first + row for row in hop.shares(samples, sender, receiver)]
        assert heard == [*share(samples, receivers, receiver)]
    pairs = {(sender, receiver) for sender in range(senders) for receiver in hop.of_sender(sender)}
    assert pairs == {(sender, receiver) for receiver in range(receivers) for sender in hop.of_receiver(receiver)}
    assert len(pairs) <= senders + receivers - 1


TALK = """
import torch

from composer_kd.blockwise.relay import Hop, Inlet, Outlet, Word, join, share

senders, receivers = SIZES
group = join(team.store, team.index, team.number, 20)
hop = Hop('hop', range(senders), range(senders, senders + receivers), 'process {}'.format)
depth, batches = DEPTH, 7


def batch(number):
    samples = 2 * senders * receivers if number < batches - 1 else senders  # the last one is small
    return torch.arange(samples) + 100.0 * number, torch.arange(samples).reshape(-1, 1) - number


if team.index < senders:
    most = 2 * senders * receivers
    outlet = Outlet(group, team.store, hop, team.index, depth=depth, most=most, dtype=DTYPE, timeout=20)
    for number in range(batches):
        whole = batch(number)
        own = share(len(whole[0]), senders, team.index)
        tensors = [each[own.start : own.stop].clone() for each in whole]
        outlet.send(tensors, number=number, samples=len(whole[0]))
        for each in tensors:
            each.zero_()  # it was copied
        if number == 3:
            outlet.end(Word.END_OF_EPOCH, number + 1)
    outlet.end(Word.STOP, batches)
    outlet.flush()
else:
    index = team.index - senders
    inlet = Inlet(group, team.store, hop, index, depth=depth, timeout=20)
    for number in range(batches):
        message = inlet.take()
        whole = batch(number)
        own = share(len(whole[0]), receivers, index)
        assert (message.word, message.number, message.samples) == (Word.BATCH, number, len(whole[0]))
        for got, each in zip(message.tensors, whole, strict=True):
            assert got.dtype == each.dtype and torch.equal(got, each[own.start : own.stop]), (number, got, each)
        if number == 3:
            message = inlet.take()
            assert (message.word, message.number, message.tensors) == (Word.END_OF_EPOCH, 4, [])
    message = inlet.take()
    assert (message.word, message.number) == (Word.STOP, batches)
    print('all', end='')
team.channel('end', 'cpu').gather(torch.zeros(1))
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ('senders', 'receivers', 'depth', 'dtype'),
    [(1, 1, 1, 'None'), (1, 1, 3, 'torch.bfloat16'), (2, 1, 2, 'None'), (1, 2, 2, 'None'), (2, 3, 2, 'None')],
)
def test_all_arrives_once_and_in_order(senders, receivers, depth, dtype):
    """In bfloat16, too, small whole numbers being exact there."""
    code = TALK.replace('SIZES', f'({senders}, {receivers})').replace('DEPTH', str(depth)).replace('DTYPE', dtype)
    if dtype != 'None':
        code = code.replace('100.0 * number', '1.0 * number')
    said = in_teams(senders + receivers, code, ranks=senders + receivers)
    assert said == ['', *itertools.repeat('', senders - 1), *itertools.repeat('all', receivers)]
