"""What ``npt bench check`` runs: numeric cases, repeats, and timings of whole ops and single kernels; real sizes and small ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..measure.shapes import MODELS, SMALL_MODELS, Case

__all__ = ["numeric_cases", "repeat_cases"]


def numeric_cases(small: bool) -> Iterator[Case]:
    """Most important first: a run that is cut short has done these."""
    models = SMALL_MODELS if small else MODELS
    eight, seventy, gpt2 = models["8B"], models["70B"], models["GPT-2"]
    halves = (torch.bfloat16, torch.float16)
    rank, wide, many, huge = (8, 24, 70, 150) if small else (64, 1024, 2048, 131072)
    for dtype in halves:
        yield Case("mlp", eight, many, dtype, rank=rank)
        yield Case("mlp", eight, 1, dtype, rank=rank)
        yield Case("mlp", gpt2, many, dtype, rule="rank1", rank=rank, num_ranks=2)
    # Past 2^31 elements: 131072 tokens × 28672 columns.
    yield Case("mlp", seventy, huge, torch.bfloat16, rank=rank, sums=False)
    yield Case("skinny", seventy, huge, torch.bfloat16, rank=rank)
    for dtype in halves:
        yield Case("factored_linear", eight, many, dtype, rule="rank1", rank=wide)
        yield Case("linear", eight, 257 if not small else 37, dtype, num_ranks=2)
        yield Case("matched_norm", eight, many, dtype)
        yield Case("matched_norm", gpt2, many, dtype)
        yield Case("coefficients", eight, many, dtype, rule="rank1", rank=rank)
        yield Case("skinny", eight, many, dtype, rank=rank)
    for rule in ("rank1", "diagonal", "anchored", "self_key"):
        yield Case("mlp", eight, 257 if not small else 33, torch.bfloat16, rule=rule, rank=rank, num_ranks=2)
        for tokens in (1, 16):
            yield Case("mlp", eight, tokens, torch.bfloat16, rule=rule, rank=rank, backward=False)
        yield Case("coefficients", eight, 16, torch.bfloat16, rule=rule, rank=rank)
    yield Case("mlp", seventy, 512 if not small else 40, torch.float16, rule="rank1", rank=wide)
    yield Case("mlp", gpt2, 1, torch.float16, rank=rank)
    yield Case("matched_norm", seventy, many, torch.bfloat16)
    yield Case("factored_linear", seventy, huge, torch.bfloat16, rule="rank1", rank=rank, backward=False)
    yield Case("linear", seventy, 64 if not small else 5, torch.bfloat16)


def repeat_cases(small: bool) -> Iterator[tuple[Case, int]]:
    """(case, repetitions): every kind of kernel whose programs share memory (rings, splits, second passes)."""
    models = SMALL_MODELS if small else MODELS
    eight, gpt2 = models["8B"], models["GPT-2"]
    times, rank = (3, 8) if small else (1000, 64)
    yield Case("mlp", eight, 16, torch.bfloat16, rank=rank, backward=False), times
    yield Case("mlp", gpt2, 300 if not small else 30, torch.bfloat16, rule="rank1", rank=rank), times
    yield Case("factored_linear", gpt2, 515 if not small else 35, torch.bfloat16, rule="rank1", rank=rank), times
    yield Case("coefficients", eight, 16, torch.bfloat16, rule="rank1", rank=rank), times
    yield Case("skinny", gpt2, 2048 if not small else 70, torch.bfloat16, rank=rank), times
    yield Case("matched_norm", eight, 515 if not small else 35, torch.bfloat16), times
    yield Case("mlp", eight, 2048 if not small else 40, torch.bfloat16, rank=rank), 3 if small else 200
