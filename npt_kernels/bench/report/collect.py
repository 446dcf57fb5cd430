"""Everything the report shows, out of result files: rows by device, what is stale, the sentences of the summary."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..results import load_results, newest_rows, repository

__all__ = ["OURS", "Asked", "Collected", "Source", "best_of_ours", "collect", "on_a_cpu"]

#: Providers that are ours, in order of preference where several were measured.
OURS = ("cuda", "triton", "eager")
_OPS = ("npt_kernels/ops", "npt_kernels/kernels", "npt_kernels/rules", "npt_kernels/functional.py", "csrc")
_MODEL = ("npt_kernels/model", "npt_kernels/component.py", "npt_kernels/training")
#: What a suite measures: a change there makes its figures stale.
_MEASURED_PATHS = {
    "kernels": _OPS,
    "memory": _OPS,
    "check": _OPS,
    "train": (*_OPS, *_MODEL, "npt_kernels/offload"),
    "run": (*_OPS, *_MODEL, "npt_kernels/conversion"),
}  # fmt: skip
#: Who is chosen unasked: a row names who ran.
_CHOICE = (
    "npt_kernels/ops/registry.py", "npt_kernels/kernels/backend.py", "npt_kernels/kernels/__init__.py",
    "npt_kernels/kernels/cuda/__init__.py", "npt_kernels/kernels/triton/__init__.py",
)  # fmt: skip
#: What of it never runs on the other kind of device.
_ON_CPUS = (
    "csrc/cpu",
    "npt_kernels/kernels/native*.py",
    "npt_kernels/kernels/cpu_layout.py",
    "npt_kernels/model/one_row.py",
)
_ON_GPUS = (
    "csrc/*.cpp", "csrc/*.h", "csrc/common", "csrc/decode", "csrc/gemm", "csrc/inst", "csrc/low_rank", "csrc/norm",
    "npt_kernels/kernels/cuda", "npt_kernels/kernels/triton",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One result file.

    Attributes:
        name: Path below the folder that was read.
        suite: Its suite, or ``run`` for the record of a training run.
        facts: Its environment.
        size: One of ``SIZES``, or empty.
        stale: Why its figures no longer describe the code, or ``None``.
        note: Incomplete, part of several, uncommitted changes.
    """

    name: str
    suite: str
    facts: dict[str, Any]
    size: str
    stale: str | None
    note: str


@dataclass
class Collected:
    """What the page is made of."""

    sources: list[Source]
    rows: list[dict[str, Any]]
    overhead: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    made: str = ""

    @property
    def devices(self) -> list[str]:
        """GPUs first, then by number of rows."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row["device"]] = counts.get(row["device"], 0) + 1
        return sorted(counts, key=lambda name: (name.startswith("CPU"), -counts[name]))

    def of(self, suite: str, device: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Rows of a suite with those values."""
        return [
            row
            for row in self.rows
            if row["suite"] == suite
            and (device is None or row["device"] == device)
            and all(row.get(name) == value for name, value in fields.items())
        ]

    def overhead_of(self, device: str, **fields: Any) -> list[dict[str, Any]]:
        """Entries of host overhead with those values."""
        entries = (entry for entry in self.overhead if entry["device"] == device)
        return [entry for entry in entries if all(entry.get(name) == value for name, value in fields.items())]

    def runs_of(self, device: str, name: str) -> list[dict[str, Any]]:
        """Records of ``npt train`` of that name."""
        return [run for run in self.runs if run["source"].facts["device"] == device and run["name"] == name]


