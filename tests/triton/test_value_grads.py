"""``value_grads`` in the interpreter: both products, either alone, one or several shares, against float64."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npt_kernels.kernels.triton.numerics import INTERPRET
from npt_kernels.kernels.triton.value_grads import dc_and_value_grad, low_rank_grad, pair_bytes, reduce_partials
from tests.support.helpers import assert_within_twice, randn

pytestmark = pytest.mark.skipif(not INTERPRET, reason="kernels were defined without TRITON_INTERPRET=1")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(tokens, width, rank, dtype):
    return (
        randn(tokens, width, dtype=dtype),
        randn(rank, width, dtype=dtype, scale=width**-0.5),
        randn(tokens, rank, dtype=dtype),
    )


def both(dy, b, c, dtype):
    dy, b, c = (t.to(dtype) for t in (dy, b, c))
    return dy @ b.t(), c.t() @ dy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rank", "parts"), [(80, 96, 32, 2), (48, 65, 24, 1), (64, 32, 16, None)])
def test_twice(dtype, tokens, width, rank, parts):
    dy, b, c = inputs(tokens, width, rank, dtype)
    actual = dc_and_value_grad(dy, b, c, method="fused", parts=parts)
    for name, y, ref, true in zip(
        ("dc", "dB"), actual, both(dy, b, c, dtype), both(dy, b, c, torch.float64), strict=True
    ):
        assert_within_twice(y, ref, true, name)


@given(tokens=st.integers(0, 70), width=st.integers(1, 70), rank=st.integers(1, 20), parts=st.integers(1, 5))
@settings(max_examples=12)
def test_any_shape(tokens, width, rank, parts):
    dy, b, c = inputs(tokens, width, rank, torch.float32)
    actual = dc_and_value_grad(dy, b, c, method="fused", parts=parts)
    for y, true in zip(actual, both(dy, b, c, torch.float64), strict=True):
        torch.testing.assert_close(y.double(), true, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(("need_dc", "need_db"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(need_dc, need_db):
    dy, b, c = inputs(40, 50, 8, torch.float32)
    full = dc_and_value_grad(dy, b, c, method="fused", parts=2)
    some = dc_and_value_grad(
        dy, b if need_dc else None, c if need_db else None, need_dc, need_db, method="fused", parts=2
    )
    for needed, one, other in zip((need_dc, need_db), some, full, strict=True):
        assert torch.equal(one, other) if needed else one is None


@pytest.mark.parametrize("method", ["fused", "vendor", "auto"])
@pytest.mark.parametrize("transposed", [True, False])
def test_single_gradient(method, transposed):
    """d w_a_up = dpᵀ u and d w_down = aᵀ dz."""
    dy, _, c = inputs(70, 40, 8, torch.float32)
    grad = low_rank_grad(c, dy, method=method, transposed=transposed)
    true = c.double().t() @ dy.double()
    torch.testing.assert_close(grad.double(), true.t() if transposed else true, rtol=1e-5, atol=2e-5)
    assert grad.is_contiguous()


def test_strides():
    dy, b, c = inputs(40, 48, 16, torch.float32)
    expected = dc_and_value_grad(dy, b, c, method="fused", parts=2)
    wide = torch.cat([dy, dy], 1)[:, :48]
    for strided in (wide, dy.t().contiguous().t()):
        actual = dc_and_value_grad(strided, b.t().contiguous().t(), c.t().contiguous().t(), method="fused", parts=2)
        for y, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(y, e)
    ones = torch.ones(1, 1).expand(40, 48)  # what .sum().backward() sends
    dc, db = dc_and_value_grad(ones, b, c, method="fused")
    torch.testing.assert_close(dc, b.sum(1).expand(40, 16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, c.sum(0).unsqueeze(1).expand(16, 48), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fused", "vendor", "auto"])
def test_no_tokens(method):
    dy, b, c = inputs(0, 12, 8, torch.float32)
    dc, db = dc_and_value_grad(dy, b, c, method=method)
    assert dc.shape == (0, 8) and torch.equal(db, torch.zeros(8, 12))


def test_bitwise_repeatable_and_independent_of_garbage():
    dy, b, c = inputs(70, 70, 16, torch.float32)
    first, second = (dc_and_value_grad(dy, b, c, method="fused", parts=3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_fixed_order_sum():
    partials = torch.randn(5, 3, 7)
    expected = torch.zeros(3, 7)
    for part in partials:
        expected = expected + part
    assert torch.equal(reduce_partials(partials, torch.empty(3, 7)), expected)


def test_break_even():
    """The docstring's arithmetic: one pass wins at R = 64 over wide outputs, loses at R = 256."""
    one, two = pair_bytes(8192, 14336, 64, 2, 512, 4)
    assert two == 2 * 8192 * 14336 * 2
    assert one == 8192 * 14336 * 2 + 8 * 64 * (28 * 8192 + 4 * 14336)
    assert one < 0.85 * two
    one, two = pair_bytes(8192, 14336, 256, 2, 128, 1)
    assert one > two
    assert pair_bytes(100, 64, 16, 2, 64, 1) == (100 * 64 * 2, 2 * 100 * 64 * 2)  # nothing shared: no second pass


def test_auto_takes_the_vendor_gemm_for_large_rank():
    dy, b, c = inputs(80, 200, 100, torch.float32)
    actual = dc_and_value_grad(dy, b, c)
    assert all(torch.equal(y, e) for y, e in zip(actual, (dy @ b.t(), c.t() @ dy), strict=True))
