"""Pre-normed layers whose MLP has no gate: ``down(act(up(x)))``, under the names in use."""

from __future__ import annotations

from .base import Target
from .named import NamedLayer

__all__ = ["PLAIN_MLP"]


def _plain(up: str, down: str, act: str, **names: str) -> NamedLayer:
    # A gate-only or gate+up recipe means the first matrix: there is no separate gate.
    aliases = {"gate": "c_fc", "up": "c_fc", "down": "c_proj", up: "c_fc", down: "c_proj"}
    return NamedLayer(
        f"plain-mlp ({up})", {"c_fc": Target("up", up), "c_proj": Target("down", down)}, aliases, act=act, dropouts=("dropout",),
        **names,  # type: ignore[arg-type]
    )  # fmt: skip


PLAIN_MLP = (
    _plain("up_proj", "down_proj", "act_fn"),  # Nemotron, Arcee
    _plain(
        "up_proj", "down_proj", "act_fn", input_norm="attention_layernorm", mlp_norm="feedforward_layernorm"
    ),  # Apertus
    _plain("c_fc", "c_proj", "act"),  # StarCoder 2
    _plain("fc1", "fc2", "activation_fn"),  # nanochat, Moshi
    _plain("dense_h_to_4h", "dense_4h_to_h", "act"),  # Persimmon
)
