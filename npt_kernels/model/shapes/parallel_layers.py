"""Parallel layers: attention and MLP read the same ``h``, ``y = h + a + MLP(norm(h))``. GPT-NeoX, GPT-J, CodeGen, Phi, Cohere.

Their MLP's input holds no ``a``, so attention enters through the change of the last matrix alone: ``w_b_up[down] = D`` gives
``a``, exactly at full rank, and the closed form leaves the other targets at zero. They can still be trained.
"""

from __future__ import annotations

from .base import Target
from .named import GATED, NamedLayer

__all__ = ["PARALLEL"]


def _plain(up: str, down: str, act: str, **names: object) -> NamedLayer:
    aliases = {"gate": "c_fc", "up": "c_fc", "down": "c_proj", up: "c_fc", down: "c_proj"}
    return NamedLayer(
        f"parallel ({up})", {"c_fc": Target("up", up), "c_proj": Target("down", down)}, aliases, act=act, parallel=True,
        **names,  # type: ignore[arg-type]
    )  # fmt: skip


PARALLEL = (
    NamedLayer("parallel gated", *GATED, mlp_norm="input_layernorm", parallel=True),  # Cohere
    _plain("fc1", "fc2", "activation_fn", mlp_norm="input_layernorm", dropouts=("resid_dropout",)),  # Phi
    _plain(
        "dense_h_to_4h", "dense_4h_to_h", "act", attention_child="attention",
        dropouts=("post_attention_dropout", "post_mlp_dropout"),
    ),  # GPT-NeoX, Pythia
    _plain("fc_in", "fc_out", "act", attention_child="attn", input_norm="ln_1", mlp_norm="ln_1"),  # GPT-J, CodeGen
)  # fmt: skip
