"""What a conversion did, as ``apply_npt`` and ``load_npt`` return it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..component import NPComponent
from .select import LayerChoice

__all__ = ["ApplyReport", "LayerReport", "make_report"]


@dataclass(frozen=True)
class LayerReport:
    """One converted layer."""

    index: int
    shape: str
    rule: str
    rank: int
    targets: tuple[str, ...]
    parameters: int
    fold: bool = False
    """The norm is matched to the change of the MLP's output (``NPTConfig.fold``)."""
    output_projection: str | None = None
    """The product of the attention that is left out"""


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
        left_out = [layer for layer in self.converted if layer.output_projection is not None]
        if left_out:
            count = (
                "" if len(left_out) == len(self.converted) else f" in {len(left_out)} of {len(self.converted)} layers"
            )
            lines.append(f"  {left_out[0].output_projection} of the attention is not computed{count} (fold)")
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
            choice.plan.fold,
            choice.plan.projection,
        )
        for choice, component in zip(choices, components, strict=True)
    )
    return ApplyReport(converted, skipped, num_layers, base_parameters, notes)
