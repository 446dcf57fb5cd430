"""The closed form: NP components that make a converted layer return what the original returned, without training.

For a target fed by the norm, ``W norm(h + a) − W u = W(γ ⊙ a)/ρ_T`` (LayerNorm: of ``a − mean a``), linear in ``a``; the down
projection must add ``a`` itself. With ``z = a E`` and ``a ≈ z D``:

    w_down = E,   w_b_up[gate, up, c_fc] = D (I − 11ᵀ/d)? diag(γ) Wᵀ,   w_b_up[down, c_proj] = D

(the centring only for LayerNorm). Exact at r = d, where ``E D = I``.
"""

from __future__ import annotations

import torch

from ..component import NPComponent
from ..model.linears import linear_weight
from ..model.norms import norm_weight
from ..model.select import LayerChoice
from .bases import Basis

__all__ = ["fill_closed_form"]


@torch.no_grad()
def fill_closed_form(component: NPComponent, choice: LayerChoice, basis: Basis) -> None:
    """Write the closed form into a ``self_key`` component. The first R directions of the basis are kept."""
    total, device = component.total_rank, component.w_down.device
    encoder, decoder = basis.encoder[:, :total].to(device), basis.decoder[:total].to(device, torch.float64)
    component.w_down.copy_(encoder)
    shape, layer = choice.plan.shape, choice.layer
    weight = norm_weight(shape.norm(layer), choice.plan.norm_kind)
    for target, value in component.w_b_up.items():
        if shape.targets[target].slot == "down":
            value.copy_(decoder)
            continue
        if shape.parallel:  # its MLP reads no a
            value.zero_()
            continue
        rows = decoder - decoder.mean(1, keepdim=True) if choice.plan.norm_kind.startswith("layer") else decoder
        if weight is not None:
            rows = rows * weight.to(rows)
        value.copy_(rows @ linear_weight(shape.linear(layer, target)).to(rows).t())
