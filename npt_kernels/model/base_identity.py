"""Which base model an adapter was made for: what is written beside it, and what a mismatch says when it is loaded.

Layer count, activation and shape of the layers must be the same. Of the weights a few numbers a layer are kept, not a hash: the
same weights in another dtype, or quantised, are the same base.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..messages import shown
from ..ops.dense_on_use import DeferredWeight
from .linears import linear_weight
from .mlp import LayerPlan
from .select import find_layers

__all__ = ["check_base", "describe_base"]

#: Numbers of a linear that are kept.
_NUMBERS = 6
#: Mean difference of the numbers, relative to their mean size, from which on the weights are others. NF4 rounds by .09.
_OTHER = 0.3


def describe_base(model: nn.Module, layers: Sequence[tuple[nn.Module, LayerPlan]]) -> dict[str, Any]:
    """What :func:`check_base` compares, as plain JSON types. ``layers``: those that are converted, with their plans."""
    plan = layers[0][1]
    return {
        "num_layers": len(find_layers(model)[1]),
        "activation": plan.act,
        "shape": plan.shape.name,
        "numbers": {str(p.index): found for layer, p in layers if (found := _numbers(layer, p)) is not None},
    }


def check_base(
    saved: dict[str, Any] | None, model: nn.Module, layers: Sequence[tuple[nn.Module, LayerPlan]], path: Any
) -> None:
    """Compare with what was saved; ``None`` (an adapter of an earlier version, or a published one) is not compared.

    Raises ``ValueError`` where the layers are of another kind, warns where the weights are others.
    """
    if not isinstance(saved, dict):
        return
    now = describe_base(model, layers)
    for key, name in (("shape", "shape of the layers"), ("num_layers", "decoder layers"), ("activation", "activation")):
        if key in saved and saved[key] != now[key]:
            raise ValueError(
                f"{path} was made for a base model with {name} {shown(saved[key])}, this {type(model).__name__} has "
                f"{now[key]!r}; load the model that it was trained on"
            )
    worst, where = 0.0, ""
    kept = saved.get("numbers")
    for index, numbers in now["numbers"].items():
        before = kept.get(index) if isinstance(kept, dict) else None
        if (
            not isinstance(before, list)
            or len(before) != len(numbers)
            or any(type(n) not in (int, float) for n in before)
        ):
            continue
        a, b = torch.tensor(before, dtype=torch.float64), torch.tensor(numbers, dtype=torch.float64)
        difference = float((a - b).abs().mean() / a.abs().mean().clamp_min(1e-12))
        if difference > worst:
            worst, where = difference, index
    if worst > _OTHER:
        warnings.warn(
            f"{path} was made for a base model with other weights (layer {where} differs by {worst:.0%}): right for a fine-tuned "
            "copy of it, wrong for another model",
            stacklevel=3,
        )


@torch.no_grad()
def _numbers(layer: nn.Module, plan: LayerPlan) -> list[float] | None:
    """Some entries of the layer's frozen linears; ``None`` where they are not here (offloaded, streamed, sharded, quantised)."""
    found: list[float] = []
    for target in plan.shape.targets:
        weight = linear_weight(plan.shape.linear(layer, target))
        if isinstance(weight, DeferredWeight) or weight.is_meta or hasattr(weight, "full_tensor") or not weight.numel():
            return None
        rows, columns = (torch.linspace(0, size - 1, _NUMBERS).long() for size in weight.shape)
        found += [
            float(f"{value:.6g}")
            for value in weight[rows.to(weight.device), columns.to(weight.device)].float().tolist()
        ]
    return found
