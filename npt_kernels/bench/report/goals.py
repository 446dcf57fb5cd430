"""The goals of the design and what was measured of each; a goal that no file speaks of is *unverified*, not empty.

The page and the table in docs/benchmarks.md are both made here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..results import BenchError, human_bytes
from .collect import Asked, Collected, best_of_ours, on_a_cpu
from .cpu_goals import added_operations, one_token, strongest_peer

__all__ = ["GOALS", "Goal", "Verdict", "markdown_table", "replace_table", "verdicts"]

UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Verdict:
    """What was measured of a goal. ``met`` is ``None`` where nothing was."""

    goal: Goal
    measured: str
    met: bool | None
    where: str = ""


@dataclass(frozen=True)
class Goal:
    """One line of the design's table. ``find(collected, device)`` gives ``(text, met)`` or ``None``."""

    what: str
    goal: str
    find: Callable[[Collected, str], tuple[str, bool] | None]
    #: Conditions that the figures are for; shown beside the goal.
    at: str = ""
    #: Whether a CPU's figures may speak for it.
    on_cpu: bool = False


def _group(c: Collected, device: str, **fields: Any) -> list[dict[str, Any]]:
    return [row for row in c.of("kernels", device, size="full", **fields) if row["status"] == "ok"]


def _ours(c: Collected, device: str, **fields: Any) -> dict[str, Any] | None:
    return best_of_ours(_group(c, device, **fields))


_8B: dict[str, Any] = {"shape": "Llama-3.1-8B", "tokens": 8192, "rank": 64, "dtype": "bfloat16"}


def _ratio(limit: float, **fields: Any) -> Callable[[Collected, str], tuple[str, bool] | None]:
    def find(c: Collected, device: str) -> tuple[str, bool] | None:
        row = _ours(c, device, **fields)
        if row is None:
            return None
        low, high = row["ratio_p10_p90"]
        return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}] ({row['provider']})", row["ratio"] <= limit

    return find


def _any_rank(c: Collected, device: str) -> tuple[str, bool] | None:
    rows = {}
    for rank in (64, 256, 1024):
        row = _ours(c, device, op="linear", mode="forward", **{**_8B, "rank": rank})
        if row is not None:
            rows[rank] = row["ratio"]
    if not rows:
        return None
    met = all(ratio <= (1.015 if rank == 64 else 1.02 * (4096 + rank) / 4096) for rank, ratio in rows.items())
    return ", ".join(f"r = {rank}: {ratio:.3f}" for rank, ratio in rows.items()), met


def _both_widths(c: Collected, device: str) -> tuple[str, bool] | None:
    wide = _ours(c, device, op="mlp", mode="forward", **_8B)
    narrow = _ours(c, device, op="mlp", mode="forward", **{**_8B, "shape": "GPT-2"})
    if wide is None:
        return None
    text = f"{wide['ratio']:.3f} ({wide['provider']})"
    met = wide["ratio"] <= 0.97
    if narrow is not None:
        text, met = f"{text}; GPT-2 {narrow['ratio']:.3f}", met and narrow["ratio"] <= 0.80
    return text, met


def _strongest(c: Collected, device: str) -> tuple[str, bool] | None:
    """Ours ÷ the better of K-concatenation and torch.compile in every setting of the MLP."""
    worst: tuple[float, str] | None = None
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in _group(c, device, op="mlp"):
        key = tuple(row[name] for name in ("shape", "mode", "tokens", "rank", "rule", "dtype", "launch"))
        settings.setdefault(key, []).append(row)
    for key, rows in settings.items():
        ours = best_of_ours(rows, "us")
        theirs = [row["us"] for row in rows if row["provider"] in ("kconcat", "compile")]
        if ours is not None and theirs:
            factor = ours["us"] / min(theirs)
            worst = max(worst or (0.0, ""), (factor, f"{key[0]} {key[1]} T={key[2]} r={key[3]}"))
    if worst is None:
        return None
    compiled = any(row["provider"] == "compile" for rows in settings.values() for row in rows)
    without = "" if compiled else ", torch.compile not measured"
    return f"slowest row {worst[0]:.3f} of it ({worst[1]}){without}", worst[0] < 1


def _against_the_loop(c: Collected, device: str) -> tuple[str, bool] | None:
    factors = []
    for loop in _group(c, device, provider="loop", op="mlp"):
        fields = {n: loop[n] for n in ("op", "shape", "mode", "tokens", "rank", "rule", "dtype", "launch")}
        ours = best_of_ours(_group(c, device, **fields), "us")
        if ours is not None and loop["tokens"] > 1:
            factors.append(loop["us"] / ours["us"])
    return None if not factors else (f"{min(factors):,.0f}× to {max(factors):,.0f}×", max(factors) >= 100)


