"""The pool: means of logits, an account of the cost, and order among its members."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_network import BATCH, IMAGES, STATE
from torch import nn

from composer_kd import NetworkTeacher, TeacherError, TeacherPool
from composer_kd.averages import Mean
from composer_kd.teachers.batches import pick, samples_in
from composer_kd.teachers.pool import convex_weights
from composer_kd.teachers.stopwatch import Stopwatch
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits, EachLogits, part
from settings import CLASSES, network, teachers

STUDENT = torch.zeros(4, 5)
LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def pool():
    pool = TeacherPool(teachers(3))
    pool.prepare(STATE)
    return pool


def test_one_teacher_speaks_as_it_is(pool):
    for index, teacher in enumerate(pool.teachers):
        assert torch.equal(pool.signal(BATCH, (index,), STUDENT), teacher.signal(BATCH))


def test_several_teachers_are_averaged(pool):
    expected = torch.stack([teacher.signal(BATCH) for teacher in pool.teachers]).mean(0)
    torch.testing.assert_close(pool.signal(BATCH, (0, 1, 2), STUDENT), expected)
    assert pool.heard == 3 and pool.samples_heard == 12 and pool.forwards == 6 and pool.seconds > 0


def test_for_a_mean_of_losses_each_is_heard_by_itself():
    pool = TeacherPool(teachers(3), weights=[1, 2, 4], average='losses')
    pool.prepare(STATE)
    said = pool.signal(BATCH, (0, 2), STUDENT, weights=pool.weights)
    assert isinstance(said, EachLogits) and said.weights == [1 / 5, 4 / 5] and said.shape == STUDENT.shape
    for logits, index in zip(said.members, (0, 2), strict=True):
        assert torch.equal(logits, pool.teachers[index].signal(BATCH))
    assert torch.equal(pool.signal(BATCH, (1,), STUDENT), pool.teachers[1].signal(BATCH))


OPTIONS = {
    'weights': {'weights': [1, 2, 4]},
    'probabilities': {'average': 'probabilities', 'temperature': 3.0},
    'only_correct': {'only_correct': True},
    'all': {'weights': [3, 2, 1], 'average': 'probabilities', 'temperature': 0.5, 'only_correct': True},
}


def expected_mean(said, shares, options, labels=LABELS):
    mean = Mean(
        temperature=options.get('temperature'), labels=labels if options.get('only_correct') else None
    )  # which is tested against a plain reference
    for logits, share in zip(said, shares, strict=True):
        mean.add(logits, share)
    return mean.result()


@pytest.mark.parametrize('name', OPTIONS)
def test_the_mean_that_was_asked_for(name):
    options = OPTIONS[name]
    pool = TeacherPool(teachers(3), **options)
    pool.prepare(STATE)
    said = torch.stack([teacher.signal(BATCH) for teacher in pool.teachers])
    weights = torch.tensor(options.get('weights', [1, 1, 1])).double()
    signal = pool.signal(BATCH, (0, 2), STUDENT, labels=LABELS, weights=pool.batch_weights(3, 0))
    shares = weights[[0, 2]] / weights[[0, 2]].sum()
    expected = expected_mean(said[[0, 2]].double(), shares.tolist(), options)
    torch.testing.assert_close(signal, expected.float())
    plain = said[[0, 2]].mean(0)
    assert not torch.allclose(signal, plain)
    alone = pool.signal(BATCH, (1,), STUDENT, labels=LABELS, weights=pool.batch_weights(3, 0))
    assert torch.equal(alone, said[1])


@given(seed=st.integers(0, 2**63), batch=st.integers(0, 10**9), number=st.integers(1, 16))
def test_random_weights_are_convex_and_a_function_of_their_arguments(seed, batch, number):
    weights = convex_weights(seed, batch, number)
    assert weights == convex_weights(seed, batch, number) and len(weights) == number
    assert all(weight > 0 for weight in weights) and sum(weights) == pytest.approx(1)


def test_random_weights_are_uniform_on_the_simplex():
    draws = torch.tensor([convex_weights(5, batch, 3) for batch in range(20_000)])
    # Each is Beta(1, 2): P(w > x) = (1 - x)^2; and two of three sum to what is left.
    for x in (0.1, 0.5, 0.8):
        torch.testing.assert_close((draws > x).float().mean(0), torch.full((3,), (1 - x) ** 2), atol=0.015, rtol=0)
    assert TeacherPool(teachers(3), weights='random').batch_weights(5, 7) == convex_weights(5, 7, 3)


class Deferring(nn.Module):
    """A text model with deferred logits at the positions that are asked for."""

    def __init__(self, seed, length=6, words=9, hidden=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.words = nn.Parameter(torch.randn(20, hidden, generator=generator))
        self.weight = nn.Parameter(torch.randn(words, hidden, generator=generator))

    def forward(self, batch):
        hidden = self.words[batch['input_ids']].cumsum(1).flatten(0, 1)
        return {'logits': DeferredLogits(hidden[batch['positions']], self.weight)}


def deferring(number):
    from composer.models import ComposerModel

    class Model(ComposerModel):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, batch):
            return self.inner(batch)

        def loss(self, outputs, batch, *args, **kwargs):
            raise NotImplementedError

    return [NetworkTeacher(Model(Deferring(seed)), name=f'teacher{seed}') for seed in range(number)]


def text():
    ids = torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(0))
    return {'input_ids': ids, 'positions': torch.tensor([0, 3, 8, 9, 20, 21, 22, 29]), 'note': 'as it is'}


@pytest.mark.parametrize('name', OPTIONS)
def test_deferred_logits(name):
    options, batch = OPTIONS[name], text()
    pool = TeacherPool(deferring(3), **options)
    pool.prepare(STATE)
    student = DeferredLogits(torch.zeros(8, 4), torch.zeros(9, 4))
    labels = torch.arange(8)
    said = torch.stack([part(teacher.signal(batch)) for teacher in pool.teachers])
    weights = options.get('weights', [1, 1, 1])
    signal = pool.signal(batch, (0, 1, 2), student, labels=labels, weights=pool.batch_weights(3, 0))
    assert not isinstance(signal, torch.Tensor)
    expected = expected_mean(said.double(), [weight / sum(weights) for weight in weights], options, labels)
    torch.testing.assert_close(part(signal), expected.float())
    torch.testing.assert_close(part(signal, slice(2, 5)), expected[2:5].float())


HEARD = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 2]])


@pytest.mark.parametrize('name', [*OPTIONS, 'random'])
def test_each_sample_hears_its_own_teachers(name):
    options = OPTIONS.get(name, {'weights': 'random'})
    pool = TeacherPool(teachers(3), **options)
    pool.prepare(STATE)
    said = torch.stack([teacher.signal(BATCH) for teacher in pool.teachers])
    weights = pool.batch_weights(3, 0)
    asked = pool.heard
    signal = pool.signal(BATCH, HEARD, STUDENT, labels=LABELS, weights=weights)
    assert pool.heard - asked == 3 and pool.samples_heard == 8
    for row, heard in enumerate(HEARD.tolist()):
        shares = torch.tensor([1.0 if weights is None else weights[i] for i in heard]).double()
        mine = said[heard, row : row + 1].double()
        expected = expected_mean(mine, (shares / shares.sum()).tolist(), options, LABELS[row : row + 1])
        torch.testing.assert_close(signal[row : row + 1], expected.float())
    one_each = pool.signal(BATCH, torch.tensor([[2], [0], [2], [1]]), STUDENT, labels=LABELS, weights=weights)
    torch.testing.assert_close(one_each, said[[2, 0, 2, 1], range(4)])


@pytest.mark.parametrize('heard', [[[0], [1], [0], [2], [1]], [[0, 1], [1, 2], [0, 2], [0, 1], [1, 2]]])
def test_each_sequence_hears_its_own_teachers(heard):
    batch, student = text(), DeferredLogits(torch.zeros(8, 4), torch.zeros(9, 4))
    pool = TeacherPool(deferring(3))
    pool.prepare(STATE)
    said = torch.stack([part(teacher.signal(batch)) for teacher in pool.teachers])
    signal = pool.signal(batch, torch.tensor(heard), student)
    for row, position in enumerate(batch['positions'].tolist()):
        torch.testing.assert_close(signal[row], said[heard[position // 6], row].mean(0))


def test_samples_of_a_batch():
    batch = {**text(), 'labels': torch.arange(30).view(5, 6), 'mask': torch.ones(3)}
    picked, rows = pick(batch, torch.tensor([1, 3]))
    assert torch.equal(picked['input_ids'], batch['input_ids'][[1, 3]]) and picked['note'] == 'as it is'
    assert torch.equal(picked['mask'], torch.ones(3))
    assert rows.tolist() == [2, 3, 4, 5, 6]
    flat = batch['input_ids'].flatten()[batch['positions']]
    assert torch.equal(picked['input_ids'].flatten()[picked['positions']], flat[rows])
    assert pick((IMAGES, [1, 2]), torch.tensor([2]))[0][1] == [1, 2]
    assert torch.equal(pick(IMAGES, torch.tensor([2]))[0], IMAGES[2:3])
    (inner, labels), _ = pick(({'x': (IMAGES, 'as it is')}, torch.arange(4)), torch.tensor([1, 3]))
    assert torch.equal(inner['x'][0], IMAGES[[1, 3]]) and inner['x'][1] == 'as it is' and labels.tolist() == [1, 3]
    assert samples_in(batch) == 5 and samples_in((None, IMAGES)) == 4 and samples_in({}) == 0


class Keyed:
    """Knows what it was told of the samples."""

    name, forwards, replays = 'keyed', 0, True

    def __init__(self):
        self.keys = []

    def check(self, student): ...

    def prepare(self, state): ...

    def release(self): ...

    def manifest(self):
        return {'sha256': ''}

    def signal(self, batch, keys=None):
        self.keys.append(keys)
        return keys[:, :1].float() + torch.zeros(1, 5)


def test_keys_go_with_their_samples():
    keys = torch.stack([torch.arange(10, 14), torch.ones(4, dtype=torch.long)], 1)
    pool = TeacherPool([Keyed(), *teachers(1), Keyed()])
    assert pool.replays and not TeacherPool(teachers(1)).replays
    pool.prepare(STATE)
    assert torch.equal(pool.signal(BATCH, (0,), STUDENT, keys=keys)[:, 0], keys[:, 0].float())
    signal = pool.signal(BATCH, torch.tensor([[0], [1], [2], [0]]), STUDENT, keys=keys)
    assert signal[[0, 2, 3], 0].tolist() == [10, 12, 13]
    assert [said.tolist() for said in pool.teachers[0].keys[1:]] == [[[10, 1], [13, 1]]]
    assert pool.heard == 4 and pool.samples_heard == 8 and pool.forwards == 1


class Largest(Keyed):
    """Says the two largest of five logits, another for each sample."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def signal(self, batch, keys=None):
        samples = len(batch[0])
        values = torch.tensor([[self.value, 0.0]]).expand(samples, 2)
        return TopKLogits(values, torch.tensor([[1, 4]]).expand(samples, 2), {4.0: values[:, 0] - 1}, 5)


