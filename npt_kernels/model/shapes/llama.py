"""Llama-like decoder layers: RMSNorm, gated MLP. Llama, SmolLM, Mistral, Qwen2, Qwen3 and others of the same layout."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..forward import first_output
from ..linears import unsupported_linear
from .base import LayerShape, Target

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class LlamaLike(LayerShape):
    name = "llama-like"
    targets: ClassVar = {
        "gate": Target("gate", "gate_proj"),
        "up": Target("up", "up_proj"),
        "down": Target("down", "down_proj"),
    }
    aliases: ClassVar = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

    def mismatch(self, layer: nn.Module) -> str | None:
        children = {name for name, _ in layer.named_children()} - {"np_component"}
        if children != _CHILDREN:
            missing, extra = _CHILDREN - children, children - _CHILDREN
            return f"not llama-like (missing {sorted(missing)}, unexpected {sorted(extra)})"
        for target in self.targets.values():
            reason = unsupported_linear(getattr(self.mlp(layer), target.attribute, None))
            if reason is not None:
                return f"mlp.{target.attribute} {reason}"
        return None

    def attention_module(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule("self_attn")

    def attention(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # transformers passes everything but hidden_states by keyword; LlamaDecoderLayer names its positionals in this order.
        names = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
        kwargs.update(zip(names, args, strict=False))
        output = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)  # type: ignore[operator]
        return first_output(output)

    def norm(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule("post_attention_layernorm")

    def activation(self, layer: nn.Module) -> Any:
        return self.mlp(layer).act_fn
