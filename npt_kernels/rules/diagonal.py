"""``diagonal``: the published low-rank form, ``ΔW = Bᵀ diag(m) Aᵀ`` with ``m = scale · tanh(a @ A)``.

One matrix ``A [d, r]`` is both the bottleneck (``z = a @ A``) and the key (``p = u @ A``), so ``w_a_up = Aᵀ`` wherever
the target's input is as wide as ``a``; its ``B [r, f]`` is ``w_b_up``. ``c = m ⊙ p``: rank ≤ r per token, so ``num_ranks``
does not change the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Rule


class Diagonal(Rule):
    name = "diagonal"
    key = "matrix"
    ties_key_to_w_down = True
    summary = "c = scale·tanh(z) ⊙ p with one matrix for z and p (published low-rank form)"

    def coefficients(self, z: Tensor, p: Tensor | None, num_ranks: int, scale: float) -> Tensor:
        assert p is not None
        return torch.tanh(z).mul_(p).mul_(scale) if not z.requires_grad else torch.tanh(z) * p * scale

    def backward(
        self, dc: Tensor, z: Tensor, p: Tensor | None, num_ranks: int, scale: float, need_z: bool, need_p: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert p is not None
        m = torch.tanh(z)
        dz = torch.ops.aten.tanh_backward(dc * p, m) * scale if need_z else None
        return dz, dc * m * scale if need_p else None

    def vectors(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        m = scale * torch.tanh(z)
        return m.unsqueeze(-1) * w_a_up, w_b_up.expand(z.shape[0], -1, -1)

    def vector_norms(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        m = scale * torch.tanh(z)
        return m.square() @ w_a_up.square().sum(-1), w_b_up.square().sum().expand(z.shape[0])
