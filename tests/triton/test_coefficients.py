"""Coefficient kernels in the interpreter: every rule, fused and split, rule gradients, against float64."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npt_kernels.kernels.triton import coefficients as module
from npt_kernels.kernels.triton import rules as rule_kernels
from npt_kernels.kernels.triton.coefficients import coefficients_forward, merge_dz, rule_backward, rule_forward
from npt_kernels.kernels.triton.numerics import INTERPRET
from npt_kernels.rules import RULES, get_rule
from tests.support.helpers import assert_within_twice, key_shape, plain_coefficients, randn

pytestmark = pytest.mark.skipif(not INTERPRET, reason="kernels were defined without TRITON_INTERPRET=1")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALE = 0.7


def inputs(rule, tokens, d_a, d_u, rank, dtype, key_scale=True):
    """(u, a, w_down, w_a_up, key_scale) with weights of trained size."""
    shape = key_shape(rule, rank, d_u)
    return (
        None if shape is None else randn(tokens, d_u, dtype=dtype),
        randn(tokens, d_a, dtype=dtype),
        randn(d_a, rank, dtype=dtype, scale=d_a**-0.5),
        None if shape is None else randn(*shape, dtype=dtype, scale=d_u**-0.5),
        (torch.rand(tokens) + 0.5).to(dtype) if key_scale else None,
    )


def plain(rule, u, a, w_down, key, key_scale, k, dtype):
    """(z, p, c) out of ordinary operations in ``dtype``."""
    u, a, w_down, key, key_scale = (None if t is None else t.to(dtype) for t in (u, a, w_down, key, key_scale))
    z = a @ w_down
    scaled = z if key_scale is None else z * key_scale.unsqueeze(1)
    p = None if key is None else (u @ key.t() if key.dim() == 2 else (u @ key).unsqueeze(1))
    return z, p, plain_coefficients(rule, scaled, u, key, k, SCALE)


def check(rule, actual, arguments, k, dtype):
    reference, truth = plain(rule, *arguments, k, dtype), plain(rule, *arguments, k, torch.float64)
    for name, y, ref, true in zip("zpc", actual, reference, truth, strict=True):
        if true is None:
            assert y.numel() == 0
        else:
            assert_within_twice(y, ref, true, f"{rule} {name}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "splits", "key_scale"), [(1, None, True), (3, 3, False)])
def test_twice(rule, dtype, k, splits, key_scale):
    arguments = inputs(rule, 32, 50, 70, 24, dtype, key_scale)
    check(rule, coefficients_forward(*arguments, rule, k, SCALE, splits=splits), arguments, k, dtype)


@given(
    rule=st.sampled_from(sorted(RULES)), tokens=st.integers(1, 40), d_a=st.integers(1, 40), d_u=st.integers(1, 40),
    r=st.integers(1, 9), k=st.integers(1, 3), splits=st.sampled_from([None, 1, 2]), key_scale=st.booleans(),
)  # fmt: skip
@settings(max_examples=12)
def test_any_shape(rule, tokens, d_a, d_u, r, k, splits, key_scale):
    arguments = inputs(rule, tokens, d_a, d_u, k * r, torch.float32, key_scale)
    actual = coefficients_forward(*arguments, rule, k, SCALE, splits=splits)
    truth = plain(rule, *arguments, k, torch.float64)
    for y, true in zip(actual, truth, strict=True):
        if true is not None:
            torch.testing.assert_close(y.double(), true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens(rule):
    z, p, c = coefficients_forward(*inputs(rule, 0, 8, 6, 4, torch.float32), rule, 2, SCALE)
    assert z.shape == c.shape == (0, 4)
    assert p.shape == {"none": (0,), "vector": (0, 1), "matrix": (0, 4)}[get_rule(rule).key]


def test_self_key_without_scale_is_z():
    z, _, c = coefficients_forward(*inputs("self_key", 5, 8, 6, 4, torch.float32, key_scale=False), "self_key")
    assert c is z


@pytest.mark.parametrize("rule", ["rank1", "diagonal"])
def test_strides(rule):
    """w_a_up as w_downᵀ (the tied diagonal), activations sliced, transposed and expanded."""
    u, a, w_down, _, key_scale = inputs(rule, 20, 32, 32, 8, torch.float32)
    wide = torch.cat([u, u], 1)
    expected = coefficients_forward(u, a, w_down, w_down.t().contiguous(), key_scale, rule)
    strided = coefficients_forward(
        wide[:, :32],
        a.t().contiguous().t(),
        w_down.t().contiguous().t(),
        w_down.t(),
        key_scale.repeat(2).view(2, -1)[0],
        rule,
    )
    for y, other in zip(strided, expected, strict=True):
        torch.testing.assert_close(y, other)
    row = a[:1].expand(20, 32)
    z = coefficients_forward(u, row, w_down, w_down.t(), None, rule)[0]
    torch.testing.assert_close(z, z[:1].expand(20, 8))


@pytest.mark.parametrize("rule", RULES)
def test_large_rank_takes_the_vendor_gemm(rule, monkeypatch):
    monkeypatch.setattr(module, "MAX_FUSED_RANK", 16)
    arguments = inputs(rule, 32, 50, 70, 24, torch.float32)
    check(rule, coefficients_forward(*arguments, rule, 3, SCALE), arguments, 3, torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
def test_bitwise_repeatable(splits):
    arguments = inputs("rank1", 24, 64, 64, 16, torch.float32)
    first, second = (coefficients_forward(*arguments, "rank1", 2, splits=splits) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------ the rule alone


def rule_inputs(rule, tokens, rank, dtype, key_scale):
    width = {"none": 0, "vector": 1, "matrix": rank}[get_rule(rule).key]
    p = randn(tokens, width, dtype=dtype) if width else None
    scale = (torch.rand(tokens) + 0.5).to(dtype) if key_scale else None
    return randn(tokens, rank, dtype=dtype), p, scale, randn(tokens, rank, dtype=dtype)


def plain_rule(rule, z, p, key_scale, k):
    z = z if key_scale is None else z * key_scale.unsqueeze(1)
    if rule == "self_key":
        return z, z
    if rule == "anchored":
        return z, z * p
    if rule == "diagonal":
        return z, SCALE * torch.tanh(z) * p
    z_blocks, p_blocks = z.unflatten(1, (k, -1)), p.unflatten(1, (k, -1))
    return z, (z_blocks * (z_blocks * p_blocks).sum(-1, keepdim=True)).flatten(1)


def rule_gradients(rule, z, p, key_scale, dc, k, dtype):
    """(c, dz of the scaled z, dp) by ordinary autograd in ``dtype``."""
    z, p, key_scale, dc = (None if t is None else t.to(dtype) for t in (z, p, key_scale, dc))
    scaled = (z if key_scale is None else z * key_scale.unsqueeze(1)).detach().requires_grad_()
    p = None if p is None else p.requires_grad_()
    c = plain_rule(rule, scaled, p, None, k)[1]
    grads = torch.autograd.grad(c, [t for t in (scaled, p) if t is not None], dc)
    return c.detach(), grads[0], grads[1] if p is not None else None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "key_scale"), [(1, True), (3, False)])
def test_rule_twice(rule, dtype, k, key_scale):
    z, p, scale, dc = rule_inputs(rule, 32, 24, dtype, key_scale)
    c = rule_forward(z, p, scale, rule, k, SCALE)
    dz, dp = rule_backward(dc, z, p, scale, rule, k, SCALE)
    reference, truth = (rule_gradients(rule, z, p, scale, dc, k, t) for t in (dtype, torch.float64))
    for name, y, ref, true in zip(("c", "dz", "dp"), (c, dz, dp), reference, truth, strict=True):
        if true is None:
            assert y is None
        else:
            assert_within_twice(y, ref, true, f"{rule} {name}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("need_z", "need_p"), [(True, False), (False, True), (False, False)])
def test_rule_backward_only_what_is_needed(rule, need_z, need_p):
    z, p, scale, dc = rule_inputs(rule, 7, 12, torch.float32, True)
    both = rule_backward(dc, z, p, scale, rule, 2, SCALE)
    some = rule_backward(dc, z, p, scale, rule, 2, SCALE, need_z, need_p)
    for needed, one, full in zip((need_z, need_p), some, both, strict=True):
        assert one is None if not needed or full is None else torch.equal(one, full)


@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored"])
def test_rule_wide_falls_back(rule, monkeypatch):
    z, p, scale, dc = rule_inputs(rule, 7, 24, torch.float32, True)
    expected = rule_forward(z, p, scale, rule, 2, SCALE), *rule_backward(dc, z, p, scale, rule, 2, SCALE)
    monkeypatch.setattr(rule_kernels, "MAX_WIDTH", 4)
    actual = rule_forward(z, p, scale, rule, 2, SCALE), *rule_backward(dc, z, p, scale, rule, 2, SCALE)
    for y, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [0, 1, 2])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("key_scale", [True, False])
def test_merge_dz(shares, down, key_scale):
    z = randn(9, 10, dtype=torch.float32)
    parts = [randn(9, 10, dtype=torch.float32) for _ in range(shares)]
    dz_down = randn(9, 10, dtype=torch.float32) if down else None
    scale = torch.rand(9) if key_scale else None
    dz, d_scale = merge_dz(parts, dz_down, z, scale, need_key_scale=key_scale)
    total = sum(parts, start=torch.zeros_like(z))
    expected = total * (1 if scale is None else scale.unsqueeze(1)) + (0 if dz_down is None else dz_down)
    torch.testing.assert_close(dz, expected, rtol=1e-6, atol=1e-6)
    if key_scale:
        torch.testing.assert_close(d_scale, (total * z).sum(1), rtol=1e-5, atol=1e-5)


def test_tanh_to_the_last_place():
    """The diagonal rule's tanh over the whole line, relative error, through the kernel itself."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 1, 2000)])[:6000].reshape(-1, 24).contiguous()
    c = rule_forward(z, torch.ones_like(z), None, "diagonal", 1, 1.0)
    truth = torch.tanh(z.double())
    relative = ((c.double() - truth).abs() / truth.abs().clamp_min(1e-300)).nan_to_num()
    assert relative.max() < 4e-7
    extreme = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    c = rule_forward(extreme, torch.ones_like(extreme), None, "diagonal")
    torch.testing.assert_close(c, torch.tanh(extreme), equal_nan=True)
