"""Half precision on a CPU without instructions for it: other layouts, the same numbers by the 2× rule."""

from __future__ import annotations

import pytest
import torch

from npt_kernels.kernels import cpu_layout
from npt_kernels.kernels.cpu_layout import k_contiguous
from tests.support.helpers import ALL_RULES, check_twice, mlp_problem, randn

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("by_torch", [True, False])
def test_only_where_torch_multiplies(monkeypatch, dtype, by_torch):
    monkeypatch.setattr(cpu_layout, "_multiplied_by_torch", lambda _: by_torch)
    weight = randn(6, 10, dtype=dtype)
    found = k_contiguous(weight)
    assert torch.equal(found, weight)
    if by_torch and dtype in HALVES:
        assert found.stride() == (1, 6)
        assert k_contiguous(found) is found, "no second copy"
    else:
        assert found is weight


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 65])
def test_the_rule_of_numbers_holds(monkeypatch, rule, dtype, tokens):
    monkeypatch.setattr(cpu_layout, "_multiplied_by_torch", lambda _: True)

    def make(*shape, dtype):
        return randn(*shape, dtype=torch.float64).mul(shape[-1] ** -0.5).to(dtype)

    check_twice(mlp_problem(rule, tokens=tokens, d=48, f=80, d_a=40, r=8, make=make, dtype=dtype), f"{rule} {dtype}")
