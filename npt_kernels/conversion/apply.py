"""``apply_npt``: convert chosen layers of a model in place, all or nothing, and say what was done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import NPTConfig
from ..model.apply_report import ApplyReport, make_report
from ..model.install import converted_layers, install, make_component
from ..model.linears import count_parameters
from ..model.probe import check_forwards
from ..model.select import fixed_ranks, plan_layers
from ..progress import Progress
from .calibrate import closed_form_components
from .random_start import initialise

__all__ = ["apply_npt"]


def apply_npt(
    model: nn.Module, config: NPTConfig | None = None, calibration: Tensor | None = None, *, progress: Progress = False
) -> ApplyReport:
    """Convert decoder layers of ``model`` into NPT layers: on this instance, in place, all or nothing.

    A converted layer returns ``h + MLP_Δ(norm(h); a)``: no attention residual, the attention output ``a`` acts through the
    per-token weight change alone. The base is frozen; only NP components train. :func:`remove_npt` undoes it.

    Args:
        model: A causal language model of ``transformers`` (or its decoder) with llama-like or gpt2-like layers.
        config: Which layers, rule, rank, targets, initialisation; default :class:`NPTConfig`.
        calibration: Token ids ``[n, seq]`` for the closed-form start, a few thousand tokens of text like the one the model
            will see. ``None``: a start without data (``init="small"`` or ``"published"``).
        progress: ``True``: show a progress bar while calibrating. A function: it gets a line of text every ten seconds.

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
    closed_form = config.uses_closed_form and (calibration is not None or config.init == "closed_form")
    ranks = fixed_ranks(config, choices)
    for rank, choice in zip(ranks or (), choices, strict=False):
        if closed_form and rank * config.num_ranks > choice.hidden_size:
            raise ValueError(
                f"num_ranks={config.num_ranks} times rank={rank} of layer {choice.plan.index} is more than the hidden size "
                f"{choice.hidden_size}, all the directions the closed form has; use num_ranks=1 or a smaller rank"
            )
    if closed_form and not config.matches_norm:
        # Tried on SmolLM2: perplexity ratio 55,405. The solution of the closed form is linear in a/ρ(h + a).
        raise ValueError(
            "norm_match=False has no closed form, which divides by the norm of h + a; leave norm_match as it is, or use "
            "init='small' and train"
        )
    choices = check_forwards(model, choices)
    notes: dict[str, Any] = {}
    if calibration is not None and not closed_form:
        notes = {"unused": f"the calibration was not used: a closed form needs rule='self_key' and init='auto' or 'closed_form' "
                           f"(here {config.rule!r}, {config.init!r})"}  # fmt: skip
    if closed_form:
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
