"""Advice after an out-of-memory error: settings that need less."""

from __future__ import annotations

import torch

from .. import conversion, evaluation
from ..configs.schema import RunConfig
from ..estimate.advice import advise
from ..training import loop, objectives

__all__ = ["failed_phases", "memory_advice"]

#: Module that an error came through → phases that the plan counts for what runs there; the first in the list counts.
_PHASES = (
    (evaluation, ("evaluation", "generation")),
    (conversion, ("conversion",)),
    (objectives, ("local", "end_to_end")),
    (loop, ("local", "end_to_end")),
)


def failed_phases(error: BaseException) -> tuple[str, ...]:
    """Phases of the plan that an error may have happened in, by its traceback; empty if that does not tell."""
    passed = []
    traceback = error.__traceback__
    while traceback is not None:
        passed.append(f"{traceback.tb_frame.f_globals.get('__name__', '')}.")
        traceback = traceback.tb_next
    for module, phases in _PHASES:
        if any(name.startswith(f"{module.__name__}.") for name in passed):
            return phases
    return ()


def memory_advice(config: RunConfig, error: BaseException) -> str:
    """What ran out, and what would need less: by the planner's count, or by rules of thumb where it does not know the model."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    where = "the GPU" if on_gpu else "the host"
    first = (str(error) or type(error).__name__).splitlines()[0]
    try:
        found = advise(config, torch.device("cuda" if on_gpu else "cpu"), failed_phases(error))
    except ValueError:  # a model whose config.json is nowhere
        found = []
    if found:
        lines = "; or ".join(f"{entry.line} ({entry.cost})" for entry in found)
        return f"out of memory on {where} ({first}). By the plan's count these would fit: {lines}"
    return f"out of memory on {where} ({first}). Try: " + "; ".join(_rules_of_thumb(config))


def _rules_of_thumb(config: RunConfig) -> list[str]:
    """Keys of this configuration that would need less, most effective first."""
    t, o = config.training, config.optimization
    advice = []
    if t.batch_size > 1:
        half = t.batch_size // 2
        advice.append(
            f"training.batch_size={half} with gradient_accumulation_steps={t.gradient_accumulation_steps * t.batch_size // half} "
            f"(same step, now {t.batch_size} × {t.gradient_accumulation_steps})"
        )
    if t.mode in ("end_to_end", "local+polish") and not o.gradient_checkpointing:
        advice.append("optimization.gradient_checkpointing=true")
    if t.mode in ("end_to_end", "local+polish"):
        advice.append("training.mode=local (activations of one layer at a time)")
    if config.data.max_length > 128:
        advice.append(f"data.max_length={config.data.max_length // 2}")
    if config.model.dtype not in ("bfloat16", "float16"):
        advice.append("model.dtype=bfloat16")
    return advice
