"""``factored_linear`` as one segmented-K product on Hopper: K runs over ``in`` and then over R. Unverified on hardware.

Key product and rule are one kernel, and so are ``dc`` and ``d w_b_up`` where one reading of dy pays (``_cuda/skinny.py``); the
other small gradients are plain GEMMs: the vendor's. A main product that cannot be fused (a width that is no multiple of 8,
say) is the vendor's too and says so once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.cuda.choose import Epilogue
from ...kernels.cuda.launch import MAIN, Overlap, Segment, low_rank, padded_vector, refusal, rows_ok, run, say_fallback
from ...kernels.cuda.skinny import coefficients, value_grads
from ...rules import get_rule
from . import eager
from .eager import key_grad

__all__ = ["backward", "forward", "fused_sum"]


def fused_sum(
    op: str,
    terms: list[tuple[Tensor, Tensor]],
    low: list[tuple[Tensor, Tensor]],
    bias: Tensor | None = None,
    overlap: Overlap = None,
) -> Tensor | None:
    """``Σ x @ wᵀ + Σ c @ b + bias`` in one launch, ``w [N, K]`` of either layout and ``b [R, N]`` or ``[N]`` (then c is [T, 1]).

    ``None`` if it cannot be fused; the reason is said once. ``overlap``: see ``launch.run``; the ``x`` must be TMA-readable then.
    """
    rows, cols = terms[0][0].shape[0], terms[0][1].shape[0]
    low = [padded_vector(c, b) if b.dim() == 1 else (c, b) for c, b in low]
    reason = refusal(
        [("out", cols), *(("in", w.shape[1]) for _, w in terms), *(("R", b.shape[0]) for _, b in low)],
        [("weight", w) for _, w in terms],
    )
    if reason is not None or rows == 0:
        if reason is not None:
            say_fallback(op, reason)
        return None
    y = terms[0][0].new_empty(rows, cols)
    segments = [Segment(MAIN, rows_ok(x), w) for x, w in terms] + [low_rank(c, b) for c, b in low]
    run(Epilogue.STORE, segments, [y], bias=bias, overlap=overlap)
    return y


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
    x = rows_ok(
        x
    )  # before the coefficients: what a decode kernel reads early may not be written by the kernel before it
    low = coefficients(x, w_a_up, None, rule, num_ranks, scale, z=z)
    y = fused_sum("factored_linear", [(x, weight)], [(low.c, w_b_up)], bias, "low" if low.own else None)
    if y is None:
        y = F.linear(x, weight, bias).addmm_(low.c, w_b_up)
    return y, low.p


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
    dz = dp = d_value = None
    if need_z or need_p or need_b:
        dz, dp, d_value = value_grads(dy, w_b_up, z, p, None, rule, num_ranks, scale, need_z, need_p, need_b)
    grads: list[Tensor] = []
    if need_x:
        assert weight is not None
        dx = None
        if dp is not None:
            assert w_a_up is not None
            dx = fused_sum("factored_linear backward", [(dy, weight.t())], [(dp, w_a_up)])
        if dx is None:
            dx = dy @ weight
            eager.add_key_grad(dx, dp, w_a_up, rule_)
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
        assert d_value is not None
        grads.append(d_value)
    if need_bias:
        grads.append(dy.sum(0))
    return grads