def _memory(c: Collected, device: str) -> tuple[str, bool] | None:
    rows = [r for r in c.of("memory", device, op="mlp", mode="local", shape="Llama-3.1-8B", tokens=8192, rank=64)]
    row = best_of_ours(rows, "peak_units")
    return (
        None
        if row is None
        else (f"{row['peak_units'] - 2:.3f} of T×f ({row['provider']})", row["peak_units"] - 2 <= 0.05)
    )


def _train(setting: str, least_rate: float, most_gib: float) -> Callable[[Collected, str], tuple[str, bool] | None]:
    def find(c: Collected, device: str) -> tuple[str, bool] | None:
        fields = {"model": "Llama-3.1-8B", "converted": "all", "mode": "local", "setting": setting, "rank": 64}
        rows = [r for r in c.of("train", device, **fields) if r["status"] == "ok" and r["sequence"] == 2048]
        if not rows:
            return None
        row = max(rows, key=lambda r: r["tokens_per_s"])
        text = f"{row['tokens_per_s']:,.0f} tokens/s, {human_bytes(row['peak_bytes'])}"
        return text, row["tokens_per_s"] >= least_rate and row["peak_bytes"] <= most_gib * 2**30

    return find


def _overhead(c: Collected, device: str) -> tuple[str, bool] | None:
    entries = c.overhead_of(device, op="linear", mode="forward")
    by_name = {e["provider"]: e for e in entries if "over_frozen_us" in e}
    if "eager" not in by_name:
        return None
    value = by_name["eager"]["over_frozen_us"]
    return f"{value:.1f} µs (eager)", value <= 10


def _quality(result: dict[str, Any]) -> str:
    return f"ratio {result['perplexity_ratio']:.4f}, KL {round(result['kl'], 4) + 0.0:.4f}"


def _fidelity(name: str, rank: str, kl: float) -> Callable[[Collected, str], tuple[str, bool] | None]:
    """Of the record ``name``.json, trained where it was trained."""

    def find(c: Collected, device: str) -> tuple[str, bool] | None:
        runs = c.runs_of(device, name)
        if not runs:
            return None
        result = runs[0]["trained"] or runs[0]["converted"]
        text = f"{_quality(result)} (SmolLM2-135M, mean rank {rank} of 576, trained)"
        return text, result["perplexity_ratio"] <= 1.01 and result["kl"] <= kl

    return find


def _full_rank(c: Collected, device: str) -> tuple[str, bool] | None:
    runs = c.runs_of(device, "full-rank")
    if not runs:
        return None
    result = runs[0]["converted"]
    text = f"{_quality(result)} (SmolLM2-135M)"
    return text, round(result["perplexity_ratio"], 3) == 1.0


_AT_8B = "Llama-3.1-8B, T = 8192, r = 64, bf16"


def _mainloop(c: Collected, device: str) -> tuple[str, bool] | None:
    least = {"cuda-mainloop": 0.98, "triton-mainloop": 0.92}
    rows = {row["provider"]: 1 / row["ratio"] for row in _group(c, device, op="linear", mode="forward", **_8B)
            if row["provider"] in least and "ratio" in row}  # fmt: skip
    if not rows:
        return None
    return ", ".join(f"{v:.3f} ({name[:-9]})" for name, v in rows.items()), all(v >= least[n] for n, v in rows.items())


