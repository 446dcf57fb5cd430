"""Numerics on real sizes: error against float64, at most twice torch's own, over the whole and in every block of 16 rows.

    max|actual − truth| ≤ 2 · max|reference − truth| + 2 · eps · max|truth|

Truth and reference of per-token results are computed on sampled blocks of rows (first, last, those around every 2^31 elements,
some at random), because a row depends on its own token only. Sums over tokens are accumulated in float64 chunk by chunk.
Memory that a kernel leaves unwritten reads NaN (``poisoned``).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .problems import Problem
from .shapes import Case

__all__ = ["CHUNK", "check_case", "poisoned", "repeat_case", "sample_rows", "worst_ratio"]

BLOCK = 16
#: Tokens of one chunk of the float64 truth: bounds its memory.
CHUNK = 1024


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` returns NaN inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis")  # wanted for the poison, not for determinism
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def sample_rows(tokens: int, widest: int, blocks: int = 6) -> Tensor:
    """Rows in whole blocks of 16: all if few, else first, last, the crossings of 2^31 elements, and random ones."""
    if tokens <= 2 * blocks * BLOCK:
        return torch.arange(tokens)
    last = tokens // BLOCK - 1
    chosen = {0, last}
    chosen |= {min(last, multiple * 2**31 // (widest * BLOCK)) for multiple in range(1, 1 + tokens * widest // 2**31)}
    generator = torch.Generator().manual_seed(1)
    while len(chosen) < blocks:
        chosen.add(int(torch.randint(last, (), generator=generator)))
    rows = torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in sorted(chosen)])
    ragged = torch.arange((last + 1) * BLOCK, tokens)  # the ragged end
    return torch.cat([rows, ragged])


def worst_ratio(actual: Tensor, reference: Tensor, truth: Tensor, floor: float = 2.0) -> float:
    """Largest error ÷ its bound over the whole tensor and every block of 16 rows; infinite if anything is not finite.

    ``floor``: multiple of eps · max|truth| that is allowed on top; 2 is the plain rule.
    """
    if actual.shape != truth.shape or actual.dtype != reference.dtype:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    if not bool(actual.isfinite().all()):
        return float("inf")
    eps = torch.finfo(actual.dtype).eps
    flat = [t.reshape(t.shape[0], -1) if t.dim() > 1 else t.reshape(-1, 1) for t in (actual, reference, truth)]
    error, allowed = ((t.double() - flat[2]).abs().amax(1) for t in flat[:2])
    size = flat[2].abs().amax(1)
    pad = -len(error) % BLOCK
    error, allowed, size = (
        torch.nn.functional.pad(t, (0, pad)).reshape(-1, BLOCK).amax(1) for t in (error, allowed, size)
    )

    def ratio(e: Tensor, a: Tensor, s: Tensor) -> Tensor:
        bound = 2 * a + floor * eps * s
        return torch.where(e == 0, torch.zeros_like(e), e / bound).amax()

    return max(float(ratio(error, allowed, size)), float(ratio(error.amax(0), allowed.amax(0), size.amax(0))))


def check_case(case: Case, backend: str, device: torch.device) -> dict[str, Any]:
    """Run a case on a backend and compare everything it returns. ``passed`` is what counts; a raised error is a failure."""
    started = time.perf_counter()
    record: dict[str, Any] = {"case": str(case), "op": case.op, "backend": backend, "passed": False}
    try:
        problem = Problem(case, device)
        with poisoned():
            actual = problem.run(backend, sums=case.sums)
        ratios = _compare(problem, actual)
        record |= {"ratios": ratios, "passed": all(r <= 1 for r in ratios.values())}
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    record["seconds"] = round(time.perf_counter() - started, 2)
    if device.type == "cuda":
        problem = actual = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    return record


def _compare(problem: Problem, actual: dict[str, Tensor]) -> dict[str, float]:
    case = problem.case
    widest = max(t.shape[-1] for n, t in problem.tensors.items() if n in problem.per_token and t.dim() > 1)
    rows = sample_rows(case.tokens, max(widest, case.model.f)).to(problem.device)
    reference = problem.run("eager", rows, sums=False)
    truth = problem.run("eager", rows, torch.float64, sums=False)
    ratios = {
        name: worst_ratio(actual[name][rows], reference[name], truth[name])
        for name in actual
        if not name.startswith("sum ")
    }
    sums = [name for name in actual if name.startswith("sum ")]
    if sums:
        full = problem.run("eager")
        total: dict[str, Tensor] = {}
        for start in range(0, case.tokens, CHUNK):
            part = problem.run("eager", slice(start, start + CHUNK), torch.float64)
            for name in sums:
                total[name] = total[name] + part[name] if name in total else part[name]
        for name in sums:
            ratios[name] = worst_ratio(actual[name], full[name], total[name])
    return ratios


def repeat_case(case: Case, times: int, backend: str, device: torch.device, deadline: float) -> dict[str, Any]:
    """Run a case ``times`` over the same inputs; every result must be bitwise the first one. Stops at ``deadline``."""
    record: dict[str, Any] = {"case": str(case), "backend": backend, "times": 0, "passed": False}
    try:
        problem = Problem(case, device)
        first = problem.run(backend)
        different = torch.zeros((), dtype=torch.int64, device=device)
        done = 1
        while done < times and time.perf_counter() < deadline:
            for _ in range(min(50, times - done)):
                again = problem.run(backend)
                for name, result in again.items():
                    different += (result.view(torch.int16) != first[name].view(torch.int16)).any()
                done += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        record |= {"times": done, "different": int(different), "passed": int(different) == 0, "complete": done >= times}
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return record
