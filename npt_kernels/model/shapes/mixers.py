"""Layers that mix tokens by something else than softmax attention: linear attention, short convolutions.

What they add to the residual stream takes the place of the attention output ``a``; the conversion needs no more of it.
"""

from __future__ import annotations

import torch.nn.functional as F

from .base import Target
from .named import GATED, NamedLayer

__all__ = ["MIXERS"]

_RECURRENT = {"past_key_values": "cache_params", "position_ids": None, "position_embeddings": None}
_LFM2 = (
    {"gate": Target("gate", "w1"), "up": Target("up", "w3"), "down": Target("down", "w2")},
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"},
)

MIXERS = (
    NamedLayer("linear attention", *GATED, attention_child="linear_attn", renamed=_RECURRENT),  # Qwen 3.5, OLMo Hybrid
    NamedLayer(
        "llama-like (w1, w3, w2)", *_LFM2, mlp_child="feed_forward", input_norm="operator_norm", mlp_norm="ffn_norm", act=F.silu
    ),  # LFM 2, its attention layers
    NamedLayer(
        "short convolution", *_LFM2, attention_child="conv", mlp_child="feed_forward", input_norm="operator_norm",
        mlp_norm="ffn_norm", act=F.silu, renamed={"position_ids": None, "position_embeddings": None},
    ),  # LFM 2
)  # fmt: skip
