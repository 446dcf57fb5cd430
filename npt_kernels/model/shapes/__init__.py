"""The shapes of decoder layers that can be converted, one file each."""

from __future__ import annotations

from .base import LayerShape
from .fused import FUSED
from .gpt2 import GPT2Like
from .llama import LLAMA, LLAMA_OTHER_NAMES
from .mixers import MIXERS
from .open_mlp import OPEN_MLP
from .parallel_layers import PARALLEL
from .plain_mlp import PLAIN_MLP
from .post_norms import POST_NORMS

__all__ = ["LAYER_SHAPES", "LayerShape"]

#: Tried in order; a new family is one file and one entry here.
LAYER_SHAPES: tuple[LayerShape, ...] = (
    LLAMA,
    *LLAMA_OTHER_NAMES,
    *FUSED,
    *MIXERS,
    GPT2Like(),
    *POST_NORMS,
    *PLAIN_MLP,
    *OPEN_MLP,
    *PARALLEL,
)
