"""The shapes of decoder layers that can be converted, one file each."""

from __future__ import annotations

from .base import LayerShape
from .gpt2 import GPT2Like
from .llama import LlamaLike

__all__ = ["LAYER_SHAPES", "LayerShape"]

#: Tried in order; a new family is one file and one entry here.
LAYER_SHAPES: tuple[LayerShape, ...] = (LlamaLike(), GPT2Like())
