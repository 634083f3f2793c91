"""Stages as Composer runs: however blocks are dealt out, the student is the same bit for bit."""

import itertools

import pytest

from helpers import in_teams

pytestmark = pytest.mark.dist

TRAIN = """
import hashlib
import itertools

import torch
from composer import Trainer
from composer.core import DataSpec
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_kd.blockwise.blocks import cut
from composer_kd.blockwise.pairs import BlockPairs
from composer_kd.blockwise.relay import Hop, Inlet, Outlet, join, share
from composer_kd.blockwise.stage import stage

BATCH, SAMPLES, BLOCKS = 8, 45, 4


def network(width, dropout=0.0):
    layers = lambda inner, outer: [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(
        *layers(1, width), *layers(width, width), nn.Dropout(dropout), *layers(width, width),
        nn.Conv2d(width, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )


AT = ['2', '6', '9']
torch.manual_seed(0)
images, labels = torch.randn(SAMPLES, 1, 6, 6), torch.randint(3, (SAMPLES,))
teacher = network(8)
torch.manual_seed(1)
student = network(4, dropout=0.3)


def parts(blocks, **options):
    options.setdefault('seed', 5)
    return stage(pairs, blocks, **options)


def data():
    order = torch.utils.data.SequentialSampler(range(SAMPLES))
    return DataSpec(DataLoader(TensorDataset(images, labels), batch_size=BATCH, sampler=order))


def train(keywords, max_duration='3ep', **options):
    model = keywords['model']
    trainer = Trainer(
        **keywords,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=max_duration,
        device='cpu',
        seed=3,
        progress_bar=False,
        device_train_microbatch_size=MICROBATCH,
        **options,
    )
    trainer.fit()
    trainer.close()
    return trainer


def digest(block):
    sha = hashlib.sha256()
    for name, tensor in sorted(pairs.student[block].state_dict().items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def make_pairs():
    global pairs
    pairs = BlockPairs(cut(teacher, AT), cut(student, AT), images[:2], loss='normalized_mse', label_weight=0.1, seed=9)


def links():
    '''The inlet and the outlet of this process's stage, each stage being one process.'''
    if team.number == 1:
        return None, None
    group = join(team.store, team.index, team.number, 30)
    hop = lambda to: Hop(f'hop {to}', range(to - 1, to), range(to, to + 1), 'stage {}'.format)
    inlet = outlet = None
    if team.index:
        inlet = Inlet(group, team.store, hop(team.index), 0, depth=2, timeout=30)
    if team.index + 1 < team.number:
        outlet = Outlet(group, team.store, hop(team.index + 1), 0, depth=2, most=BATCH, timeout=30)
    return inlet, outlet
"""

RELAYED = """
make_pairs()
inlet, outlet = links()
own = share(BLOCKS, team.number, team.index)
keywords = parts(
    own, data=None if inlet else data(), inlet=inlet, outlet=outlet, batch_size=BATCH, length=-(-SAMPLES // BATCH)
)
trainer = train(keywords)
batches = trainer.state.timestamp.batch.value
assert keywords['algorithms'][0].runs == dict.fromkeys(own, batches)
print(batches, *(digest(block) for block in own), end=' ')
if team.number > 1:
    team.channel('end', 'cpu').gather(torch.zeros(1))
"""

BY_BLOCK = """
make_pairs()
for block in range(BLOCKS):
    keywords = parts([block], teachers=range(block + 1), data=data())
    trainer = train(keywords)
    assert sum(keywords['algorithms'][0].runs.values()) == (block + 1) * trainer.state.timestamp.batch.value
print(trainer.state.timestamp.batch.value, *(digest(block) for block in range(BLOCKS)), end=' ')
"""

