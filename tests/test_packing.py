"""Tensors as one piece of memory, and back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_kd.packing import Packing

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=6))
def test_what_is_packed_comes_back(kinds):
    tensors = [torch.randint(0, 100, shape).to(dtype) for dtype, shape in kinds]
    tensors = [tensor.permute(tuple(reversed(range(tensor.ndim)))) for tensor in tensors]  # not contiguous
    packing = Packing(tensors)
    packed = packing.pack(tensors)
    assert packed.dtype == torch.uint8 and packed.shape == (packing.bytes,)
    assert packing.bytes == sum(tensor.nbytes for tensor in tensors)
    unpacked = packing.unpack(packed)
    assert [one.dtype for one in unpacked] == [one.dtype for one in tensors]
    assert all(torch.equal(one, other) for one, other in zip(unpacked, tensors, strict=True))
    packed.zero_()
    assert not any(one.any() for one in unpacked)  # which share its memory
