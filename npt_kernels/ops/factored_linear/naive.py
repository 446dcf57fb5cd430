"""The definition: the rule's explicit vectors, every ΔW_t built and added to W. Small shapes only; run it in float64."""

from __future__ import annotations

from torch import Tensor

from ...rules import get_rule
from ..linear import naive as explicit


def factored_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    w_a_up: Tensor | None,
    w_b_up: Tensor,
    bias: Tensor | None = None,
    *,
    rule: str = "rank1",
    num_ranks: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """``y [T, out]``; shapes as in README.md."""
    v_a, v_b = get_rule(rule).vectors(z, x, w_a_up, w_b_up, num_ranks, scale)
    return explicit.linear(x, weight, v_a, v_b, bias)
