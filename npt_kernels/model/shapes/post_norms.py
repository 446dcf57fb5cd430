"""Layers with a norm behind the MLP (Gemma 2 and 3, OLMo 2 and 3, EXAONE 4): recognised, and refused with the reason.

The change of the last matrix has to carry ``a`` to the residual stream. A norm behind it would norm ``a`` with the MLP's output,
so no weight change of the MLP equals the original layer, at any rank.
"""

from __future__ import annotations

from .named import GATED, NamedLayer

__all__ = ["POST_NORMS"]

POST_NORMS = (
    NamedLayer(
        "sandwich-normed", *GATED, mlp_norm="pre_feedforward_layernorm", post_attention="post_attention_layernorm",
        post_mlp="post_feedforward_layernorm",
    ),
    NamedLayer(
        "post-normed", *GATED, input_norm=None, mlp_norm=None, post_attention="post_attention_layernorm",
        post_mlp="post_feedforward_layernorm",
    ),
)  # fmt: skip
