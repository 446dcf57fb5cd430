"""``matched_norm`` in plain PyTorch. Statistics in float32 at least, over the rounded sum that the original layer norms."""

from __future__ import annotations

import torch
from torch import Tensor


def _statistics(h: Tensor, a: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x [T, d], τ [T, d], s [T, 1])`` of README.md in the compute dtype."""
    compute = torch.promote_types(h.dtype, torch.float32)
    total, x = (h + a).to(compute), h.to(compute)
    if kind == "rms":
        return x, total, torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    total, x = total - total.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    return x, total, torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)


def forward(
    h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """``(u [T, d], key_scale [T])``."""
    compute = torch.promote_types(h.dtype, torch.float32)
    x, _, s = _statistics(h, a, kind, eps)
    u = x * s
    if kind == "rms":  # as transformers' RMSNorm: rounded before the weight
        u = u.to(h.dtype)
        u = u if weight is None else weight * u
    else:
        u = u if weight is None else u * weight.to(compute)
    u = u if bias is None else u + bias.to(compute)
    return u.to(h.dtype).contiguous(), s.squeeze(-1).to(h.dtype).contiguous()


def backward(
    du: Tensor | None,
    d_key_scale: Tensor | None,
    h: Tensor,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (h, a, weight, bias) where ``needs`` is true, in that order."""
    need_h, need_a, need_weight, need_bias = needs
    x, total, s = _statistics(h, a, kind, eps)
    du = torch.zeros_like(x) if du is None else du.to(x.dtype)
    grads: list[Tensor] = []
    if need_h or need_a:
        g = du if weight is None else du * weight.to(x.dtype)
        ds = (g * x).sum(-1, keepdim=True)  # pairwise; a BLAS dot loses digits over a long row
        if d_key_scale is not None:
            ds = ds + d_key_scale.to(x.dtype).unsqueeze(-1)
        dt = total * (ds * s.pow(3) / -h.shape[-1])
        if need_h:
            dx = g if kind == "rms" else g - g.mean(-1, keepdim=True)
            grads.append(torch.addcmul(dt, dx, s).to(h.dtype).contiguous())
        if need_a:
            grads.append(dt.to(a.dtype).contiguous())
    if need_weight:
        assert weight is not None
        grads.append((du * (x * s)).sum(0).to(weight.dtype))
    if need_bias:
        assert bias is not None
        grads.append(du.sum(0).to(bias.dtype))
    return grads
