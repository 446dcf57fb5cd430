"""Numerics on real sizes: every result of a case on a backend against float64, by the 2× rule (``error_rule.py``).

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

from .error_rule import BLOCK, worst_excess
from .problems import Problem
from .reference import term_sizes
from .shapes import Case

__all__ = ["CHUNK", "OutOfRangeError", "check_case", "poisoned", "repeat_case", "sample_rows"]

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


class OutOfRangeError(ValueError):
    """A case whose true results its dtype cannot hold: the case is at fault, whatever a backend returns."""


def check_case(case: Case, backend: str, device: torch.device) -> dict[str, Any]:
    """Run a case on a backend and compare everything it returns.

    The record's ``status``: ``ok``; ``wrong``, with the ``ratios`` (error ÷ bound) by result; ``failed``, with the ``reason``.
    """
    started = time.perf_counter()
    record: dict[str, Any] = {"case": str(case), "op": case.op, "provider": backend, "status": "failed"}
    try:
        problem = Problem(case, device)
        with poisoned():
            actual = problem.run(backend, sums=case.sums)
        ratios = _compare(problem, actual)
        worst = max(ratios, key=lambda name: ratios[name])
        record |= {"ratios": {name: _finite(ratio) for name, ratio in ratios.items()}, "status": "ok"}
        if not ratios[worst] <= 1:
            record |= {"status": "wrong", "reason": f"{worst} is off by {ratios[worst]:.3g} times what it may be"}
    except Exception as error:
        record["reason"] = _first_line(error)
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def _finite(ratio: float) -> float | str:
    return round(ratio, 4) if abs(ratio) < float("inf") else str(ratio)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _compare(problem: Problem, actual: dict[str, Tensor]) -> dict[str, float]:
    case = problem.case
    widest = max(t.shape[-1] for n, t in problem.tensors.items() if n in problem.per_token and t.dim() > 1)
    rows = sample_rows(case.tokens, max(widest, case.model.f)).to(problem.device)
    reference = problem.run("eager", rows, sums=False)
    truth = problem.run("eager", rows, torch.float64, sums=False)
    _in_range(truth, case.dtype)
    terms = term_sizes(problem, rows) if any(name == "d key_scale" for name in actual) else {}
    ratios = {
        name: worst_excess(actual[name][rows], reference[name], truth[name], terms=terms.get(name)).ratio
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
        _in_range(total, case.dtype)
        for name in sums:
            ratios[name] = worst_excess(actual[name], full[name], total[name]).ratio
    return ratios


def _in_range(truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in truth.items():
        largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
        if not largest <= torch.finfo(dtype).max:
            limit = f"{dtype}".removeprefix("torch.")
            raise OutOfRangeError(
                f"{name} truly reaches {largest:.3g}, {limit} ends at {torch.finfo(dtype).max:g}: mend the case"
            )


def repeat_case(case: Case, times: int, backend: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Run a case ``times`` over the same inputs; every result must be bitwise the first one. Stops after ``seconds``.

    The record's ``status``: ``ok``, ``wrong`` (some runs differ), ``incomplete`` (out of time, none differed) or ``failed``.
    """
    deadline = time.perf_counter() + seconds
    record: dict[str, Any] = {"case": str(case), "provider": backend, "times": 0, "status": "failed"}
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
        count = int(different)
        record |= {"times": done, "different": count, "status": "ok" if done >= times else "incomplete"}
        if count:
            record |= {"status": "wrong", "reason": f"{count} of {done} runs differ from the first"}
        elif done < times:
            record["reason"] = f"out of time after {done} of {times} runs; none differed"
    except Exception as error:
        record["reason"] = _first_line(error)
    return record
