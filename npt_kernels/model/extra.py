"""A second weight change beside the component of a converted layer: its own rank, rule and targets, the component frozen.

``y = (W + ΔW_t + ΔE_t) u``: ΔW_t is what makes the layer equal to the original, ΔE_t starts at 0 and is what fine-tuning trains
(``training.objective=task``). Both hear the attention output ``a``; the norm is matched to the component's change alone, so that
the equivalence stays what it was. A layer with an extra change calls its linears and adds both changes (``mlp.py``), and computes
the attention's output projection, which the component alone could do without. Inside ``npt_disabled`` the layer is the original,
without either; ``npt_scale`` speaks of the component.

A layer that is not converted has the same by ``NPTConfig(attention_residual=True)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..component import NPComponent
from ..config import resolve_layers
from ..messages import shown
from ..rules import get_rule
from .install import require_converted
from .linears import linear_shape
from .shapes.base import LayerShape

__all__ = [
    "ExtraSpec", "add_extra", "extra_components", "extra_tensors", "fill_extra", "put_extra", "remove_extra", "spec_of",
    "split_tensors",
]  # fmt: skip

#: Prefix of its tensors in an adapter's file.
_PREFIX = "extra."


@dataclass(frozen=True)
class ExtraSpec:
    """What an adapter's header says of it.

    Attributes:
        rank, rule, num_ranks, scale: As in ``NPTConfig``.
        targets: Canonical names.
        layers: Indices, in order.
    """

    rank: int
    rule: str
    num_ranks: int
    scale: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"targets": list(self.targets), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, entry: Any) -> ExtraSpec:
        """Raises ``ValueError`` for what is none; a damaged file, say."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(entry, Mapping) or set(entry) != names:
            raise ValueError(f"extra={shown(entry)} must have the keys {', '.join(sorted(names))}")
        for name, least in (("rank", 1), ("num_ranks", 1)):
            if isinstance(entry[name], bool) or not isinstance(entry[name], int) or not least <= entry[name] < 2**31:
                raise ValueError(f"extra has {name}={shown(entry[name])}, expected a whole number from {least} on")
        if isinstance(entry["scale"], bool) or not isinstance(entry["scale"], int | float):
            raise ValueError(f"extra has scale={shown(entry['scale'])}, expected a number")
        layers, targets = entry["layers"], entry["targets"]
        if not isinstance(layers, list) or not layers or any(type(i) is not int or i < 0 for i in layers):
            raise ValueError(f"extra has layers={shown(layers)}, expected indices")
        if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"extra has targets={shown(targets)}, expected names")
        get_rule(entry["rule"])
        return cls(
            entry["rank"],
            entry["rule"],
            entry["num_ranks"],
            float(entry["scale"]),
            tuple(targets),
            tuple(sorted(set(layers))),
        )


def extra_components(model: nn.Module) -> dict[int, NPComponent]:
    """Index of a converted layer → its extra component, in order; empty for a model without."""
    found = {i: layer._modules.get("np_extra") for i, layer in require_converted(model).items()}
    return {i: component for i, component in found.items() if component is not None}


