"""Reads the files of ``benchmarks/gpu_check.py``, which ``npt bench check`` replaced: the first GPU figures are in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..measure.shapes import MODELS

__all__ = ["from_gpu_check", "is_gpu_check"]

_WHOLE_OP = re.compile(
    r"(?P<what>MLP forward|MLP local training|gate projection|matched norm) (?P<shape>\S+) T=(?P<tokens>\d+)(?: R=(?P<rank>\d+))?"
)
_OPS = {
    "MLP forward": ("mlp", "forward"),
    "MLP local training": ("mlp", "local"),
    "gate projection": ("linear", "forward"),
    "matched norm": ("norm", "forward"),
}


def is_gpu_check(data: Any) -> bool:
    """Whether a file's content is such a result."""
    return isinstance(data, dict) and {"environment", "numerics", "repeats", "timings", "backends"} <= data.keys()


def from_gpu_check(data: dict[str, Any]) -> dict[str, Any]:
    """The content as a file of the suite ``check``: the same figures under today's names."""
    size = "small" if data["small"] else "full"
    rows = [*_checks(data), *_timings(data), *_memory(data)]
    return {
        "schema": 1, "suite": "check", "size": size, "complete": not data["not_run"], "environment": data["environment"],
        "command": data["command"], "backends": data["backends"], "ceilings": data.get("ceilings", {}), "rows": rows,
        "not_run": data["not_run"], **({"note": data["note"]} if "note" in data else {}),
    }  # fmt: skip


def _checks(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, entries in (("numerics", data["numerics"]), ("repeat", data["repeats"])):
        for entry in entries:
            kept = {
                name: value for name, value in entry.items() if name not in ("backend", "passed", "error", "complete")
            }
            row = {"kind": kind, "launch": None, "provider": entry["backend"], **kept, "status": "ok"}
            if "error" in entry:
                row |= {"status": "failed", "reason": entry["error"]}
            elif not entry["passed"]:
                worst = max(entry.get("ratios", {"": float("inf")}).items(), key=lambda item: item[1])
                differ = f"{entry.get('different')} of {entry.get('times')} runs differ"
                reason = f"{worst[0]} is off by {worst[1]:.3g} times what it may be" if kind == "numerics" else differ
                row |= {"status": "wrong", "reason": reason}
            elif not entry.get("complete", True):
                row |= {"status": "incomplete", "reason": f"out of time after {entry['times']} runs"}
            yield row


def _timings(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in data["timings"]:
        found = _WHOLE_OP.fullmatch(group["name"])
        for provider, times in group["contenders"].items():
            measured = {"status": "failed", "reason": times["error"]} if "error" in times else {"status": "ok", **times}
            if found is None or found["shape"] not in MODELS:
                yield {"kind": "kernel", "case": group["name"], "launch": group["mode"], "provider": provider,
                       "baseline": group["baseline"], **measured}  # fmt: skip
                continue
            (op, mode), model = _OPS[found["what"]], MODELS[found["shape"]]
            yield {
                "suite": "kernels", "op": op, "mode": "decode" if group["mode"] == "graph" else mode, "shape": model.title,
                "d": model.d, "f": model.f, "tokens": int(found["tokens"]), "rank": None if op == "norm" else int(found["rank"]),
                "rule": "self_key", "dtype": "bfloat16", "launch": group["mode"], "provider": provider, **measured,
            }  # fmt: skip


def _memory(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One T × f tensor is the unit; the old figure leaves gate and up out, which today's has in it."""
    for name, units in data.get("memory", {}).items():
        shape, tokens, provider = name.split()
        model, count = MODELS[shape], int(tokens.removeprefix("T="))
        kept = units + (2 if model.gated else 1)
        yield {
            "suite": "memory", "op": "mlp", "mode": "local", "shape": model.title, "d": model.d, "f": model.f, "tokens": count,
            "rank": 64, "rule": "self_key", "dtype": "bfloat16", "provider": provider, "status": "ok",
            "peak_bytes": round(kept * count * model.f * 2), "peak_units": round(kept, 4),
        }  # fmt: skip
