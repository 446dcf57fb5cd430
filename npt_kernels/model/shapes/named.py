"""Decoder layers that differ in the names of their parts, and in which norms and dropouts stand where: one description each.

    a = post_attention(attention(input_norm(h)))
    serial    total = h + a,     y = total + MLP(mlp_norm(total))
    parallel                     y = h + a + MLP(mlp_norm(h))

Any norm may be absent. What a description says is tried on the model's own forward before a layer is converted
(``model/probe.py``), so one that does not fit is refused and never converted wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..forward import first_output
from ..linears import unsupported_linear
from .base import LayerShape, Mismatch, Target

__all__ = ["GATED", "NamedLayer"]

#: Targets and aliases of a gated MLP with the usual names.
GATED = (
    {"gate": Target("gate", "gate_proj"), "up": Target("up", "up_proj"), "down": Target("down", "down_proj")},
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
)


@dataclass(frozen=True)
class NamedLayer(LayerShape):
    """A shape described by names of children.

    Attributes:
        name: Of the shape, for reports.
        targets, aliases: As in :class:`.base.LayerShape`.
        attention_child, mlp_child: The attention and the MLP.
        input_norm, mlp_norm: Norms in front of them; ``None``: none. A parallel layer may name one norm for both.
        post_attention: Norm of the attention's output.
        post_mlp: Norm of the MLP's output: a layer that has one is refused (``post_norms.py``).
        act: Attribute of the MLP that holds the activation; a function where the MLP has none.
        renamed: Arguments of the layer → names under which its attention takes them; ``None``: it does not take them.
        dropouts: Children that may stand anywhere; what they do is for the probe to find out.
        parallel: Whether the MLP reads ``h`` and not ``h + a``.
        order: Names of positional arguments behind the hidden states.
    """

    name: str  # type: ignore[misc]
    targets: Mapping[str, Target]  # type: ignore[misc]
    aliases: Mapping[str, str] = field(default_factory=dict)  # type: ignore[misc]
    attention_child: str = "self_attn"
    mlp_child: str = "mlp"
    input_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_attention: str | None = None
    post_mlp: str | None = None
    act: str | Callable[[Tensor], Tensor] = "act_fn"
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    parallel: bool = False  # type: ignore[misc]
    order: tuple[str, ...] = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")

    def mismatch(self, layer: nn.Module) -> str | None:
        norms = {self.input_norm, self.mlp_norm, self.post_attention, self.post_mlp}
        wanted = {self.attention_child, self.mlp_child, *(norm for norm in norms if norm is not None)}
        children = {name for name, _ in layer.named_children()} - {"np_component", *self.dropouts}
        if children != wanted:
            return Mismatch.of_children(self.name, children, wanted)
        if self.post_mlp is not None:
            return (
                f"it has a norm behind its MLP ({self.post_mlp}), which would norm the attention's share with the MLP's output: "
                "no weight change equals such a layer"
            )
        mlp = self.mlp(layer)
        inside = {name for name, child in mlp.named_children() if not isinstance(child, nn.Dropout)}
        act = {self.act} if isinstance(self.act, str) else set()
        extra = inside - {*act, *(target.attribute for target in self.targets.values())}
        if extra:
            return f"not {self.name} (its MLP has {sorted(extra)} too)"
        for target in self.targets.values():
            reason = unsupported_linear(getattr(mlp, target.attribute, None))
            if reason is not None:
                return f"mlp.{target.attribute} {reason}"
        if isinstance(self.act, str) and not callable(getattr(mlp, self.act, None)):
            return f"not {self.name} (its MLP has no {self.act})"
        return None

    def attention_module(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.post_attention or self.attention_child)

    def attention(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(self.order, args, strict=False))
        if self.renamed:
            kwargs = {new: value for name, value in kwargs.items() if (new := self.renamed.get(name, name)) is not None}
        normed = hidden_states if self.input_norm is None else getattr(layer, self.input_norm)(hidden_states)
        a = first_output(getattr(layer, self.attention_child)(normed, **kwargs))
        return a if self.post_attention is None else getattr(layer, self.post_attention)(a)  # type: ignore[no-any-return]

    def norm(self, layer: nn.Module) -> nn.Module:
        return _NO_NORM if self.mlp_norm is None else layer.get_submodule(self.mlp_norm)

    def mlp(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.mlp_child)

    def after_down(self, mlp: nn.Module, out: Tensor) -> Tensor:
        dropout = mlp._modules.get("dropout") if mlp.training else None
        return out if dropout is None else dropout(out)

    def activation(self, layer: nn.Module) -> Any:
        return getattr(self.mlp(layer), self.act) if isinstance(self.act, str) else self.act


_NO_NORM = nn.Identity()
