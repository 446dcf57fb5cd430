"""What ``npt bench check`` runs: numeric cases, repeats, and what it times; real sizes and small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.shapes import MODELS, SMALL_MODELS, Case, ModelShape
from .grid import Setting
from .kernels import measure_setting
from .memory import measure_memory
from .providers import PROVIDERS
from .single_kernels import SingleKernel, against_products, cuda_kernels

__all__ = ["Timing", "numeric_cases", "repeat_cases", "timings"]


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
    yield Case("value_grads", seventy, huge, torch.bfloat16, rank=rank)
    for dtype in halves:
        yield Case("factored_linear", eight, many, dtype, rule="rank1", rank=wide)
        yield Case("linear", eight, 257 if not small else 37, dtype, num_ranks=2)
        yield Case("matched_norm", eight, many, dtype)
        yield Case("matched_norm", gpt2, many, dtype)
        yield Case("coefficients", eight, many, dtype, rule="rank1", rank=rank)
        yield Case("value_grads", eight, many, dtype, rank=rank)
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
    yield Case("value_grads", gpt2, 2048 if not small else 70, torch.bfloat16, rank=rank), times
    yield Case("matched_norm", eight, 515 if not small else 35, torch.bfloat16), times
    yield Case("mlp", eight, 2048 if not small else 40, torch.bfloat16, rank=rank), 3 if small else 200


# ---- timings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One group of rows: ``rows(device, ceilings, rounds)``. Rows of whole ops are those of the suites kernels and memory."""

    name: str
    rows: Callable[[torch.device, dict[str, Any], int], list[dict[str, Any]]]


def timings(small: bool, backends: Sequence[str], compiled: bool) -> list[Timing]:
    """What is timed, most important first. ``compiled``: torch.compile among the contenders, some 20 s a setting."""
    models = SMALL_MODELS if small else MODELS
    many, few, rank, ranks = (40, (1, 5), 8, (16,)) if small else (8192, (1, 16, 64, 256), 64, (1024, 4096))
    eight, seventy, gpt2 = models["8B"], models["70B"], models["GPT-2"]
    ours = ["kconcat", *backends]
    mainloops = [f"{name}-mainloop" for name in backends if f"{name}-mainloop" in PROVIDERS]
    case = Case("value_grads", eight, many, torch.bfloat16, rank=rank)
    both = Case("coefficients", eight, many, torch.bfloat16, rule="rank1", rank=rank)

    def op(
        op: str, mode: str, model: ModelShape = eight, tokens: int = many, wide: int = rank, more: Sequence[str] = ()
    ) -> Timing:
        names = ["frozen", *(backends if op == "norm" else ours), *more]
        asked = tuple(PROVIDERS[name] for name in dict.fromkeys(names))
        return _whole_op(Setting(op, model, mode, tokens, wide, "self_key", torch.bfloat16, asked))

    compile_too = ["compile"] if compiled else []
    result = [
        op("mlp", "forward", more=compile_too),
        op("mlp", "forward", gpt2, more=compile_too),
        op("linear", "forward", more=mainloops),
        op("mlp", "local", more=compile_too),
        op("mlp", "local", gpt2),
        *(op("mlp", mode, tokens=tokens) for tokens in few for mode in ("decode", "forward")),
        *(op("linear", "forward", wide=wide, more=mainloops) for wide in ranks),
        _single(against_products(f"value grads 8B T={many} R={rank}", case, backends, ("two GEMMs", "one pass"))),
        _single(
            against_products(
                f"coefficients rank1 8B T={many} R={rank}", both, backends, ("two GEMMs + rule", "one kernel")
            )
        ),
        op("norm", "forward"),
        op("mlp", "forward", seventy, tokens=many if small else 2048),
    ]
    if "cuda" in backends:
        result += [_single(kernel) for kernel in cuda_kernels(small)]
    asked = tuple(PROVIDERS[name] for name in ("frozen", *backends))
    return [*result, _memory(Setting("mlp", eight, "local", many, rank, "self_key", torch.bfloat16, asked))]


def _whole_op(setting: Setting) -> Timing:
    def rows(device: torch.device, ceilings: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
        return [{"suite": "kernels", **row} for row in measure_setting(setting, device, ceilings, rounds=rounds)]

    return Timing(str(setting), rows)


def _single(kernel: SingleKernel) -> Timing:
    return Timing(kernel.name, lambda device, ceilings, rounds: kernel.rows(device, rounds))


def _memory(setting: Setting) -> Timing:
    def rows(device: torch.device, ceilings: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
        return [{"suite": "memory", **row} for row in measure_memory(setting, device)]

    return Timing(f"memory of {setting}", rows)
