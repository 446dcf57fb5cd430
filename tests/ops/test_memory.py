"""Nothing of size T·k·d, T·k·f or T·f·d exists beside the tensors that the caller named or gets.

Sizes are such that the forbidden ones stand far above everything that is allowed, and the meter reads the C++ allocator,
so scratch memory inside an operator is seen as well.
"""

from __future__ import annotations

import pytest
import torch

from npt_kernels.rules import get_rule
from tests.support.helpers import (
    ALL_RULES,
    MemoryTrace,
    Problem,
    factored_problem,
    linear_problem,
    memory_meter,
    mlp_problem,
)

T, D, F, K, R = 256, 64, 96, 8, 16  # R = k·r
BYTES = 4
WIDE = T * F * BYTES  # the largest tensor that a plain MLP has
FORBIDDEN = {"T·k·d": T * K * D * BYTES, "T·k·f": T * K * F * BYTES, "T·f·d": T * F * D * BYTES}
assert min(FORBIDDEN.values()) > 4 * WIDE
assert D * F * BYTES < WIDE  # weight gradients stay below the limit


def trace(problem: Problem, needs: list[str], which: str = "op") -> tuple[MemoryTrace, MemoryTrace]:
    """Allocations of one forward and one backward (gradients land in fresh ``.grad``)."""
    leaves = problem.leaves(needs)
    with memory_meter() as forward:
        y = getattr(problem, which)(**leaves)
    grad = torch.randn_like(y)
    with memory_meter() as backward:
        y.backward(grad)
    assert all(leaves[name].grad is not None for name in needs)
    return forward[0], backward[0]


def assert_no_giant(traced: MemoryTrace, limit: int = WIDE) -> None:
    giants = [size for size in traced.allocations if size > limit]
    assert not giants, f"allocations of {giants} bytes; allowed {limit}, forbidden {FORBIDDEN}"


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_meter_catches_what_materialises(rule):
    """The same checks on the definition (which builds ΔW_t) and on explicit vectors must fail: the test can fail."""
    problem = factored_problem(rule, T, D, F, R // K, K, dtype=torch.float32)
    forward, backward = trace(problem, problem.present(), which="naive")
    assert max(forward.allocations) >= FORBIDDEN["T·f·d"]
    for traced in (forward, backward):
        with pytest.raises(AssertionError, match="allocations"):
            assert_no_giant(traced)

    def explicit(x, z, weight, w_a_up, w_b_up, bias):
        v_a, v_b = get_rule(rule).vectors(z, x, w_a_up, w_b_up, K, 1.0)
        return x @ weight.t() + bias + ((v_a * x.unsqueeze(1)).sum(-1, keepdim=True) * v_b).sum(1)

    problem.op = explicit
    with pytest.raises(AssertionError, match="allocations"):
        assert_no_giant(trace(problem, problem.present())[0])


@pytest.mark.parametrize("rule", ALL_RULES)
def test_factored_linear(rule):
    problem = factored_problem(rule, T, D, F, R // K, K, dtype=torch.float32)
    forward, backward = trace(problem, problem.present())
    assert_no_giant(forward)
    assert_no_giant(backward)
    low_rank = T * R * BYTES
    assert forward.peak <= WIDE + 5 * low_rank, "the output, p, c and at most three more of [T, R]"
    grads = sum(t.numel() * BYTES for t in problem.tensors.values() if t is not None)
    assert backward.peak <= grads + 8 * low_rank, "the gradients themselves and [T, R]"


def test_linear():
    """v_a and v_b are the caller's; only their own gradients may have their size, and only if asked for."""
    problem = linear_problem(T, D, F, K, dtype=torch.float32)
    forward, backward = trace(problem, ["x", "weight", "bias"])
    assert_no_giant(forward)
    assert_no_giant(backward)
    assert forward.peak <= WIDE + 2 * T * K * BYTES
    forward, backward = trace(problem, problem.present())
    assert_no_giant(forward)
    giants = sorted(size for size in backward.allocations if size > WIDE)
    assert giants == sorted([FORBIDDEN["T·k·d"], FORBIDDEN["T·k·f"]]), "d v_a and d v_b, once each"


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("gated", [True, False])
def test_mlp(rule, gated):
    targets = ("gate", "up", "down") if gated else ("up", "down")
    problem = mlp_problem(
        rule, T, D, F, D, R // K, K, gated=gated, targets=targets, dtype=torch.float32, normalise=True, act="silu"
    )
    forward, backward = trace(problem, problem.present())
    assert_no_giant(forward)
    assert_no_giant(backward)
    # z, z̃, three p, c and scratch; out; gate and up saved; inter; one more for the activation's input or output.
    assert forward.peak <= 12 * T * R * BYTES + T * D * BYTES + (4 if gated else 2) * WIDE
    grads = sum(t.numel() * BYTES for t in problem.tensors.values() if t is not None)
    assert backward.peak <= grads + 16 * T * R * BYTES + (4 if gated else 3) * WIDE


@pytest.mark.parametrize("rule", ALL_RULES)
def test_mlp_without_gradients_keeps_nothing_wide(rule):
    problem = mlp_problem(rule, T, D, F, D, R // K, K, dtype=torch.float32, normalise=True)
    with torch.no_grad(), memory_meter() as result:
        y = problem.op(**problem.tensors)
    assert y.isfinite().all()
    assert_no_giant(result[0])
    assert result[0].peak <= 12 * T * R * BYTES + T * D * BYTES + 3 * WIDE, "gate, up and one temporary at a time"
    with torch.no_grad(), memory_meter() as result:
        y = problem.op(**problem.tensors)
    alive = sum(result[0].allocations)
    assert alive > result[0].peak, "something is freed on the way"


def test_local_training_backward_holds_little():
    """Frozen weights: beside the adapter's gradients, dinter, dup and dgate are all of the wide tensors."""
    problem = mlp_problem("self_key", T, D, F, D, R // K, K, dtype=torch.float32, normalise=True)
    needs = [n for n in problem.present() if n.endswith("_value") or n == "w_down"]
    _, backward = trace(problem, needs)
    grads = sum(problem.tensors[n].numel() * BYTES for n in needs)
    assert_no_giant(backward)
    assert backward.peak <= grads + 8 * T * R * BYTES + 3 * WIDE