def test_the_largest_logits_are_not_averaged_but_sampled():
    pool = TeacherPool([Largest(3.0), Largest(4.0)])
    alone = pool.signal(BATCH, (1,), STUDENT)
    assert isinstance(alone, TopKLogits) and alone.values[0, 0] == 4
    for speakers in ((0, 1), torch.tensor([[0, 1]] * 4)):
        with pytest.raises(TeacherError, match='which cannot be averaged: take average='):
            pool.signal(BATCH, speakers, STUDENT)
    each = pool.signal(BATCH, torch.tensor([[1], [0], [0], [1]]), STUDENT)
    assert each.values[:, 0].tolist() == [4, 3, 3, 4] and each.tail(4.0).tolist() == [3, 2, 2, 3]
    assert each.indices.tolist() == [[1, 4]] * 4
    pool.teachers[0].signal = lambda batch, keys: torch.zeros(len(batch[0]), 5)
    with pytest.raises(TeacherError, match='of some teachers more logits are known than of others'):
        pool.signal(BATCH, torch.tensor([[1], [0], [0], [1]]), STUDENT)


@pytest.mark.parametrize('residency', ['device', 'host'])
def test_teachers_of_all_kinds_in_one_pool(residency):
    def members():
        torch.manual_seed(0)
        large = nn.Sequential(nn.Conv2d(1, 2, 5, stride=3), nn.Flatten(), nn.Linear(32, CLASSES))  # 16 x 16
        return [
            NetworkTeacher(network(1)),
            NetworkTeacher(large, input_size=16, normalization=([0.5], [0.5]), student_normalization=([0.0], [1.0])),
            NetworkTeacher(network(2, width=9), dtype='bfloat16', channels_last=True),
            NetworkTeacher(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), dtype='float64'),
        ]

    pool = TeacherPool(members(), residency=residency)
    pool.prepare(STATE)
    expected = []
    for teacher in members():
        teacher.prepare(STATE)
        expected.append(teacher.signal(BATCH))
    for index, logits in enumerate(expected):
        pool.place([index], [(index + 1) % 4])
        assert torch.equal(pool.signal(BATCH, (index,), STUDENT), logits)
    mean = pool.signal(BATCH, (0, 1, 2, 3), STUDENT)
    torch.testing.assert_close(
        mean, torch.stack([logits.double() for logits in expected]).mean(0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    'options, message',
    [
        ({'weights': [1, 2]}, 'weights has 2 numbers for 3 teachers'),
        ({'weights': [1, 0, 2]}, r'weights must be above 0 each, not \[1.0, 0.0, 2.0\]'),
        ({'weights': 'uniform'}, "weights are numbers, or 'random', not 'uniform'"),
        ({'average': 'ranks'}, "average must be 'logits', 'probabilities' or 'losses', not 'ranks'"),
        ({'residency': 'disk'}, "residency must be 'device', 'host' or 'auto', not 'disk'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherPool(teachers(3), **options)


def test_low_precision_signals_are_averaged_in_fp32(pool):
    for teacher in pool.teachers:
        teacher.signal = lambda batch, keys=None, logits=teacher.signal(BATCH).bfloat16(): logits
    expected = torch.stack([teacher.signal(BATCH).float() for teacher in pool.teachers]).mean(0)
    signal = pool.signal(BATCH, (0, 1, 2), STUDENT)
    assert signal.dtype == torch.float32
    torch.testing.assert_close(signal, expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_teacher_that_is_not_finite_is_named_once(pool, value):
    pool.teachers[1].signal = lambda batch, keys: torch.full((4, 5), value)
    pool.signal(BATCH, (0, 1), STUDENT)
    pool.signal(BATCH, (0,), STUDENT)
    with pytest.raises(TeacherError, match=r'teacher teacher1 \(number 1\) gave NaN or infinity at batch 7'):
        pool.raise_if_unsound(7)
    pool.raise_if_unsound(8)


def test_a_class_may_be_ruled_out(pool):
    pool.teachers[1].signal = lambda batch, keys: torch.tensor([0.0, 1.0, 2.0, 3.0, -torch.inf]).expand(4, 5)
    pool.signal(BATCH, (1,), STUDENT)
    pool.raise_if_unsound(0)


def test_another_shape_is_refused(pool):
    with pytest.raises(
        TeacherError, match=r'teacher teacher2 \(number 2\) gives logits of shape \[4, 5\], the student \[4, 6\]'
    ):
        pool.signal(BATCH, (2,), torch.zeros(4, 6))


def test_release_releases_all(pool):
    pool.release()
    assert pool.released and all(teacher._network is None for teacher in pool.teachers)


def test_the_account_goes_on(pool):
    pool.signal(BATCH, (0, 1, 2), STUDENT)
    resumed = TeacherPool(teachers(3))
    resumed.load_state_dict(pool.state_dict())
    assert resumed.state_dict() == pool.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_stopwatch_on_a_device_adds_up_without_waiting():
    watch, device = Stopwatch(1.0), torch.device('cuda')
    with watch.running(device):
        torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize()
    assert watch.seconds > 1.001
