"""``npt bench compare``: what got worse from one result to the next, beyond the spread of both.

A figure is worse when its median is worse by more than ``threshold`` *and* the 10–90 % ranges of the two do not touch. Times are
compared as ratios to the floor measured in the same rounds, which a different clock does not move; the floor's own rows, rows
without one, and training are compared as they are. Bytes have no spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .providers import BASELINE
from .results import KEY_FIELDS, BenchError, newest_rows, row_key

__all__ = ["Change", "Comparison", "compare_results"]

#: Bytes may differ by this much: allocators round, and a first step may see a cache.
_BYTES_THRESHOLD = 0.005


@dataclass(frozen=True)
class Change:
    """One figure of one row in both results. ``factor`` > 1 is worse; ``verdict``: worse, better or same."""

    name: str
    figure: str
    before: float
    after: float
    factor: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Everything ``compare`` found.

    Attributes:
        changes: Every figure both results have.
        broken: Rows that were right before and are wrong or failed now, with the reason.
        missing: Rows only the older result has. added: only the newer.
        devices: Of both.
    """

    changes: list[Change] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    devices: tuple[str, str] = ("", "")

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]

    @property
    def regressed(self) -> bool:
        return bool(self.worse or self.broken)


def compare_results(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *, threshold: float = 0.03, force: bool = False
) -> Comparison:
    """Compare loaded results (:func:`results.load_results`).

    Raises:
        BenchError: They come from different devices (unless ``force``), or have no row in common.
    """
    devices = (_device(before), _device(after))
    if devices[0] != devices[1] and not force:
        raise BenchError(
            f"these are of different devices ({devices[0]}; {devices[1]}): times say nothing about a change there. "
            "--force compares all the same"
        )
    old, new = ({_key(row): row for row in newest_rows(side)} for side in (before, after))
    measured = {key for key, row in old.items() if row["status"] in _FINISHED}
    if not measured & set(new):
        raise BenchError("the two results have no measured row in common; were they run with different filters?")
    result = Comparison(devices=devices)
    for key in old:
        name = _name(key)
        if key not in measured:
            continue
        if key not in new or new[key]["status"] in ("skipped", "unavailable"):
            reason = f" ({new[key]['reason']})" if key in new else ""
            result.missing.append(name + reason)
        elif new[key]["status"] in ("wrong", "failed"):
            result.broken.append(f"{name}: {new[key]['status']} now: {new[key]['reason']}")
        else:
            result.changes.extend(_changes(name, old[key], new[key], threshold))
    result.added.extend(_name(key) for key, row in new.items() if key not in measured and row["status"] in _FINISHED)
    return result


_FINISHED = ("ok", "formula", "checked")


def _device(results: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(str(result["environment"].get("device", "unknown")) for result in results)
    if len(names) > 1:
        raise BenchError(f"one side holds results of several devices ({'; '.join(names)}); give one device's folder")
    return next(iter(names))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row_key(row["suite"], row)


def _name(key: tuple[Any, ...]) -> str:
    values = dict(zip(KEY_FIELDS[key[0]], key[1:], strict=True))
    unit = {"tokens": "T={}", "rank": "r={}", "batch": "{}×", "sequence": "{} tokens", "converted": "{} layers"}
    words = [unit.get(k, "{}").format(v) for k, v in values.items() if (v is not None and v not in ("eager", "self_key"))
             or k == "provider"]  # fmt: skip
    return " ".join([key[0], *words])


def _changes(name: str, old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[Change]:
    changes = []
    suite = old["suite"]
    if (
        suite == "check"
        and old["kind"] == "kernel"
        and old["status"] == new["status"] == "ok"
        and "ratio" in old
        and "ratio" in new
    ):
        changes.append(_judge(name, "ratio", old, new, threshold, lower_is_better=True))
    if suite == "kernels" and old["status"] == new["status"] == "ok":
        figure = "ratio" if "ratio" in old and "ratio" in new and old["provider"] != BASELINE else "us"
        changes.append(_judge(name, figure, old, new, threshold, lower_is_better=True))
    elif suite == "train":
        changes.append(_judge(name, "tokens_per_s", old, new, threshold, lower_is_better=False))
    if suite in ("memory", "train"):
        changes.append(_judge(name, "peak_bytes", old, new, _BYTES_THRESHOLD, lower_is_better=True))
    return changes


def _judge(
    name: str, figure: str, old: dict[str, Any], new: dict[str, Any], threshold: float, *, lower_is_better: bool
) -> Change:
    before, after = float(old[figure]), float(new[figure])
    spread = f"{figure}_p10_p90"
    (low_before, high_before), (low_after, high_after) = (
        row.get(spread, (row[figure], row[figure])) for row in (old, new)
    )
    factor = (after / before if lower_is_better else before / after) if before and after else 1.0
    up, down = low_after > high_before, high_after < low_before
    worse, better = (up, down) if lower_is_better else (down, up)
    verdict = "same"
    if worse and factor > 1 + threshold:
        verdict = "worse"
    elif better and factor < 1 / (1 + threshold):
        verdict = "better"
    return Change(name, figure, before, after, factor, verdict)
