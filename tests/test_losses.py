import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from composer_kd import losses

quick = settings(deadline=None, max_examples=40)


def kl_reference(student, teacher, temperature=1.0):
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    return temperature**2 * rel_entr(p, q).sum(-1).mean()


def reverse_kl_reference(student, teacher, temperature=1.0):
    return kl_reference(teacher, student, temperature)


def jsd_reference(student, teacher, temperature=1.0, beta=0.5):
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * rel_entr(p, m) + (1 - beta) * rel_entr(q, m)).sum(-1).mean()


def mse_reference(student, teacher):
    return sum((a - b) ** 2 for a, b in zip(student.flat, teacher.flat, strict=True)) / student.size


def cosine_reference(student, teacher):
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - ((student * teacher).sum(-1) / norms).mean()


def topk_kl_reference(student, teacher, k, temperature=1.0):
    """One position and one class at a time."""
    total, classes = 0.0, student.shape[-1]
    positions = list(zip(student.reshape(-1, classes), teacher.reshape(-1, classes), strict=True))
    for s, t in positions:
        log_q, log_p = log_softmax(s / temperature), log_softmax(t / temperature)
        order = np.argsort(-t)
        total += sum(math.exp(log_p[c]) * (log_p[c] - log_q[c]) for c in order[:k])
        if k < classes:
            p_rest, q_rest = (logsumexp(x[order[k:]]) for x in (log_p, log_q))
            total += math.exp(p_rest) * (p_rest - q_rest)
    return temperature**2 * total / len(positions)


def topk_kl(*, student_logits, teacher_logits, k=3, temperature=1.0, where=None, axis=-1):
    """`topk_kl` with a dense teacher, so that it runs through the tests of the others."""
    values, indices, tail = losses.topk(teacher_logits=teacher_logits, k=k, temperature=temperature, axis=axis)
    return losses.topk_kl(
        student_logits=student_logits,
        teacher_values=values,
        teacher_indices=indices,
        teacher_tail=tail,
        temperature=temperature,
        where=where,
        axis=axis,
    )


# Loss, options, reference in float64 numpy, teacher's logits may be -inf.
TABLE = [
    pytest.param(losses.kl, {}, kl_reference, id='kl'),
    pytest.param(losses.kl, {'temperature': 4.0}, kl_reference, id='kl-T4'),
    pytest.param(losses.kl, {'temperature': 0.7}, kl_reference, id='kl-T0.7'),
    pytest.param(losses.reverse_kl, {'temperature': 3.0}, reverse_kl_reference, id='reverse_kl'),
    pytest.param(losses.jsd, {}, jsd_reference, id='jsd'),
    pytest.param(losses.jsd, {'temperature': 2.0, 'beta': 0.1}, jsd_reference, id='jsd-0.1'),
    pytest.param(losses.mse, {}, mse_reference, id='mse'),
    pytest.param(losses.cosine, {}, cosine_reference, id='cosine'),
    pytest.param(topk_kl, {'k': 1}, topk_kl_reference, id='topk_kl-1'),
    pytest.param(topk_kl, {'k': 3, 'temperature': 4.0}, topk_kl_reference, id='topk_kl-T4'),
    pytest.param(topk_kl, {'k': 7, 'temperature': 2.0}, topk_kl_reference, id='topk_kl-all'),
]
every_loss = pytest.mark.parametrize(('loss', 'options', 'reference'), TABLE)
WITH_TEMPERATURE = [losses.kl, losses.reverse_kl, losses.jsd, topk_kl]


