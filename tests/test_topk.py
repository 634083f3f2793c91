import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from composer_kd import losses
from composer_kd.topk import TopKLogits, topk_loss


def logits(*shape, seed=0):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(1, 9),
    temperatures=st.lists(st.floats(0.3, 9), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 99),
)
def test_every_temperature_has_the_tail_of_its_own(k, temperatures, seed):
    teacher, student = logits(4, 9, seed=seed), logits(4, 9, seed=seed + 1)
    known = TopKLogits.of(teacher, k, temperatures)
    assert known.shape == teacher.shape and known.device == teacher.device
    for temperature in temperatures:
        values, indices, tail = losses.topk(teacher_logits=teacher, k=k, temperature=temperature)
        assert torch.equal(known.values, values) and torch.equal(known.indices, indices)
        assert torch.equal(known.tail(temperature), tail)
        p = torch.softmax(teacher / temperature, -1)
        mass = known.tail_mass(temperature)
        torch.testing.assert_close(mass, 1 - p.gather(-1, indices).sum(-1), rtol=0, atol=1e-12)
        found = topk_loss(student_logits=student, teacher=known, temperature=temperature)
        kl = losses.kl(student_logits=student, teacher_logits=teacher, temperature=temperature)
        bias = losses.topk_bias(student_logits=student, teacher_logits=teacher, k=k, temperature=temperature)
        torch.testing.assert_close(found + bias.mean(), kl, rtol=1e-10, atol=1e-11)


def test_a_mass_too_small_for_one_minus_the_chosen():
    teacher = torch.tensor([[60.0, 61.0, 1.0, 2.0, 3.0]])
    exact = TopKLogits.of(teacher.double(), 2, [1.0]).tail_mass(1.0)
    assert 0 < exact.item() < 1e-25
    torch.testing.assert_close(TopKLogits.of(teacher, 2, [1.0]).tail_mass(1.0).double(), exact, rtol=1e-5, atol=0)


def test_where():
    student, teacher = logits(2, 3, 9).requires_grad_(), logits(2, 3, 9, seed=1)
    where = torch.tensor([[True, False, True], [False, True, False]])
    known = TopKLogits.of(teacher, 4, [2.0])
    found = topk_loss(student_logits=student, teacher=known, temperature=2.0, where=where)
    chosen = TopKLogits.of(teacher[where], 4, [2.0])
    expected = topk_loss(student_logits=student[where], teacher=chosen, temperature=2.0)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, student)
    assert grad[~where].eq(0).all() and grad[where].ne(0).all()


def test_all_classes_need_no_tail():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    values, indices = teacher.sort(descending=True)
    known = TopKLogits(values, indices, {}, 9)
    for temperature in (1.0, 3.7):
        found = topk_loss(student_logits=student, teacher=known, temperature=temperature)
        dense = losses.kl(student_logits=student, teacher_logits=teacher, temperature=temperature)
        torch.testing.assert_close(found, dense, rtol=1e-13, atol=0)
        assert known.tail_mass(temperature).eq(0).all()


def test_a_temperature_that_was_not_recorded():
    known = TopKLogits.of(logits(4, 9), 3, [8.0, 1.0, 2.0, 4.0])
    with pytest.raises(ValueError) as error:
        topk_loss(student_logits=logits(4, 9), teacher=known, temperature=2.5)
    assert str(error.value) == (
        "the record's tails are at temperatures 1, 2, 4, 8, not 2.5: distil at one of these, or record anew with "
        'temperature 2.5'
    )


def test_other_classes_or_positions():
    known = TopKLogits.of(logits(4, 9), 3, [1.0])
    for shape in ((4, 8), (3, 9), (4, 1, 9), (4, 2)):
        with pytest.raises(ValueError, match='differ in shape: both must score the same classes at the same positions'):
            topk_loss(student_logits=logits(*shape), teacher=known)


def test_rows():
    known = TopKLogits.of(logits(5, 9), 3, [1.0, 2.0])
    some = known.rows(slice(1, 3))
    assert some.shape == (2, 9)
    assert torch.equal(some.values, known.values[1:3]) and torch.equal(some.indices, known.indices[1:3])
    assert all(torch.equal(some.tail(T), known.tail(T)[1:3]) for T in (1.0, 2.0))


def test_soundness():
    sound = torch.tensor([[1.0, 0.0, -math.inf]])
    assert TopKLogits.of(sound, 3, [1.0]).are_sound() and TopKLogits.of(sound, 2, [1.0]).are_sound()
    for poison in (math.nan, math.inf):
        assert not TopKLogits.of(torch.tensor([[1.0, poison, 0.0]]), 2, [1.0]).are_sound()


def test_half_precision_and_small_integers():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    known = TopKLogits.of(teacher.half(), 3, [1.0])
    assert known.values.dtype == torch.float16 and known.tail(1.0).dtype == torch.float32
    stored = TopKLogits(known.values, known.indices.to(torch.int16), known.tails, 9)
    exact = TopKLogits.of(teacher.half().double(), 3, [1.0])
    torch.testing.assert_close(
        topk_loss(student_logits=student, teacher=stored),
        topk_loss(student_logits=student, teacher=exact),
        rtol=1e-6,
        atol=0,
    )
