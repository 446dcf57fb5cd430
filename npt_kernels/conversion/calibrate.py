"""A calibration from tokens to components: moments, bases, ranks, the closed form, the refit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..component import NPComponent
from ..config import NPTConfig, parse_rank
from ..model.forward import evaluating
from ..model.install import make_component
from ..model.select import LayerChoice, find_layers
from ..progress import progress_bar
from .attention_moments import FISHER_TOKENS, Moments, check_tokens, collect_moments
from .bases import Basis, Metric, make_basis, make_metric
from .closed_form import fill_closed_form
from .ranks import allot_ranks
from .refit import refit_sequentially

__all__ = ["closed_form_components", "conversion_forwards", "refit_tokens"]

#: Bytes of the refit's three streams of hidden states.
_REFIT_BYTES = 2**30
#: What the Fisher costs beside a forward of the decoder (head, backward, sums), and the refit's two streams: counted on SmolLM2,
#: whose conversion took 6:54 on two AVX2 cores in float32 (commit 89296b4), 6:40 by this count.
_FISHER_COST, _REFIT_COST = 3.8, 2.3


def refit_tokens(hidden_size: int) -> int:
    """Tokens that the refit uses at most."""
    return _REFIT_BYTES // (3 * 4 * hidden_size)


def conversion_forwards(config: NPTConfig, tokens: int, hidden_size: int) -> float:
    """Time of the closed form on ``tokens``, in that of the original's decoder on one token."""
    fisher = min(tokens, FISHER_TOKENS) if config.basis == "fisher" else 0
    refit = min(tokens, refit_tokens(hidden_size)) if config.refit else 0
    return tokens + _FISHER_COST * fisher + _REFIT_COST * refit


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
        _, mean = parse_rank(config.rank)
        ranks = allot_ranks(worths, mean)
    components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
    for component, choice in zip(components, choices, strict=True):
        fill_closed_form(component, choice, bases.pop(0))
    refitted = False
    if config.refit:
        _, layers = find_layers(model)
        sample = tokens[: max(1, refit_tokens(choices[0].hidden_size) // tokens.shape[1])]
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
