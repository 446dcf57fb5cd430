"""GPT-2-like decoder layers: LayerNorm, plain MLP with ``Conv1D`` weights ``[in, out]``."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from ..forward import first_output
from ..linears import unsupported_linear
from .base import LayerShape, Mismatch, Target

_CHILDREN = {"ln_1", "attn", "ln_2", "mlp"}


class GPT2Like(LayerShape):
    name = "gpt2-like"
    targets: ClassVar = {"c_fc": Target("up", "c_fc"), "c_proj": Target("down", "c_proj")}
    # A gate-only or gate+up recipe means the first matrix here: GPT-2 has no separate gate.
    aliases: ClassVar = {"gate": "c_fc", "up": "c_fc", "down": "c_proj"}

    def mismatch(self, layer: nn.Module) -> str | None:
        children = {name for name, _ in layer.named_children()} - {"np_component"}
        if children != _CHILDREN:
            return Mismatch.of_children(self.name, children, _CHILDREN)
        for target in self.targets.values():
            reason = unsupported_linear(getattr(self.mlp(layer), target.attribute, None))
            if reason is not None:
                return f"mlp.{target.attribute} {reason}"
        return None

    def attention_module(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule("attn")

    def attention(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = (
            _cache_name(type(self.attention_module(layer))),  # type: ignore[arg-type]
            "attention_mask",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "use_cache",
        )
        kwargs.update(zip(names, args, strict=False))
        if kwargs.pop("encoder_hidden_states", None) is not None:
            raise ValueError("a converted GPT-2 layer has no cross-attention; encoder_hidden_states must be None")
        kwargs.pop("encoder_attention_mask", None)
        output = layer.attn(layer.ln_1(hidden_states), **kwargs)  # type: ignore[operator]
        return first_output(output)

    def norm(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule("ln_2")

    def activation(self, layer: nn.Module) -> Any:
        return self.mlp(layer).act

    def after_down(self, mlp: nn.Module, out: Tensor) -> Tensor:
        return mlp.dropout(out)  # type: ignore[operator, no-any-return]


@lru_cache(maxsize=None)
def _cache_name(attention: Any) -> str:
    """transformers 5.24 renamed ``past_key_values``, here passed by place, and warns where it is said by that name."""
    return "cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values"