def logits_pair(*shape, dtype=torch.float64, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return student.requires_grad_(), teacher


def value_and_grad(loss, student, teacher, **options):
    value = loss(student_logits=student, teacher_logits=teacher, **options)
    (grad,) = torch.autograd.grad(value, student)
    return value, grad


# Values and gradients


@every_loss
@pytest.mark.parametrize('shape', [(7,), (5, 7), (2, 3, 7)])
def test_equals_reference(loss, options, reference, shape):
    student, teacher = logits_pair(*shape)
    value = loss(student_logits=student, teacher_logits=teacher, **options)
    assert value.shape == ()
    assert value.dtype == torch.float64
    expected = reference(student.detach().numpy(), teacher.numpy(), **options)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@every_loss
def test_gradient(loss, options, reference):
    student, teacher = logits_pair(4, 7)
    where = torch.tensor([True, True, False, True])
    for mask in (None, where):
        assert torch.autograd.gradcheck(
            lambda x, mask=mask: loss(student_logits=x, teacher_logits=teacher, where=mask, **options), student
        )


@pytest.mark.parametrize('temperature', [1.0, 2.0, 3.0, 4.0, 2.7])
@pytest.mark.parametrize('shape', [(1, 2), (7, 33), (64, 10), (256, 1000)])
def test_kl_equals_torch_bit_for_bit(shape, temperature):
    student, teacher = logits_pair(*shape, dtype=torch.float32)
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    expected = F.kl_div(log_q, p, reduction='batchmean') * temperature * temperature
    (expected_grad,) = torch.autograd.grad(expected, student)
    value, grad = value_and_grad(losses.kl, student, teacher, temperature=temperature)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


def test_kl_runs_from_teacher_to_student():
    # A teacher sure of one class, a student that spreads: log 2 forwards, nearly infinite backwards.
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -1e4]])
    assert losses.kl(student_logits=student, teacher_logits=teacher).item() == pytest.approx(math.log(2))
    assert losses.reverse_kl(student_logits=student, teacher_logits=teacher).item() == pytest.approx(5000, rel=1e-3)


@pytest.mark.parametrize('loss', WITH_TEMPERATURE)
def test_hot_gradient_tends_to_that_of_matched_logits(loss):
    # Hinton et al. 2015, section 2.1: for large T and centred logits, T^2 KL tends to sum (student - teacher)^2 / 2C;
    # merged classes are not of one size, so `topk_kl` tends to that at k = C only; JSD has a quarter of the curvature.
    student, teacher = logits_pair(5, 7)
    student, teacher = ((x - x.mean(-1, keepdim=True)).detach().requires_grad_() for x in (student, teacher))
    options = {'k': 7} if loss is topk_kl else {}
    _, grad = value_and_grad(loss, student, teacher, temperature=1e6, **options)
    expected = (student - teacher).detach() / (7 * 5)
    torch.testing.assert_close(grad, expected / 4 if loss is losses.jsd else expected, rtol=1e-4, atol=1e-7)


# Properties


def finite(low=-20.0, high=20.0):
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def pairs(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=5))
    both = draw(arrays(np.float64, (2, *shape), elements=finite()))
    return torch.from_numpy(both[0]), torch.from_numpy(both[1])


@quick
@given(pair=pairs(), temperature=st.floats(0.5, 8), beta=st.floats(0.01, 0.99))
def test_divergences_are_bounded_and_zero_at_equality(pair, temperature, beta):
    student, teacher = pair
    for loss in WITH_TEMPERATURE:
        options = {'k': 2} if loss is topk_kl else {}
        assert loss(student_logits=student, teacher_logits=teacher, temperature=temperature, **options) >= -1e-12
        same = loss(student_logits=teacher, teacher_logits=teacher, temperature=temperature, **options)
        assert abs(same) < 1e-11
    bound = -(temperature**2) * (beta * math.log(beta) + (1 - beta) * math.log1p(-beta))
    mixed = losses.jsd(student_logits=student, teacher_logits=teacher, temperature=temperature, beta=beta)
    assert -1e-12 <= mixed <= bound * (1 + 1e-9)


@quick
@given(pair=pairs(), shift=finite(), temperature=st.floats(0.5, 8))
def test_shifting_all_logits_changes_nothing(pair, shift, temperature):
    student, teacher = pair
    for loss in (losses.kl, losses.reverse_kl, losses.jsd):
        expected = loss(student_logits=student, teacher_logits=teacher, temperature=temperature)
        shifted = loss(student_logits=student + shift, teacher_logits=teacher - shift, temperature=temperature)
        torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-10)
    # Shifted after the choice: where logits tie, another choice is as good but not the same.
    values, indices, tail = losses.topk(teacher_logits=teacher, k=1, temperature=temperature)
    expected, shifted = (
        losses.topk_kl(
            student_logits=student + by,
            teacher_values=values - by,
            teacher_indices=indices,
            teacher_tail=tail - by,
            temperature=temperature,
        )
        for by in (0.0, shift)
    )
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-10)


