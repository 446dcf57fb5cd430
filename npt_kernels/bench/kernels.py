"""``npt bench kernels``: every provider of a setting checked against float64, then timed against the others, launch by launch.

A provider whose numbers are wrong gets no time: its row says ``wrong`` and by how much. Ratios are of interleaved launches to
``frozen``, the same layer without a delta, with the 10th and 90th percentile over rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..measure.against_truth import CHUNK, poisoned, sample_rows
from ..measure.error_rule import worst_excess
from ..measure.problems import Problem
from ..measure.reference import reference_results, term_sizes
from ..measure.shapes import ModelShape
from ..measure.timing import Call, clocks, compare, compare_graphs, cpu_ceilings, rotation, settle_power
from .costs import minimum_flops, roofline_us
from .grid import Setting, slow_seconds
from .providers import BASELINE, Provider, Results
from .results import ResultFile

__all__ = ["check_provider", "host_overhead", "measure_setting", "run_kernels", "short_reason"]

#: Rounds of A B C C B A per group, and of the pool of slow providers.
ROUNDS = {"cuda": 30, "cpu": 5}
SLOW_ROUNDS = 3
#: A provider that takes longer than this many times the fastest is timed in rounds of its own, with the baseline beside it.
SLOW_FACTOR = 8.0
#: Seconds that one CPU measurement should last at least; shorter calls are repeated within it.
SHORTEST = 400e-6


def check_provider(
    provider: Provider, problem: Problem, mode: str, call: Results, known: dict[str, Any]
) -> dict[str, float]:
    """Result name → error ÷ its bound (at most 1 is right); what is missing or has a wrong shape is infinite.

    ``known`` keeps the references of a setting by function, so that providers of one function share them.
    """
    with poisoned():
        actual = call()
    if provider.function not in known:
        case = problem.case
        rows = sample_rows(case.tokens, max(case.model.f, case.model.d)).to(problem.device)
        known[provider.function] = (rows, *reference_results(problem, provider.function, mode, rows, CHUNK))
    rows, reference, truth = known[provider.function]
    if provider.function == "npt" and "d key_scale" in truth and "terms" not in known:
        known["terms"] = term_sizes(problem, rows)
    floor = allowed_floor(provider, problem)
    ratios: dict[str, float] = {}
    for name, expected in truth.items():
        result = actual.get(name)
        if not isinstance(result, Tensor):
            ratios[name] = float("inf")
            continue
        if not name.startswith("sum "):
            if result.shape[0] != problem.case.tokens:
                ratios[name] = float("inf")
                continue
            result = result[rows]
        terms = known.get("terms", {}).get(name)
        ratios[name] = worst_excess(result, reference[name], expected, floor=floor, terms=terms).ratio
    return ratios


def allowed_floor(provider: Provider, problem: Problem) -> float:
    """Multiple of eps · max|truth| allowed beyond twice the plain form's error: the provider's own, and what sums take.

    A library may add K products in any order. In float32 that moves a result by about √K eps, and whether the plain form or
    the provider is the lucky one is chance (seen: one token, K = 1792); below float32, where sums are wide, it is nothing.
    """
    longest = max(problem.case.model.f, problem.case.model.d, problem.case.tokens)
    dtype = problem.case.dtype
    return provider.floor + math.sqrt(longest) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps


def measure_setting(
    setting: Setting, device: torch.device, ceilings: dict[str, Any], *, rounds: int, slow_limit: float = 5.0
) -> list[dict[str, Any]]:
    """The rows of one setting, one per provider: ``ok`` with times, else ``wrong``, ``failed`` or ``skipped`` with the reason."""
    rows: dict[str, dict[str, Any]] = {}
    problem = Problem(setting.case, device)
    known: dict[str, Any] = {}
    calls: dict[str, Results] = {}
    for provider in setting.providers:
        row, call = _checked(provider, setting, problem, known, ceilings, slow_limit)
        rows[provider.name] = row
        if call is not None:
            calls[provider.name] = call
    known.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    by_name = {provider.name: provider for provider in setting.providers}
    for name, times in _timed(setting, problem, calls, by_name, device, rounds).items():
        rows[name] |= _finished(times, by_name[name], setting, ceilings)
    return [{**setting.row(), "launch": _launch(setting, device), **row} for row in rows.values()]


def _launch(setting: Setting, device: torch.device) -> str:
    return "graph" if setting.mode == "decode" and device.type == "cuda" else "eager"


def _checked(
    provider: Provider,
    setting: Setting,
    problem: Problem,
    known: dict[str, Any],
    ceilings: dict[str, Any],
    slow_limit: float,
) -> tuple[dict[str, Any], Results | None]:
    """``(row so far, call)``; no call for a provider that cannot run, failed, or computes something else."""
    row: dict[str, Any] = {"provider": provider.name, "function": provider.function}
    reason = provider.why_not(problem.case, setting.mode, problem.device)
    if reason is None and provider.slow:
        seconds = slow_seconds(setting, ceilings.get("copy_tbs") or 0.01)
        if seconds > slow_limit:
            reason = f"one call takes about {seconds:,.0f} s; the limit is {slow_limit:g} s (--slow-limit)"
    if reason is not None:
        return {**row, "status": "skipped", "reason": reason}, None
    try:
        call = provider.prepare(problem, setting.mode)
        ratios = check_provider(provider, problem, setting.mode, call, known)
    except Exception as error:
        return {**row, "status": "failed", "reason": short_reason(error)}, None
    worst = max(ratios, key=lambda name: ratios[name])
    floor = round(allowed_floor(provider, problem), 2)
    row["check"] = {"worst": worst, "error_over_bound": _finite(ratios[worst]), "floor_eps": floor}
    if not ratios[worst] <= 1:
        reason = f"{worst} is off by {ratios[worst]:.3g} times what it may be; not timed"
        return {**row, "status": "wrong", "reason": reason}, None
    if problem.device.type == "cpu" and provider.name.startswith(("triton", "cuda")):
        return {**row, "status": "checked", "reason": "interpreted on a CPU: right, but its time means nothing"}, None
    return {**row, "status": "ok"}, call


def _finite(value: float) -> float | str:
    return round(value, 4) if value == value and abs(value) != float("inf") else str(value)


def short_reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _timed(
    setting: Setting,
    problem: Problem,
    calls: dict[str, Results],
    providers: dict[str, Provider],
    device: torch.device,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Name → times. Slow providers are timed in a pool of their own, so that they do not cost the others their rounds."""
    if not calls:
        return {}
    pilot = {name: _pilot(call, device) for name, call in calls.items()}
    fastest = min(pilot.values())
    slow = [name for name, seconds in pilot.items() if seconds > SLOW_FACTOR * fastest and name != BASELINE]
    pools = [([n for n in calls if n not in slow], rounds)]
    if slow:
        pools.append(([n for n in calls if n == BASELINE or n in slow], min(rounds, SLOW_ROUNDS)))
    size = sum(t.numel() * t.element_size() for t in problem.tensors.values())
    sets = rotation(size, device, 8)
    problems = [problem, *(Problem(setting.case, device, seed) for seed in range(1, sets))]
    results: dict[str, dict[str, Any]] = {}
    for names, count in pools:
        prepared: dict[str, Call] = {}
        for name in names:
            each = [calls[name], *(providers[name].prepare(p, setting.mode) for p in problems[1:])]
            prepared[name] = _rotating(each)
        inner = max(1, min(50, round(SHORTEST / max(fastest, 1e-7)))) if device.type == "cpu" else 1
        if names[-1] in slow:
            inner = 1
        if _launch(setting, device) == "graph":
            measured = compare_graphs(prepared, BASELINE, device, rounds=count, sets=sets)
        else:
            measured = compare(prepared, BASELINE, device, rounds=count, sets=sets, inner=inner)
        for name, times in measured.items():
            results.setdefault(name, times)  # the baseline's figures are those of its first, longer pool
    return results


