"""``anchored``: the key is one trained direction ``w [in]`` per target, the same for every token.

``v_a = w``, ``v_b[t,j] = z[t,j] @ w_b_up[j]``; so ``c = z · ⟨w, u⟩``. Unlike ``rank1``, which is even in ``a`` (replace a by
−a and nothing changes), this is linear in ``a``, as the function to be fitted nearly is (docs/comparison.md).
"""

from __future__ import annotations

from torch import Tensor

from .base import Rule, gram_norm


class Anchored(Rule):
    name = "anchored"
    key = "vector"
    summary = "v_a is one trained vector per target; c = z·⟨w, u⟩"

    def coefficients(self, z: Tensor, p: Tensor | None, num_ranks: int, scale: float) -> Tensor:
        assert p is not None
        return z * p

    def backward(
        self, dc: Tensor, z: Tensor, p: Tensor | None, num_ranks: int, scale: float, need_z: bool, need_p: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert p is not None
        dp = (dc.unsqueeze(-2) @ z.unsqueeze(-1)).squeeze(-1) if need_p else None
        return dc * p if need_z else None, dp

    def vectors(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        v_b = (z.unflatten(-1, (num_ranks, -1)).transpose(0, 1) @ w_b_up.unflatten(0, (num_ranks, -1))).transpose(0, 1)
        return w_a_up.expand(z.shape[0], num_ranks, -1), v_b

    def vector_norms(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert w_a_up is not None
        return (w_a_up.square().sum() * num_ranks).expand(z.shape[0]), gram_norm(z, w_b_up, num_ranks)
