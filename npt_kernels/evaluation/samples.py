"""Greedy continuations of prompts by the original and the converted model, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.forward import evaluating
from ..model.install import npt_disabled
from ..model.sharding import is_sharded

__all__ = ["Sample", "generate", "generate_samples"]


@dataclass(frozen=True)
class Sample:
    """A prompt and its greedy continuations (without the prompt)."""

    prompt: str
    base: str
    npt: str


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of ``prompts`` by ``model`` as it is, one by one (no padding), without the prompt."""
    device = next(model.parameters()).device
    end = getattr(tokenizer, "eos_token_id", None)
    texts = []
    with evaluating(model):
        for prompt in prompts:
            ids = torch.as_tensor([tokenizer(prompt)["input_ids"]], device=device)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Chat models ship sampling settings, which a greedy call would warn about once per prompt.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=end if end is not None else 0,
                # Sharded layers need every process in every forward, also should one of them end its text earlier.
                synced_gpus=is_sharded(model),
            )
            texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def generate_samples(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, *, base: Sequence[str] | None = None
) -> list[Sample]:
    """Greedy continuations by the original (``npt_disabled``) and the converted model.

    Args:
        model: A converted causal language model with ``generate``.
        tokenizer: Its tokenizer (called on a string; ``decode``).
        prompts: The prompts.
        max_new_tokens: Tokens at most per continuation.
        base: The original's continuations from an earlier call; the original is then not run again.
    """
    if base is None:
        with npt_disabled(model):
            base = generate(model, tokenizer, prompts, max_new_tokens)
    converted = generate(model, tokenizer, prompts, max_new_tokens)
    return [Sample(*texts) for texts in zip(prompts, base, converted, strict=True)]