def _rotating(calls: Sequence[Results]) -> Call:
    return lambda index: calls[index % len(calls)]()


def _pilot(call: Callable[[], object], device: torch.device) -> float:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _finished(times: dict[str, Any], provider: Provider, setting: Setting, ceilings: dict[str, Any]) -> dict[str, Any]:
    if "error" in times:
        return {"status": "failed", "reason": times["error"]}
    flops = minimum_flops(setting.case, setting.mode, provider.function)
    best = roofline_us(setting.case, setting.mode, provider.function, ceilings)
    extra: dict[str, Any] = {"tflops": round(flops / times["us"] / 1e6, 4)}
    if best is not None:
        extra |= {"roofline_us": round(best, 3), "roofline_share": round(best / times["us"], 4)}
    return times | extra


def host_overhead(settings: Sequence[Setting], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """What a call costs apart from its arithmetic: the same calls at a size where that is nothing, per op, mode and provider.

    Time until the call returns (on a GPU the kernels go on behind it), and the difference to the baseline's.
    """
    tiny = {
        True: ModelShape("tiny", 16, 16),
        False: ModelShape("tiny", 16, 16, gated=False, act="gelu_new", norm="layer"),
    }
    entries: list[dict[str, Any]] = []
    seen = set()
    for setting in settings:
        key = (setting.op, setting.mode, setting.model.gated)
        if key in seen or setting.mode == "decode":
            continue
        seen.add(key)
        chosen = tuple(p for p in setting.providers if p.name != "compile" and not p.slow)
        small = replace(setting, model=tiny[setting.model.gated], tokens=1, rank=8, providers=chosen)
        problem = Problem(small.case, device)
        calls = {}
        for provider in chosen:
            if provider.why_not(small.case, small.mode, device) is None and not (
                device.type == "cpu" and provider.name.startswith(("triton", "cuda"))
            ):
                try:
                    calls[provider.name] = provider.prepare(problem, small.mode)
                    calls[provider.name]()
                except Exception:
                    calls.pop(provider.name, None)  # its failure is told by the settings that ask for it
        times = _returns(calls, device, max(rounds, 15))
        for name, values in times.items():
            middle = values[len(values) // 2]
            base = times.get(BASELINE)
            entries.append(
                {
                    "op": setting.op, "mode": setting.mode, "gated": setting.model.gated, "provider": name,
                    "host_us": round(middle, 2),
                    "host_us_p10_p90": [round(values[len(values) // 10], 2), round(values[-1 - len(values) // 10], 2)],
                    **({"over_frozen_us": round(middle - base[len(base) // 2], 2)} if base else {}),
                }
            )  # fmt: skip
    return entries


def _returns(calls: dict[str, Results], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Sorted microseconds until each call returns, interleaved; the device is idle before every call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls, *reversed(calls)] * rounds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        calls[name]()
        times[name].append((time.perf_counter() - start) * 1e6)
    return {name: sorted(values) for name, values in times.items()}


def run_kernels(
    settings: Sequence[Setting],
    device: torch.device,
    result: ResultFile,
    *,
    rounds: int | None = None,
    slow_limit: float = 5.0,
    done: Callable[[Setting, list[dict[str, Any]]], None] = lambda setting, rows: None,
) -> ResultFile:
    """Measure ``settings`` in order. The file is saved after each; ``done(setting, its rows)`` is told.

    Raises ``KeyboardInterrupt`` as it comes; what was finished is in the file, and what was not is named there.
    """
    rounds = rounds or ROUNDS[device.type]
    dtype = settings[0].dtype
    ceilings = settle_power(device, 2.5, dtype) if device.type == "cuda" else cpu_ceilings(dtype)
    result.extra |= {"ceilings": ceilings, "clocks": {"before": clocks()}}
    result.not_run = [str(setting) for setting in settings]
    result.save()
    result.extra["host_overhead"] = host_overhead(settings, device, rounds)
    for setting in settings:
        rows = measure_setting(setting, device, ceilings, rounds=rounds, slow_limit=slow_limit)
        result.rows.extend(rows)
        result.not_run.pop(0)
        if any(row.get("roofline_share", 0) > 1.1 for row in rows):
            result.extra["note"] = (
                "shares of the roofline above 100 %: its ceilings were measured while the machine was busy"
            )
        result.save()
        done(setting, rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result.extra["clocks"]["after"] = clocks()
    result.complete = True
    result.save()
    return result
