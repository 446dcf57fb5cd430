"""A calibration from tokens to components: moments, bases, ranks, the closed form, the refit.

The Fisher's forward is the covariance's: one pass. The refit walks the original's stream once more, 3.5 of the 37 TFLOP of the
demo's conversion, because h and a of 16,384 tokens at 30 layers, kept from the first pass, would take 2.1 GiB, the most of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..component import NPComponent
from ..config import NPTConfig, parse_rank
from ..model.forward import evaluating
from ..model.install import make_component
from ..model.select import LayerChoice, find_layers
from ..progress import Progress, progress_bar
from .attention_moments import FISHER_TOKENS, Moments, check_tokens, collect_moments
from .bases import Basis, Metric, make_basis, make_metric
from .closed_form import fill_closed_form
from .ranks import allot_ranks
from .refit import refit_sequentially

__all__ = ["closed_form_components", "conversion_seconds"]

#: Tokens of the sequential refit: four full streams of them are held at once (4 × tokens × d numbers).
_REFIT_TOKENS = 16384
#: The refit's two streams and sums, in the time of the first pass without a Fisher.
_REFIT_COST = 2.3


def conversion_seconds(config: NPTConfig, tokens: int, plain: float, fisher: float) -> float:
    """Time of the closed form on ``tokens``, if one takes ``plain`` seconds in the first pass and ``fisher`` with a backward."""
    backward = min(tokens, FISHER_TOKENS) if config.basis == "fisher" else 0
    refit = min(tokens, _REFIT_TOKENS) if config.refit else 0
    return plain * (tokens + _REFIT_COST * refit) + max(fisher - plain, 0.0) * backward


def closed_form_components(
    model: nn.Module,
    config: NPTConfig,
    choices: list[LayerChoice],
    ranks: list[int] | None,
    calibration: Tensor,
    *,
    progress: Progress = False,
) -> tuple[list[NPComponent], dict[str, Any]]:
    """Components of the chosen layers, fitted on ``calibration [n, seq]``; the model is read, not changed.

    ``ranks=None`` allots them (``rank="auto:MEAN"``). Returns the components and notes for the report.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    tokens = check_tokens(calibration, vocab_size)
    attention = [choice.plan.shape.attention_module(choice.layer) for choice in choices]
    with progress_bar("calibrating", tokens.numel(), "tokens", enabled=progress) as advance:
        moments = collect_moments(
            model, attention, tokens, fisher=config.basis == "fisher", seed=config.seed, advance=advance
        )
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    metrics, covariances, bases = _fit_bases(config.basis, moments, dtype)
    worths, unit = [basis.worth for basis in bases], metrics[0].unit
    if ranks is None:
        _, mean = parse_rank(config.rank)
        ranks = allot_ranks(worths, mean)
    components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
    for component, choice in zip(components, choices, strict=True):
        fill_closed_form(component, choice, bases.pop(0))
    refitted = False
    if config.refit:
        _, layers = find_layers(model)
        sample = tokens[: max(1, _REFIT_TOKENS // tokens.shape[1])]
        bar = progress_bar("refitting on the converted stream", len(layers), "layers", enabled=progress)
        with evaluating(model), bar as advance:
            refitted = refit_sequentially(
                model, layers, choices, components, metrics, covariances, sample, advance=advance
            )
    dropped = [float(worth[c.total_rank :].sum()) for worth, c in zip(worths, components, strict=True)]
    notes: dict[str, Any] = {
        "tokens": tokens.numel(),
        "basis": config.basis,
        "refit": refitted,
        "dropped_worth": dropped,
        "worth_unit": unit,
    }
    if config.refit and not refitted:
        notes["unused"] = "refit=True was not used: the model works on the hidden states between its layers"
    return components, notes


def _fit_bases(name: str, moments: list[Moments], dtype: torch.dtype) -> tuple[list[Metric], list[Tensor], list[Basis]]:
    """Metrics, covariances and bases of the layers, in host memory; ``moments`` is used up.

    Found in float64 and kept in ``dtype``, five of d × d: 11 GiB for an 8B model in float32. A GPU needs one layer's at a time.
    """
    metrics, covariances, bases = [], [], []
    while moments:
        entry = moments.pop(0)
        metric, covariance = make_metric(name, entry), entry.covariance / entry.tokens
        del entry
        basis = make_basis(metric, covariance)
        metrics.append(metric.to("cpu", dtype))
        covariances.append(covariance.to("cpu", dtype))
        encoder, decoder = (matrix.to("cpu", dtype) for matrix in (basis.encoder, basis.decoder))
        bases.append(Basis(encoder, decoder, basis.worth.cpu()))
    return metrics, covariances, bases
