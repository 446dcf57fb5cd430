"""How many optimizer steps a run will do, as far as that is known without reading the text."""

from __future__ import annotations

import glob
from pathlib import Path

from ..configs.schema import RunConfig

__all__ = ["count_steps"]

#: Tokens of the demo text's training part under SmolLM2's tokenizer, and characters per token of English for other texts.
_DEMO_TRAIN_TOKENS, _CHARACTERS_PER_TOKEN = 168_700, 4.3


def count_steps(config: RunConfig, processes: int = 1) -> tuple[int | None, str]:
    """``(optimizer steps, how they are known)``; ``None`` where only reading the text would tell."""
    training, data = config.training, config.data
    if training.mode == "none":
        return 0, "training.mode is none: conversion only"
    sequences, origin = data.num_train_samples, "data.num_train_samples"
    known = _training_tokens(config)
    if known is not None and (sequences is None or known[0] // data.max_length < sequences):
        sequences, origin = known[0] // data.max_length, known[1]
    polish = training.polish_steps if training.mode == "local+polish" else 0
    after = f", then {polish} of polish" if polish else ""
    if sequences is None:
        if training.max_steps is None:
            return None, f"{training.num_epochs} × the dataset, whose length is known once it is read{after}"
        return training.max_steps + polish, f"training.max_steps at most{after}"
    per_step = training.batch_size * training.gradient_accumulation_steps * processes
    steps = training.num_epochs * max(1, -(-sequences // per_step))
    if training.max_steps is not None and training.max_steps <= steps:
        return training.max_steps + polish, f"training.max_steps{after}"
    return steps + polish, f"{training.num_epochs} × {sequences:,} sequences ({origin}){after}"


def _training_tokens(config: RunConfig) -> tuple[int, str] | None:
    """Tokens of the training text without reading it, and how they are known."""
    data = config.data
    if data.train_files:
        names = [
            name for pattern in data.train_files for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)
        ]
        share = 1.0 if data.eval_files else 1 - data.eval_fraction
        size = sum(Path(name).stat().st_size for name in names if Path(name).is_file())
        return round(size * share / _CHARACTERS_PER_TOKEN), "estimated from the size of the files"
    if data.dataset_name == "demo":
        return _DEMO_TRAIN_TOKENS, "about; length of the demo text"
    return None
