"""``matched_norm``: both norms, both outputs, both backends, against the definition in float64."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from npt_kernels.kernels.triton.numerics import INTERPRET
from npt_kernels.model.norms import identify_norm, matched_norm
from npt_kernels.ops.matched_norm import matched_norm as op
from npt_kernels.ops.matched_norm.naive import matched_norm as naive
from tests.support.helpers import assert_within_twice, randn, subsets

needs_interpreter = pytest.mark.skipif(not INTERPRET, reason="kernels were defined without TRITON_INTERPRET=1")
BACKENDS = ["eager", pytest.param("triton", marks=needs_interpreter)]
KINDS = ["rms", "layer"]
NAMES = ("h", "a", "weight", "bias")
EPS = 1e-5


def tensors(tokens, width, kind, dtype=torch.float64):
    bias = randn(width, dtype=dtype) if kind == "layer" else None
    h, a = randn(tokens, width, dtype=dtype) * 2 + 0.5, randn(tokens, width, dtype=dtype)
    return {"h": h, "a": a, "weight": randn(width, dtype=dtype), "bias": bias}


def reference(h, a, weight, bias, kind, eps):
    """As a user would write it, with ordinary autograd: the norm in fp32, HF's RMSNorm rounding."""
    compute = torch.promote_types(h.dtype, torch.float32)
    total, x = (h + a).to(compute), h.to(compute)
    if kind == "layer":
        s = torch.rsqrt(total.var(-1, unbiased=False, keepdim=True) + eps)
        u = (x - x.mean(-1, keepdim=True)) * s
    else:
        s = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        u = (x * s).to(h.dtype)
    u = u if weight is None else u * weight
    u = u if bias is None else u + bias
    return u.to(h.dtype), s.squeeze(-1).to(h.dtype)


def run(function, inputs, *, needs=NAMES, dtype=None, which=(True, True), extra=()):
    """Outputs, and gradients by name for fixed upstream gradients of the outputs in ``which``."""
    leaves = {
        n: None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(n in needs)
        for n, t in inputs.items()
    }
    outputs = function(*leaves.values(), *extra)
    generator = torch.Generator().manual_seed(7)
    upstream = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(inputs["h"].dtype).to(o.dtype)
        for o in outputs
    ]
    chosen = [(o, g) for o, g, use in zip(outputs, upstream, which, strict=True) if use and o.requires_grad]
    if chosen:
        torch.autograd.backward(*zip(*chosen, strict=True))
    return [o.detach() for o in outputs], {n: None if t is None else t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(kind, affine):
    inputs = tensors(3, 6, kind)
    if not affine:
        inputs |= {"weight": None, "bias": None}
    leaves = [None if t is None else t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *t: op(*t, kind, EPS, "eager"), leaves)


@pytest.mark.parametrize("kind", KINDS)
@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 40),
    which=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_any_shape_equals_definition(kind, tokens, width, which):
    inputs = tensors(tokens, width, kind)
    (outputs, grads), (truth, grads_true) = (
        run(op, inputs, which=which, extra=(kind, EPS, "eager")), run(naive, inputs, which=which, extra=(kind, EPS))
    )  # fmt: skip
    for y, t in zip(outputs, truth, strict=True):
        torch.testing.assert_close(y, t, rtol=1e-11, atol=1e-11)
    for name, grad in grads_true.items():
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (32, 96), (30, 33)])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "u", "key_scale"])
def test_twice(backend, kind, dtype, tokens, width, which):
    inputs = tensors(tokens, width, kind, dtype)
    (outputs, grads), (refs, grads_ref), (truth, grads_true) = (
        run(op, inputs, which=which, extra=(kind, EPS, backend)), run(reference, inputs, which=which, extra=(kind, EPS)),
        run(naive, inputs, which=which, extra=(kind, EPS), dtype=torch.float64),
    )  # fmt: skip
    for name, y, ref, true in zip(("u", "key_scale"), outputs, refs, truth, strict=True):
        assert_within_twice(y, ref, true, name)
    for name, grad in grads.items():
        if inputs[name] is None or (name in ("weight", "bias") and not which[0]):
            continue  # key_scale does not depend on them
        assert_within_twice(grad, grads_ref[name], grads_true[name], f"d {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", [s for s in subsets(NAMES) if s], ids="+".join)
def test_every_subset_of_gradients(backend, kind, needs):
    inputs = tensors(5, 24, kind, torch.float32)
    outputs, everything = run(op, inputs, extra=(kind, EPS, backend))
    subset_outputs, grads = run(op, inputs, needs=needs, extra=(kind, EPS, backend))
    for y, other in zip(outputs, subset_outputs, strict=True):
        assert torch.equal(y, other)
    for name in NAMES:
        if name in needs and inputs[name] is not None:
            torch.testing.assert_close(grads[name], everything[name], rtol=1e-6, atol=1e-6)
        else:
            assert grads[name] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", [NAMES, ("h", "a"), ("a",), ()], ids=lambda n: "+".join(n) or "none")
