"""``rank1``: both vectors come from attention. The published rank-1 (k = 1) and rank-k form.

``v_a[t,j] = z[t,j] @ w_a_up[j]``, ``v_b[t,j] = z[t,j] @ w_b_up[j]``; so ``c_j = z_j · ⟨z_j, p_j⟩`` with ``p = u @ w_a_upᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Rule, gram_norm, split_ranks


class Rank1(Rule):
    name = "rank1"
    key = "matrix"
    separates_terms = True
    summary = "v_a and v_b both from attention; c_j = z_j·⟨z_j, p_j⟩ (published rank-1 / rank-k form)"

    def coefficients(self, z: Tensor, p: Tensor | None, num_ranks: int, scale: float) -> Tensor:
        assert p is not None
        z_blocks, p_blocks = split_ranks(z, num_ranks), split_ranks(p, num_ranks)
        s = torch.linalg.vecdot(z_blocks, p_blocks).unsqueeze(-1)
        return (z_blocks * s).flatten(-2)

    def backward(
        self, dc: Tensor, z: Tensor, p: Tensor | None, num_ranks: int, scale: float, need_z: bool, need_p: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert p is not None
        dc, z, p = (split_ranks(t, num_ranks) for t in (dc, z, p))
        ds = torch.linalg.vecdot(dc, z).unsqueeze(-1)
        dz = None
        if need_z:
            s = torch.linalg.vecdot(z, p).unsqueeze(-1)
            dz = torch.addcmul(s * dc, ds, p).flatten(-2)
        return dz, (ds * z).flatten(-2) if need_p else None

    def vectors(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        z_blocks = split_ranks(z, num_ranks)
        v_a = torch.einsum("tkr,kri->tki", z_blocks, w_a_up.unflatten(0, (num_ranks, -1)))
        v_b = torch.einsum("tkr,kro->tko", z_blocks, w_b_up.unflatten(0, (num_ranks, -1)))
        return v_a, v_b

    def vector_norms(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        return gram_norm(z, w_a_up, num_ranks), gram_norm(z, w_b_up, num_ranks)
