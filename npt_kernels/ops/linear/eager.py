"""``linear`` on the vendor's GEMM: one ``F.linear``, two batched matrix–vector products, nothing of size ``T·k·d``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(y [T, out], s [T, k])``."""
    y = F.linear(x, weight, bias)
    s = torch.bmm(v_a, x.unsqueeze(2)).squeeze(2)
    y.unsqueeze(1).baddbmm_(s.unsqueeze(1), v_b)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    v_a: Tensor | None,
    v_b: Tensor | None,
    s: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, v_a, v_b, bias) where ``needs`` is true, in that order."""
    need_x, need_weight, need_v_a, need_v_b, need_bias = needs
    grads: list[Tensor] = []
    t = None
    if need_x or need_v_a:
        assert v_b is not None
        t = torch.bmm(v_b, dy.unsqueeze(2)).squeeze(2)
    if need_x:
        assert weight is not None and v_a is not None and t is not None
        dx = dy @ weight
        dx.unsqueeze(1).baddbmm_(t.unsqueeze(1), v_a)
        grads.append(dx)
    if need_weight:
        assert x is not None
        grads.append(dy.t() @ x)
    if need_v_a:
        assert x is not None and t is not None
        grads.append(t.unsqueeze(2) * x.unsqueeze(1))
    if need_v_b:
        assert s is not None
        grads.append(s.unsqueeze(2) * dy.unsqueeze(1))
    if need_bias:
        grads.append(dy.sum(0))
    return grads
