"""Layers whose MLP is no module of its own: ``fc1`` and ``fc2`` stand in the layer. OPT, XGLM, BioGPT.

What other shapes ask of the MLP module they ask of the layer. Hooks on ``fc1``, ``fc2``, norms and layer work as elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..linears import unsupported_linear
from .base import Mismatch, Target
from .named import NamedLayer

__all__ = ["OPEN_MLP"]


class OpenMlp(NamedLayer):
    """``h + dropout(attention(norm(h)))``, then ``+ dropout(fc2(act(fc1(norm(·)))))``."""

    def mlp(self, layer: nn.Module) -> nn.Module:
        return layer

    def mismatch(self, layer: nn.Module) -> str | None:
        wanted = {"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"}
        children = {name for name, _ in layer.named_children()} - {"np_component", "activation_fn"}
        if children != wanted:
            return Mismatch.of_children(self.name, children, wanted)
        for name in ("fc1", "fc2"):
            reason = unsupported_linear(getattr(layer, name))
            if reason is not None:
                return f"{name} {reason}"
        if getattr(layer, "activation_dropout", 0):
            return (
                f"it drops out between fc1 and fc2 (activation_dropout={layer.activation_dropout}), inside of what becomes "
                "one op; set activation_dropout=0 in the model's configuration"
            )
        return None

    def attention(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        a = super().attention(layer, hidden_states, *args, **kwargs)
        return F.dropout(a, p=layer.dropout, training=layer.training)  # type: ignore[arg-type]

    def mlp_output(self, layer: nn.Module, u: Tensor) -> Tensor:
        return self.after_down(layer, layer.fc2(layer.activation_fn(layer.fc1(u))))  # type: ignore[operator]

    def after_down(self, mlp: nn.Module, out: Tensor) -> Tensor:
        return F.dropout(out, p=mlp.dropout, training=mlp.training)  # type: ignore[arg-type]


OPEN_MLP = (
    OpenMlp(
        "open mlp (fc1)", {"c_fc": Target("up", "fc1"), "c_proj": Target("down", "fc2")},
        {"gate": "c_fc", "up": "c_fc", "down": "c_proj", "fc1": "c_fc", "fc2": "c_proj"},
        input_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", act="activation_fn",
    ),
)  # fmt: skip
