"""Layer by layer: how much of the original layer's work the converted one does, and how large the weight change is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import get_activation
from ..functional import npt_factored_linear
from ..masked_ids import plain_ids
from ..model.forward import evaluating
from ..model.linears import linear_bias, linear_weight
from ..model.visits import walk_layers

__all__ = ["LayerFidelity", "NormStatistics", "changed_linear", "delta_norms", "layer_fidelity"]

#: Tokens whose explicit vectors exist at a time: the diagonal rule has r vectors of width f each.
_VECTOR_TOKENS = 16


@dataclass(frozen=True)
class NormStatistics:
    """‖ΔW_t‖_F over ``tokens`` tokens: mean, median, 95th percentile and maximum; ÷ ‖W‖_F of the frozen weight in ``relative``.

    Percentiles are the values of tokens (nearest rank), not interpolated.
    """

    tokens: int
    mean: float
    p50: float
    p95: float
    max: float
    relative: dict[str, float]

    @classmethod
    def of(cls, norms: Tensor, weight_norm: float) -> NormStatistics:
        """From the norms of tokens ``[T]``."""
        ordered = norms.double().sort().values
        last = len(ordered) - 1
        values = {
            "mean": float(ordered.mean()),
            "p50": float(ordered[last // 2]),
            "p95": float(ordered[-(-last * 95 // 100)]),
            "max": float(ordered[last]),
        }
        relative = {name: value / max(weight_norm, 1e-30) for name, value in values.items()}
        return cls(len(ordered), relative=relative, **values)


@dataclass(frozen=True)
class LayerFidelity:
    """One converted layer, on the original's input.

    Attributes:
        index, rank: Layer index and r.
        explained_variance: ``1 − Σ|ŷ − y|² / Σ|δ − mean δ|²`` with ``δ = y − h`` what the original layer adds to the stream
            (``training/losses.py``): 1 is exact, 0 is what the best constant reaches, negative is worse than that.
        variance: Mean over tokens and features of ``(δ − mean δ)²``.
        delta_norm: Target → mean over tokens of ‖ΔW_t‖_F, the norm match included (:func:`delta_norms`).
        weight_norm: Target → ‖W‖_F of the frozen weight.
        delta_statistics: Target → how ‖ΔW_t‖_F is distributed over tokens.
    """

    index: int
    rank: int
    explained_variance: float
    variance: float
    delta_norm: dict[str, float]
    weight_norm: dict[str, float]
    delta_statistics: dict[str, NormStatistics] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerFidelity:
        """Of :meth:`to_dict`."""
        statistics = {target: NormStatistics(**found) for target, found in values.get("delta_statistics", {}).items()}
        return cls(**{**values, "delta_statistics": statistics})


class _Sums:
    """Running sums over tokens in float64: the variance of a stream without keeping the stream."""

    def __init__(self) -> None:
        self.tokens, self.error, self.square = 0, 0.0, 0.0
        self.total: Tensor | float = 0.0

    def add(self, student: Tensor, teacher: Tensor, h: Tensor) -> None:
        delta = (teacher - h).flatten(0, -2).double()
        self.tokens += len(delta)
        self.error += float((student.double() - teacher.double()).square().sum())
        self.square += float(delta.square().sum())
        self.total = self.total + delta.sum(0)

    def spread(self) -> float:
        """Σ|δ − mean δ|²."""
        assert isinstance(self.total, Tensor)
        return max(self.square - float(self.total.square().sum()) / self.tokens, torch.finfo(torch.float64).tiny)

    @property
    def width(self) -> int:
        assert isinstance(self.total, Tensor)
        return len(self.total)


@torch.no_grad()
def layer_fidelity(
    model: nn.Module,
    tokens: Tensor,
    *,
    max_tokens: int = 1024,
    norm_tokens: int = 256,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] | None = None,
) -> list[LayerFidelity]:
    """Explained variance and ‖ΔW‖_F of every converted layer, on the original's inputs, in layer order.

    Args:
        model: A converted model.
        tokens: Token ids ``[n, seq]``; the first ``max_tokens`` are used (whole sequences, one at least).
        max_tokens: Tokens for the explained variance.
        norm_tokens: Tokens for ‖ΔW‖_F, spread evenly over those (its mean settles fast, its vectors are large).
        batch_tokens: Tokens per forward.
        advance: Called with the number of tokens done, for a progress bar.
    """
    device = next(model.parameters()).device
    sequences = plain_ids(tokens)[: max(1, max_tokens // tokens.shape[1])]
    every = max(1, sequences.numel() // max(1, norm_tokens))
    ranks: dict[int, int] = {}
    sums: dict[int, _Sums] = {}
    norms: dict[int, dict[str, list[Tensor]]] = {}
    weights: dict[int, dict[str, float]] = {}
    done = 0

    def visit(layer: Any, h: Tensor, a: Tensor, y: Tensor) -> None:
        index = layer.npt_plan.index
        ranks[index] = layer.np_component.rank
        sums.setdefault(index, _Sums()).add(layer.npt_student(h, a), y, h)
        flat_h, flat_a = h.flatten(0, -2), a.flatten(0, -2)
        chosen = slice(-done % every, None, every)
        if len(flat_h[chosen]):
            for target, found in delta_norms(layer, flat_h[chosen], flat_a[chosen]).items():
                norms.setdefault(index, {}).setdefault(target, []).append(found.cpu())
        if index not in weights:
            # Here, because the weights of a sharded layer are whole only while it is visited.
            weights[index] = {t: float(_weight(layer, t).float().norm()) for t in norms[index]}

    with evaluating(model):
        for batch in sequences.split(max(1, batch_tokens // tokens.shape[1])):
            walk_layers(model, batch.to(device), visit)
            done += batch.numel()
            if advance is not None:
                advance(batch.numel())
    return [_summary(index, ranks[index], entry, norms[index], weights[index]) for index, entry in sorted(sums.items())]


def _summary(
    index: int, rank: int, entry: _Sums, norms: dict[str, list[Tensor]], weights: dict[str, float]
) -> LayerFidelity:
    statistics = {target: NormStatistics.of(torch.cat(found), weights[target]) for target, found in norms.items()}
    return LayerFidelity(
        index=index,
        rank=rank,
        explained_variance=1.0 - entry.error / entry.spread(),
        variance=entry.spread() / (entry.tokens * entry.width),
        delta_norm={target: found.mean for target, found in statistics.items()},
        weight_norm=weights,
        delta_statistics=statistics,
    )


def _weight(layer: Any, target: str) -> Tensor:
    return linear_weight(layer.npt_plan.shape.linear(layer, target))


@torch.no_grad()
def delta_norms(layer: Any, h: Tensor, a: Tensor) -> dict[str, Tensor]:
    """Target → ``‖ΔW_t‖_F`` per token, ``[T]``, for a converted layer with input ``h [T, d]`` and attention output ``a [T, d]``.

    The change counts from the frozen weight acting on the unmatched input ``u = norm(h)``. A norm-matched layer feeds
    ``u' = norm(h)·ρ(h)/ρ_T`` instead, which is the further rank-1 change ``W(u' − u) ⊗ u/‖u‖²``; it is part of ΔW here (gate
    and up; the down projection has none). With ``ΔW_t = Σ_n v_b ⊗ v_a``: ``‖ΔW_t‖² = Σ_nm ⟨v_a n, v_a m⟩⟨v_b n, v_b m⟩``.
    """
    plan, component = layer.npt_plan, layer.np_component
    shape = plan.shape
    matched, key_scale = layer.npt_mlp_input(h, a)
    plain = shape.norm(layer)(h) if plan.norm_match else matched
    z = component(a)
    z_matched = z if key_scale is None else z * key_scale.unsqueeze(-1)
    adapter = component.tensors(z.dtype)
    outputs: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def measure(target: str, u: Tensor, u_plain: Tensor, z_target: Tensor) -> None:
        key, value = adapter.w_a_up.get(target), adapter.w_b_up[target]
        # A self key is the layer's true input, so that both parts of the change share it.
        u_key = u_plain if component.rule.key == "none" else u
        parts = []
        for rows in torch.arange(len(u)).split(_VECTOR_TOKENS):
            v_a, v_b = component.rule.vectors(
                z_target[rows], u_key[rows], key, value, component.num_ranks, component.scale
            )
            if u is not u_plain:
                change = nn.functional.linear(u[rows] - u_plain[rows], _weight(layer, target))
                own = u_plain[rows] / u_plain[rows].square().sum(-1, keepdim=True)
                v_a, v_b = torch.cat([v_a, own.unsqueeze(1)], 1), torch.cat([v_b, change.unsqueeze(1)], 1)
            v_a, v_b = v_a.float(), v_b.float()
            gram = (v_a @ v_a.transpose(1, 2)) * (v_b @ v_b.transpose(1, 2))
            parts.append(gram.sum((1, 2)).clamp_min(0).sqrt())
        norms[target] = torch.cat(parts)

    for target, place in shape.targets.items():
        if place.slot == "down":
            continue
        if target in component.target_shapes:
            measure(target, matched, plain, z_matched)
        linear = shape.linear(layer, target)
        if "down" in (shape.targets[t].slot for t in component.target_shapes):
            outputs[place.slot] = changed_linear(component, adapter, target, matched, z_matched, linear)
    for target, place in shape.targets.items():
        if place.slot == "down" and target in component.target_shapes:
            activation = get_activation(plan.act).forward
            inter = activation(outputs["gate"]) * outputs["up"] if "gate" in outputs else activation(outputs["up"])
            measure(target, inter, inter, z)
    return norms


def changed_linear(component: Any, adapter: Any, target: str, u: Tensor, z: Tensor, linear: nn.Module) -> Tensor:
    """``u (W + ΔW)ᵀ + bias``, ``ΔW = 0`` for a linear that is no target."""
    weight, bias = linear_weight(linear), linear_bias(linear)
    if target not in component.target_shapes:
        return nn.functional.linear(u, weight, bias)
    return npt_factored_linear(
        u, z, weight, adapter.w_a_up.get(target), adapter.w_b_up[target], bias,
        rule=component.rule_name, num_ranks=component.num_ranks, scale=component.scale,
    )  # fmt: skip
