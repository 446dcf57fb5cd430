"""``npt_linear``: the explicit form, against its definition and against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from npt_kernels import npt_linear
from npt_kernels.ops.linear import linear as op
from tests.support.helpers import GemmMeter, check_twice, integers, linear_problem, randn, subsets

NAMES = ("x", "weight", "v_a", "v_b", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library_op():
    return op.library_op


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(k, bias):
    problem = linear_problem(4, 3, 5, k, bias=bias)
    assert torch.autograd.gradcheck(npt_linear, tuple(problem.leaves().values()))


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(0, 7, 6), (1, 7, 6), (1, 1, 1), (13, 17, 5), (33, 31, 65)])
def test_equals_definition(tokens, d_in, d_out, k):
    problem = linear_problem(tokens, d_in, d_out, k)
    y, grads = problem.run("op")
    y_true, grads_true = problem.run("naive")
    torch.testing.assert_close(y, y_true, rtol=1e-12, atol=1e-12)
    for name in NAMES:
        torch.testing.assert_close(
            grads[name], grads_true[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"d {n}: {m}"
        )


@given(
    tokens=st.integers(0, 9), d_in=st.integers(1, 12), d_out=st.integers(1, 12), k=st.integers(1, 4), bias=st.booleans()
)
def test_any_shape_equals_definition(tokens, d_in, d_out, k, bias):
    problem = linear_problem(tokens, d_in, d_out, k, bias=bias)
    (y, grads), (y_true, grads_true) = problem.run("op"), problem.run("naive")
    torch.testing.assert_close(y, y_true, rtol=1e-11, atol=1e-11)
    for name in problem.present():
        torch.testing.assert_close(grads[name], grads_true[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "k"), [(32, 64, 48, 1), (97, 64, 80, 3)])
def test_twice(dtype, tokens, d_in, d_out, k):
    check_twice(linear_problem(tokens, d_in, d_out, k, dtype=dtype), f"{dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tokens", [1, 37])
def test_small_integers_are_exact(dtype, tokens, k):
    problem = linear_problem(tokens, 19, 23, k, make=integers, dtype=dtype)
    grad = integers(tokens, 23)
    y, grads = problem.run("op", grad=grad)
    y_true, grads_true = problem.run("naive", grad=grad, dtype=torch.float64)
    assert y_true.abs().max() > 4
    assert torch.equal(y.double(), y_true)
    for name in NAMES:
        assert torch.equal(grads[name].double(), grads_true[name]), name


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("needs", [NAMES, ("v_a", "v_b"), ("x",), ()], ids=lambda n: "+".join(n) or "none")
def test_opcheck(k, needs):
    problem = linear_problem(4, 3, 5, k, dtype=torch.float32)
    opcheck(library_op(), (*problem.leaves(needs).values(), "eager"))


@pytest.mark.parametrize("needs", list(subsets(NAMES)), ids=lambda n: "+".join(n) or "none")
def test_every_subset_of_gradients(needs):
    problem = linear_problem(4, 3, 5, 2)
    y_all, grads_all = problem.run("op")
    y, grads = problem.run("op", needs)
    assert torch.equal(y, y_all)
    for name in NAMES:
        if name in needs:
            assert torch.equal(grads[name], grads_all[name]), name
        else:
            assert grads[name] is None, name


SAVED = {  # what the gradient of each tensor needs, README.md of the op; "s" is [T, k]
    "x": {"weight", "v_a", "v_b"}, "weight": {"x"}, "v_a": {"x", "v_b"}, "v_b": {"s"}, "bias": set(),
}  # fmt: skip


@pytest.mark.parametrize("needs", [s for s in subsets(NAMES) if s], ids="+".join)
def test_saves_only_what_is_needed(needs):
    problem = linear_problem(4, 3, 5, 2)
    leaves = problem.leaves(needs)
    y = npt_linear(**leaves)
    shapes = {"s": (4, 2)} | {name: tuple(t.shape) for name, t in leaves.items()}
    expected = sorted(shapes[name] for name in set().union(*(SAVED[name] for name in needs)))
    assert sorted(tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None) == expected
    assert type(y.grad_fn).__name__.startswith("Npt_linear")


def test_computes_only_what_is_needed():
    tokens, d_in, d_out = 32, 16, 24
    problem = linear_problem(tokens, d_in, d_out, 2)
    full = tokens * d_in * d_out

    def big_products(needs):
        y = npt_linear(**problem.leaves(needs))
        with GemmMeter() as meter:
            y.sum().backward()
        return meter.count(full)

    assert big_products(("v_a", "v_b")) == 0, "frozen weight and no dx: no full GEMM in the backward"
    assert big_products(("bias",)) == 0
    assert big_products(("x", "v_a", "v_b")) == 1
    assert big_products(NAMES) == 2


def test_no_grad_saves_nothing_and_equals():
    problem = linear_problem()
    with torch.no_grad():
        y = npt_linear(**problem.leaves())
    assert not y.requires_grad
    assert torch.equal(y, problem.run("op")[0])


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("k", [None, 2])
def test_leading_dimensions(leading, k):
    terms = () if k is None else (k,)
    x, weight = randn(*leading, 5), randn(6, 5)
    v_a, v_b = randn(*leading, *terms, 5), randn(*leading, *terms, 6)
    leaves = [t.requires_grad_() for t in (x, weight, v_a, v_b)]
    y = npt_linear(*leaves)
    assert y.shape == (*leading, 6)
    y.square().sum().backward()
    flat = [
        x.detach().reshape(-1, 5),
        weight.detach(),
        v_a.detach().reshape(-1, k or 1, 5),
        v_b.detach().reshape(-1, k or 1, 6),
    ]
    flat = [t.requires_grad_() for t in flat]
    y_flat = npt_linear(*flat)
    y_flat.square().sum().backward()
    assert torch.equal(y.reshape(-1, 6), y_flat)
    for leaf, other in zip(leaves, flat, strict=True):
        assert leaf.grad.shape == leaf.shape
        assert torch.equal(leaf.grad.reshape(other.shape), other.grad)


def test_strides():
    """Non-contiguous, expanded, sliced and transposed inputs, and the zero-stride gradient of ``sum()``."""
    tokens, k = 6, 2
    x = randn(7, tokens).t()
    weight = randn(7, 5).t()  # as GPT-2's Conv1D stores it
    v_a = randn(tokens, 1, 7).expand(tokens, k, 7)
    v_b = randn(k, tokens, 10).transpose(0, 1)[..., ::2]
    bias = randn(1).expand(5)
    views = [x, weight, v_a, v_b, bias]
    assert not any(t.is_contiguous() for t in views)
    strided = [t.detach().requires_grad_() for t in views]
    dense = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in views]
    y, y_dense = npt_linear(*strided), npt_linear(*dense)
    torch.testing.assert_close(y, y_dense, rtol=1e-13, atol=1e-13)
    y.sum().backward()
    y_dense.backward(torch.ones_like(y_dense))
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-13)


def test_expanded_zero_stride_leaf_of_a_graph():
    """An input that is a view inside the graph gets its gradient summed over the expansion."""
    base = randn(1, 7).requires_grad_()
    problem = linear_problem(4, 7, 6, 1)
    leaves = problem.leaves(()) | {"x": base.expand(4, 7)}
    (got,) = torch.autograd.grad(npt_linear(**leaves).square().sum(), base)
    (want,) = torch.autograd.grad(problem.naive(**leaves).square().sum(), base)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inputs_are_not_written():
    problem = linear_problem(6, 5, 4, 2)
    leaves = problem.leaves()
    npt_linear(**leaves).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.detach(), problem.tensors[name]), name


def test_two_runs_are_bitwise_equal():
    problem = linear_problem(33, 32, 48, 2, dtype=torch.bfloat16)
    (y1, g1), (y2, g2) = problem.run("op"), problem.run("op")
    assert torch.equal(y1, y2)
    assert all(torch.equal(g1[n], g2[n]) for n in NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_zero_change_is_bitwise_the_plain_linear(dtype):
    t = linear_problem(9, 32, 24, 2, dtype=dtype).tensors
    y = npt_linear(t["x"], t["weight"], t["v_a"], torch.zeros_like(t["v_b"]), t["bias"])
    assert torch.equal(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]))


def test_one_tensor_in_two_places():
    x = randn(5, 6).requires_grad_()
    weight = randn(6, 6)
    (got,) = torch.autograd.grad(npt_linear(x, weight, x, x).square().sum(), x)
    x_true = x.detach().clone().requires_grad_()
    y = linear_problem().naive(x_true, weight, x_true.unsqueeze(1), x_true.unsqueeze(1))
    (want,) = torch.autograd.grad(y.square().sum(), x_true)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_called_twice_in_one_graph():
    problem = linear_problem(4, 6, 6, 1)
    results = []
    for f in (npt_linear, problem.naive):
        leaves = problem.leaves()
        rest = {n: t for n, t in leaves.items() if n != "x"}
        f(f(leaves["x"], **rest), **rest).sum().backward()
        results.append({n: t.grad for n, t in leaves.items()})
    for name in NAMES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-11, atol=1e-11)


def test_backward_twice_with_retain_graph():
    problem = linear_problem()
    leaves = problem.leaves()
    y = npt_linear(**leaves).sum()
    y.backward(retain_graph=True)
    first = {n: t.grad.clone() for n, t in leaves.items()}
    y.backward()
    assert all(torch.equal(leaves[n].grad, 2 * first[n]) for n in NAMES)


def test_second_order_is_refused_not_wrong():
    problem = linear_problem()
    leaves = problem.leaves()
    (dx,) = torch.autograd.grad(npt_linear(**leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_functional_grad():
    problem = linear_problem()
    tensors = tuple(problem.tensors.values())
    got = torch.func.grad(lambda *t: npt_linear(*t).square().sum(), argnums=tuple(range(5)))(*tensors)
    want = torch.func.grad(lambda *t: problem.naive(*t).square().sum(), argnums=tuple(range(5)))(*tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_autocast():
    """bf16 inside, fp32 parameters get fp32 gradients, the numbers are those of a call in bf16."""
    problem = linear_problem(9, 16, 12, 2, dtype=torch.float32)
    leaves = problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = npt_linear(**leaves)
        expected = npt_linear(**{n: t.detach().bfloat16() for n, t in leaves.items()})
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    low = {n: t.detach().bfloat16().requires_grad_() for n, t in leaves.items()}
    npt_linear(**low).sum().backward()
    for name in NAMES:
        assert leaves[name].grad.dtype == torch.float32
        assert torch.equal(leaves[name].grad, low[name].grad.float()), name


def test_autocast_leaves_float64_alone_and_mixes_dtypes():
    problem = linear_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = npt_linear(**problem.tensors)
        mixed = dict(problem.tensors) | {"x": problem.tensors["x"].bfloat16()}
        assert npt_linear(**mixed).dtype == torch.bfloat16
    assert y.dtype == torch.float64
    assert torch.equal(y, npt_linear(**problem.tensors))
