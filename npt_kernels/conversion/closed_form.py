"""The closed form: NP components that make a converted layer return what the original returned, without training.

For a target fed by the norm, ``W norm(h + a) − W u = W(γ ⊙ a)/ρ_T`` (LayerNorm: of ``a − mean a``), linear in ``a``; the down
projection must add ``a`` itself. With ``z = a E`` and ``a ≈ z D``:

    w_down = E,   w_b_up[gate, up, c_fc] = D (I − 11ᵀ/d)? diag(γ) Wᵀ,   w_b_up[down, c_proj] = D

(the centring only for LayerNorm). Exact at r = d, where ``E D = I``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import NPComponent
from ..config import NPTConfig
from ..model.forward import evaluating
from ..model.linears import linear_weight
from .bases import Basis, Metric, make_basis, make_metric
from .moments import Moments, check_tokens, collect_moments
from .ranks import allot_ranks
from .refit import refit_sequentially

if TYPE_CHECKING:
    from ..model.patching import LayerChoice

__all__ = ["closed_form_components", "fill_closed_form"]

#: Tokens of the sequential refit: four full streams of them are held at once (4 × tokens × d numbers).
_REFIT_TOKENS = 16384


@torch.no_grad()
def fill_closed_form(component: NPComponent, choice: LayerChoice, basis: Basis) -> None:
    """Write the closed form into a ``self_key`` component. The first R directions of the basis are kept."""
    total, device = component.total_rank, component.w_down.device
    encoder, decoder = basis.encoder[:, :total].to(device), basis.decoder[:total].to(device)
    component.w_down.copy_(encoder)
    shape, layer = choice.plan.shape, choice.layer
    norm_weight = getattr(shape.norm(layer), "weight", None)
    for target, value in component.w_b_up.items():
        if shape.targets[target].slot == "down":
            value.copy_(decoder)
            continue
        rows = decoder - decoder.mean(1, keepdim=True) if choice.plan.norm_kind == "layer" else decoder
        if norm_weight is not None:
            rows = rows * norm_weight.to(rows)
        value.copy_(rows @ linear_weight(shape.linear(layer, target)).to(rows).t())


def closed_form_components(
    model: nn.Module,
    config: NPTConfig,
    choices: list[LayerChoice],
    ranks: list[int] | None,
    calibration: Tensor,
    *,
    progress: bool = False,
) -> tuple[list[NPComponent], dict[str, Any]]:
    """Components of the chosen layers, fitted on ``calibration [n, seq]``; the model is read, not changed.

    ``ranks=None`` allots them (``rank="auto:MEAN"``). Returns the components and notes for the report.
    """
    from ..model.patching import find_layers, make_component
    from ..progress import progress_bar

    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    tokens = check_tokens(calibration, vocab_size)
    attention = [choice.plan.shape.attention_module(choice.layer) for choice in choices]
    with progress_bar("calibrating", tokens.numel(), "tokens", enabled=progress) as advance:
        moments = collect_moments(
            model, attention, tokens, fisher=config.basis == "fisher", seed=config.seed, advance=advance
        )
    metrics, covariances, bases = _fit_bases(config.basis, moments)
    worths, unit = [basis.worth for basis in bases], metrics[0].unit
    if ranks is None:
        mean = int(str(config.rank).partition(":")[2])
        ranks = allot_ranks(worths, mean)
    components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
    for component, choice in zip(components, choices, strict=True):
        fill_closed_form(component, choice, bases.pop(0))
    if not config.refit:
        metrics.clear()
    if config.refit:
        _, layers = find_layers(model)
        sample = tokens[: max(1, _REFIT_TOKENS // tokens.shape[1])]
        bar = progress_bar("refitting on the converted stream", len(layers), "layers", enabled=progress)
        with evaluating(model), bar as advance:
            refit_sequentially(
                model, layers, choices, components, metrics, covariances, sample, fill_closed_form, advance=advance
            )
    dropped = [float(worth[c.total_rank :].sum()) for worth, c in zip(worths, components, strict=True)]
    notes = {
        "tokens": tokens.numel(),
        "basis": config.basis,
        "refit": config.refit,
        "dropped_worth": dropped,
        "worth_unit": unit,
    }
    return components, notes


def _fit_bases(name: str, moments: list[Moments]) -> tuple[list[Metric], list[Tensor], list[Basis]]:
    """Metrics, covariances and bases of the layers, in host memory; ``moments`` is used up.

    They are d × d in float64: 21 GiB for an 8B model, of which a GPU needs one layer's at a time.
    """
    metrics, covariances, bases = [], [], []
    while moments:
        entry = moments.pop(0)
        metric, covariance = make_metric(name, entry), entry.covariance / entry.tokens
        del entry
        basis = make_basis(metric, covariance)
        metrics.append(metric.to("cpu"))
        covariances.append(covariance.cpu())
        bases.append(Basis(basis.encoder.cpu(), basis.decoder.cpu(), basis.worth.cpu()))
    return metrics, covariances, bases