def add_extra(
    model: nn.Module,
    rank: int,
    *,
    rule: str = "self_key",
    num_ranks: int = 1,
    scale: float = 1.0,
    layers: str | Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[int, NPComponent]:
    """Put an extra change on converted layers and freeze their components. It starts at 0: no output moves by a bit.

    Args:
        model: A converted model without extra changes.
        rank, rule, num_ranks, scale: Of the extra change; any rule beside any.
        layers: As in ``NPTConfig.layers``; a range means those in it that are converted. Default: all that are.
        targets: Linears that change; default: all of the MLP.
        seed: Of the start: ``w_down ~ N(0, 1/d)``, keys ``~ N(0, 1/in)``, ``w_b_up = 0``.

    Returns:
        Index → component, of which all parameters train (:func:`~.install.npt_parameters` gives them).

    Raises:
        ValueError: Not converted, has one already, or a layer, target, rule or rank that does not exist.
    """
    converted = require_converted(model)
    if extra_components(model):
        raise ValueError("the model has an extra change already; remove_extra(model) takes it off")
    if layers is None:
        wanted = list(converted)
    else:
        wanted = resolve_layers(layers, max(converted) + 1)
        missing = [index for index in wanted if index not in converted]
        if missing and (not isinstance(layers, str) or len(missing) == len(wanted)):
            there = ", ".join(map(str, converted))
            raise ValueError(
                f"extra layers={shown(layers)}: layer {missing[0]} is not converted; converted are {there}"
            )
        wanted = [index for index in wanted if index in converted]
    shape = next(iter(converted.values())).npt_plan.shape
    names = shape.canonical_targets(tuple(targets)) if targets else tuple(shape.targets)
    spec = ExtraSpec(rank, rule, num_ranks, float(scale), names, tuple(wanted))
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for index in wanted:
        layer = converted[index]
        made[index] = component = make_extra(layer, layer.npt_plan.shape, layer.np_component, spec)
        with torch.no_grad():
            for parameter, width in (
                (component.w_down, component.hidden_size),
                *((key, key.shape[-1]) for key in component.w_a_up.values()),
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(width**-0.5))
    put_extra(converted, made)
    return made


def make_extra(layer: nn.Module, shape: LayerShape, beside: NPComponent, spec: ExtraSpec) -> NPComponent:
    """A component of zeros for one layer, in the dtype and on the device of the one that is there."""
    unknown = [name for name in spec.targets if name not in shape.targets]
    if unknown:
        raise ValueError(f"extra target {unknown[0]!r} is not one of {', '.join(shape.targets)}")
    sizes = {name: beside.target_shapes.get(name) or linear_shape(shape.linear(layer, name)) for name in spec.targets}
    return NPComponent(
        beside.hidden_size, sizes, rank=spec.rank, rule=spec.rule, num_ranks=spec.num_ranks, scale=spec.scale,
        dtype=beside.w_down.dtype, device=beside.w_down.device,
    )  # fmt: skip


def put_extra(layers: Mapping[int, Any], components: Mapping[int, NPComponent]) -> None:
    """Attach them; what was there on all layers is frozen."""
    for index, layer in layers.items():
        layer.np_component.requires_grad_(False)
        layer.np_component.ready = None  # what it knew of a layer without
        if index in components:
            layer.np_extra = components[index]


def remove_extra(model: nn.Module) -> None:
    """Take the extra changes off; the components train again. Raises ``ValueError`` if there is none."""
    if not extra_components(model):
        raise ValueError("the model has no extra change; nothing to remove")
    for layer in require_converted(model).values():
        layer._modules.pop("np_extra", None)
        layer.np_component.requires_grad_(True)


def spec_of(model: nn.Module) -> ExtraSpec | None:
    """What is on the model; ``None`` without."""
    found = extra_components(model)
    if not found:
        return None
    first = next(iter(found.values()))
    return ExtraSpec(
        first.rank, first.rule_name, first.num_ranks, first.scale, tuple(first.target_shapes), tuple(found)
    )


def extra_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``extra.layers.{i}.{name}`` → tensor (not copied)."""
    return {
        f"{_PREFIX}layers.{index}.{name}": parameter.detach()
        for index, component in extra_components(model).items()
        for name, parameter in component.named_parameters()
    }


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(the component's, the extra's without their prefix)``."""
    own = {name: t for name, t in tensors.items() if not name.startswith(_PREFIX)}
    return own, {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}


def fill_extra(
    layers: Iterable[tuple[int, nn.Module, LayerShape, NPComponent]], spec: ExtraSpec
) -> dict[int, NPComponent]:
    """Components of zeros for the layers of ``spec``. Raises ``ValueError`` for a layer or target that is not there."""
    there = {index: (layer, shape, beside) for index, layer, shape, beside in layers}
    missing = [index for index in spec.layers if index not in there]
    if missing:
        raise ValueError(f"the extra change is of layer {missing[0]}, which the adapter does not convert")
    return {index: make_extra(*there[index], spec) for index in spec.layers}
