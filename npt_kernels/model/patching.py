"""``apply_npt`` and its inverse: convert chosen layers of a model in place, all or nothing, and say what was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import identify_activation
from ..component import NPComponent
from ..config import NPTConfig, parse_rank, resolve_layers
from ..conversion.random_start import initialise
from .layer import LayerPlan, NPTLayer, convert_layer, is_converted, own_forward, restore_layer
from .linears import count_parameters, linear_shape
from .norms import identify_norm
from .shapes import LAYER_SHAPES
from .shapes.base import LayerShape
from .sharding import is_sharded
from .weight_location import compute_device

__all__ = [
    "ApplyReport",
    "apply_npt",
    "converted_layers",
    "find_layers",
    "install",
    "npt_disabled",
    "npt_parameters",
    "plan_layers",
    "remove_npt",
]

_STATE = "_npt_state"


@dataclass
class NPTState:
    """What a converted model remembers: its configuration and which base parameters were trainable before."""

    config: NPTConfig
    trainable_before: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerReport:
    """One converted layer."""

    index: int
    shape: str
    rule: str
    rank: int
    targets: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class ApplyReport:
    """What :func:`apply_npt` did. ``str(report)`` is a table.

    Attributes:
        converted: One entry per converted layer, in order.
        skipped: Layer index → why it was left alone although the selection named it.
        num_layers: Decoder layers of the model.
        base_parameters: Parameters of the frozen model.
        calibration: Notes of the closed form (tokens, basis, share of the loss kept), empty without calibration.
    """

    converted: tuple[LayerReport, ...]
    skipped: dict[int, str]
    num_layers: int
    base_parameters: int
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Trainable parameters added."""
        return sum(layer.parameters for layer in self.converted)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the converted layers."""
        return tuple(layer.index for layer in self.converted)

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.converted]
        first = self.converted[0]
        lines = [
            f"converted {len(self.converted)} of {self.num_layers} {first.shape} layers: {_ranges(self.layers)}",
            f"  rule {first.rule}, targets {', '.join(first.targets)}, rank "
            + (
                f"{ranks[0]}"
                if len(set(ranks)) == 1
                else f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}"
            ),
            f"  {self.parameters:,} trainable parameters beside {self.base_parameters:,} frozen "
            f"({self.parameters / max(self.base_parameters, 1):.1%})",
        ]
        lines += [f"  skipped layer {index}: {reason}" for index, reason in self.skipped.items()]
        if "unused" in self.calibration:
            lines.append(f"  {self.calibration['unused']}")
        return "\n".join(lines)


def _ranges(indices: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _shape_of(layer: nn.Module) -> tuple[LayerShape | None, str]:
    if is_converted(layer):
        return layer.npt_plan.shape, ""  # type: ignore[union-attr, return-value]
    reasons = []
    for shape in LAYER_SHAPES:
        reason = shape.mismatch(layer)
        if reason is None:
            return shape, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """``(path, layers)``: the module list whose entries are decoder layers. Raises ``ValueError`` if there is none or several."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_shape_of(entry)[0] is not None for entry in module)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{type(model).__name__} has several lists of decoder layers ({', '.join(path for path, _ in found)}); "
            "pass the submodule that holds only one of them"
        )
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    reason = f"; its longest module list holds {_shape_of(max(lists, key=len)[0])[1]}" if lists else ""
    known = ", ".join(shape.name for shape in LAYER_SHAPES)
    raise ValueError(f"{type(model).__name__} has no decoder layers that NPT knows ({known}){reason}")


