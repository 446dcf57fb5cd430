"""``factored_linear`` on the vendor's GEMM: ``F.linear`` and one in-place ``addmm_``; beside outputs only ``[T, R]`` exists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import Rule, get_rule

__all__ = ["add_key_grad", "backward", "forward", "key_grad", "key_product"]


def key_product(u: Tensor, w_a_up: Tensor | None, rule: Rule) -> Tensor:
    """``p = u @ w_a_upᵀ``: ``[T, R]``, ``[T, 1]`` for a vector key, an empty tensor without key."""
    if rule.key == "none":
        return u.new_empty(0)
    assert w_a_up is not None
    return F.linear(u, w_a_up if rule.key == "matrix" else w_a_up.unsqueeze(0))


def add_key_grad(du: Tensor, dp: Tensor | None, w_a_up: Tensor | None, rule: Rule) -> None:
    """``du += dp @ w_a_up`` in place."""
    if dp is not None:
        assert w_a_up is not None
        du.addmm_(dp, w_a_up if rule.key == "matrix" else w_a_up.unsqueeze(0))


def key_grad(dp: Tensor | None, u: Tensor | None, rule: Rule) -> Tensor:
    """``d w_a_up = dpᵀ @ u``: ``[R, in]`` or ``[in]``."""
    assert dp is not None and u is not None
    grad = dp.t() @ u
    return grad if rule.key == "matrix" else grad.squeeze(0)


def forward(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    w_a_up: Tensor | None,
    w_b_up: Tensor,
    bias: Tensor | None,
    rule: str,
    num_ranks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(y [T, out], p)``."""
    rule_ = get_rule(rule)
    p = key_product(x, w_a_up, rule_)
    y = F.linear(x, weight, bias)
    y.addmm_(rule_.coefficients(z, p, num_ranks, scale), w_b_up)
    return y, p


def backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    w_a_up: Tensor | None,
    w_b_up: Tensor | None,
    p: Tensor,
    rule: str,
    num_ranks: int,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, z, weight, w_a_up, w_b_up, bias) where ``needs`` is true, in that order."""
    need_x, need_z, need_weight, need_key, need_b, need_bias = needs
    rule_ = get_rule(rule)
    dz = dp = None
    need_p = rule_.key != "none" and (need_x or need_key)
    if need_z or need_p:
        assert w_b_up is not None
        dz, dp = rule_.backward(dy @ w_b_up.t(), z, p, num_ranks, scale, need_z, need_p)
    grads: list[Tensor] = []
    if need_x:
        assert weight is not None
        dx = dy @ weight
        add_key_grad(dx, dp, w_a_up, rule_)
        grads.append(dx)
    if need_z:
        assert dz is not None
        grads.append(dz)
    if need_weight:
        assert x is not None
        grads.append(dy.t() @ x)
    if need_key:
        grads.append(key_grad(dp, x, rule_))
    if need_b:
        grads.append(torch.mm(rule_.coefficients(z, p, num_ranks, scale).t(), dy))
    if need_bias:
        grads.append(dy.sum(0))
    return grads
