"""``factored_linear`` in Triton: the delta rides in the K loop of the one GEMM; the low-rank gradients read dy once.

``dx = dy @ W + dp @ w_a_up`` fuses with nothing that would pay for a slower main loop: vendor's GEMM, in-place ``addmm_``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.triton.decode import DECODE_TOKENS, decode_gemm
from ...kernels.triton.rules import rule_backward, rule_forward
from ...kernels.triton.segmented_gemm import segmented_gemm
from ...kernels.triton.value_grads import skinny_grad, skinny_pair
from ...rules import Rule, get_rule
from .eager import add_key_grad, key_product

__all__ = ["backward", "forward", "key_matrix", "linear_with_delta", "skinny_key_grad"]


def linear_with_delta(
    u: Tensor, weight: Tensor, c: Tensor | None, w_b_up: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``u Wᵀ + c @ w_b_up + bias`` as one GEMM; the vendor's where there is no delta."""
    if c is None or w_b_up is None:
        return F.linear(u, weight, bias)
    gemm = decode_gemm if u.shape[0] <= DECODE_TOKENS else segmented_gemm
    return gemm([(u, weight), (c, w_b_up.t())], bias)


def key_matrix(w_a_up: Tensor, rule: Rule) -> Tensor:
    """``w_a_up`` as a matrix ``[P, in]``: P = R, or 1 for a vector key."""
    return w_a_up if rule.key == "matrix" else w_a_up.unsqueeze(0)


def skinny_key_grad(dp: Tensor | None, u: Tensor | None, rule: Rule) -> Tensor:
    """``d w_a_up = dpᵀ @ u``: ``[R, in]`` or ``[in]``."""
    assert dp is not None and u is not None
    grad = skinny_grad(dp, u)
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
    p = key_product(x, w_a_up, get_rule(rule))
    c = rule_forward(z, p, None, rule, num_ranks, scale)
    return linear_with_delta(x, weight, c, w_b_up, bias), p


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
    need_p = rule_.key != "none" and (need_x or need_key)
    need_dc = need_z or need_p
    dz = dp = d_value = None
    if need_dc or need_b:
        c = rule_forward(z, p, None, rule, num_ranks, scale) if need_b else None
        dc, d_value = skinny_pair(dy, w_b_up, c, need_dc, need_b)
        if dc is not None:
            dz, dp = rule_backward(dc, z, p, None, rule, num_ranks, scale, need_z, need_p)
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
        grads.append(skinny_key_grad(dp, x, rule_))
    if need_b:
        assert d_value is not None
        grads.append(d_value)
    if need_bias:
        grads.append(dy.sum(0))
    return grads