def converted_layers(model: nn.Module) -> dict[int, Any]:
    """Index → converted layer, in order; empty for a model without NPT."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {m.npt_plan.index: m for m in model.modules() if isinstance(m, NPTLayer)}


@dataclass(frozen=True)
class LayerChoice:
    """A layer that will be converted: everything but its weights."""

    layer: nn.Module
    plan: LayerPlan
    targets: dict[str, tuple[int, int]]
    hidden_size: int


def plan_layers(
    model: nn.Module, config: NPTConfig, *, weights: bool = True
) -> tuple[list[LayerChoice], dict[int, str], int]:
    """``(choices, skipped, number of layers)`` without touching the model. Raises ``ValueError``.

    ``weights=False``: the model is on ``meta``, and which norm it has is not known, since that is found by running it.
    """
    _, layers = find_layers(model)
    if is_sharded(model):
        raise ValueError("the model is sharded with fully_shard; convert it first, then shard it")
    indices = resolve_layers(config.layers, len(layers))
    explicit = not isinstance(config.layers, str)
    choices, skipped = [], {}
    for index in indices:
        layer = layers[index]
        shape, reason = _shape_of(layer)
        if shape is not None:
            choice = _choose(layer, shape, index, config, weights)
            if isinstance(choice, LayerChoice):
                choices.append(choice)
                continue
            reason = choice
        if explicit:
            raise ValueError(f"layer {index} cannot be converted: {reason}")
        skipped[index] = reason
    if not choices:
        reason = next(iter(skipped.values()), f"layers={config.layers!r} selects none of its {len(layers)}")
        raise ValueError(f"no layer of {type(model).__name__} was converted: {reason}")
    return choices, skipped, len(layers)


def _choose(layer: nn.Module, shape: LayerShape, index: int, config: NPTConfig, weights: bool) -> LayerChoice | str:
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook") and not own_forward(layer):
        return "another library has replaced forward on this instance; convert before that one patches"
    if weights and any(parameter.is_meta for parameter in layer.parameters()):
        return (
            "it has no weights yet (device 'meta'); load them before converting, or keep it out of the offloaded part"
        )
    targets = {t: linear_shape(shape.linear(layer, t)) for t in shape.canonical_targets(tuple(config.targets))}
    hidden_size = linear_shape(shape.linear(layer, next(iter(shape.targets))))[0]
    act = identify_activation(shape.activation(layer))
    if act is None:
        return f"its activation {type(shape.activation(layer)).__name__} is not one of the supported ones"
    norm_kind = identify_norm(shape.norm(layer), hidden_size) if weights else None
    if norm_kind is None:
        if weights and config.matches_norm:
            return f"its norm {type(shape.norm(layer)).__name__} is neither RMSNorm nor LayerNorm; set norm_match=False"
        norm_kind = "rms"
    plan = LayerPlan(index, shape, act, norm_kind, config.matches_norm)
    return LayerChoice(layer, plan, targets, hidden_size)


def fixed_ranks(config: NPTConfig, choices: list[LayerChoice]) -> list[int] | None:
    """Rank of every chosen layer, or ``None`` for ``auto``, which a calibration must settle. Raises ``ValueError``."""
    kind, value = parse_rank(config.rank)
    if kind == "auto":
        return None
    widths = [choice.hidden_size for choice in choices]
    if kind == "list":
        if len(value) != len(choices):
            raise ValueError(f"rank lists {len(value)} numbers, but {len(choices)} layers are converted")
        ranks = list(value)
    elif kind == "fraction":
        ranks = [min(width, max(1, round(value * width / 8) * 8 or round(value * width))) for width in widths]
    else:
        ranks = [value] * len(choices)
    for rank, width, choice in zip(ranks, widths, choices, strict=True):
        if rank > width:
            raise ValueError(
                f"rank={rank} of layer {choice.plan.index} is larger than the hidden size {width}; rank {width} is already exact"
            )
    return ranks


def make_component(choice: LayerChoice, config: NPTConfig, rank: int) -> NPComponent:
    """An NP component of zeros, fp32, on the device where the layer computes."""
    weight = next(choice.layer.parameters())
    if weight.is_meta:
        raise ValueError(f"layer {choice.plan.index} has no weights yet (device 'meta'); load them before converting")
    return NPComponent(
        choice.hidden_size,
        choice.targets,
        rank=rank,
        rule=config.rule,
        num_ranks=config.num_ranks,
        scale=config.modulation_scale,
        dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        device=compute_device(choice.layer),
    )


def install(model: nn.Module, config: NPTConfig, choices: list[LayerChoice], components: list[NPComponent]) -> None:
    """Freeze the base and put the components in place. The step of ``apply_npt`` and ``load_npt`` that changes the model."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for choice, component in zip(choices, components, strict=True):
        convert_layer(choice.layer, choice.plan, component)
    setattr(model, _STATE, NPTState(config, trainable))


