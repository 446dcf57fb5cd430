"""Which layers of a model a configuration converts, found by their structure, and what is known of each before it changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..activations import identify_activation
from ..config import NPTConfig, parse_rank, resolve_layers
from ..rules import get_rule
from .layer import LayerPlan, is_converted
from .linears import linear_bias, linear_shape, linear_weight, whole
from .mlp import has_hooks, plain_forward
from .norms import identify_norm
from .shapes import LAYER_SHAPES
from .shapes.base import LayerShape
from .sharding import is_sharded
from .swap import own_forward

__all__ = ["LayerChoice", "find_layers", "fixed_ranks", "plan_layers"]


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
    places: dict[int, int] = {}
    for index, layer in enumerate(layers):
        first = places.setdefault(id(layer), index)
        if first != index:
            raise ValueError(
                f"layers {first} and {index} are one module, so they could not have components of their own; give each a copy "
                "(copy.deepcopy), or convert another model"
            )
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
    mlp = shape.mlp(layer)
    if "forward" in mlp.__dict__ and not hasattr(mlp, "_hf_hook") and not own_forward(mlp):
        return "another library has replaced mlp.forward on this instance; convert before that one patches"
    for target, place in shape.targets.items():
        problem = _reads_otherwise(shape.linear(layer, target), weights)
        if problem is not None:
            return f"mlp.{place.attribute} {problem}"
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
    # A parallel layer's MLP reads no a, and without a norm there is nothing to match: both are exact as they are.
    norm_match = config.matches_norm and not shape.parallel and norm_kind != "none"
    known_before = get_rule(config.rule).key == "none" and any(shape.targets[t].slot == "down" for t in targets)
    if config.fold and norm_match and not known_before:
        raise ValueError(
            f"fold=True matches the norm to the change of the down projection's output, and targets={list(config.targets)} "
            "leave that one alone; add it, or use fold=False"
        )
    # The attention residual needs a itself.
    fold = config.fold is not False and not config.attention_residual and (known_before or not norm_match)
    plan = LayerPlan(
        index, shape, act, norm_kind, norm_match, config.attention_residual, fold,
        shape.output_projection(layer, hidden_size) if fold else None,
    )  # fmt: skip
    return LayerChoice(layer, plan, targets, hidden_size)


def _reads_otherwise(linear: nn.Module, weights: bool) -> str | None:
    """Why ``x Wᵀ + b`` with the weight that is read is not what the module computes, or ``None``. The closed form reads it."""
    if not plain_forward(linear):
        kind = type(whole(linear))
        return (
            f"({kind.__module__}.{kind.__name__}) has a forward of its own, so its weight does not say what it "
            "computes; convert first (it may be wrapped afterwards), or merge it into a plain Linear"
        )
    if not weights or not has_hooks(whole(linear)) or any(p.is_meta for p in linear.parameters()):
        return None
    weight, bias = linear_weight(linear), linear_bias(linear)
    probe = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).reshape(3, -1)
    with torch.no_grad():
        wanted, got = nn.functional.linear(probe, weight, bias), linear(probe)
    if not isinstance(got, torch.Tensor) or not torch.allclose(got.float(), wanted.float(), rtol=0.05, atol=1e-3):
        return (
            "has a hook that changes its output, which the conversion cannot see; convert first, then register the hook"
        )
    return None


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
