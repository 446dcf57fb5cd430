"""The GEMM kernels one by one: segments, layouts, tiles, epilogues, few tokens, repeatability."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from npt_kernels.activations import get_activation
from npt_kernels.kernels.triton import decode, explicit
from npt_kernels.kernels.triton.gate_up import gate_up_forward
from npt_kernels.kernels.triton.launch import TileConfig, default_config, tile_config
from npt_kernels.kernels.triton.segmented_gemm import (
    gate_up_backward,
    gemm_act,
    gemm_act_backward,
    gemm_terms,
    segmented_gemm,
)
from npt_kernels.kernels.triton.support import FUSED_ACTIVATIONS
from tests.support.helpers import assert_within_twice, randn
from tests.support.triton_kernels import DTYPES, LAYOUTS, odd

SMALL = TileConfig(16, 32, 16, num_warps=4, num_stages=2, group_t=2, subtiles=2)
sizes = st.sampled_from([1, 2, 15, 16, 17, 33, 50])
budget = settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def product(segments, bias=None):
    """Σ X Wᵀ + bias in the tensors' own dtype, as torch computes it."""
    y = F.linear(*segments[0], bias)
    for x, w in segments[1:]:
        y = y + F.linear(x, w)
    return y


def wide(segments):
    return [(x.double(), w.double()) for x, w in segments]


