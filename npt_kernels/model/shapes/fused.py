"""Gated MLPs whose gate and up are one linear, ``gate_up_proj``, the gate above: Phi-3, Phi-4, GLM.

Each half is read as a view (:class:`~..linears.LinearHalf`); where the linear has hooks or is wrapped it is called once, as
in the layer's own MLP. Dropout on the residual stream is for the probe to refuse where it is not 0.
"""

from __future__ import annotations

from torch import nn

from ..linears import LinearHalf
from .base import Slot, Target
from .named import NamedLayer

__all__ = ["FUSED"]

_PARTS = {"gate": 0, "up": 1}


class FusedGate(NamedLayer):
    """``down(act(gate) * up)`` with ``gate, up = gate_up(x).chunk(2)``."""

    def linear(self, layer: nn.Module, target: str) -> nn.Module:
        return self.linears(self.mlp(layer))[self.targets[target].slot]

    def linears(self, mlp: nn.Module) -> dict[Slot, nn.Module]:
        found = super().linears(mlp)
        return {slot: LinearHalf(module, _PARTS[slot]) if slot in _PARTS else module for slot, module in found.items()}  # type: ignore[misc]


FUSED = (
    FusedGate(
        "fused gate_up", {
            "gate": Target("gate", "gate_up_proj"), "up": Target("up", "gate_up_proj"), "down": Target("down", "down_proj"),
        },
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
        act="activation_fn", dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
)  # fmt: skip