GOALS: tuple[Goal, ...] = (
    Goal("segmented-K GEMM with one segment ÷ the vendor's, TFLOP/s", "≥ 0.98 (cuda), ≥ 0.92 (triton)", _mainloop, _AT_8B),
    Goal("the delta's cost: gate projection with the segment ÷ without", "≤ 1.015 at r = 64; ≤ 1.02·(d + R)/d at any R",
         _any_rank, "Llama-3.1-8B, T = 8192, bf16"),
    Goal("NPT MLP forward ÷ the unmodified, unfused MLP", "≤ 0.97; ≤ 0.80 at GPT-2 width", _both_widths, _AT_8B),
    Goal("NPT MLP forward and backward, local ÷ frozen MLP forward and dx", "≤ 0.70",
         _ratio(0.70, op="mlp", mode="local", **_8B), _AT_8B),
    Goal("against the strongest baseline (K-concatenation, torch.compile)", "faster in every row", _strongest, "every MLP row"),
    Goal("against the published per-token loop", "≥ 100×", _against_the_loop, "MLP, more than one token"),
    Goal("peak memory of forward and backward beyond inputs, weights, gate and up", "≤ 5 % of one T×f tensor", _memory,
         _AT_8B),
    Goal("training Llama-3.1-8B, all 32 layers, local", "≥ 18,000 tokens/s and ≤ 20 GiB",
         _train("resident", 18000, 20), "seq 2048, r = 64"),
    Goal("the same, frozen layers streamed", "≥ 9,000 tokens/s and ≤ 8 GiB", _train("streamed", 9000, 8), "seq 2048, r = 64"),
    Goal("decode, T = 1, MLP with delta ÷ without (CUDA graph)", "≤ 1.02",
         _ratio(1.02, op="mlp", mode="decode", **{**_8B, "tokens": 1}), "Llama-3.1-8B, r = 64, bf16"),
    Goal("call overhead over F.linear", "≤ 10 µs", _overhead, "shapes with no arithmetic to speak of"),
    Goal("on a CPU: ÷ the fastest of K-concatenation, torch.compile and LoRA of the same rank", "≤ 1 in every row",
         strongest_peer, "every MLP row, fp32", on_cpu=True),
    Goal("on a CPU: forward ÷ frozen", "≤ the ratio of their operations", added_operations(256), "MLP, T ≥ 256, fp32",
         on_cpu=True),
    Goal("the same for one token", "≤ 1.25", one_token(1.25), "MLP, T = 1, r = 128, fp32", on_cpu=True),
    Goal("perplexity NPT ÷ original, conversion alone, all layers", "1.000", _full_rank, "r = d", on_cpu=True),
    Goal("perplexity NPT ÷ original, and KL, held-out text, all layers", "≤ 1.01 and ≤ 0.05 nats",
         _fidelity("demo-rank-128", "128", 0.05), "mean r ≈ d/4", on_cpu=True),
    Goal("the same at 1.10 × the original's multiplications (o_proj folded)", "≤ 1.01 and ≤ 0.04 nats",
         _fidelity("demo", "184", 0.04), "mean r ≈ d/3", on_cpu=True),
)  # fmt: skip


def verdicts(collected: Collected) -> list[Verdict]:
    """One per goal, from the first device that has figures for it; a CPU speaks only for goals that are not about a GPU."""
    names = dict.fromkeys([*collected.devices, *(run["source"].facts["device"] for run in collected.runs)])
    found = []
    for goal in GOALS:
        verdict = Verdict(goal, UNVERIFIED, None)
        for device in names:
            if on_a_cpu(device) and not goal.on_cpu:
                continue
            asked = Asked(collected)
            answer = goal.find(asked, device)
            if answer is not None:
                verdict = Verdict(goal, answer[0], answer[1], device + (", stale" if asked.stale else ""))
                break
        found.append(verdict)
    return found


def markdown_table(collected: Collected) -> str:
    """The goals as a Markdown table."""
    lines = ["| what | at | goal | measured | on |", "|---|---|---|---|---|"]
    for v in verdicts(collected):
        measured = f"*{v.measured}*" if v.met is None else f"{v.measured}, {'met' if v.met else '**not met**'}"
        lines.append(f"| {v.goal.what} | {v.goal.at} | {v.goal.goal} | {measured} | {v.where} |")
    return "\n".join(lines)


_BEGIN, _END = "<!-- goals: made by `npt bench report --table`, do not edit -->", "<!-- end of goals -->"


def replace_table(file: Path, collected: Collected) -> None:
    """Put the table between the markers in ``file``. Raises :class:`BenchError` if the file or the markers are not there."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--table {file}: {error.strerror}") from error
    pattern = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)
    if not pattern.search(text):
        raise BenchError(f"--table {file}: it has no lines {_BEGIN!r} and {_END!r} to put the table between")
    block = f"{_BEGIN}\n\n{markdown_table(collected)}\n\n{_END}"
    file.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")


def count(found: Sequence[Verdict]) -> str:
    """``3 met, 1 not met, 7 unverified``."""
    kinds = [(sum(v.met is True for v in found), "met"), (sum(v.met is False for v in found), "not met"),
             (sum(v.met is None for v in found), UNVERIFIED)]  # fmt: skip
    return ", ".join(f"{number} {name}" for number, name in kinds if number)
