"""What is read from a CPU's rows at real sizes (``size`` ``cpu``) for the table of goals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .collect import Collected, best_of_ours

__all__ = ["added_operations", "one_token", "strongest_peer"]

_SETTING = ("shape", "mode", "tokens", "rank", "rule", "dtype", "launch")
#: What a user would take instead: a delta without a kernel, a compiler, an adapter of the same rank.
_PEERS = ("kconcat", "compile", "peft")


def _settings(c: Collected, device: str, **fields: Any) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The MLP's rows with figures, by what they measure."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in c.of("kernels", device, size="cpu", op="mlp", **fields):
        if row["status"] == "ok":
            found.setdefault(tuple(row[name] for name in _SETTING), []).append(row)
    return found


def strongest_peer(c: Collected, device: str) -> tuple[str, bool] | None:
    """Ours ÷ the fastest peer, over all settings."""
    factors: dict[str, float] = {}
    for (shape, mode, tokens, rank, *_), rows in _settings(c, device).items():
        ours, theirs = best_of_ours(rows, "us"), [row["us"] for row in rows if row["provider"] in _PEERS]
        if ours is not None and theirs:
            factors[f"{shape} {mode} T={tokens:,} r={rank}"] = ours["us"] / min(theirs)
    if not factors:
        return None
    worst = max(factors, key=lambda name: factors[name])
    won = sum(factor <= 1 for factor in factors.values())
    return f"{won} of {len(factors)} rows; slowest {factors[worst]:.3f} of it ({worst})", won == len(factors)


def _forward(c: Collected, device: str, **fields: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """``(ours, frozen)`` of every forward."""
    pairs = []
    for rows in _settings(c, device, mode="forward", **fields).values():
        ours, frozen = best_of_ours(rows, "us"), next((r for r in rows if r["provider"] == "frozen"), None)
        if ours is not None and frozen is not None:
            pairs.append((ours, frozen))
    return pairs


def added_operations(least_tokens: int) -> Callable[[Collected, str], tuple[str, bool] | None]:
    """The forward's time ÷ the frozen layer's, over the operations' ratio."""

    def find(c: Collected, device: str) -> tuple[str, bool] | None:
        factors = {}
        for ours, frozen in _forward(c, device):
            operations = ours["tflops"] * ours["us"] / (frozen["tflops"] * frozen["us"])
            at = f"({ours['shape']} T={ours['tokens']:,} r={ours['rank']})"
            if ours["tokens"] >= least_tokens:
                factors[f"{ours['ratio']:.3f} where they are {operations:.3f} {at}"] = ours["ratio"] / operations
        if not factors:
            return None
        worst = max(factors, key=lambda name: factors[name])
        won = sum(factor <= 1 for factor in factors.values())
        return f"{won} of {len(factors)} rows; worst {worst}", won == len(factors)

    return find


def one_token(limit: float) -> Callable[[Collected, str], tuple[str, bool] | None]:
    def find(c: Collected, device: str) -> tuple[str, bool] | None:
        pairs = _forward(c, device, tokens=1)
        text = ", ".join(f"{ours['shape']} {ours['ratio']:.3f}" for ours, _ in pairs)
        return (text, all(ours["ratio"] <= limit for ours, _ in pairs)) if pairs else None

    return find
