"""``self_key``: the key is the token's own input, ``v_a = u/‖u‖²``, hence ``⟨v_a, u⟩ = 1`` and ``c = z``.

The only rule with a closed form that is exact at full rank (docs/method.md). Norm matching (1/ρ_T on ``z``, α on
``u``) is applied by the caller, see ``npt_kernels/model/norms.py``. Tokens with ``u = 0`` have no key; the linear form
``ΔW_t u_t = z_t @ w_b_up`` is the definition there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Rule, gram_norm


class SelfKey(Rule):
    name = "self_key"
    key = "none"
    summary = "v_a = u/‖u‖², the token's own input; c = z (closed form, exact at full rank)"

    def coefficients(self, z: Tensor, p: Tensor | None, num_ranks: int, scale: float) -> Tensor:
        return z

    def backward(
        self, dc: Tensor, z: Tensor, p: Tensor | None, num_ranks: int, scale: float, need_z: bool, need_p: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return dc if need_z else None, None

    def vectors(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        v_a = u / u.square().sum(-1, keepdim=True)
        v_b = torch.einsum("tkr,kro->tko", z.unflatten(-1, (num_ranks, -1)), w_b_up.unflatten(0, (num_ranks, -1)))
        return v_a.unsqueeze(-2).expand(-1, num_ranks, -1), v_b

    def vector_norms(
        self, z: Tensor, u: Tensor, w_a_up: Tensor | None, w_b_up: Tensor, num_ranks: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return num_ranks / u.square().sum(-1).clamp_min(torch.finfo(u.dtype).tiny), gram_norm(z, w_b_up, num_ranks)
