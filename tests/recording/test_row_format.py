"""Rows against what they were made of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from composer_kd import losses
from composer_kd.recording import RecordError, RowFormat
from composer_kd.topk import TopKLogits
from composer_kd.vocabulary import DeferredLogits

quick = settings(deadline=None, max_examples=40)
TEMPERATURES = (1.0, 2.0, 4.0, 0.7)


def logits_of(dtype, low=-1000, high=1000, positions=st.integers(0, 5), classes=st.integers(1, 12)):
    width = {'float16': 16, 'float32': 32, 'float64': 64}[dtype]
    values = st.floats(low, high, width=width, allow_nan=False, allow_infinity=False) | st.just(-math.inf)
    shapes = st.tuples(positions, classes)
    return shapes.flatmap(lambda shape: arrays(dtype, shape, elements=values)).map(torch.from_numpy)


def decoded(row_format, logits):
    rows = row_format.encode(logits)
    assert (rows.dtype, rows.shape) == (torch.uint8, (len(logits), row_format.row_bytes))
    row_format.check(rows.numpy())
    return row_format.decode(rows)


@quick
@given(logits_of('float32', low=None, high=None))
def test_whole_vectors_in_float32_are_the_same_bits(logits):
    back = decoded(RowFormat(logits.shape[1]), logits)
    assert torch.equal(back.view(torch.int32), logits.view(torch.int32))


@quick
@given(logits_of('float64'), st.sampled_from(['float16', 'float32']))
def test_whole_vectors_are_rounded_to_their_dtype(logits, dtype):
    back = decoded(RowFormat(logits.shape[1], dtype=dtype), logits)
    assert back.dtype == torch.float32
    assert torch.equal(back, logits.to(getattr(torch, dtype)).float())


@quick
@given(logits_of('float64'), st.integers(1, 12), st.sampled_from(['float16', 'float32']))
@example(torch.full((2, 4), -math.inf, dtype=torch.float64), 2, 'float16')
def test_top_k_is_that_of_the_losses(logits, k, dtype):
    k, classes = min(k, logits.shape[1]), logits.shape[1]
    back = decoded(RowFormat(classes, k, dtype, TEMPERATURES), logits)
    assert isinstance(back, TopKLogits) and (back.shape, [*back.tails]) == (logits.shape, [*TEMPERATURES])
    for temperature in TEMPERATURES:
        values, indices, tail = losses.topk(teacher_logits=logits, k=k, temperature=temperature)
        assert torch.equal(back.values, values.to(getattr(torch, dtype)).float())
        assert torch.equal(back.indices, indices)
        torch.testing.assert_close(back.tails[temperature], tail.float(), rtol=2e-7, atol=1e-6)


@quick
@given(logits_of('float32'))
def test_all_classes_are_the_whole_vector(logits):
    classes = logits.shape[1]
    back = decoded(RowFormat(classes, classes, 'float32', (4.0,)), logits)
    dense = torch.full_like(logits, math.nan).scatter_(-1, back.indices, back.values)
    assert torch.equal(dense, decoded(RowFormat(classes), logits))
    assert (back.tails[4.0] == -math.inf).all()


def test_a_small_tail_is_exact():
    """The whole less the chosen would leave nothing of it."""
    logits = torch.tensor([[40.0, 0.0, -1.0, -2.0]])
    tail = decoded(RowFormat(4, 1, 'float16', (1.0,)), logits).tails[1.0]
    torch.testing.assert_close(tail, logits[:, 1:].logsumexp(-1))


@pytest.mark.parametrize('classes', [2**16, 2**16 + 1])
def test_classes_of_large_vocabularies(classes):
    chosen = torch.tensor([[classes - 1, 2**15, 3], [0, 2**15 - 1, classes - 2]])
    logits = torch.zeros(2, classes).scatter_(1, chosen, torch.tensor([[9.0, 8.0, 7.0]]).expand(2, 3))
    row_format = RowFormat(classes, 3, 'float16', (1.0,))
    assert row_format.row_bytes == 3 * 2 + 3 * (2 if classes == 2**16 else 4) + 4
    rows = row_format.encode(logits)
    assert torch.equal(row_format.decode(rows).indices, chosen)
    assert torch.equal(row_format.decode(rows[1:]).indices, chosen[1:])  # which begins at an odd place in memory


@pytest.mark.parametrize('k', [None, 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_deferred_logits_say_what_dense_ones_do_and_are_never_all_there(k, dtype, monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(600, 8), torch.randn(50, 8), torch.randn(50)
    deferred = DeferredLogits(*(x.to(dtype) for x in (hidden, weight, bias)))
    dense = torch.cat([deferred.part(slice(i, i + 256)) for i in range(0, 600, 256)])
    row_format = RowFormat(50, k, 'float32', (1.0, 2.0) if k else ())
    parts = []
    part = DeferredLogits.part
    monkeypatch.setattr(DeferredLogits, 'part', lambda *args: parts.append(part(*args)) or parts[-1])
    assert torch.equal(row_format.encode(deferred), row_format.encode(dense))
    assert [len(chunk) for chunk in parts] == [256, 256, 88]


def test_dense_logits_are_encoded_in_parts(monkeypatch):
    logits = torch.randn(700, 20)
    row_format = RowFormat(20, 3, 'float16', (1.0, 4.0))
    whole = row_format.encode(logits)
    monkeypatch.setattr('composer_kd.recording.formats._LOGITS_AT_ONCE', 1)
    assert torch.equal(row_format.encode(logits), whole)


def test_logits_may_lie_in_memory_in_any_order():
    logits = torch.randn(9, 4).t()
    for row_format in (RowFormat(9), RowFormat(9, 2, 'float16', (1.0,))):
        assert torch.equal(row_format.encode(logits), row_format.encode(logits.contiguous()))


@pytest.mark.parametrize('k', [None, 2])
@pytest.mark.parametrize('dtype', ['float16', 'float32'])
@pytest.mark.parametrize('logit', [math.nan, math.inf, 1e5, -1e5, 1e39, -1e39])
def test_what_does_not_fit_is_an_error(k, dtype, logit):
    row_format = RowFormat(3, k, dtype, (2.0,) if k else ())
    rows = row_format.encode(torch.tensor([[0.0, 1.0, 2.0], [-math.inf, logit, -math.inf]], dtype=torch.float64))
    if dtype == 'float32' and abs(logit) == 1e5:
        return row_format.check(rows.numpy())
    with pytest.raises(RecordError, match=r'^a logit of the teacher is NaN or infinite') as error:
        row_format.check(rows.numpy())
    assert ('record it in float32' in str(error.value)) == (dtype == 'float16')
    return row_format.check(rows[:1].numpy())


def test_a_class_that_is_ruled_out_stays_so():
    logits = torch.tensor([[1.0, -math.inf, 0.5]])
    for dtype in ('float16', 'float32'):
        assert torch.equal(decoded(RowFormat(3, dtype=dtype), logits), logits)
        assert decoded(RowFormat(3, 2, dtype, (1.0,)), logits).tails[1.0].item() == -math.inf


def test_rows_that_no_teacher_wrote():
    row_format = RowFormat(5, 2, 'float16', (1.0,))
    rows = row_format.encode(torch.randn(2, 5)).numpy()
    wrong = rows.copy()
    wrong[1, 4:6] = np.array([5], '<u2').view(np.uint8)
    with pytest.raises(RecordError, match=r'^there are classes beyond the 5 of the record'):
        row_format.check(wrong)
    wrong = rows.copy()
    wrong[0, 8:12] = np.array([math.nan], '<f4').view(np.uint8)
    with pytest.raises(RecordError, match=r'^the logits of the teacher are too large for a record'):
        row_format.check(wrong)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((0,), 'a record is of 1 class or more, not 0'),
        ((5, 6, 'float16', (1.0,)), 'a record holds from 1 to all 5 logits of a position, not 6'),
        ((5, 0, 'float16', (1.0,)), 'a record holds from 1 to all 5 logits of a position, not 0'),
        ((5, None, 'bfloat16'), 'a record holds float16 or float32, not bfloat16'),
        ((5, 2, 'float16', (0.0,)), 'temperatures must be positive and finite'),
        ((5, 2, 'float16'), 'with k a record holds tails at one or more temperatures'),
        ((5, 2, 'float16', (1.0, 1.0)), 'with k a record holds tails at one or more temperatures'),
        ((5, None, 'float16', (1.0,)), 'with k a record holds tails at one or more temperatures'),
    ],
)
def test_formats_that_cannot_be(arguments, message):
    with pytest.raises(RecordError, match=f'^{message}'):
        RowFormat(*arguments)


def test_a_teacher_of_other_classes():
    with pytest.raises(RecordError, match=r'^the teacher speaks of 4 classes, its record is of 5$'):
        RowFormat(5).encode(torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('k', [None, 10])
def test_a_gpu_writes_the_same_rows_and_is_not_made_to_wait(k):
    logits = torch.randn(1500, 2000)
    row_format = RowFormat(2000, k, 'float16', (1.0, 4.0) if k else ())
    on_device = logits.cuda()
    row_format.encode(on_device)
    torch.cuda.set_sync_debug_mode('error')
    try:
        rows = row_format.encode(on_device)
        back = row_format.decode(rows)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    expected = row_format.decode(row_format.encode(logits))
    if k is None:
        assert torch.equal(back.cpu(), expected)
    else:
        assert torch.equal(back.values.cpu(), expected.values) and torch.equal(back.indices.cpu(), expected.indices)
        for temperature, tail in back.tails.items():
            torch.testing.assert_close(tail.cpu(), expected.tails[temperature])
