"""The public ops on the Triton backend against the float64 definition: rules, targets, dtypes, layouts, gradient subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from npt_kernels import AdapterTensors, npt_factored_linear, npt_gated_mlp, npt_linear, npt_mlp
from npt_kernels.ops.factored_linear import naive as naive_factored
from npt_kernels.ops.linear import naive as naive_linear
from npt_kernels.ops.mlp import naive as naive_mlp
from npt_kernels.rules import RULES, get_rule
from tests.support.helpers import assert_within_twice, randn
from tests.support.triton_kernels import DTYPES, LAYOUTS, odd

Tensors = dict[str, Tensor | None]
tokens_ = st.sampled_from([0, 1, 16, 35, 80])
width_ = st.sampled_from([5, 16, 33, 40])
layouts_ = st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4)
dtypes_ = st.sampled_from(DTYPES)


def budget(examples: int) -> settings:
    """The same few examples in every run; no shrinking, which interpreted kernels make take minutes."""
    return settings(max_examples=examples, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def run(
    function: Callable[..., Tensor], tensors: Tensors, needs: Sequence[str], dtype: torch.dtype | None = None
) -> Any:
    """(y, gradient by name) with leaves of the given tensors' own layout."""
    leaves = {
        name: None
        if t is None
        else (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_(name in needs)
        for name, t in tensors.items()
    }
    y = function(**leaves)
    names = [name for name in needs if leaves[name] is not None]
    if not names:
        assert not y.requires_grad
        return y, {}
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.float16).to(y.dtype)
    grads = torch.autograd.grad(y, [leaves[name] for name in names], upstream, allow_unused=True)
    return y.detach(), dict(zip(names, grads, strict=True))


def check(
    op: Callable[..., Tensor], naive: Callable[..., Tensor], tensors: Tensors, needs: Sequence[str],
    blocks: bool = True, factor: float = 2.0,
) -> None:  # fmt: skip
    """The 2× rule on the output and every gradient asked for; eager is the torch computation; two runs are bitwise equal.

    ``blocks=False`` for the MLP with ``rank1``, cubic in z: over 16 numbers torch's own error there is a matter of luck, over
    the whole tensor it is not. ``factor``: as in ``assert_within_twice``.
    """
    y, grads = run(lambda **t: op(**t, backend="triton"), tensors, needs)
    y_ref, grads_ref = run(lambda **t: op(**t, backend="eager"), tensors, needs)
    y_true, grads_true = run(naive, tensors, needs, torch.float64)
    assert_within_twice(y, y_ref, y_true, "output", blocks=blocks, factor=factor)
    again, grads_again = run(lambda **t: op(**t, backend="triton"), tensors, needs)
    assert torch.equal(y, again), "two runs differ"
    for name, grad in grads.items():
        true = grads_true[name]
        assert grad is not None, name
        truth = torch.zeros_like(grad).double() if true is None else true
        assert_within_twice(grad, grads_ref[name], truth, f"d {name}", blocks=blocks, factor=factor)
        assert torch.equal(grad, grads_again[name]), f"two runs differ in d {name}"


def some(draw: Any, tensors: Tensors) -> list[str]:
    """Any subset of the tensors that exist."""
    present = [name for name, tensor in tensors.items() if tensor is not None]
    return draw(st.lists(st.sampled_from(present), unique=True, max_size=len(present)).map(sorted))


def key_shape(rule: str, rank: int, width: int) -> tuple[int, ...] | None:
    return {"matrix": (rank, width), "vector": (width,), "none": None}[get_rule(rule).key]


@budget(15)
@given(st.data())
def test_linear(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tokens, d_in, d_out, k, dtype, layouts = draw(
        st.tuples(tokens_, width_, width_, st.sampled_from([1, 3]), dtypes_, layouts_)
    )
    tensors: Tensors = {
        "x": odd(randn(tokens, d_in, dtype=dtype), layouts[0]),
        "weight": odd(randn(d_out, d_in, dtype=dtype, scale=d_in**-0.5), layouts[1]),
        "v_a": odd(randn(tokens, k, d_in, dtype=dtype, scale=d_in**-0.5), layouts[2]),
        "v_b": odd(randn(tokens, k, d_out, dtype=dtype), layouts[3]),
        "bias": randn(d_out, dtype=dtype) if draw(st.booleans()) else None,
    }
    check(npt_linear, naive_linear.linear, tensors, some(draw, tensors), blocks=False, factor=8.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 3])