@quick
@given(pair=pairs(), temperature=st.floats(0.5, 8), beta=st.floats(0.01, 0.99))
def test_jsd_swaps_sides_with_beta(pair, temperature, beta):
    a, b = pair
    one = losses.jsd(student_logits=a, teacher_logits=b, temperature=temperature, beta=beta)
    other = losses.jsd(student_logits=b, teacher_logits=a, temperature=temperature, beta=1 - beta)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_jsd_tends_to_both_divergences():
    student, teacher = logits_pair(5, 7)
    both = {'student_logits': student, 'teacher_logits': teacher, 'temperature': 2.0}
    torch.testing.assert_close(losses.jsd(**both, beta=1e-7) / 1e-7, losses.kl(**both), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.jsd(**both, beta=1 - 1e-7) / 1e-7, losses.reverse_kl(**both), rtol=1e-4, atol=0)


@quick
@given(pair=pairs(), temperature=st.floats(0.5, 8))
def test_topk_rises_with_k_to_the_dense_loss(pair, temperature):
    student, teacher = pair
    values, indices = teacher.sort(descending=True)  # One order for every k, so that each choice holds the one before.
    by_k = [
        losses.topk_kl(
            student_logits=student,
            teacher_values=values[..., :k],
            teacher_indices=indices[..., :k],
            teacher_tail=temperature * (values[..., k:] / temperature).logsumexp(-1),
            temperature=temperature,
        ).item()
        for k in range(1, student.shape[-1] + 1)
    ]
    for fewer, more in itertools.pairwise(by_k):
        assert fewer <= more + 1e-10
    dense = losses.kl(student_logits=student, teacher_logits=teacher, temperature=temperature)
    assert by_k[-1] == pytest.approx(dense.item(), rel=1e-10, abs=1e-11)


@quick
@given(pair=pairs(), scale=st.floats(0.1, 10))
def test_cosine_lies_between_0_and_2_and_ignores_scale(pair, scale):
    student, teacher = (x + F.one_hot(torch.tensor(0), x.shape[-1]) * 50 for x in pair)
    value = losses.cosine(student_logits=student, teacher_logits=teacher)
    assert -1e-12 <= value <= 2
    torch.testing.assert_close(losses.cosine(student_logits=student * scale, teacher_logits=teacher), value)
    assert losses.cosine(student_logits=-teacher, teacher_logits=teacher).item() == pytest.approx(2)


@every_loss
@pytest.mark.parametrize('axis', [0, 1, 2, -1, -2, -3])
def test_axis(loss, options, reference, axis):
    student, teacher = logits_pair(3, 2, 7)
    expected, expected_grad = value_and_grad(loss, student, teacher, **options)
    moved = student.detach().movedim(-1, axis).contiguous().requires_grad_()
    value, grad = value_and_grad(loss, moved, teacher.movedim(-1, axis), axis=axis, **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad.movedim(-1, axis))


# Positions that count


@every_loss
@quick
@given(mask=arrays(np.bool_, (3, 4)))
def test_where_equals_selecting(loss, options, reference, mask):
    student, teacher = logits_pair(3, 4, 7)
    where = torch.from_numpy(mask)
    value, grad = value_and_grad(loss, student, teacher, where=where, **options)
    assert torch.all(grad[~where] == 0)
    if where.any():
        chosen = student.detach()[where].requires_grad_()
        expected, expected_grad = value_and_grad(loss, chosen, teacher[where], **options)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad[where], expected_grad)
    else:
        assert value == 0


@every_loss
@pytest.mark.parametrize('shape', [(), (1,), (4,), (3, 1), (1, 4)])
def test_where_broadcasts(loss, options, reference, shape):
    student, teacher = logits_pair(3, 4, 7)
    where = torch.ones(shape, dtype=torch.bool)
    where.view(-1)[1:2] = False
    value = loss(student_logits=student, teacher_logits=teacher, where=where, **options)
    full = loss(student_logits=student, teacher_logits=teacher, where=where.expand(3, 4).clone(), **options)
    assert torch.equal(value, full)


@every_loss
@pytest.mark.parametrize('poison', [math.nan, math.inf, -math.inf])
def test_masked_positions_do_no_harm(loss, options, reference, poison):
    student, teacher = logits_pair(4, 7)
    where = torch.tensor([True, False, True, False])
    expected, expected_grad = value_and_grad(loss, student, teacher, where=where, **options)
    bad_student, bad_teacher = (torch.where(where[:, None], x, poison) for x in (student.detach(), teacher))
    value, grad = value_and_grad(loss, bad_student.requires_grad_(), bad_teacher, where=where, **options)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@every_loss