class Asked(Collected):
    """A :class:`Collected` that remembers whether anything that was taken from it is stale."""

    def __init__(self, collected: Collected) -> None:
        super().__init__(collected.sources, collected.rows, collected.overhead, collected.runs, collected.made)
        self.stale = False

    def of(self, suite: str, device: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        found = super().of(suite, device, **fields)
        self.stale |= any(row["stale"] for row in found)
        return found

    def overhead_of(self, device: str, **fields: Any) -> list[dict[str, Any]]:
        found = super().overhead_of(device, **fields)
        self.stale |= any(entry["stale"] for entry in found)
        return found

    def runs_of(self, device: str, name: str) -> list[dict[str, Any]]:
        found = super().runs_of(device, name)
        self.stale |= any(run["stale"] for run in found)
        return found


def collect(folder: Path) -> Collected:
    """Read every result below ``folder``. Raises :class:`BenchError` if there is none."""
    runs = _training_runs(folder if folder.is_dir() else folder.parent)
    results = load_results(folder, strict=not runs)
    sources = [_source(result, folder) for result in results]
    stale = {id(result): source.stale for result, source in zip(results, sources, strict=True)}
    rows = []
    for row in newest_rows(results):
        origin = row.pop("source")
        rows.append(
            row | {"device": origin["environment"]["device"], "size": origin["size"], "stale": stale[id(origin)],
                   "commit": origin["environment"].get("commit", ""), "ceilings": origin.get("ceilings", {})}
        )  # fmt: skip
    overhead = _newest_overhead(results, stale)
    sources += [run["source"] for run in runs]
    return Collected(sources, rows, overhead, runs, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")


def _source(result: dict[str, Any], folder: Path) -> Source:
    notes = []
    if not result.get("complete"):
        notes.append(f"interrupted: {len(result.get('not_run', []))} groups not run")
    if "part" in result:
        notes.append(f"part {result['part']}")
    if result["environment"].get("uncommitted_changes"):
        notes.append("uncommitted changes")
    if "note" in result:
        notes.append(str(result["note"]))
    path = result["path"]
    name = str(path.relative_to(folder)) if folder.is_dir() and path.is_relative_to(folder) else path.name
    return Source(
        name, result["suite"], result["environment"], result.get("size", ""),
        staleness(result["suite"], result["environment"].get("commit", ""), result["environment"].get("device", "")),
        ", ".join(notes),
    )  # fmt: skip


def on_a_cpu(device: str) -> bool:
    """Whether a result's device is a CPU."""
    return not any(name in device for name in ("NVIDIA", "AMD Instinct", "GPU")) or "no GPU" in device


def staleness(suite: str, commit: str, device: str = "") -> str | None:
    """Why figures measured at ``commit`` no longer describe the code here; ``None`` if they do or nothing is known.

    ``device``: the name in the result; a change of what runs on the other kind of device takes nothing from a figure.
    """
    root = repository()
    if root is None:
        return None
    if not commit:
        return "measured without a commit"
    git = ["git", "-C", str(root)]
    if subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True).returncode:
        return f"commit {commit[:9]} is not in this repository"
    elsewhere = ("**/*.md", *_CHOICE, *(() if not device else _ON_GPUS if on_a_cpu(device) else _ON_CPUS))
    paths = [*_MEASURED_PATHS[suite], *(f":(exclude,glob){path}" for path in elsewhere if "*" in path),
             *(f":(exclude){path}" for path in elsewhere if "*" not in path)]  # fmt: skip
    log = subprocess.run([*git, "log", "--format=%h", f"{commit}..HEAD", "--", *paths], capture_output=True, text=True)
    newer = log.stdout.split()
    if not newer:
        return None
    return f"measured at {commit[:9]}; what it measures changed in {newer[0]}" + (
        f" and {len(newer) - 1} earlier commits" if len(newer) > 1 else ""
    )


def _newest_overhead(results: Iterable[dict[str, Any]], stale: dict[int, str | None]) -> list[dict[str, Any]]:
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        device = result["environment"]["device"]
        for entry in result.get("host_overhead", []):
            key = (device, entry["op"], entry["mode"], entry["gated"], entry["provider"])
            entries[key] = entry | {"device": device, "stale": stale[id(result)]}
    return list(entries.values())


def _training_runs(folder: Path) -> list[dict[str, Any]]:
    """Records of ``npt train`` runs that lie beside the results: fidelity of real conversions."""
    runs = []
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            result = data["result"]
            base, converted = result["base"], result["converted"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        facts = {name: data.get(name, "") for name in ("device", "date", "commit")} | data.get("versions", {})
        stale = staleness("run", _full_commit(str(facts["commit"])), str(facts["device"]))
        source = Source(str(path.relative_to(folder)), "run", facts, "", stale, str(data.get("note", "")))
        runs.append(
            {"name": path.stem, "command": data.get("command", ""), "source": source, "base": base,
             "converted": converted, "trained": result.get("trained"), "stale": stale}
        )  # fmt: skip
    return runs


def _full_commit(short: str) -> str:
    root = repository()
    if root is None or not short:
        return short
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--verify", "-q", f"{short}^{{commit}}"],
                           capture_output=True, text=True)  # fmt: skip
    return found.stdout.strip() or short


def best_of_ours(rows: Sequence[dict[str, Any]], figure: str = "ratio") -> dict[str, Any] | None:
    """Of rows of one setting, ours with the least ``figure``."""
    candidates = [row for row in rows if row.get("provider") in OURS and row["status"] == "ok" and figure in row]
    return min(candidates, key=lambda row: float(row[figure]), default=None)