@st.composite
def problems(draw, max_segments=3, dtypes=DTYPES):
    """(segments, bias): one to three segments of any K, layout and alignment."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype, tokens, out = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0, 1, 5, 16, 37])), draw(sizes)
    segments = []
    for _ in range(draw(st.integers(1, max_segments))):
        k = draw(sizes)
        x = odd(randn(tokens, k, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
        w = odd(randn(out, k, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
        segments.append((x, w))
    return segments, randn(out, dtype=dtype) if draw(st.booleans()) else None


@budget
@given(problems())
def test_segments(problem):
    segments, bias = problem
    truth = product(wide(segments), None if bias is None else bias.double())
    y = segmented_gemm(segments, bias)
    assert_within_twice(y, product(segments, bias), truth)
    assert torch.equal(y, segmented_gemm(segments, bias)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, subtiles=1),
        dataclasses.replace(SMALL, persistent=False, group_t=1),
        dataclasses.replace(SMALL, tma=True),
        dataclasses.replace(SMALL, tma=True, block_t=32, block_n=64, block_k=32, subtiles=4),
        TileConfig(64, 16, 64, num_warps=4, num_stages=3, group_t=8),
    ],
    ids=["one piece", "a program per tile", "descriptors", "descriptors, other tile", "tall"],
)
def test_every_kind_of_tile(dtype, config):
    x, w, c, b = (
        randn(50, 48, dtype=dtype),
        randn(72, 48, dtype=dtype),
        randn(50, 24, dtype=dtype),
        randn(24, 72, dtype=dtype),
    )
    segments = [(x, w), (c, b.t()), (x, randn(48, 72, dtype=dtype).t())]
    assert_within_twice(segmented_gemm(segments, config=config), product(segments), product(wide(segments)))


@pytest.mark.parametrize("act", FUSED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activation(act, dtype):
    activation = get_activation(act)
    segments = [
        (randn(19, 33, dtype=dtype, scale=0.4), randn(40, 33, dtype=dtype)),
        (randn(19, 7, dtype=dtype), randn(40, 7, dtype=dtype)),
    ]
    bias = randn(40, dtype=dtype)
    pre = product(wide(segments), bias.double())
    y, kept = gemm_act(segments, bias, act, True)
    assert kept is not None
    assert_within_twice(kept, product(segments, bias), pre)
    assert_within_twice(y, activation.forward(product(segments, bias)), activation.forward(pre))
    assert torch.equal(y, gemm_act(segments, bias, act, False)[0])
    grad = gemm_act_backward(segments, kept, act)
    leaf = kept.double().requires_grad_()
    truth = torch.autograd.grad(activation.forward(leaf), leaf, product(wide(segments)))[0]
    assert_within_twice(grad, activation.backward(product(segments), kept), truth)


def test_activations_at_large_and_special_values():
    """exp must not overflow into NaN on either side; NaN stays NaN."""
    values = torch.tensor([-3e4, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 3e4, float("nan")])
    eye = torch.eye(1)
    for act in FUSED_ACTIVATIONS:
        y = gemm_act([(values[:, None], eye)], None, act, False)[0][:, 0]
        expected = get_activation(act).forward(values)
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=1e-7, equal_nan=True)
        slope = gemm_act_backward([(torch.ones(10, 1), eye)], values[:, None], act)[:9, 0]
        expected = get_activation(act).backward(torch.ones(9), values[:9])
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


@budget
@given(
    seed=st.integers(0, 2**16), tokens=st.sampled_from([0, 1, 18, 40]), d=sizes, f=sizes, rank=st.sampled_from([1, 7, 16, 21]),
    dtype=st.sampled_from(DTYPES), low_rank=st.sampled_from(["", "g", "u", "gu"]), act=st.sampled_from(FUSED_ACTIVATIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), bias=st.booleans(),
    tma=st.booleans(),
)  # fmt: skip
def test_pair(seed, tokens, d, f, rank, dtype, low_rank, act, layouts, bias, tma):
    torch.manual_seed(seed)
    activation = get_activation(act)
    x = odd(randn(tokens, d, dtype=dtype), layouts[0])
    wg, wu = (odd(randn(f, d, dtype=dtype, scale=d**-0.5), layout) for layout in layouts[1:])
    segments = {
        s: (randn(tokens, rank, dtype=dtype), randn(rank, f, dtype=dtype, scale=rank**-0.5).t()) for s in low_rank
    }
    bg, bu = (randn(f, dtype=dtype), randn(f, dtype=dtype)) if bias else (None, None)
    gates = [(x, wg)] + [segments[s] for s in "g" if s in segments]
    ups = [(x, wu)] + [segments[s] for s in "u" if s in segments]
    gate, up = product(gates, bg), product(ups, bu)
    gate_true = product(wide(gates), None if bg is None else bg.double())
    up_true = product(wide(ups), None if bu is None else bu.double())
    config = dataclasses.replace(tile_config("gate_up_forward", x, tokens), tma=tma)
    inter, kept_gate, kept_up = gate_up_forward(
        x, wg, wu, segments.get("g"), segments.get("u"), bg, bu, act, True, config=config
    )  # fmt: skip
    assert_within_twice(inter, activation.forward(gate) * up, activation.forward(gate_true) * up_true, "inter")
    assert kept_gate is not None and kept_up is not None
    assert_within_twice(kept_gate, gate, gate_true, "gate")
    assert_within_twice(kept_up, up, up_true, "up")
    again = gate_up_forward(x, wg, wu, segments.get("g"), segments.get("u"), bg, bu, act, False, config=config)
    assert torch.equal(inter, again[0]) and again[1] is None


@budget
@given(
    problem=problems(max_segments=2, dtypes=(torch.float32, torch.float16)), act=st.sampled_from(FUSED_ACTIVATIONS),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
)  # fmt: skip
def test_pair_backward(problem, act, needs):
    segments, _ = problem
    activation = get_activation(act)
    dinter = product(segments)
    gate, up = randn(*dinter.shape, dtype=dinter.dtype), randn(*dinter.shape, dtype=dinter.dtype)
    leaf = gate.double().requires_grad_()
    dinter_true = product(wide(segments))
    truth_gate = torch.autograd.grad(activation.forward(leaf), leaf, dinter_true * up.double())[0]
    dgate, dup = gate_up_backward(segments, gate, up, act, *needs)
    assert (dgate is not None, dup is not None) == needs
    if dgate is not None:
        assert_within_twice(dgate, activation.backward(dinter * up, gate), truth_gate, "dgate")
    if dup is not None:
        truth = dinter_true * activation.forward(gate.double())
        assert_within_twice(dup, dinter * activation.forward(gate), truth, "dup")


@budget
@given(
    seed=st.integers(0, 2**16), tokens=st.sampled_from([0, 1, 18, 70]), d=sizes, out=sizes, k=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from(DTYPES), layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)  # fmt: skip
def test_explicit_pieces(seed, tokens, d, out, k, dtype, layouts):
    torch.manual_seed(seed)
    x, w = odd(randn(tokens, d, dtype=dtype), layouts[0]), randn(out, d, dtype=dtype)
    v_a, v_b = odd(randn(tokens, k, d, dtype=dtype), layouts[1]), odd(randn(tokens, k, out, dtype=dtype), layouts[0])
    s = explicit.row_dot(v_a, x)
    assert_within_twice(s, (v_a @ x.unsqueeze(2)).squeeze(2), (v_a.double() @ x.double().unsqueeze(2)).squeeze(2), "s")
    outer = explicit.row_outer(s, x)
    assert torch.equal(outer, s.unsqueeze(2) * x.unsqueeze(1))  # one rounding either way
    y = gemm_terms(x, w, s, v_b)
    reference = F.linear(x, w) + (s.unsqueeze(1) @ v_b).squeeze(1)
    truth = F.linear(x.double(), w.double()) + (s.double().unsqueeze(1) @ v_b.double()).squeeze(1)
    assert_within_twice(y, reference, truth, "y")
    if tokens <= 64:
        assert_within_twice(decode.decode_terms(x, w, s, v_b, None), reference, truth, "decode")


@budget
@given(problems(max_segments=2), st.sampled_from([1, 2, 3, 5]))
def test_decode(problem, splits):
    """K split over programs: right, and the same bits in every run."""
    segments, bias = problem
    reference = product(segments, bias)
    truth = product(wide(segments), None if bias is None else bias.double())
    y = decode._split_gemm(segments, bias, dataclasses.replace(SMALL, persistent=False), splits)
    assert_within_twice(y, reference, truth)
    assert torch.equal(y, decode._split_gemm(segments, bias, dataclasses.replace(SMALL, persistent=False), splits))
    assert_within_twice(decode.decode_gemm(segments, bias), reference, truth)
    act, pre = decode.decode_act(segments, bias, "silu", False)
    assert pre is None
    assert_within_twice(act, F.silu(reference), F.silu(truth))


def test_nothing_is_read_or_written_outside():
    """Inputs and outputs sit in poisoned buffers; a stray read shows as NaN, a stray write as a changed guard."""
    x = odd(randn(17, 19, dtype=torch.float32), "offset")
    w = odd(randn(33, 19, dtype=torch.float32), "strided")
    y = segmented_gemm([(x, w)])
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y, x @ w.t(), rtol=1e-5, atol=1e-5)


def test_default_tiles_exist_for_every_generation_and_token_count():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for kernel in ("segmented_gemm", "gate_up_forward", "gate_up_backward", "decode"):
            for itemsize in (2, 4):
                for tokens in (1, 16, 64, 100, 8192):
                    config = default_config(kernel, capability, itemsize, tokens)
                    assert config.block_t >= 16 and config.block_t & (config.block_t - 1) == 0
                    assert kernel != "decode" or config.block_t >= tokens or tokens > 64
