"""``npt_factored_linear``: every rule through the bottleneck, against the explicit definition and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from npt_kernels import npt_factored_linear, npt_linear
from npt_kernels.ops.factored_linear import factored_linear as op
from npt_kernels.rules import get_rule
from tests.support.helpers import (
    ALL_RULES,
    GemmMeter,
    check_twice,
    factored_problem,
    integers,
    key_shape,
    randn,
    subsets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
rules = pytest.mark.parametrize("rule", ALL_RULES)


@rules
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(rule, k, bias):
    problem = factored_problem(rule, 4, 3, 5, r=2, k=k, bias=bias)
    names = problem.present()
    leaves = problem.leaves()
    assert torch.autograd.gradcheck(
        lambda *t: problem.op(**(leaves | dict(zip(names, t, strict=True)))), tuple(leaves[n] for n in names)
    )


@rules
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "r"), [(0, 7, 6, 2), (1, 7, 6, 1), (13, 17, 5, 3), (33, 31, 65, 9)]
)
def test_equals_definition(rule, k, tokens, d_in, d_out, r):
    problem = factored_problem(rule, tokens, d_in, d_out, r, k)
    (y, grads), (y_true, grads_true) = problem.run("op"), problem.run("naive")
    torch.testing.assert_close(y, y_true, rtol=1e-11, atol=1e-10)
    for name in problem.present():
        torch.testing.assert_close(
            grads[name], grads_true[name], rtol=1e-11, atol=1e-10, msg=lambda m, n=name: f"d {n}: {m}"
        )


@rules
@given(data=st.data())
def test_any_shape_equals_definition(rule, data):
    tokens, d_in, d_out, r, k = (data.draw(st.integers(low, 9)) for low in (0, 1, 1, 1, 1))
    problem = factored_problem(rule, tokens, d_in, d_out, r, k, bias=data.draw(st.booleans()))
    (y, grads), (y_true, grads_true) = problem.run("op"), problem.run("naive")
    torch.testing.assert_close(y, y_true, rtol=1e-10, atol=1e-9)
    for name in problem.present():
        torch.testing.assert_close(grads[name], grads_true[name], rtol=1e-10, atol=1e-9)


@rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "r", "k"), [(32, 8, 1), (97, 8, 3), (80, 72, 1)])
def test_twice(rule, dtype, tokens, r, k):
    def make(*shape, dtype):  # fan-in scaled, so that fp16 does not overflow in rank1's cubic form
        return randn(*shape, dtype=dtype, scale=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)

    check_twice(factored_problem(rule, tokens, 64, 48, r, k, dtype=dtype, make=make), f"{rule} {dtype}")


@pytest.mark.parametrize("rule", ["rank1", "anchored", "self_key"])  # sums and products alone; no tanh
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tokens", [1, 21])
def test_small_integers_are_exact(rule, dtype, tokens, k):
    def make(*shape, dtype):
        return integers(*shape, dtype=dtype, density=0.3)

    problem = factored_problem(rule, tokens, 11, 13, r=2, k=k, make=make, dtype=dtype)
    grad = integers(tokens, 13, density=0.3)
    y, grads = problem.run("op", grad=grad)
    y_true, grads_true = problem.run("reference", grad=grad, dtype=torch.float64)  # naive divides for self_key
    assert max(g.abs().max() for g in grads_true.values() if g is not None) <= 256, (
        "the premise: all sums exact in bf16"
    )
    assert torch.equal(y.double(), y_true)
    for name in problem.present():
        assert torch.equal(grads[name].double(), grads_true[name]), name


def test_diagonal_is_exact_on_integers_at_zero_and_saturation():
    """tanh(0) = 0 and tanh(±20) = ±1 exactly in fp32: integer arithmetic again."""
    problem = factored_problem("diagonal", 17, 9, 12, r=4, make=integers, dtype=torch.float32, scale=2.0)
    problem.tensors["z"] = problem.tensors["z"] * 20
    y, _ = problem.run("op")
    c = 2 * problem.tensors["z"].sign() * (problem.tensors["x"] @ problem.tensors["w_a_up"].t())
    want = (
        problem.tensors["x"] @ problem.tensors["weight"].t() + c @ problem.tensors["w_b_up"] + problem.tensors["bias"]
    )
    assert torch.equal(y, want)
    assert y.abs().max() > 3


@rules
@pytest.mark.parametrize("k", [1, 3])
def test_opcheck(rule, k):
    problem = factored_problem(rule, 4, 3, 5, 2, k, dtype=torch.float32)
    for needs in (problem.present(), ("z", "w_b_up"), ()):
        opcheck(op.library_op, (*problem.leaves(needs).values(), rule, k, 0.7, "eager"))


@rules
@pytest.mark.parametrize("k", [1, 2])
def test_every_subset_of_gradients(rule, k):
    problem = factored_problem(rule, 4, 3, 5, 2, k)
    y_all, grads_all = problem.run("op")
    for needs in subsets(problem.present()):
        y, grads = problem.run("op", needs)
        assert torch.equal(y, y_all)
        for name in problem.present():
            if name in needs:
                torch.testing.assert_close(grads[name], grads_all[name], rtol=1e-13, atol=1e-13)
            else:
                assert grads[name] is None, (needs, name)


@rules
def test_saves_only_what_is_needed(rule):
    problem = factored_problem(rule, 11, 13, 17, r=3)
    shapes = {name: tuple(t.shape) for name, t in problem.tensors.items() if t is not None}
    keyed = get_rule(rule).key != "none"
    for needs in subsets(problem.present()):
        if not needs:
            continue
        y = problem.op(**problem.leaves(needs))
        saved = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None]
        assert (shapes["x"] in saved) == bool({"weight", "w_a_up"} & set(needs)), needs
        assert (shapes["weight"] in saved) == ("x" in needs), needs
        if keyed:
            assert (shapes["w_a_up"] in saved) == ("x" in needs), needs
        assert (shapes["w_b_up"] in saved) == bool({"x", "z", "w_a_up"} & set(needs)), needs
        assert (11, 17) not in saved, "the output is not saved"


@rules
def test_computes_only_what_is_needed(rule):
    tokens, d_in, d_out, r = 32, 24, 40, 2
    problem = factored_problem(rule, tokens, d_in, d_out, r)
    full = tokens * d_in * d_out
    train = [n for n in ("z", "w_a_up", "w_b_up") if problem.tensors[n] is not None]

    def products(needs):
        y = problem.op(**problem.leaves(needs))
        with GemmMeter() as meter:
            y.sum().backward()
        return meter

    with GemmMeter() as meter:
        problem.op(**problem.leaves())
    assert meter.count(full) == 1, "the forward is one full GEMM"
    assert products(train).count(full) == 0, "frozen weight and no dx: only low-rank products"
    assert products((*train, "x")).count(full) == 1
    assert products(problem.present()).count(full) == 2
    assert products(("bias",)).products == []
    assert products(("w_b_up",)).products == [(r, d_out, tokens)]


@rules
def test_zero_adapter_is_bitwise_the_plain_linear(rule):
    for dtype in (torch.float64, *DTYPES):
        problem = factored_problem(rule, 9, 32, 24, 4, 2, dtype=dtype)
        t = problem.tensors | {"w_b_up": torch.zeros_like(problem.tensors["w_b_up"])}
        assert torch.equal(problem.op(**t), torch.nn.functional.linear(t["x"], t["weight"], t["bias"])), dtype


@rules
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_explicit_op_on_the_rules_vectors(rule, k):
    t = factored_problem(rule, 6, 5, 7, 2, k).tensors
    v_a, v_b = get_rule(rule).vectors(t["z"], t["x"], t["w_a_up"], t["w_b_up"], k, 0.7)
    explicit = npt_linear(t["x"], t["weight"], v_a, v_b, t["bias"])
    torch.testing.assert_close(
        npt_factored_linear(**t, rule=rule, num_ranks=k, scale=0.7), explicit, rtol=1e-12, atol=1e-12
    )


@rules
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0, 3)], ids=str)
def test_leading_dimensions(rule, leading):
    t = factored_problem(rule, 1, 5, 6, 2, 2).tensors
    x, z = randn(*leading, 5).requires_grad_(), randn(*leading, 4).requires_grad_()
    y = npt_factored_linear(**(t | {"x": x, "z": z}), rule=rule, num_ranks=2)
    y.square().sum().backward()
    flat_x, flat_z = (t.detach().reshape(-1, t.shape[-1]).requires_grad_() for t in (x, z))
    y_flat = npt_factored_linear(**(t | {"x": flat_x, "z": flat_z}), rule=rule, num_ranks=2)
    y_flat.square().sum().backward()
    assert y.shape == (*leading, 6)
    assert torch.equal(y.reshape(-1, 6), y_flat)
    assert torch.equal(x.grad.reshape(-1, 5), flat_x.grad)
    assert torch.equal(z.grad.reshape(-1, 4), flat_z.grad)


@rules
def test_strides(rule):
    """Transposed, sliced and expanded inputs, and the zero-stride gradient of ``sum()``."""
    k, r, tokens = 2, 3, 6
    shape = key_shape(rule, k * r, 7)
    views = {
        "x": randn(7, tokens).t(),
        "z": randn(tokens, 2 * k * r)[:, ::2],
        "weight": randn(7, 5).t(),
        "w_a_up": None if shape is None else randn(*shape[::-1]).t() if len(shape) == 2 else randn(14)[::2],
        "w_b_up": randn(1, 5).expand(k * r, 5),
        "bias": randn(1).expand(5),
    }
    assert not any(t.is_contiguous() for t in views.values() if t is not None)
    results = []
    for fmt in (torch.preserve_format, torch.contiguous_format):
        leaves = {
            n: None
            if t is None
            else (t if fmt is torch.preserve_format else t.clone(memory_format=fmt)).detach().requires_grad_()
            for n, t in views.items()
        }
        y = npt_factored_linear(**leaves, rule=rule, num_ranks=k)
        y.backward(torch.ones_like(y)) if fmt is torch.contiguous_format else y.sum().backward()
        results.append([y, *(t.grad for t in leaves.values() if t is not None)])
    for strided, dense in zip(*results, strict=True):
        torch.testing.assert_close(strided, dense, rtol=1e-12, atol=1e-12)


@rules
def test_two_runs_are_bitwise_equal(rule):
    problem = factored_problem(rule, 33, 32, 48, 8, 2, dtype=torch.bfloat16)
    (y1, g1), (y2, g2) = problem.run("op"), problem.run("op")
    assert torch.equal(y1, y2)
    assert all(torch.equal(g1[n], g2[n]) for n in problem.present())


@rules
def test_inputs_are_not_written(rule):
    problem = factored_problem(rule, k=2)
    leaves = problem.leaves()
    problem.op(**leaves).sum().backward()
    with torch.no_grad():
        problem.op(**leaves)
    for name, leaf in leaves.items():
        assert leaf is None or torch.equal(leaf.detach(), problem.tensors[name]), name


def test_input_used_twice():
    """x is also z (self_key), and z of one call is the output of another."""
    x = randn(5, 6).requires_grad_()
    weight, value = randn(6, 6), randn(6, 6)
    y = npt_factored_linear(x, x, weight, None, value, rule="self_key")
    y = npt_factored_linear(x, y, weight, None, value, rule="self_key")
    (got,) = torch.autograd.grad(y.square().sum(), x)
    want_x = x.detach().clone().requires_grad_()
    out = want_x @ weight.t() + (want_x @ weight.t() + want_x @ value) @ value
    (want,) = torch.autograd.grad(out.square().sum(), want_x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@rules
def test_functional_grad(rule):
    problem = factored_problem(rule, k=2)
    names = problem.present()
    tensors = tuple(problem.tensors[n] for n in names)
    absent = {n: None for n in problem.tensors if n not in names}

    def loss(f):
        return lambda *t: f(**absent, **dict(zip(names, t, strict=True))).square().sum()

    argnums = tuple(range(len(names)))
    got = torch.func.grad(loss(problem.op), argnums)(*tensors)
    want = torch.func.grad(loss(problem.naive), argnums)(*tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@rules
def test_autocast(rule):
    problem = factored_problem(rule, 9, 16, 12, 4, dtype=torch.float32)
    leaves = problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = problem.op(**leaves)
    low = {n: None if t is None else t.detach().bfloat16().requires_grad_() for n, t in leaves.items()}
    y_low = problem.op(**low)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_low)
    y.sum().backward()
    y_low.sum().backward()
    for name in problem.present():
        assert leaves[name].grad.dtype == torch.float32
        assert torch.equal(leaves[name].grad, low[name].grad.float()), name
