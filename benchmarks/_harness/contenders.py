"""The timings of ``gpu_check.py``: what is timed against what, from the vendor's GEMM to single kernels, on the same tensors.

Contenders that compute whole ops are providers of ``npt bench`` (``npt_kernels/bench/providers.py``); kernels that are no op of
their own (the skinny pair, the coefficients) are compared with the vendor's products here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from npt_kernels.bench.providers import PROVIDERS
from npt_kernels.measure.problems import Problem
from npt_kernels.measure.shapes import Case, ModelShape
from npt_kernels.measure.timing import Call, rotation
from npt_kernels.ops.registry import BACKENDS

__all__ = ["Workload", "workloads"]


@dataclass
class Workload:
    """A row group of the report: contenders, the baseline they are divided by, how often the inputs rotate."""

    name: str
    make: Callable[[torch.device], tuple[dict[str, Call], int]]
    baseline: str
    tokens: int
    note: str = ""


def _sets(case: Case, device: torch.device, most: int = 16) -> list[Problem]:
    first = Problem(case, device)
    size = sum(t.numel() * t.element_size() for t in first.tensors.values())
    return [first] + [Problem(case, device, seed) for seed in range(1, rotation(size, device, most))]


def _op(
    case: Case, mode: str, providers: Sequence[str], device: torch.device, most: int = 8
) -> tuple[dict[str, Call], int]:
    """An op by providers."""
    problems = _sets(case, device, most)

    def rotating(name: str) -> Call:
        calls = [PROVIDERS[name].prepare(problem, mode) for problem in problems]
        return lambda index: calls[index % len(calls)]()

    return {name: rotating(name) for name in providers}, len(problems)


def _kernel(
    case: Case, names: tuple[str, str], backends: list[str], device: torch.device
) -> tuple[dict[str, Call], int]:
    """A kernel against the vendor's products: (vendor's name, ours)."""
    problems = _sets(case, device)
    contenders: dict[str, Call] = {names[0]: lambda i: problems[i].run("eager")}
    for backend in backends:
        if backend != "eager":
            contenders[f"{backend}, {names[1]}"] = lambda i, backend=backend: problems[i].run(backend)
    return contenders, len(problems)


def workloads(models: dict[str, ModelShape], backends: list[str], small: bool, compiled: bool) -> list[Workload]:
    """All workloads, the most important first."""
    eight, seventy, gpt2 = models["8B"], models["70B"], models["GPT-2"]
    many, few = (40, (1, 5)) if small else (8192, (1, 16, 64, 256))
    rank, ranks = (8, (16,)) if small else (64, (1024, 4096))
    base = Case("mlp", eight, many, torch.bfloat16, rank=rank)
    vendor = ["frozen", "kconcat", *backends]
    result: list[Workload] = []

    def add(name: str, make: Any, tokens: int, baseline: str = "frozen", note: str = "") -> None:
        result.append(Workload(name, make, baseline, tokens, note))

    def mlp(name: str, case: Case, mode: str, with_compile: bool = compiled) -> None:
        providers = [*vendor, *(["compile"] if with_compile else [])]
        add(f"MLP {name} {case.model.name} T={case.tokens} R={rank}",
            lambda device: _op(case, mode, providers, device, 8 if mode == "forward" else 1), case.tokens)  # fmt: skip

    def gate(wide: int) -> None:
        case = replace(base, op="factored_linear", rank=wide)
        mainloops = [
            f"{name}-mainloop" for name in backends if name != "eager"
        ]  # how good our product is without a delta
        add(f"gate projection 8B T={many} R={wide}",
            lambda device: _op(case, "forward", [*vendor, *mainloops], device), many)  # fmt: skip

    mlp("forward", base, "forward")
    mlp("forward", replace(base, model=gpt2), "forward")
    gate(rank)
    mlp("local training", base, "local")
    mlp("local training", replace(base, model=gpt2), "local", with_compile=False)
    for tokens in few:
        mlp("forward", replace(base, tokens=tokens), "forward", with_compile=False)
    for wide in ranks:
        gate(wide)
    names = ("two GEMMs", "one pass")
    add(f"skinny pair 8B T={many} R={rank}",
        lambda device: _kernel(replace(base, op="skinny"), names, backends, device), many, names[0])  # fmt: skip
    both, case = ("two GEMMs + rule", "one kernel"), replace(base, op="coefficients", rule="rank1")
    add(f"coefficients rank1 8B T={many} R={rank}",
        lambda device: _kernel(case, both, backends, device), many, both[0])  # fmt: skip
    norms = [name for name in backends if BACKENDS[name].lacks("matched_norm") is None]
    add(f"matched norm 8B T={many}",
        lambda device: _op(replace(base, op="matched_norm"), "forward", ["frozen", *norms], device), many)  # fmt: skip
    mlp("forward", replace(base, model=seventy, tokens=2048 if not small else many), "forward", with_compile=False)
    if "cuda" in backends:
        from .cuda_kernels import cuda_rows

        for name, baseline, tokens, make in cuda_rows(small):
            add(name, make, tokens, baseline)
    return result
