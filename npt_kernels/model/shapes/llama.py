"""Llama-like layers, a norm before attention and before a gated MLP: Llama, SmolLM, Mistral, Qwen2, Qwen3, Gemma 1, StableLM."""

from __future__ import annotations

from .named import GATED, NamedLayer

__all__ = ["LLAMA", "LLAMA_OTHER_NAMES"]

LLAMA = NamedLayer("llama-like", *GATED, dropouts=("dropout",))

#: The same layer with other names for its MLP or the norm in front of it.
LLAMA_OTHER_NAMES = (
    # VaultGemma
    NamedLayer("llama-like (pre_feedforward_layernorm)", *GATED, mlp_norm="pre_feedforward_layernorm"),
    # Llama 4, its dense layers
    NamedLayer("llama-like (feed_forward)", *GATED, mlp_child="feed_forward", act="activation_fn"),
    # Jamba, its attention layers
    NamedLayer("llama-like (pre_ff_layernorm)", *GATED, mlp_child="feed_forward", mlp_norm="pre_ff_layernorm"),
)