@pytest.mark.parametrize('shape', [(4, 7), (0, 7), (7,)])
def test_no_position_gives_zero(loss, options, reference, shape):
    student, teacher = logits_pair(*shape)
    value, grad = value_and_grad(loss, student, teacher, where=torch.tensor(False), **options)
    assert value == 0
    assert grad.shape == student.shape
    assert torch.all(grad == 0)


@every_loss
def test_empty_batch_gives_zero(loss, options, reference):
    student, teacher = logits_pair(0, 7)
    value, _ = value_and_grad(loss, student, teacher, **options)
    assert value == 0


# Precision, extremes, sides


@every_loss
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(loss, options, reference, dtype):
    student, teacher = logits_pair(5, 7, dtype=dtype)
    value, grad = value_and_grad(loss, student, teacher, **options)
    expected, expected_grad = value_and_grad(
        loss, student.detach().float().requires_grad_(), teacher.float(), **options
    )
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad.to(dtype))


@every_loss
def test_autocast_changes_nothing(loss, options, reference):
    student, teacher = logits_pair(5, 7, dtype=torch.float32)
    expected, expected_grad = value_and_grad(loss, student, teacher, **options)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value, grad = value_and_grad(loss, student, teacher, **options)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@every_loss
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_on_gpu_changes_nothing(loss, options, reference, dtype):
    student, teacher = (x.detach().cuda() for x in logits_pair(5, 7, dtype=torch.float32))
    expected, expected_grad = value_and_grad(loss, student.requires_grad_(), teacher, **options)
    with torch.autocast('cuda', dtype=dtype):
        value, grad = value_and_grad(loss, student, teacher, **options)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)
    on_cpu = reference(student.detach().cpu().numpy(), teacher.cpu().numpy(), **options)
    assert value.item() == pytest.approx(on_cpu, rel=1e-4)


@every_loss
def test_mixed_precision_sides(loss, options, reference):
    student, teacher = logits_pair(5, 7)
    expected = loss(student_logits=student, teacher_logits=teacher.float().double(), **options)
    value, _ = value_and_grad(loss, student, teacher.float(), **options)
    torch.testing.assert_close(value, expected, rtol=1e-6 if loss is topk_kl else 1e-12, atol=0)


@every_loss
def test_no_gradient_reaches_the_teacher(loss, options, reference):
    student, teacher = logits_pair(5, 7)
    teacher.requires_grad_()
    loss(student_logits=student, teacher_logits=teacher, **options).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not loss(student_logits=student.detach(), teacher_logits=teacher, **options).requires_grad


def test_no_gradient_reaches_a_topk_teacher():
    student, teacher = logits_pair(5, 7)
    values, indices, tail = losses.topk(teacher_logits=teacher.requires_grad_(), k=2)
    assert not values.requires_grad
    assert not tail.requires_grad
    values, tail = values.clone().requires_grad_(), tail.clone().requires_grad_()
    losses.topk_kl(student_logits=student, teacher_values=values, teacher_indices=indices, teacher_tail=tail).backward()
    assert values.grad is None
    assert tail.grad is None


@pytest.mark.parametrize('loss', [losses.kl, losses.jsd, topk_kl])
def test_classes_the_teacher_rules_out_add_nothing(loss):
    student, teacher = logits_pair(5, 7)
    teacher[:, 4:] = -math.inf
    value, grad = value_and_grad(loss, student, teacher, temperature=2.0)
    nearly = teacher.clamp(min=-1e5)
    expected, expected_grad = value_and_grad(loss, student, nearly, temperature=2.0)
    assert value > 0
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('loss', WITH_TEMPERATURE)
@pytest.mark.parametrize('scale', [1e2, 1e4, 1e8])
def test_extreme_logits_stay_finite(loss, scale):
    student, teacher = logits_pair(5, 7, dtype=torch.float32, scale=scale)
    value, grad = value_and_grad(loss, student, teacher, temperature=4.0)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


# Top k


def test_topk_keeps_raw_logits_and_the_mass_of_the_rest():
    _, teacher = logits_pair(5, 7)
    values, indices, tail = losses.topk(teacher_logits=teacher, k=3, temperature=4.0)
    assert torch.equal(values, teacher.gather(-1, indices))
    assert torch.equal(values, teacher.sort(descending=True).values[:, :3])
    mass = torch.softmax(teacher / 4, -1)
    merged = torch.softmax(torch.cat([values, tail[:, None]], -1) / 4, -1)
    torch.testing.assert_close(merged[:, :3], mass.gather(-1, indices))
    torch.testing.assert_close(merged[:, 3], 1 - mass.gather(-1, indices).sum(-1))
    _, _, none_left = losses.topk(teacher_logits=teacher, k=7)
    assert torch.all(none_left == -math.inf)


