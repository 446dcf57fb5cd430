"""Peaks of live tensors on a random model of given numbers: what the byte count is checked against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.loading import resolve_dtype
from ..base_model.mixed_precision import choose_mixed_precision
from ..configs.schema import RunConfig
from ..conversion.apply import apply_npt
from ..conversion.quantise import quantise_base
from ..estimate.storage import quantization_of
from ..evaluation.perplexity import evaluate, evaluate_base
from ..model.install import npt_parameters
from ..offload import streaming
from ..ops.dense_on_use import release_scratch
from ..training.kept_casts import KeptCasts, kept_casts
from ..training.loop import make_objective, make_optimizer
from ..training.objectives import Objective, delta_variances, enable_checkpointing
from .live_bytes import LiveBytes

__all__ = ["build_model", "measure_phases", "quantise", "training_steps"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(numbers: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A causal model with random weights, made on the device in its dtype, in evaluation mode. ``numbers``: a config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in numbers.items() if key != "model_type"}
    config = AutoConfig.for_model(numbers["model_type"], **values)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def quantise(model: nn.Module, config: RunConfig) -> None:
    """Store the frozen linears as ``optimization.quantization`` says; nothing for ``none``. Scratch buffers start empty."""
    if quantization_of(config) == "none":
        return
    release_scratch()
    quantise_base(model, quantization_of(config), config.optimization.quantization_library)


def _ids(config: RunConfig, model: nn.Module, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(vocabulary, (max(1, rows), config.data.max_length), generator=generator)
    return ids.to(next(model.parameters()).device)


def measure_phases(
    numbers: dict[str, Any], config: RunConfig, device: torch.device | str = "cpu", *, steps: int = 2
) -> tuple[dict[str, int], LiveBytes]:
    """Phase (as :func:`npt_kernels.estimate.byte_count.count_bytes` calls them) → peak of live tensors, of one run.

    The model is random, of the numbers of a ``config.json``; conversion, evaluation and ``steps`` optimizer steps are the
    package's own. The second result can say what was alive at the highest peak.
    """
    device = torch.device(device)
    model = build_model(numbers, resolve_dtype(config, device), device)
    quantise(model, config)
    length = config.data.max_length
    calibration = _ids(config, model, config.data.calibration_tokens // length)
    npt = config.npt_config()
    closed_form = npt.uses_closed_form
    heldout = _ids(config, model, config.evaluation.tokens // length)
    with LiveBytes(include=model, trace=True) as live, streaming(config, model, device):
        precision = _precision(config, device, kept_casts(model, config))
        with live.phase("conversion" if closed_form else "other"), precision:
            apply_npt(model, npt, calibration if closed_form else None)
        with live.phase("evaluation"):
            teacher = evaluate_base(model, heldout)[1]
            evaluate(model, heldout, teacher=teacher)
            del teacher
        mode = config.training.mode
        for name in ("local", "end_to_end"):
            if name not in mode and not (name == "end_to_end" and mode == "local+polish"):
                continue
            kind = "local" if name == "local" else "kl" if mode == "local+polish" else config.training.objective
            with training_steps(model, config, kind) as step, live.phase(name):
                for _ in range(steps):
                    step()
    return {name: size for name, size in live.peaks.items() if name != "other"}, live


@contextmanager
def _precision(config: RunConfig, device: torch.device, kept: KeptCasts | None) -> Iterator[None]:
    """The autocast of ``npt train``."""
    dtype = _AUTOCAST.get(choose_mixed_precision(config, device))
    with torch.autocast(device.type, dtype) if dtype else nullcontext(), kept or nullcontext():
        yield


@contextmanager
def training_steps(model: nn.Module, config: RunConfig, kind: str) -> Iterator[Any]:
    """Inside the block a function that runs one optimizer step of objective ``kind`` on random tokens and returns the tokens.

    Objective, optimizer, clipping and autocast are those of ``npt train``.
    """
    training, optimization = config.training, config.optimization
    groups = [_ids(config, model, training.batch_size) for _ in range(training.gradient_accumulation_steps)]
    variances = delta_variances(model, groups[0][:1]) if kind in ("local", "layer") else {}
    objective: Objective = make_objective(kind, model, config, variances)
    optimizer = make_optimizer(model, config, training.learning_rate)
    parameters = npt_parameters(model)
    share = 1 / len(groups)
    kept = kept_casts(model, config)

    def step() -> int:
        with _precision(config, groups[0].device, kept):
            objective.accumulate_group(groups, [share] * len(groups), lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(ids.numel() for ids in groups)

    enable_checkpointing(model, optimization.gradient_checkpointing and kind != "local")
    try:
        yield step
    finally:
        enable_checkpointing(model, False)
        model.eval()
