"""The definition as it is read, out of ordinary differentiable operations; run it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def matched_norm(
    h: Tensor, a: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, kind: str = "rms", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``(u [T, d], key_scale [T])``; shapes as in README.md."""
    total, x = h + a, h
    if kind == "layer":
        total, x = total - total.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    key_scale = 1 / torch.sqrt((total * total).mean(-1) + eps)
    u = x * key_scale.unsqueeze(-1)
    u = u if weight is None else u * weight
    return u if bias is None else u + bias, key_scale