def test_topk_leaves_its_input_alone():
    student, teacher = logits_pair(5, 7)
    before = student.detach().clone(), teacher.clone()
    topk_kl(student_logits=student, teacher_logits=teacher).backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_all_classes_equal_the_dense_loss(temperature):
    student, teacher = logits_pair(5, 7)
    dense, dense_grad = value_and_grad(losses.kl, student, teacher, temperature=temperature)
    value, grad = value_and_grad(topk_kl, student, teacher, temperature=temperature, k=7)
    torch.testing.assert_close(value, dense, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('gap', [10.0, 17.0, 30.0, 80.0])
def test_tail_too_small_for_one_minus_the_rest(gap):
    # In float32 the selected mass rounds to 1 from a gap of 17 on; the tail's own logsumexp keeps value and gradient.
    _, teacher = logits_pair(4, 50, dtype=torch.float32, scale=1.0)
    student = torch.zeros(4, 50).scatter(1, teacher.topk(3).indices, gap).requires_grad_()
    value, grad = value_and_grad(topk_kl, student, teacher)
    exact, exact_grad = value_and_grad(topk_kl, student.detach().double().requires_grad_(), teacher.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_a_rest_of_next_to_no_mass_keeps_its_value_and_gradient(temperature):
    # Either side's rest weighs about 1e-12, of which one less the chosen leaves nothing in float32.
    student, teacher = logits_pair(4, 50, scale=1.0)
    chosen = teacher.topk(3).indices
    gap = temperature * -math.log(1e-12 / 20)
    student, teacher = (x.detach().scatter_add(1, chosen, torch.full((4, 3), gap).double()) for x in (student, teacher))
    masses = torch.softmax(student / temperature, -1).scatter(1, chosen, 0.0)
    assert 1e-13 < masses.sum(-1).min() < masses.sum(-1).max() < 1e-11
    options = {'temperature': temperature, 'k': 3}
    _, grad = value_and_grad(topk_kl, student.float().requires_grad_(), teacher.float(), **options)
    _, exact = value_and_grad(topk_kl, student.float().double().requires_grad_(), teacher.float().double(), **options)
    of_rest, exact_of_rest = (x.double().scatter(1, chosen, 0.0) for x in (grad, exact))
    assert 0 < exact_of_rest.abs().max() < 1e-11
    torch.testing.assert_close(of_rest, exact_of_rest, rtol=1e-4, atol=0)


def test_no_copy_of_all_logits_but_one_on_either_way():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            own = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            for x in result if isinstance(result, tuple) else [result]:
                if isinstance(x, torch.Tensor) and x.numel() >= 5 * 700 and x.untyped_storage().data_ptr() not in own:
                    self.made += 1
            return result

    student, teacher = logits_pair(5, 700, dtype=torch.float32)
    values, indices, tail = losses.topk(teacher_logits=teacher, k=3, temperature=2.0)
    given = {'teacher_values': values, 'teacher_indices': indices, 'teacher_tail': tail}
    with Copies() as forward:
        value = losses.topk_kl(student_logits=student, **given, temperature=2.0)
    with Copies() as backward:
        (grad,) = torch.autograd.grad(value, student)
    assert (forward.made, backward.made) == (1, 1)
    assert grad.shape == student.shape


@quick
@given(pair=pairs(), temperature=st.floats(0.5, 8), k=st.integers(1, 5))
def test_bias_is_what_the_merged_rest_hides(pair, temperature, k):
    student, teacher = pair
    k = min(k, student.shape[-1])
    both = {'student_logits': student, 'teacher_logits': teacher, 'temperature': temperature}
    bias = losses.topk_bias(**both, k=k)
    assert bias.shape == student.shape[:-1]
    assert torch.all(bias >= -1e-12)
    hidden = losses.kl(**both) - topk_kl(**both, k=k)
    torch.testing.assert_close(bias.mean(), hidden, rtol=1e-9, atol=1e-10)


def test_bias_on_another_axis_and_where_the_teacher_rules_out_the_rest():
    student, teacher = logits_pair(5, 7)
    bias = losses.topk_bias(student_logits=student, teacher_logits=teacher, k=3)
    assert bias.gt(0).all() and not bias.requires_grad
    moved = losses.topk_bias(student_logits=student.t(), teacher_logits=teacher.t(), k=3, axis=0)
    torch.testing.assert_close(moved, bias)
    teacher[:, 3:] = -math.inf
    for k in (2, 3, 4):  # some of the rest are ruled out, all of them, one among the chosen
        hidden = losses.kl(student_logits=student, teacher_logits=teacher) - topk_kl(
            student_logits=student, teacher_logits=teacher, k=k
        )
        bias = losses.topk_bias(student_logits=student, teacher_logits=teacher, k=k)
        torch.testing.assert_close(bias.mean(), hidden.detach(), rtol=1e-9, atol=1e-12)
        assert k == 2 or bias.eq(0).all()


def test_stored_types():
    # As a store would give them back: half-precision values, small integers, and junk where nothing was stored.
    student, teacher = logits_pair(4, 7, dtype=torch.float32)
    values, indices, tail = losses.topk(teacher_logits=teacher, k=3)
    where = torch.tensor([True, True, False, True])
    stored = {'teacher_values': values.half(), 'teacher_indices': indices.to(torch.int16), 'teacher_tail': tail}
    expected = losses.topk_kl(student_logits=student[where], **{name: x[where] for name, x in stored.items()})
    stored['teacher_indices'][2] = -1
    assert torch.equal(losses.topk_kl(student_logits=student, **stored, where=where), expected)


# Errors


@every_loss
def test_shapes_must_agree(loss, options, reference):
    student, teacher = logits_pair(5, 7)
    with pytest.raises(ValueError, match=r'student_logits \(5, 7\)'):
        loss(student_logits=student, teacher_logits=torch.cat([teacher, teacher]), **options)


def test_topk_shapes_must_agree():
    student, teacher = logits_pair(5, 7)
    values, indices, tail = losses.topk(teacher_logits=teacher, k=3)
    right = {'teacher_values': values, 'teacher_indices': indices, 'teacher_tail': tail}
    wide = losses.topk(teacher_logits=torch.cat([teacher, teacher], -1), k=8)
    wrong = [
        {'teacher_indices': indices[:, :2]},
        {'teacher_tail': tail[:3]},
        {'teacher_tail': tail[:, None]},
        dict(zip(right, wide, strict=True)),
    ]
    for change in wrong:
        with pytest.raises(ValueError, match='do not fit'):
            losses.topk_kl(student_logits=student, **(right | change))


@pytest.mark.parametrize('loss', WITH_TEMPERATURE)
@pytest.mark.parametrize('temperature', [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(loss, temperature):
    student, teacher = logits_pair(5, 7)
    with pytest.raises(ValueError, match='temperature must be positive'):
        loss(student_logits=student, teacher_logits=teacher, temperature=temperature)
    values, indices, tail = losses.topk(teacher_logits=teacher, k=3)
    with pytest.raises(ValueError, match='temperature must be positive'):
        losses.topk_kl(
            student_logits=student,
            teacher_values=values,
            teacher_indices=indices,
            teacher_tail=tail,
            temperature=temperature,
        )


@pytest.mark.parametrize('beta', [0.0, 1.0, -0.1, 1.1])
def test_beta_lies_between(beta):
    student, teacher = logits_pair(5, 7)
    with pytest.raises(ValueError, match='between 0 and 1'):
        losses.jsd(student_logits=student, teacher_logits=teacher, beta=beta)


@pytest.mark.parametrize('k', [0, 8])
def test_k_is_a_number_of_classes(k):
    with pytest.raises(ValueError, match='number of classes, 7'):
        losses.topk(teacher_logits=torch.zeros(5, 7), k=k)


@every_loss
@pytest.mark.parametrize('where', [torch.ones(3, dtype=torch.bool), torch.ones(5, 1, dtype=torch.bool), torch.ones(5)])
def test_where_must_be_a_mask_of_the_positions(loss, options, reference, where):
    student, teacher = logits_pair(5, 7)
    with pytest.raises(ValueError, match='boolean mask'):
        loss(student_logits=student, teacher_logits=teacher, where=where, **options)


def test_sides_are_named():
    with pytest.raises(TypeError):
        losses.kl(torch.zeros(5, 7), torch.zeros(5, 7))