def test_opcheck(kind, needs):
    inputs = tensors(4, 8, kind, torch.float32)
    leaves = [None if t is None else t.requires_grad_(name in needs) for name, t in inputs.items()]
    opcheck(op.library_op, (*leaves, kind, EPS, "eager"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_strides(backend):
    """h in fp32, a in bf16 (autocast's residual), a weight in a third dtype; rows expanded, transposed, sliced."""
    h, a = randn(24, 6, dtype=torch.float32).t(), randn(1, 48, dtype=torch.bfloat16)[:, ::2].expand(6, 24)
    weight = randn(24, dtype=torch.float16)
    inputs = {"h": h, "a": a, "weight": weight, "bias": None}
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.values()]
    u, key_scale = op(*leaves, "rms", EPS, backend)
    assert u.dtype == key_scale.dtype == torch.float32
    (u.sum() + key_scale.sum()).backward()
    truth = [None if t is None else t.detach().double().requires_grad_() for t in inputs.values()]
    u_true, scale_true = naive(*truth, "rms", EPS)
    (u_true.sum() + scale_true.sum()).backward()
    torch.testing.assert_close(u.double(), u_true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key_scale.double(), scale_true, rtol=1e-5, atol=1e-5)
    for leaf, true in zip(leaves, truth, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            tolerance = 8 * torch.finfo(leaf.dtype).eps
            torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(backend, kind):
    (u, key_scale), grads = run(op, tensors(0, 8, kind, torch.float32), extra=(kind, EPS, backend))
    assert u.shape == (0, 8) and key_scale.shape == (0,)
    assert grads["h"].shape == (0, 8) and torch.equal(grads["weight"], torch.zeros(8))


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_programs_and_bitwise_repeatable(kind, monkeypatch):
    from npt_kernels.kernels.triton import norm as kernels

    monkeypatch.setattr(kernels, "_PARTS", 4)
    inputs = tensors(30, 16, kind, torch.float32)
    first, second = (run(op, inputs, extra=(kind, EPS, "triton"))[1] for _ in range(2))
    _, truth = run(naive, inputs, extra=(kind, EPS), dtype=torch.float64)
    for name, grad in truth.items():
        if grad is not None:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name].double(), grad, rtol=1e-4, atol=1e-5)


@needs_interpreter
def test_long_rows_fall_back(monkeypatch):
    from npt_kernels.kernels.triton import norm as kernels

    inputs = tensors(3, 40, "rms", torch.float32)
    expected, grads_expected = run(op, inputs, extra=("rms", EPS, "eager"))
    monkeypatch.setattr(kernels, "MAX_WIDTH", 32)
    outputs, grads = run(op, inputs, extra=("rms", EPS, "triton"))
    assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
    assert all(torch.equal(grads[n], grads_expected[n]) for n in ("h", "a", "weight"))


@needs_interpreter
@pytest.mark.parametrize(("limit", "trained"), [("MAX_BACKWARD_WIDTH", False), ("MAX_TRAINED_WIDTH", True)])
def test_long_rows_of_the_backward_fall_back(monkeypatch, limit, trained):
    from npt_kernels.kernels.eager import EagerSteps
    from npt_kernels.kernels.triton import norm as kernels

    inputs = tensors(3, 40, "rms", torch.float32)
    h, a, weight = (inputs[name].detach() for name in ("h", "a", "weight"))
    du, needs = torch.ones_like(h), [True, True, trained, False]
    arguments = (du, None, h, a, weight, None, "rms", EPS, needs)
    expected = EagerSteps().matched_norm_backward(*arguments)
    monkeypatch.setattr(kernels, limit, 32)
    monkeypatch.setattr(kernels, "backward_kernel", None)  # any launch would fail
    assert all(torch.equal(g, e) for g, e in zip(kernels.backward(*arguments), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_module_function(kind):
    """The public function: any leading dimensions, module parameters, and what it is for: u + linear part = norm(h + a)."""
    width = 12
    norm = (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(width, eps=EPS).double()
    with torch.no_grad():
        norm.weight.copy_(randn(width))
    h, a = randn(2, 3, width), randn(2, 3, width)
    u, key_scale = matched_norm(norm, kind, h, a)
    assert u.shape == h.shape and key_scale.shape == (2, 3)
    centred = a if kind == "rms" else a - a.mean(-1, keepdim=True)
    torch.testing.assert_close(u + norm.weight * centred * key_scale.unsqueeze(-1), norm(h + a), rtol=1e-10, atol=1e-10)
    assert identify_norm(norm, width) == kind
    with pytest.raises(ValueError, match="a \\[2, 12\\]"):
        matched_norm(norm, kind, h, a[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_break(kind):
    norm = (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(8, eps=EPS)
    h, a = randn(5, 8, dtype=torch.float32).requires_grad_(), randn(5, 8, dtype=torch.float32)

    def function(h, a):
        u, key_scale = matched_norm(norm, kind, h, a)
        return (u * key_scale.unsqueeze(-1)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(function(h, a), h)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(h, a), h)[0], expected)
