"""What the package must know of a family of decoder layers: one :class:`LayerShape` per *shape of layer*, not per model.

A new family is one small file here: how to recognise the layer, how to run its attention, which norm feeds its MLP, which
frozen linears that MLP has. Conversion, training and saving need nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..linears import linear_shape, unsupported_linear

__all__ = ["LayerShape", "Slot", "Target"]

#: Names in use for the product behind the heads.
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")

#: Place of a target in the MLP op: ``inter = act(gate) ⊙ up`` (or ``act(up)``), ``out = down(inter)``.
Slot = str


@dataclass(frozen=True)
class Target:
    """One frozen linear that may change: its place in the op and its attribute below the layer's MLP."""

    slot: Slot
    attribute: str


class LayerShape(ABC):
    """One shape of decoder layer. Stateless; methods take the layer."""

    name: ClassVar[str]
    #: Canonical target name → place and attribute, in the order (gate,) up, down.
    targets: ClassVar[Mapping[str, Target]]
    #: Other accepted names → canonical name.
    aliases: ClassVar[Mapping[str, str]] = {}
    #: Whether the MLP reads ``norm(h)`` and not ``norm(h + a)``.
    parallel: ClassVar[bool] = False

    @abstractmethod
    def mismatch(self, layer: nn.Module) -> str | None:
        """``None`` if the layer has this shape, else the reason why not."""

    @abstractmethod
    def attention_module(self, layer: nn.Module) -> nn.Module:
        """The module whose (first) output is the attention output ``a``."""

    @abstractmethod
    def attention(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``a [..., d]``: pre-norm and attention exactly as the layer's own forward runs them."""

    @abstractmethod
    def norm(self, layer: nn.Module) -> nn.Module:
        """The norm in front of the MLP."""

    @abstractmethod
    def activation(self, layer: nn.Module) -> Any:
        """The activation callable of the MLP."""

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The MLP module; the layer itself if it has none of its own."""
        return layer.get_submodule("mlp")

    def mlp_output(self, layer: nn.Module, u: Tensor) -> Tensor:
        """What the original MLP makes of its input."""
        out: Tensor = self.mlp(layer)(u)
        return out

    def linear(self, layer: nn.Module, target: str) -> nn.Module:
        """The frozen linear of a canonical target."""
        return self.mlp(layer).get_submodule(self.targets[target].attribute)

    def linears(self, mlp: nn.Module) -> dict[Slot, nn.Module]:
        """Place in the op → frozen linear, of the module that :meth:`mlp` gives."""
        return {place.slot: getattr(mlp, place.attribute) for place in self.targets.values()}

    def after_down(self, mlp: nn.Module, out: Tensor) -> Tensor:
        """What the MLP module itself does behind its last linear."""
        return out

    def output_projection(self, layer: nn.Module, width: int) -> str | None:
        """Attribute of the attention module that may be its output projection, the last thing that it computes; ``None``: none.

        By name and size only: whether it is the last is tried before it is relied on (``model/probe.py``).
        """
        attention = self.attention_module(layer)
        for name in _OUTPUT_PROJECTIONS:
            linear = getattr(attention, name, None)
            if (
                isinstance(linear, nn.Module)
                and unsupported_linear(linear) is None
                and linear_shape(linear)[1] == width
            ):
                return name
        return None

    def output(self, layer: nn.Module, residual: Tensor, mlp_output: Tensor) -> Tensor:
        """How the layer joins its MLP's output to the residual stream."""
        return residual + mlp_output

    def original(self, layer: nn.Module, h: Tensor, a: Tensor) -> Tensor:
        """What the original layer returns for its input ``h`` and attention output ``a``."""
        total = h + a
        return self.output(layer, total, self.mlp_output(layer, self.norm(layer)(h if self.parallel else total)))

    def canonical_targets(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Canonical names, in op order, of the targets a user named. Raises ``ValueError`` for one that does not exist."""
        chosen = set()
        for name in names:
            canonical = self.aliases.get(name, name)
            if canonical not in self.targets:
                raise ValueError(
                    f"targets contains {name!r}, which a {self.name} layer does not have; it has "
                    f"{', '.join(self.targets)} (also accepted: {', '.join(self.aliases)})"
                )
            chosen.add(canonical)
        return tuple(target for target in self.targets if target in chosen)
