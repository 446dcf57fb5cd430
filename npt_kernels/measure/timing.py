"""Timing by the protocol of research/kernels.md §7.

Contenders are interleaved A B C C B A at single-launch granularity, so that a clock that drifts favours none; medians and the
spread of paired ratios are reported, never a best. The card is brought to its settled power first; inputs rotate through sets
that together exceed the L2 cache three times; calls of at most 256 tokens are also replayed from a CUDA graph, because
there the launches, not the kernels, are what an eager call takes.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Call", "clocks", "compare", "compare_graphs", "cpu_ceilings", "rotation", "settle_power"]

Call = Callable[[int], object]


def clocks() -> str:
    """SM clock, power, temperature and their limits as nvidia-smi gives them; empty without it. Settings are never changed."""
    query = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            .stdout.strip()
            .splitlines()[0]
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def rotation(bytes_per_set: int, device: torch.device, most: int = 16) -> int:
    """Number of input sets: together over three times the L2 cache; 1 where one set already is over four times its size."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes_per_set >= 4 * cache:
        return 1
    return max(3, min(most, -(-3 * cache // max(bytes_per_set, 1))))


def cpu_ceilings(dtype: torch.dtype) -> dict[str, float]:
    """The best that this CPU shows in about a second: TFLOP/s of the vendor's GEMM, TB/s of a copy in memory and in cache."""
    n = 768
    x, w = (torch.randn(n, n).to(dtype) for _ in range(2))
    y = torch.empty(n, n, dtype=dtype)

    def best(call: Callable[[], object]) -> float:
        call()
        least, stop = float("inf"), time.perf_counter() + 0.35
        while time.perf_counter() < stop:
            start = time.perf_counter()
            call()
            least = min(least, time.perf_counter() - start)
        return least

    def copy(size: int) -> float:
        source = torch.zeros(size // 4)
        target = torch.empty_like(source)
        return 2 * size / best(lambda: target.copy_(source)) / 1e12

    return {
        "gemm_tflops": round(2 * n**3 / best(lambda: torch.mm(x, w, out=y)) / 1e12, 4),
        "copy_tbs": round(copy(2**26), 5),
        "cached_copy_tbs": round(copy(2**19), 5),
        "cached_bytes": float(2**20),
    }


def settle_power(device: torch.device, seconds: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Back-to-back GEMM of random numbers for ``seconds``; returns the ceilings of this run: TFLOP/s of it, TB/s of a copy."""
    if device.type != "cuda":
        return {}
    n = 8192
    x, w = (torch.randn(n, n, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    y = torch.empty_like(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stop = time.perf_counter() + seconds
    rate = 0.0
    while time.perf_counter() < stop:
        start.record()
        for _ in range(20):
            torch.mm(x, w, out=y)
        end.record()
        end.synchronize()
        rate = 20 * 2 * n**3 / start.elapsed_time(end) / 1e9
    source = torch.empty(2**29, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    copied = 10 * 2 * source.numel() * 4
    return {"gemm_tflops": round(rate, 1), "copy_tbs": round(copied / start.elapsed_time(end) / 1e9, 3)}


def compare(
    contenders: Mapping[str, Call], baseline: str, device: torch.device, *, rounds: int, sets: int, inner: int = 1
) -> dict[str, dict[str, Any]]:
    """Median microseconds per contender and its ratio to ``baseline``, with the 10th and 90th percentile of paired ratios.

    Args:
        contenders: Name → ``call(set index)``. One that raises in its first call is reported as failed and left out.
        rounds: Rounds of A B C C B A.
        sets: Number of input sets that ``call`` rotates through.
        inner: Calls that one measurement covers (divided out again).
    """
    result: dict[str, dict[str, Any]] = {}
    alive: dict[str, Call] = {}
    for name, call in contenders.items():
        try:
            for index in range(min(sets, 2)):
                call(index)
            _synchronise(device)
            alive[name] = call
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    times: dict[str, list[float]] = {name: [] for name in alive}
    order = [*alive, *reversed(list(alive))]
    step = 0
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a measurement is not the contender's
    try:
        for _ in range(rounds):
            marks = []
            if device.type == "cuda":
                torch.cuda._sleep(
                    10_000_000
                )  # some 5 ms of backlog: the GPU never waits for Python between two launches
            for name in order:
                mark = _Mark(device)
                for _ in range(inner):
                    alive[name](step % sets)
                    step += 1
                marks.append((name, mark.stop()))
            _synchronise(device)
            for name in alive:
                both = [stop() for other, stop in marks if other == name]
                times[name].append(sum(both) / len(both) / inner)
    finally:
        if collecting:
            gc.enable()
    return result | _summary(times, baseline)


def compare_graphs(
    contenders: Mapping[str, Call], baseline: str, device: torch.device, *, rounds: int, sets: int, repeat: int = 20
) -> dict[str, dict[str, Any]]:
    """As :func:`compare`, each contender a CUDA graph of ``repeat`` calls over the rotating sets."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name, call in contenders.items():
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # compile and fill caches outside the capture
                for index in range(sets):
                    call(index)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for index in range(repeat):
                    call(index % sets)
            graphs[name] = graph
        except Exception as error:
            failed[name] = {"error": f"not capturable: {type(error).__name__}: {error}".splitlines()[0][:200]}
            torch.cuda.synchronize(device)

    def replay(graph: torch.cuda.CUDAGraph) -> Call:
        return lambda _: graph.replay()

    measured = compare({n: replay(g) for n, g in graphs.items()}, baseline, device, rounds=rounds, sets=1)
    for entry in measured.values():
        if "us" in entry:
            entry["us"] = round(entry["us"] / repeat, 3)
            entry["us_p10_p90"] = [round(value / repeat, 3) for value in entry["us_p10_p90"]]
    return failed | measured


class _Mark:
    """Start of a measurement; ``stop()`` returns a function that gives the microseconds once the device is synchronised."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        else:
            self.start = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        if self.cuda:
            self.events[1].record()
            return lambda: self.events[0].elapsed_time(self.events[1]) * 1000
        elapsed = (time.perf_counter() - self.start) * 1e6
        return lambda: elapsed


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        entry: dict[str, Any] = {"us": round(statistics.median(values), 3), "rounds": len(values)}
        entry["us_p10_p90"] = [round(value, 3) for value in _spread(values)]
        if baseline in times:
            ratios = [v / b for v, b in zip(values, times[baseline], strict=True)]
            entry["ratio"] = round(statistics.median(ratios), 4)
            entry["ratio_p10_p90"] = [round(value, 4) for value in _spread(ratios)]
        result[name] = entry
    return result


def _spread(values: list[float]) -> tuple[float, float]:
    """10th and 90th percentile."""
    ordered, last = sorted(values), len(values) - 1
    return ordered[round(last * 0.1)], ordered[round(last * 0.9)]
