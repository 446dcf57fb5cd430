"""Conversion of real models: one file per decoder-layer shape, patching on the instance, checkpoints."""

from __future__ import annotations

from .base import LayerShape
from .gpt2 import GPT2Like
from .library_linears import adopt_quantised
from .llama import LlamaLike
from .quantised import QuantisedLinear, quantise_base

__all__ = ["LAYER_SHAPES", "LayerShape", "QuantisedLinear", "adopt_quantised", "quantise_base"]

#: Tried in order; a new family is one file and one entry here.
LAYER_SHAPES: tuple[LayerShape, ...] = (LlamaLike(), GPT2Like())