# Two blocks on one process, and the other two on two.
HYBRID = """
make_pairs()
hop = Hop('hop', range(1), range(1, 3), 'process {}'.format)
group, length = join(team.store, team.launch_rank, 3, 30), -(-SAMPLES // BATCH)
if team.index == 0:
    outlet = Outlet(group, team.store, hop, 0, depth=2, most=BATCH, timeout=30)
    train(parts(range(2), data=data(), outlet=outlet))
    blocks = range(2)
else:
    inlet = Inlet(group, team.store, hop, team.rank, depth=2, timeout=30)
    blocks = range(2, 4)
    train(parts(blocks, inlet=inlet, batch_size=BATCH // 2, length=length))
print(*(digest(block) for block in blocks))
team.channel('end', 'cpu').gather(torch.zeros(1)) if team.rank == 0 else None
"""

SAME_SHARES = """
import copy

from composer_kd.blockwise.stage import _drawing_from

make_pairs()
train(parts(range(2), data=data()))
ranks = [{block: pairs.student[block] for block in (2, 3)}]
ranks.append(copy.deepcopy(ranks[0]))
weights = [[p for block in each.values() for p in block.parameters()] for each in ranks]
buffers = [[b for block in each.values() for b in block.buffers()] for each in ranks]
optimizer, step = torch.optim.SGD(weights[0], lr=0.1, momentum=0.9), 0
for first in 3 * [*range(0, SAMPLES, BATCH)]:
    with torch.no_grad():
        x = pairs.teacher[1](pairs.teacher[0](images[first : first + BATCH]))
    for mine, other in zip(*buffers, strict=True):
        other.copy_(mine)
    for rank, own in enumerate(ranks):
        rows = share(len(x), 2, rank)
        with torch.no_grad():
            a = {2: x[rows.start : rows.stop]}
            for block in (2, 3):
                a[block + 1] = pairs.teacher[block](a[block])
        losses = []
        for block in (2, 3):
            own[block].train()
            with _drawing_from(5, str(block), step, 0, device=x.device):
                given = own[block](a[block])
            of_rows = labels[first : first + BATCH][rows.start : rows.stop]
            losses.append(pairs.losses(block, student=given, teacher=a[block + 1], labels=of_rows))
        (torch.stack(losses).sum() * (len(rows) * 2 / len(x))).backward()  # the last batch is not shared evenly
    for mine, other in zip(*weights, strict=True):
        mine.grad = mine.grad / 2 + other.grad / 2
        other.grad = None
    optimizer.step()
    optimizer.zero_grad()
    for mine, other in zip(*weights, strict=True):
        other.data.copy_(mine)
    step += 1
print(*(digest(block) for block in range(4)))
"""


def test_stages_of_several_processes_equal_a_loop_over_the_same_shares():
    pipeline = TRAIN.replace('MICROBATCH', 'None') + HYBRID
    first, *second = (said.split() for said in in_teams((1, 2), pipeline, ranks=3, timeout=60))
    (expected,) = in_teams(1, TRAIN.replace('MICROBATCH', '8') + SAME_SHARES, ranks=1, timeout=60)
    assert [*first, *second[0]] == expected.split()


def students(code, processes, microbatch=8):
    """The batches that each process trained on, and the digests of all blocks."""
    said = in_teams(processes, TRAIN.replace('MICROBATCH', str(microbatch)) + code, ranks=processes, timeout=60)
    words = [each.split() for each in said]
    return {each[0] for each in words}, [*itertools.chain.from_iterable(each[1:] for each in words)]


@pytest.fixture(scope='module')
def joint():
    return students(RELAYED, 1)


def test_a_joint_run_trains_all_blocks(joint):
    batches, digests = joint
    assert batches == {'18'} and len({*digests}) == 4


@pytest.mark.parametrize('processes', [2, 3, 4])
def test_relayed_stages_give_the_same_student(joint, processes):
    assert students(RELAYED, processes) == joint


def test_block_after_block_gives_the_same_student(joint):
    assert students(BY_BLOCK, 1) == joint


def test_microbatches_are_the_same_in_stages(joint):
    """BatchNorm makes another student of them, but of all ways to deal out blocks the same."""
    small = students(RELAYED, 1, microbatch=4)
    assert small != joint
    assert students(RELAYED, 2, microbatch=4) == small
