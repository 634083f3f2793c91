"""The pool: means of logits, an account of the cost, and order among its members."""

import pytest
import torch
from test_network import BATCH, STATE

from composer_kd import TeacherError, TeacherPool
from composer_kd.teachers.stopwatch import Stopwatch
from settings import teachers

STUDENT = torch.zeros(4, 5)


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
    assert pool.forwards == 3 and pool.seconds > 0


def test_low_precision_signals_are_averaged_in_fp32(pool):
    for teacher in pool.teachers:
        teacher.signal = lambda batch, logits=teacher.signal(BATCH).bfloat16(): logits
    expected = torch.stack([teacher.signal(BATCH).float() for teacher in pool.teachers]).mean(0)
    signal = pool.signal(BATCH, (0, 1, 2), STUDENT)
    assert signal.dtype == torch.float32
    torch.testing.assert_close(signal, expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_teacher_that_is_not_finite_is_named_once(pool, value):
    pool.teachers[1].signal = lambda batch: torch.full((4, 5), value)
    pool.signal(BATCH, (0, 1), STUDENT)
    pool.signal(BATCH, (0,), STUDENT)
    with pytest.raises(TeacherError, match=r'teacher teacher1 \(number 1\) gave NaN or infinity at batch 7'):
        pool.raise_if_unsound(7)
    pool.raise_if_unsound(8)


def test_a_class_may_be_ruled_out(pool):
    pool.teachers[1].signal = lambda batch: torch.tensor([0.0, 1.0, 2.0, 3.0, -torch.inf]).expand(4, 5)
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
