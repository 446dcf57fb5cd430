"""``npt bench memory``: the peak of a call beyond its inputs and weights, per provider and mode; on a CPU too.

On a CPU every allocation of torch's allocator is counted (``allocations.py``), on a GPU ``max_memory_allocated`` is read. What
would not fit is given by its formula and labelled so, never mixed with what was measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure.allocations import memory_meter
from ..measure.problems import Problem
from ..measure.shapes import MODELS
from .grid import Filters, Setting, plan_settings, slow_seconds
from .kernels import check_provider, short_reason
from .peers import delta_bytes
from .providers import PROVIDERS, Provider, Results
from .results import ResultFile

__all__ = ["headline", "measure_memory", "peak_of", "plan_memory", "run_memory"]

#: Bytes per second at which a CPU and a GPU build weights, to estimate what is slow.
_BUILD_RATE = {"cpu": 0.005, "cuda": 2.0}


def plan_memory(filters: Filters, size: str, dtype: torch.dtype) -> list[Setting]:
    """The settings of the suite: no decode (its tensors are one token's) and no norm; the headline first, unless filtered."""
    modes = list(filters.modes) or ["forward", "local", "end_to_end"]
    ops = list(filters.ops) or ["mlp", "linear"]
    narrowed = Filters(ops, filters.shapes, filters.providers, modes, filters.tokens, filters.ranks, filters.rule)
    settings = plan_settings(narrowed, size, dtype)
    asked = (filters.ops, filters.shapes, filters.providers, filters.modes, filters.tokens, filters.ranks)
    return settings if any(asked) else [*headline(), *settings]


def headline() -> list[Setting]:
    """One projection of Llama-3.1-8B at 4 × 512 tokens in float32: its ΔW of all tokens would be 448 GiB. Real size anywhere."""
    providers = tuple(PROVIDERS[name] for name in ("eager", "triton", "cuda", "materialised"))
    return [
        Setting("linear", MODELS["8B"], mode, 4 * 512, 64, "self_key", torch.float32, providers)
        for mode in ("forward", "local")
    ]


def peak_of(call: Results, device: torch.device) -> tuple[int, int]:
    """``(peak, results)`` in bytes of one call beyond what was allocated before; ``results`` is what it returns."""
    call()  # first calls fill caches: workspaces, compiled code
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        collecting = gc.isenabled()
        gc.disable()  # what an earlier call left in cycles must not be freed, and subtracted, in this one
        try:
            with memory_meter() as trace:
                results = call()
        finally:
            if collecting:
                gc.enable()
        peak = trace[0].peak
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results.values()}
    return peak, sum(storages.values())


def measure_memory(setting: Setting, device: torch.device, *, slow_limit: float = 5.0) -> list[dict[str, Any]]:
    """The rows of one setting: ``ok`` with bytes, ``formula`` for what does not fit, else as in ``kernels``."""
    problem = Problem(setting.case, device)
    known: dict[str, Any] = {}
    unit = setting.tokens * setting.model.f * setting.dtype.itemsize
    rows = []
    for provider in setting.providers:
        row = {**setting.row(), "provider": provider.name, "function": provider.function}
        rows.append(row | _measured(provider, setting, problem, known, unit, slow_limit))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _measured(
    provider: Provider, setting: Setting, problem: Problem, known: dict[str, Any], unit: int, slow_limit: float
) -> dict[str, Any]:
    case, device = problem.case, problem.device
    reason = provider.why_not(case, setting.mode, device)
    if reason is None and provider.slow:
        seconds = slow_seconds(setting, _BUILD_RATE[device.type])
        if seconds > slow_limit:
            reason = f"one call takes about {seconds:,.0f} s; the limit is {slow_limit:g} s (--slow-limit)"
    if reason is not None and provider.name == "materialised":
        size = delta_bytes(case)
        return {
            "status": "formula", "reason": reason, "peak_bytes": size, "peak_units": round(size / unit, 4),
            "formula": f"T·f·d·{case.dtype.itemsize} B = {case.tokens}·{case.model.f}·{case.model.d}·{case.dtype.itemsize}",
        }  # fmt: skip
    if reason is not None:
        return {"status": "skipped", "reason": reason}
    try:
        call = provider.prepare(problem, setting.mode)
        ratios = check_provider(provider, problem, setting.mode, call, known)
        worst = max(ratios, key=lambda name: ratios[name])
        if not ratios[worst] <= 1:
            return {"status": "wrong", "reason": f"{worst} is off by {ratios[worst]:.3g} times what it may be"}
        peak, results = peak_of(call, device)
    except Exception as error:
        return {"status": "failed", "reason": short_reason(error)}
    return {
        "status": "ok", "peak_bytes": peak, "result_bytes": results, "peak_units": round(peak / unit, 4),
        "method": "torch.cuda.max_memory_allocated" if device.type == "cuda" else "every allocation of torch's CPU allocator",
    }  # fmt: skip


def run_memory(
    settings: Sequence[Setting],
    device: torch.device,
    result: ResultFile,
    *,
    slow_limit: float = 5.0,
    done: Callable[[Setting, list[dict[str, Any]]], None] = lambda setting, rows: None,
) -> ResultFile:
    """Measure ``settings`` in order; saving, interruption and ``done`` as in ``kernels.run_kernels``."""
    result.not_run = [str(setting) for setting in settings]
    result.save()
    for setting in settings:
        rows = measure_memory(setting, device, slow_limit=slow_limit)
        result.rows.extend(rows)
        result.not_run.pop(0)
        result.save()
        done(setting, rows)
    result.complete = True
    result.save()
    return result
