"""Floating-point operations of a training step that the mode cannot do without; recomputation counts nothing (model FLOPs)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.base import linear_shape
from ..models.patching import converted_layers, find_layers

__all__ = ["step_flops"]


def step_flops(model: nn.Module, plain: nn.Module, objective: str, batch: int, sequence: int) -> int:
    """Of one optimizer step: products only, multiply–adds as two, attention scores causal.

    Args:
        model: The converted model; what it has quantised does not matter.
        plain: The same model unconverted, on any device, ``meta`` too: its weights' shapes are what is counted.
        objective: ``local``: the original up to the last converted layer, and per converted layer its MLP forward, the
            gradient of its activated intermediate, and the low-rank products with theirs. ``layer``: the converted model in
            whole instead, with gradients for the inputs of everything above the first converted layer. ``kl``: the original
            in whole too, and three products with the output head (two forward, one backward).
    """
    _, layers = find_layers(plain)
    converted = converted_layers(model)
    first, last = min(converted), max(converted)
    head = plain.get_output_embeddings() if objective == "kl" else None  # type: ignore[operator]
    total = 0 if head is None else 3 * 2 * head.weight.numel()
    for index, layer in enumerate(layers):
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        # Scores and their product with the values, 2·seq·d each per token, half of it masked.
        forward = 2 * weights + 2 * sequence * _hidden(layer)
        if index <= last or objective == "kl":
            total += forward
        if objective == "local" and index not in converted:
            continue
        low = intermediate = mlp = 0
        if index in converted:
            low = 2 * sum(p.numel() for p in converted[index].np_component.parameters())
            shape = converted[index].npt_plan.shape
            mlp = 2 * sum(i * o for i, o in (linear_shape(shape.linear(layer, target)) for target in shape.targets))
            intermediate = mlp // len(shape.targets)
            total += 3 * low
        if objective == "local":
            total += mlp + intermediate
            continue
        if index <= last or objective == "kl":
            total += forward
        if index == first:
            total += intermediate  # nothing below it learns
        elif first < index and (index <= last or objective == "kl"):
            total += forward + 2 * sequence * _hidden(layer)  # of the scores both factors get a gradient
    return int(total * batch * sequence)


def _hidden(layer: Any) -> int:
    return int(next(p.shape[-1] for p in layer.parameters() if p.dim() == 1))