def apply_npt(
    model: nn.Module, config: NPTConfig | None = None, calibration: Tensor | None = None, *, progress: bool = False
) -> ApplyReport:
    """Convert decoder layers of ``model`` into NPT layers: on this instance, in place, all or nothing.

    A converted layer returns ``h + MLP_Δ(norm(h); a)``: no attention residual, the attention output ``a`` acts through the
    per-token weight change alone. The base is frozen; only NP components train. :func:`remove_npt` undoes it.

    Args:
        model: A causal language model of ``transformers`` (or its decoder) with llama-like or gpt2-like layers.
        config: Which layers, rule, rank, targets, initialisation; default :class:`NPTConfig`.
        calibration: Token ids ``[n, seq]`` for the closed-form start, a few thousand tokens of text like the one the model
            will see. ``None``: a start without data (``init="small"`` or ``"published"``).
        progress: Show a progress bar while calibrating.

    Returns:
        :class:`ApplyReport`: the converted layers, what was skipped and why, parameter counts.

    Raises:
        TypeError, ValueError: The model is already converted or has no layer that fits, or a setting cannot work. The model
            is then unchanged.
    """
    config = config or NPTConfig()
    if not isinstance(config, NPTConfig):
        raise TypeError(f"config must be an NPTConfig, got {type(config).__name__}; use NPTConfig(**values)")
    if converted_layers(model):
        raise ValueError("the model is already converted; call remove_npt(model) first")
    choices, skipped, total = plan_layers(model, config)
    closed_form = config.init == "closed_form" or (
        config.init == "auto" and config.rule == "self_key" and calibration is not None
    )
    ranks = fixed_ranks(config, choices)
    for rank, choice in zip(ranks or (), choices, strict=False):
        if closed_form and rank * config.num_ranks > choice.hidden_size:
            raise ValueError(
                f"num_ranks={config.num_ranks} times rank={rank} of layer {choice.plan.index} is more than the hidden size "
                f"{choice.hidden_size}, all the directions the closed form has; use num_ranks=1 or a smaller rank"
            )
    notes: dict[str, Any] = {}
    if calibration is not None and not closed_form:
        notes = {"unused": f"the calibration was not used: a closed form needs rule='self_key' and init='auto' or 'closed_form' "
                           f"(here {config.rule!r}, {config.init!r})"}  # fmt: skip
    if closed_form:
        from ..conversion import closed_form_components

        if calibration is None:
            raise ValueError("init='closed_form' needs calibration=token ids [n, seq]; or use init='small'")
        components, notes = closed_form_components(model, config, choices, ranks, calibration, progress=progress)
    else:
        if ranks is None:
            raise ValueError(
                f"rank={config.rank!r} is allotted by the closed form: pass calibration=token ids, or a fixed rank"
            )
        components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
        generator = torch.Generator().manual_seed(config.seed)
        for component in components:
            initialise(component, config.init, generator)
    base_parameters = count_parameters(model)
    install(model, config, choices, components)
    return make_report(choices, components, skipped, total, base_parameters, notes)


def make_report(
    choices: list[LayerChoice],
    components: list[NPComponent],
    skipped: dict[int, str],
    num_layers: int,
    base_parameters: int,
    notes: dict[str, Any],
) -> ApplyReport:
    converted = tuple(
        LayerReport(
            choice.plan.index,
            choice.plan.shape.name,
            component.rule_name,
            component.rank,
            tuple(component.target_shapes),
            sum(parameter.numel() for parameter in component.parameters()),
        )
        for choice, component in zip(choices, components, strict=True)
    )
    return ApplyReport(converted, skipped, num_layers, base_parameters, notes)


def remove_npt(model: nn.Module) -> None:
    """Put the original modules back, bit for bit, and restore which parameters were trainable.

    Raises ``ValueError`` if the model is not converted, or is only a part of the one that ``apply_npt`` was given.
    """
    layers = converted_layers(model)
    if not layers:
        raise ValueError("the model has no NPT layers; nothing to remove")
    if is_sharded(model):
        raise ValueError(
            "the model is sharded with fully_shard, which cannot be undone; save_npt, and load a fresh model"
        )
    # The state sits on the module that was given to apply_npt: this one or a submodule.
    states: list[tuple[nn.Module, NPTState]] = [
        (m, m.__dict__[_STATE]) for m in model.modules() if _STATE in m.__dict__
    ]
    if not states:
        raise ValueError(
            f"this {type(model).__name__} is a part of the model that was converted; call remove_npt on the one that "
            "apply_npt or load_npt was given"
        )
    for layer in layers.values():
        restore_layer(layer)
    for module, state in states:
        trainable = set(state.trainable_before)
        for name, parameter in module.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
        delattr(module, _STATE)


@contextmanager
def npt_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model is the original one, exactly; afterwards it is as it was. May be nested.

    Raises ``ValueError`` if the model is not converted.
    """
    components = [layer.np_component for layer in converted_layers(model).values()]
    if not components:
        raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
    before = [component.enabled for component in components]
    for component in components:
        component.enabled = False
    try:
        yield model
    finally:
        for component, enabled in zip(components, before, strict=True):
            component.enabled = enabled


def npt_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, layer by layer. Raises ``ValueError`` if the model is not converted."""
    layers = converted_layers(model)
    if not layers:
        raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
    return [parameter for layer in layers.values() for parameter in layer.np_component.parameters()]


def npt_config(model: nn.Module) -> NPTConfig:
    """The configuration a converted model was made with. Raises ``ValueError`` if the model is not converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        state = getattr(module, _STATE, None)
        if state is not None:
            return state.config
    raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
