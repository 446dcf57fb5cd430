"""The sentences at the top of the page: what the delta costs and what it saves, from whatever was measured."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from ..grid import GRIDS
from ..results import human_bytes
from .collect import OURS, Collected, best_of_ours
from .goals import count, verdicts

__all__ = ["summarise"]

_KEY = ("op", "shape", "mode", "tokens", "rank", "rule", "dtype", "launch")


def summarise(collected: Collected) -> list[str]:
    """HTML sentences, most important first; each names its device and conditions."""
    lines = [line for device in collected.devices for line in _device_lines(collected, device)]
    refused = [row for row in collected.rows if row["status"] == "wrong"]
    if refused:
        names = ", ".join(dict.fromkeys(html.escape(str(row.get("provider", row.get("setting")))) for row in refused))
        lines.append(f'<strong class="bad">{len(refused)} rows refused</strong>: the numbers of {names} were wrong.')
    lines.append(f"Of the design's goals: <strong>{count(verdicts(collected))}</strong>.")
    if not any("NVIDIA" in device for device in collected.devices):
        lines.append(
            '<span class="unverified">No GPU has run this yet: no speed on a GPU is claimed anywhere on this page.</span>'
        )
    return lines


def _device_lines(collected: Collected, device: str) -> Iterator[str]:
    where = f"on {html.escape(device)}"
    for mode, phrase in (
        (
            "forward",
            "The delta costs <strong>{:+.1f} %</strong> of a forward: an NPT MLP takes {} the time of the same without",
        ),
        (
            "local",
            "Training locally ({:+.1f} %): an NPT MLP's forward and backward take {} the time of a frozen one's with dx",
        ),
        ("decode", "Decoding a token ({:+.1f} %): an NPT MLP takes {} the time of the same MLP without a delta"),
    ):
        ours = best_of_ours(_largest(collected, device, mode))
        if ours is not None:
            low, high = ours["ratio_p10_p90"]
            share = f"<strong>{ours['ratio']:.3f}×</strong> [{low:.3f}, {high:.3f}]"
            sentence = phrase.format(100 * (ours["ratio"] - 1), share)
            yield f"{sentence} ({_conditions(ours)}, provider {ours['provider']}) {where}.{_small(ours)}"
    loop = _loop(collected, device)
    if loop is not None:
        factor, row = loop
        yield (
            f"<strong>{factor:,.0f}×</strong> faster than the published per-token loop ({_conditions(row)}, {row['mode']}) "
            f"{where}.{_small(row)}"
        )
    yield from _memory_lines(collected, device, where)
    yield from _train_lines(collected, device, where)


def _conditions(row: dict[str, Any]) -> str:
    return f"{html.escape(row['shape'])}, T = {row['tokens']:,}, r = {row['rank']}, {row['dtype']}"


def _small(row: dict[str, Any]) -> str:
    return (
        ' <span class="unverified">Small stand-in shape: says nothing about real sizes.</span>'
        if row["size"] == "small"
        else ""
    )


def _settings(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _KEY), []).append(row)
    return groups


def _largest(collected: Collected, device: str, mode: str) -> list[dict[str, Any]]:
    """The setting that speaks for a mode of the MLP: Llama-3.1-8B, real size if there is one, most tokens, the grid's rank."""
    rows = [r for r in collected.of("kernels", device, op="mlp", mode=mode) if "ratio" in r and r["provider"] in OURS]
    groups = _settings(rows)

    def rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
        row = groups[key][0]
        tokens = -row["tokens"] if mode == "decode" else min(row["tokens"], 8192)
        full = row["size"] != "small"
        usual = GRIDS[row["size"]].base_rank
        return full, row["shape"].startswith("Llama-3.1-8B"), tokens, -abs(row["rank"] - usual)

    return groups[max(groups, key=rank)] if groups else []


def _loop(collected: Collected, device: str) -> tuple[float, dict[str, Any]] | None:
    best: tuple[float, dict[str, Any]] | None = None
    for rows in _settings([r for r in collected.of("kernels", device, op="mlp") if "us" in r]).values():
        loop = next((row for row in rows if row["provider"] == "loop"), None)
        ours = best_of_ours(rows, "us")
        if loop is None or ours is None:
            continue
        factor = loop["us"] / ours["us"]
        key = (loop["size"] != "small", factor)
        if best is None or key > (best[1]["size"] != "small", best[0]):
            best = factor, loop
    return best


def _memory_lines(collected: Collected, device: str, where: str) -> Iterator[str]:
    for formula in collected.of("memory", device, status="formula", op="linear", mode="local"):
        same = {name: formula[name] for name in ("op", "shape", "mode", "tokens", "rank", "dtype")}
        ours = best_of_ours(collected.of("memory", device, **same), "peak_bytes")
        if ours is not None and formula["peak_bytes"] >= 2**37:
            yield (
                f"One projection of {_conditions(formula)}: every ΔW built would be "
                f"<strong>{human_bytes(formula['peak_bytes'])}</strong> (by formula); forward and local backward here peak at "
                f"<strong>{human_bytes(ours['peak_bytes'])}</strong> beyond inputs and weights, measured {where} "
                f"(provider {ours['provider']})."
            )
            return


def _train_lines(collected: Collected, device: str, where: str) -> Iterator[str]:
    rows = [r for r in collected.of("train", device, setting="resident", converted="all") if "tokens_per_s" in r]
    if rows:
        row = max(rows, key=lambda r: (r["size"] != "small", r["frozen_parameters"], r["mode"] == "local"))
        mfu = f", {100 * row['mfu']:.0f} % MFU" if "mfu" in row else ""
        small = _small(row)
        yield (
            f"Training {html.escape(row['model'])}, all layers, {row['mode'].replace('_', ' ')}: "
            f"<strong>{row['tokens_per_s']:,.0f} tokens/s</strong>{mfu}, peak {human_bytes(row['peak_bytes'])} "
            f"(batch {row['batch']} × {row['sequence']}, r = {row['rank']}, {row['dtype']}) {where}.{small}"
        )
    pairs = collected.of("train", device, setting="published loop", status="ok")
    for loop in pairs:
        same = {name: loop[name] for name in ("model", "converted", "mode", "rank", "batch", "sequence", "dtype")}
        form = collected.of("train", device, setting="published form", status="ok", **same)
        if form and loop is max(pairs, key=lambda r: (r["size"] != "small", r["frozen_parameters"])):
            factor = form[0]["tokens_per_s"] / loop["tokens_per_s"]
            yield (
                f"The published form trains <strong>{factor:,.1f}×</strong> faster through our ops than by its per-token loop "
                f"({html.escape(loop['model'])}, 4 layers, {loop['sequence']} tokens) {where}.{_small(loop)}"
            )
