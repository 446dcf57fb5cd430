"""NP components put on the layers of a model instance, found again, switched off or scaled for a while, taken off bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..component import NPComponent, switched
from ..config import NPTConfig, resolve_layers
from ..messages import shown
from .layer import NPTLayer, convert_layer, restore_layer
from .select import LayerChoice, find_layers
from .sharding import is_sharded
from .weight_location import compute_device

__all__ = [
    "converted_layers",
    "install",
    "make_component",
    "npt_config",
    "npt_disabled",
    "npt_parameters",
    "npt_scale",
    "remove_npt",
    "require_converted",
]

#: Attribute of the module that was converted.
_STATE = "_npt_state"


@dataclass
class NPTState:
    """What a converted model remembers: its configuration and which base parameters were trainable before."""

    config: NPTConfig
    trainable_before: list[str] = field(default_factory=list)


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
    done: list[nn.Module] = []
    try:
        model.requires_grad_(False)
        for choice, component in zip(choices, components, strict=True):
            convert_layer(choice.layer, choice.plan, component)
            done.append(choice.layer)
        setattr(model, _STATE, NPTState(config, trainable))
    except BaseException:
        for layer in done:
            restore_layer(layer)
        _make_trainable(model, trainable)
        raise


def converted_layers(model: nn.Module) -> dict[int, Any]:
    """Index → converted layer, in order; empty for a model without NPT."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {m.npt_plan.index: m for m in model.modules() if isinstance(m, NPTLayer)}


def require_converted(model: nn.Module) -> dict[int, Any]:
    """:func:`converted_layers`, or ``ValueError`` if there are none."""
    layers = converted_layers(model)
    if not layers:
        raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
    return layers


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
        _make_trainable(module, state.trainable_before)
        delattr(module, _STATE)


def _make_trainable(module: nn.Module, names: list[str]) -> None:
    wanted = set(names)
    for name, parameter in module.named_parameters():
        if name in wanted:
            parameter.requires_grad_(True)


@contextmanager
def npt_disabled(model: nn.Module, layers: str | Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model is the original one, exactly, for the thread or coroutine that entered it; all others
    go on with the converted model. Blocks may be nested and may end in any order.

    A thread that is started inside is another thread. A task of asyncio that is started inside, and a function that is given to
    ``asyncio.to_thread``, take the block along, as they take every context variable.

    Exactly: the bits of the original with its parameters frozen, as they are here. (For a product of a slice torch asks whether
    the weight trains, and rounds differently if so: the head in the first step of ``generate``, by 2e-7.)

    Args:
        model: A converted model.
        layers: The layers that are the original ones, as in ``NPTConfig.layers``; the others stay converted. Default: all.

    Raises:
        ValueError: The model is not converted, or a layer that is named is not.
    """
    with switched({component.switch: None for component in _chosen(model, layers)}):
        yield model


@contextmanager
def npt_scale(model: nn.Module, scale: float, layers: str | Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Inside the ``with`` block the weight changes have another strength: ``y = (W + scale·ΔW_t) x``.

    At 1 nothing changes, bit for bit. **0 is not the original model**: a converted layer has no attention residual, attention
    acts through ΔW_t alone, so a layer at 0 does not hear attention at all; it returns ``h + MLP(norm(h))``. (The original is
    :func:`npt_disabled`.) A model that was converted exactly computes at ``scale`` what the original would with every attention
    output multiplied by it: ``h + s·a + MLP(norm(h + s·a))``; where the norm is matched, it is to that sum. With
    ``NPTConfig(attention_residual=True)`` ΔW_t comes on top of the whole layer, and there 0 is the original.

    Whom it holds for, and how blocks nest, as :func:`npt_disabled`; of several scales of a layer the one entered last holds.
    Gradients are those of the scaled model. Saving saves the components as they are.

    Args:
        model: A converted model.
        scale: Any finite number; 1 is the model as it is, below 0 attention speaks against itself.
        layers: Which layers, as in ``NPTConfig.layers``: ``"all"``, ``"upper_half"``, indices, ``"16:20"``. Default: all that
            are converted.

    Raises:
        TypeError: ``scale`` is not a number.
        ValueError: It is not finite; the model is not converted, or a layer that is named is not.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale={shown(scale)} must be a number, such as 0.5")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    with switched({component.switch: float(scale) for component in _chosen(model, layers)}):
        yield model


def _chosen(model: nn.Module, layers: str | Sequence[int] | None) -> list[NPComponent]:
    """Components of the layers that a user named. A range such as ``"upper_half"`` means those in it that are converted."""
    converted = require_converted(model)
    if layers is None:
        return [layer.np_component for layer in converted.values()]
    if isinstance(layers, int):
        raise TypeError(f"layers={shown(layers)} must be a list of indices or a range such as '2:4'; use [{layers}]")
    wanted = resolve_layers(layers, len(find_layers(model)[1]))
    missing = [index for index in wanted if index not in converted]
    if missing and (len(missing) == len(wanted) or not isinstance(layers, str)):
        names = ", ".join(map(str, converted))
        raise ValueError(f"layers={shown(layers)}: layer {missing[0]} is not converted; converted are {names}")
    return [converted[index].np_component for index in wanted if index in converted]


def npt_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, layer by layer: those of the components, or of the extra changes beside them (``extra.py``),
    where there are any. Raises ``ValueError`` if the model is not converted."""
    layers = require_converted(model).values()
    extra = [layer._modules["np_extra"] for layer in layers if "np_extra" in layer._modules]
    components = extra or [layer.np_component for layer in layers]
    return [parameter for component in components for parameter in component.parameters()]


def npt_config(model: nn.Module) -> NPTConfig:
    """The configuration a converted model was made with. Raises ``ValueError`` if the model is not converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        state = getattr(module, _STATE, None)
        if state is not None:
            return state.config
    raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt first")
