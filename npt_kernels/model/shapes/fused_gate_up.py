"""Gated layers whose gate and up projections are one linear, ``[gate | up] = gate_up_proj(x)``. Phi-3, Phi-4, GLM."""

from __future__ import annotations

from torch import Tensor, nn

from ..linears import linear_bias, linear_shape, linear_weight
from .base import Target
from .named import GATED, NamedLayer

__all__ = ["FUSED_GATE_UP"]

_FUSED = "gate_up_proj"


class _Rows(nn.Module):
    """Rows of a linear, read when they are asked for: moved, streamed or merged into, it is the linear's weight of that moment.

    No child of the model, and holds the linear where ``nn.Module`` does not look for children.
    """

    def __init__(self, whole: nn.Module, rows: slice) -> None:
        super().__init__()
        self.whole, self.rows = (whole,), rows

    @property
    def weight(self) -> Tensor:
        """``[f, d]``, a view; of a quantised linear made dense."""
        return linear_weight(self.whole[0])[self.rows]

    @property
    def bias(self) -> Tensor | None:
        bias = linear_bias(self.whole[0])
        return None if bias is None else bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.whole[0](x)[..., self.rows]
        return out


class FusedGateUp(NamedLayer):
    """See the module."""

    def mismatch(self, layer: nn.Module) -> str | None:
        reason = super().mismatch(layer)
        if reason is not None:
            return reason
        whole = getattr(self.mlp(layer), _FUSED)
        if linear_shape(whole)[1] % 2:
            return f"mlp.{_FUSED} has {linear_shape(whole)[1]} outputs, not two equal halves"
        return None

    def called(self, layer: nn.Module, target: str) -> tuple[nn.Module, slice | None]:
        module = self.mlp(layer).get_submodule(self.targets[target].attribute)
        if self.targets[target].slot == "down":
            return module, None
        half = linear_shape(module)[1] // 2
        return module, slice(0, half) if self.targets[target].slot == "gate" else slice(half, 2 * half)

    def linear(self, layer: nn.Module, target: str) -> nn.Module:
        module, rows = self.called(layer, target)
        return module if rows is None else _Rows(module, rows)


_TARGETS, _ALIASES = GATED
FUSED_GATE_UP = (
    FusedGateUp(
        "fused gate and up",
        {name: Target(target.slot, "down_proj" if name == "down" else _FUSED) for name, target in _TARGETS.items()},
        _ALIASES,
        act="activation_fn",
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
)
