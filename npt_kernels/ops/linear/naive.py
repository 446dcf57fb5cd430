"""The definition, written as it is read: build every ΔW_t, add it to W, multiply. Small shapes only (T·out·in numbers)."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y [T, out]`` from ``x [T, in]``, ``weight [out, in]``, ``v_a [T, k, in]``, ``v_b [T, k, out]``; run it in float64."""
    delta = torch.einsum("tko,tki->toi", v_b, v_a)
    y = torch.einsum("toi,ti->to", weight + delta, x)
    return y if bias is None else y + bias
