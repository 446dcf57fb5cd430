"""Deferred weights: a frozen tensor to every operation, dense inside one only, in scratch buffers that are shared and safe."""

from __future__ import annotations

import threading

import pytest
import torch

from npt_kernels import npt_factored_linear, npt_linear
from npt_kernels.conversion.quantise import quantise_linear
from npt_kernels.ops.dense_on_use import DeferredWeight, dense, release_scratch, scratch_buffers
from tests.support.quantised_models import linear


def test_the_deferred_weight_is_a_frozen_tensor():
    made = quantise_linear(linear(), "int8")
    weight, values = made.weight, made.weight.to_dense()
    assert isinstance(weight, DeferredWeight)
    assert (weight.shape, weight.dtype, weight.device) == (values.shape, values.dtype, values.device)
    assert weight.stride() == values.stride() and weight.t().stride() == values.t().stride()
    assert torch.equal(weight.t() + 0, values.t())
    assert torch.equal(weight.mT.to(torch.float64) @ values.double(), values.t().double() @ values.double())
    assert isinstance(weight.bfloat16().t().detach(), DeferredWeight)
    assert torch.equal(weight.bfloat16() * 1, values.bfloat16())
    assert torch.equal(weight[3], values[3]) and torch.equal(weight.reshape(-1), values.reshape(-1))
    assert float(weight.float().norm()) == float(values.norm())
    with pytest.raises(TypeError, match="quantised weight, which is frozen"):
        weight.mul_(2)
    with pytest.raises(TypeError, match="quantised weight, which is frozen"):
        weight.t().copy_(values.t())
    assert torch.equal(made.weight.to_dense(), values)
    assert "DeferredWeight(QuantisedLinear, shape=[80, 48]" in repr(weight)


def test_views_of_a_deferred_weight_do_not_lie_in_scratch():
    a, b = quantise_linear(linear(), "int8"), quantise_linear(linear(seed=1), "int8")
    view, values = a.weight[2:5], a.weight.to_dense()
    b(torch.randn(2, 48))
    for buffer in scratch_buffers():
        buffer.fill_(torch.nan)
    assert torch.equal(view, values[2:5])


def test_scratch_is_shared_grown_and_released():
    release_scratch()
    small, large = quantise_linear(linear(16, 8), "int8"), quantise_linear(linear(64, 32), "int8")
    small(torch.randn(2, 16))
    large(torch.randn(2, 64))
    small(torch.randn(2, 16))
    assert [buffer.numel() for buffer in scratch_buffers()] == [64 * 32]
    with dense(small.weight, large.weight, None, large.weight.t()) as (a, b, none, c):
        assert none is None and torch.equal(c, b.t()) and c.data_ptr() != b.data_ptr()
        assert torch.equal(a, small.weight.to_dense())
        release_scratch()  # not what is in use
        assert torch.equal(b, large.weight.to_dense())
    assert len(list(scratch_buffers())) == 3
    release_scratch()
    assert not list(scratch_buffers())


def test_a_failure_inside_gives_the_scratch_back():
    made = quantise_linear(linear(), "int8")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape"):
            made(torch.randn(2, 7))
    values = made.weight.to_dense()
    release_scratch()
    assert not list(scratch_buffers())
    done = []
    thread = threading.Thread(target=lambda: done.append(made(torch.eye(48))))  # a lock still held would hang it
    thread.start()
    thread.join(20)
    assert torch.equal(done[0], values.t() + made.bias)


def test_scratch_of_inference_mode_serves_training():
    release_scratch()
    made = quantise_linear(linear(), "int8")
    with torch.inference_mode():
        made(torch.randn(2, 48))
    x = torch.randn(2, 48, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.weight.to_dense().sum(0).expand(2, -1))


def test_input_gradients_of_the_public_ops():
    """Explicit and factored op take a deferred weight too, and its gradient is refused by nobody asking for it."""
    made = quantise_linear(linear(48, 80), "int8")
    values = made.weight.to_dense()
    x, v_a, v_b, z, up = (torch.randn(n, requires_grad=True) for n in ((5, 48), (5, 48), (5, 80), (5, 4), (4, 80)))
    for call in (
        lambda w: npt_linear(x, w, v_a, v_b),
        lambda w: npt_factored_linear(x, z, w, None, up, rule="self_key"),
    ):
        leaves = [t for t in (x, v_a, v_b, z, up)]
        expected = torch.autograd.grad(call(values).square().sum(), leaves, allow_unused=True)
        y = call(made.weight)
        for buffer in scratch_buffers():
            buffer.fill_(torch.nan)
        for act, ref in zip(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True), expected, strict=True):
            assert (act is None) == (ref is None)
            assert act is None or torch.equal(act, ref)
