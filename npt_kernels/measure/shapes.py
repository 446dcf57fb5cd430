"""The registry of shapes: which models, and the numeric cases of ``benchmarks/gpu_check.py``; real sizes and small ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..bench.results import unknown_name

__all__ = ["MODELS", "SMALL_MODELS", "Case", "ModelShape", "find_shape", "numeric_cases", "repeat_cases"]

#: Small shapes of ``npt bench`` are the real ones with every width divided by this.
SMALL_DIVISOR = 16


@dataclass(frozen=True)
class ModelShape:
    """The MLP of a model: ``d`` hidden size, ``f`` MLP width, gated (gate, up, down) or plain (c_fc, c_proj)."""

    name: str
    d: int
    f: int
    gated: bool = True
    act: str = "silu"
    norm: str = "rms"
    #: The model's own name, where ``name`` is short for it.
    title: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        """Slots of the op ``mlp`` that this MLP has."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def small(self) -> ModelShape:
        """The same proportions at a sixteenth of every width."""
        n = SMALL_DIVISOR
        return replace(self, name=f"{self.name} ÷{n}", title=f"{self.title} ÷{n}", d=self.d // n, f=self.f // n)


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("GPT-2", 768, 3072, gated=False, act="gelu_new", norm="layer", title="GPT-2"),
        ModelShape("1B", 2048, 8192, title="Llama-3.2-1B"),
        ModelShape("8B", 4096, 14336, title="Llama-3.1-8B"),
        ModelShape("70B", 8192, 28672, title="Llama-3.1-70B"),
    )
}
SMALL_MODELS = {
    "8B": ModelShape("8B-small", 48, 80),
    "70B": ModelShape("70B-small", 64, 96),
    "GPT-2": ModelShape("GPT-2-small", 32, 56, gated=False, act="gelu_new", norm="layer"),
}


def find_shape(name: str) -> ModelShape:
    """The model of that name: ``8B``, ``llama-3.1-8b``, ``gpt2`` …, in any case. Raises :class:`BenchError`."""
    known = {key: shape for shape in MODELS.values() for key in (_plain(shape.name), _plain(shape.title))}
    if _plain(name) not in known:
        titles = {form: shape.title for shape in MODELS.values() for form in (shape.name.lower(), shape.title.lower())}
        raise unknown_name("--shape", name, list(dict.fromkeys(titles.values())), titles)
    return known[_plain(name)]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == ".")


@dataclass(frozen=True)
class Case:
    """One numeric check.

    Attributes:
        op: ``linear``, ``factored_linear``, ``mlp``, ``matched_norm``, ``coefficients`` or ``skinny``.
        rank: R = k·r.
        key_scale: With a key scale (norm matched), for ``mlp``.
        sums: Whether gradients that are sums over tokens are compared too (their float64 truth costs a full pass).
        backward: Whether gradients are compared at all.
    """

    op: str
    model: ModelShape
    tokens: int
    dtype: torch.dtype
    rule: str = "self_key"
    rank: int = 64
    num_ranks: int = 1
    key_scale: bool = True
    sums: bool = True
    backward: bool = True

    def __str__(self) -> str:
        parts = [self.op, self.model.name, f"T={self.tokens}", str(self.dtype).removeprefix("torch.")]
        if self.op not in ("linear", "matched_norm"):
            parts.append(f"{self.rule} R={self.rank}" + (f" k={self.num_ranks}" if self.num_ranks > 1 else ""))
        return " ".join(parts)


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
