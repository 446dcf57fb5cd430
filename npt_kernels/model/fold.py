"""The output projection of attention that a converted layer need not compute.

A component reads the attention output through its bottleneck alone: ``z = a @ w_down`` with ``a = o W_oᵀ + b_o``, where
``o [..., d_o]`` is what the heads return. So ``z = o (w_downᵀ W_o)ᵀ + w_downᵀ b_o``, and the product ``o W_oᵀ`` is left out. What
else reads ``a``, the norm match, then reads the change of the last linear's output in its place (:mod:`.mlp`).

``w_down`` stays the parameter that is trained and saved; ``w_downᵀ W_o [R, d_o]`` is made of it: ``d·d_o·R`` products against the
``T·d·d_o`` that are left out, and while nothing changes (decoding on a CPU) it is kept. So folding is a way to compute: where it
would not pay, and whenever somebody else has business with the projection (a hook, a PEFT adapter, weights that are elsewhere),
the projection is simply called.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..argument_checks import autocast_dtype
from ..component import NPComponent
from ..quantised.foreign import made_by_library
from .linears import linear_bias, linear_weight
from .mlp import LayerPlan, has_hooks, plain_forward
from .swap import Swapped

__all__ = [
    "NPTOutputProjection",
    "bottleneck_of_heads",
    "foldable",
    "folded_weight",
    "heads_output",
    "output_projection",
    "skippable_projection",
]


class _Skipping(threading.local):
    """The projection that hands on what it is given, in this thread, while the attention of its layer runs."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None


_skipping = _Skipping()


class NPTOutputProjection(Swapped):
    """Mixin of the output projection of a folded layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _skipping.module is self:
            return hidden_states
        return self.npt_original_class.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]


def skippable_projection(layer: nn.Module, plan: LayerPlan, component: NPComponent, h: Tensor) -> nn.Module | None:
    """The output projection of a converted layer, if the layer can do without its result in this call, and had better."""
    if "np_extra" in layer._modules:  # which hears the attention output itself
        return None
    # The attention's own mode: checkpointing puts nothing but the layer into training.
    if plan.projection is None or (plan.shape.attention_module(layer).training and not plan.folds_in_training):
        return None
    projection = output_projection(layer, plan)
    if projection is None or not foldable(layer, plan, projection):
        return None
    return projection if component.keeps_derived() or _pays(h.shape[:-1].numel(), component.total_rank) else None


def foldable(layer: nn.Module, plan: LayerPlan, projection: nn.Module) -> bool:
    """Whether the projection is ``o Wᵀ + b`` and nobody else has business with it or with its output."""
    return not (
        has_hooks(plan.shape.attention_module(layer))
        or has_hooks(projection)
        or not plain_forward(projection)
        or made_by_library(projection)
        or projection._modules  # a parametrized weight
        or linear_weight(projection).is_meta
    )


def _pays(tokens: int | torch.SymInt, rank: int) -> bool:
    """Whether it takes less to fold than to call: ``R ≤ T``. A size that the compiler does not know may be one token."""
    if not torch.compiler.is_compiling():
        return bool(tokens >= rank)
    from torch.fx.experimental import symbolic_shapes

    surely = getattr(symbolic_shapes, "guard_or_false", symbolic_shapes.statically_known_true)
    return bool(surely(tokens >= rank))


def output_projection(layer: nn.Module, plan: LayerPlan) -> nn.Module | None:
    """The one that was there at the conversion, ``None`` if another module stands in its place."""
    module = None if plan.projection is None else getattr(plan.shape.attention_module(layer), plan.projection, None)
    return cast(nn.Module, module) if isinstance(module, NPTOutputProjection) else None


def heads_output(
    layer: nn.Module, plan: LayerPlan, projection: nn.Module, h: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``o [..., d_o]``: the attention of the layer for its input ``h``, without ``projection``."""
    before = _skipping.module
    _skipping.module = projection
    try:
        return plan.shape.attention(layer, h, *args, **kwargs)
    finally:
        _skipping.module = before


def bottleneck_of_heads(component: NPComponent, projection: nn.Module, o: Tensor) -> Tensor:
    """``z [..., R] = a @ w_down`` of ``a = projection(o)``."""
    tensors = (*projection._parameters.values(), *projection._buffers.values())
    folded, shift = component.derived(autocast_dtype(o), tensors, lambda w_down: folded_weight(w_down, projection))
    return F.linear(o.to(folded.dtype) if autocast_dtype(o) is None else o, folded, shift)


def folded_weight(
    w_down: Tensor, projection: nn.Module, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """``w_downᵀ W_o [R, d_o]`` and ``w_downᵀ b_o [R]``, computed in ``dtype``, or in the projection's."""
    weight, bias = linear_weight(projection).to(dtype), linear_bias(projection)
    rows, bias = w_down.t().to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    return rows @ weight, None if bias is None else F.linear(bias, rows)
