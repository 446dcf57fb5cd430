"""Llama-like layers, a norm before attention and before a gated MLP: Llama, SmolLM, Mistral, Qwen2, Qwen3, Gemma 1, StableLM."""

from __future__ import annotations

from .named import GATED, NamedLayer

__all__ = ["LLAMA"]

LLAMA = NamedLayer("llama-like", *GATED, dropouts=("dropout",))