@budget(5)
@given(data=st.data())
def test_factored_linear(rule, k, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tokens, d_in, d_out, dtype, layouts = draw(st.tuples(tokens_, width_, width_, dtypes_, layouts_))
    rank = k * draw(st.sampled_from([1, 7, 16]))
    shape = key_shape(rule, rank, d_in)
    tensors: Tensors = {
        "x": odd(randn(tokens, d_in, dtype=dtype), layouts[0]),
        "z": odd(randn(tokens, rank, dtype=dtype, scale=rank**-0.5), layouts[1]),
        "weight": odd(randn(d_out, d_in, dtype=dtype, scale=d_in**-0.5), layouts[2]),
        "w_a_up": None if shape is None else odd(randn(*shape, dtype=dtype, scale=d_in**-0.5), layouts[3]),
        "w_b_up": randn(rank, d_out, dtype=dtype, scale=rank**-0.5),
        "bias": randn(d_out, dtype=dtype) if draw(st.booleans()) else None,
    }
    kind = {"rule": rule, "num_ranks": k, "scale": 0.7}
    check(
        lambda **t: npt_factored_linear(**t, **kind), lambda **t: naive_factored.factored_linear(**t, **kind),
        tensors, some(draw, tensors), blocks=False, factor=8.0,
    )  # fmt: skip


def mlp_tensors(
    rule: str, tokens: int, d: int, f: int, d_a: int, rank: int, targets: Sequence[str], gated: bool, bias: bool,
    key_scale: bool, dtype: torch.dtype, layouts: Sequence[str] = ("contiguous",) * 4,
) -> Tensors:  # fmt: skip
    """The 16 tensors of the op by name; absent ones are ``None``."""

    def key(target: str, width: int) -> Tensor | None:
        shape = key_shape(rule, rank, width)
        return None if shape is None or target not in targets else randn(*shape, dtype=dtype, scale=width**-0.5)

    def value(target: str, width: int) -> Tensor | None:
        return randn(rank, width, dtype=dtype, scale=rank**-0.5) if target in targets else None

    def weight(rows: int, columns: int, layout: str) -> Tensor:
        return odd(randn(rows, columns, dtype=dtype, scale=columns**-0.5), layout)

    return {
        "x": odd(randn(tokens, d, dtype=dtype), layouts[0]),
        # |z| near 1: rank1 is cubic in z, and with heavy tails the largest error hangs on one token's luck.
        "a": odd(randn(tokens, d_a, dtype=dtype, scale=rank**-0.5), layouts[1]),
        "key_scale": randn(tokens, dtype=dtype).abs() if key_scale else None,
        "gate_weight": weight(f, d, layouts[2]) if gated else None,
        "up_weight": weight(f, d, layouts[3]),
        "down_weight": weight(d, f, layouts[2]),
        "gate_bias": randn(f, dtype=dtype) if bias and gated else None,
        "up_bias": randn(f, dtype=dtype) if bias else None,
        "down_bias": randn(d, dtype=dtype) if bias else None,
        "w_down": randn(d_a, rank, dtype=dtype, scale=d_a**-0.5),
        "gate_key": key("gate", d), "gate_value": value("gate", f),
        "up_key": key("up", d), "up_value": value("up", f),
        "down_key": key("down", f), "down_value": value("down", d),
    }  # fmt: skip


def mlp_functions(rule: str, k: int, act: str, gated: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(public op, definition) over tensors by name."""
    names = {"gate": "gate", "up": "up", "down": "down"} if gated else {"up": "c_fc", "down": "c_proj"}

    def op(backend: str | None = None, **t: Any) -> Tensor:
        keys = {name: t[f"{slot}_key"] for slot, name in names.items() if t[f"{slot}_key"] is not None}
        values = {name: t[f"{slot}_value"] for slot, name in names.items() if t[f"{slot}_value"] is not None}
        adapter = AdapterTensors(t["w_down"], keys, values, rule, k, 0.7)
        if gated:
            return npt_gated_mlp(
                t["x"], t["a"], t["gate_weight"], t["up_weight"], t["down_weight"], adapter, act=act,
                key_scale=t["key_scale"], gate_bias=t["gate_bias"], up_bias=t["up_bias"], down_bias=t["down_bias"],
                backend=backend,
            )  # fmt: skip
        return npt_mlp(
            t["x"], t["a"], t["up_weight"], t["down_weight"], adapter, act=act, key_scale=t["key_scale"],
            c_fc_bias=t["up_bias"], c_proj_bias=t["down_bias"], backend=backend,
        )  # fmt: skip

    def naive(**t: Any) -> Tensor:
        return naive_mlp.mlp(**t, act=act, rule=rule, num_ranks=k, scale=0.7)

    return op, naive


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("k", [1, 3])
@budget(6)
@given(data=st.data())
def test_mlp(rule, gated, k, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tokens, d, f, d_a, dtype, layouts = draw(st.tuples(tokens_, width_, width_, width_, dtypes_, layouts_))
    slots = ["gate", "up", "down"] if gated else ["up", "down"]
    targets = draw(st.lists(st.sampled_from(slots), unique=True, min_size=1))
    rank = k * draw(st.sampled_from([1, 5, 16]))
    # A token whose activations are all zero has no self_key: the definition divides by |u|².
    smooth = ["silu", "gelu", "gelu_new", "quick_gelu"]
    act = draw(st.sampled_from(smooth if rule == "self_key" else [*smooth, "relu", "relu2"]))
    tensors = mlp_tensors(
        rule, tokens, d, f, d_a, rank, targets, gated, draw(st.booleans()), draw(st.booleans()), dtype, layouts
    )
    op, naive = mlp_functions(rule, k, act, gated)
    check(op, naive, tensors, some(draw, tensors), blocks=False, factor=8.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_mlp_every_gradient_at_once(rule, gated):
    targets = ("gate", "up", "down") if gated else ("up", "down")
    for dtype, tokens in ((torch.float32, 70), (torch.bfloat16, 70), (torch.float16, 20)):
        tensors = mlp_tensors(rule, tokens, 24, 40, 24, 10, targets, gated, True, True, dtype)
        op, naive = mlp_functions(rule, 2, "silu", gated)
        needs = [name for name, tensor in tensors.items() if tensor is not None]
        check(op, naive, tensors, needs, blocks=rule != "rank1")


def test_each_gradient_alone():
    tensors = mlp_tensors("rank1", 18, 16, 24, 16, 6, ("gate", "up", "down"), True, True, True, torch.float32)
    op, naive = mlp_functions("rank1", 2, "silu", True)
    for name in tensors:
        check(op, naive, tensors, [name], blocks=False)


@pytest.mark.parametrize("targets", [("gate",), ("up",), ("down",), ("gate", "up")], ids="+".join)
@pytest.mark.parametrize(
    "extra", [(), ("x",), ("key_scale",), ("down_weight",)], ids=["adapter", "x", "key_scale", "wd"]
)
def test_training_an_adapter_of_some_targets(targets, extra):
    """Only a target with a delta passes a gradient to z̃; the others need no backward of their own (nor the down weight)."""
    tensors = mlp_tensors("rank1", 18, 16, 24, 16, 6, targets, True, True, True, torch.float32)
    op, naive = mlp_functions("rank1", 2, "silu", True)
    trained = [name for name in tensors if name == "w_down" or name.endswith(("_key", "_value"))]
    check(op, naive, tensors, [*[n for n in trained if tensors[n] is not None], *extra], blocks=False)


def test_no_delta_at_all():
    tensors = mlp_tensors("self_key", 18, 16, 24, 16, 6, (), True, False, False, torch.float32)
    op, naive = mlp_functions("self_key", 1, "silu", True)
    check(op, naive, tensors, ["x", "gate_weight", "a"])


def test_upstream_gradient_of_any_layout():
    """``y.sum().backward()`` hands in a gradient with all strides zero."""
    tensors = mlp_tensors("rank1", 18, 16, 24, 16, 6, ("gate", "down"), True, False, False, torch.float32)
    op, _ = mlp_functions("rank1", 1, "silu", True)
    results = []
    for backend in ("triton", "eager"):
        leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}
        op(backend, **leaves).sum().backward()
        results.append(leaves)
    for name, leaf in results[0].items():
        if leaf is not None:
            torch.testing.assert_close(leaf.grad, results[1][name].grad, rtol=1e-4, atol=1e-5)


def test_inputs_are_left_alone():
    tensors = mlp_tensors("self_key", 18, 16, 24, 16, 6, ("gate", "up", "down"), True, True, False, torch.float16)
    before = {n: None if t is None else t.clone() for n, t in tensors.items()}
    op, _ = mlp_functions("self_key", 1, "silu", True)
    run(lambda **t: op(**t, backend="triton"), tensors, ["x", "a", "gate_value", "w_down"])
    for name, tensor in tensors.items():
        assert tensor is None or torch.equal(tensor, before[name]), name
