"""What a call of the MLP costs: full GEMMs of the backward and tensors saved for it, for every set of wanted gradients."""

from __future__ import annotations

import pytest
import torch

from npt_kernels.rules import get_rule
from tests.support.helpers import ALL_RULES, GemmMeter, mlp_problem, subsets

TARGETS = [s for s in subsets(("gate", "up", "down")) if s]
PLAIN_TARGETS = [s for s in subsets(("up", "down")) if s]
FORMS = [(True, t) for t in TARGETS] + [(False, t) for t in PLAIN_TARGETS]
rules = pytest.mark.parametrize("rule", ALL_RULES)
forms = pytest.mark.parametrize(
    ("gated", "targets"), FORMS, ids=[f"{'gated' if g else 'plain'}-{'+'.join(t)}" for g, t in FORMS]
)

TOKENS, D, F, D_A, R = 64, 24, 40, 20, 2
FULL = TOKENS * D * F


def sized(rule, targets=("gate", "up", "down"), gated=True):
    return mlp_problem(rule, targets=targets, gated=gated, tokens=TOKENS, d=D, f=F, d_a=D_A, r=R, bias=True)


def trained_names(problem):
    return [n for n in problem.present() if n.endswith(("_key", "_value")) or n == "w_down"]


def saved_shapes(y):
    return [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None and t.numel()]


def backward_products(problem, needs):
    y = problem.op(**problem.leaves(needs))
    with GemmMeter() as meter:
        y.sum().backward()
    return meter


@rules
@forms
def test_local_training_needs_one_full_gemm(rule, gated, targets):
    """Frozen weights and no dx: the backward never forms dy @ W of gate and up; only dout @ Wd, if a target is below it."""
    problem = sized(rule, targets, gated)
    with GemmMeter() as meter:
        problem.op(**problem.leaves(trained_names(problem)))
    assert meter.count(FULL) == (3 if gated else 2)
    above = bool({"gate", "up"} & set(targets))
    meter = backward_products(problem, trained_names(problem))
    assert meter.count(FULL) == (1 if above else 0), "full GEMMs in the backward"
    y = problem.op(**problem.leaves(trained_names(problem)))
    assert not {(F, D)} & set(saved_shapes(y)), "gate and up weights are only needed for dx"


def test_every_full_gemm_is_accounted_for():
    problem = sized("self_key")
    trained = trained_names(problem)
    assert backward_products(problem, [*trained, "x"]).count(FULL) == 3  # dinter, dgate @ Wg, dup @ Wu
    assert backward_products(problem, [*trained, "a"]).count(FULL) == 1
    assert backward_products(problem, ["down_weight"]).count(FULL) == 1
    assert backward_products(problem, ["gate_weight"]).count(FULL) == 2
    assert backward_products(problem, ["down_bias"]).products == []
    assert backward_products(problem, ["down_value"]).products == [(R, D, TOKENS)]
    assert backward_products(problem, problem.present()).count(FULL) == 6


@rules
def test_saved_tensors(rule):
    problem = sized(rule)
    keyed = get_rule(rule).key != "none"

    def saved(*needs):
        return saved_shapes(problem.op(**problem.leaves(needs)))

    wide, x, a = (TOKENS, F), (TOKENS, D), (TOKENS, D_A)
    local = saved(*trained_names(problem))
    assert local.count(wide) == 2, "gate and up, nothing else of that size"
    assert local.count(x) == (1 if keyed else 0), "x is only saved for a key matrix's gradient"
    assert local.count(a) == 1
    assert local.count((F, D)) == 0
    assert saved("x").count((F, D)) == 2
    assert saved("x").count(x) == saved("x").count(a) == 0
    assert saved("w_down").count(x) == 0
    for only in ("down_value", "down_bias"):
        assert wide not in saved(only), f"d {only} needs neither gate nor up"
    assert saved("down_weight").count(wide) == 2


def test_no_grad_saves_and_equals():
    problem = sized("rank1")
    with torch.no_grad():
        y = problem.op(**problem.leaves())
    assert not y.requires_grad
    assert torch.equal(y, problem.run("op")[0])
