"""Result files: where and on what they were measured, written after every row, read back by the report and by ``compare``.

The format is documented in docs/benchmarks.md; ``SCHEMA`` goes up when a reader of the old one would misread the new one.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..durable_files import write_whole
from .gpu_check_files import from_gpu_check, is_gpu_check

__all__ = [
    "KEY_FIELDS",
    "SCHEMA",
    "BenchError",
    "ResultFile",
    "device_folder",
    "environment",
    "human_bytes",
    "load_results",
    "newest_rows",
    "repository",
    "row_key",
    "unknown_name",
    "write_json",
]

#: Sizes of a run: real ones on a GPU, real ones that a CPU can do, and small ones, which show that everything runs, not how fast.
SIZES = ("full", "cpu", "small")
SCHEMA = 1
SUITES = ("kernels", "memory", "train", "check")
#: What tells rows apart, per suite.
KEY_FIELDS = {
    "kernels": ("op", "shape", "mode", "tokens", "rank", "rule", "dtype", "launch", "provider"),
    "memory": ("op", "shape", "mode", "tokens", "rank", "rule", "dtype", "provider"),
    "train": (
        "model",
        "converted",
        "mode",
        "setting",
        "rule",
        "rank",
        "batch",
        "sequence",
        "dtype",
        "micro_batch",
        "backend",
    ),
    "check": ("kind", "case", "provider", "launch"),
}


class BenchError(ValueError):
    """A benchmark that cannot run as asked; the message is for users and needs no traceback."""


def unknown_name(
    option: str, value: str, known: Iterable[str], spellings: Mapping[str, str] | None = None
) -> BenchError:
    """The error for a name that does not exist: what exists, and the nearest. ``spellings``: accepted form → its name."""
    names = list(known)
    forms = {name: name for name in names} | dict(spellings or {})
    close = difflib.get_close_matches(value.lower(), forms, n=1, cutoff=0.5)
    hint = f"; did you mean {forms[close[0]]!r}?" if close else ""
    return BenchError(f"{option} {value!r} is not known{hint} (there are: {', '.join(names)})")


@lru_cache(maxsize=1)
def repository() -> Path | None:
    """The git checkout this package is imported from; ``None`` for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    # A virtual environment inside somebody else's repository must not lend us that repository's commit.
    if not (root / "pyproject.toml").is_file() or _output("git", "rev-parse", "--show-toplevel", at=root) != str(root):
        return None
    return root


def _output(*command: str, at: Path | None = None) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=at, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date of a measurement on ``device``."""
    root = repository()
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "version": __version__,
        "commit": _output("git", "rev-parse", "HEAD", at=root) if root else "",
        "uncommitted_changes": bool(root and _output("git", "status", "--porcelain", "--untracked-files=no", at=root)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda or "",
        "interpreter": os.environ.get("TRITON_INTERPRET", "") not in ("", "0"),
    }
    facts |= {name: version for name in ("transformers", "peft", "liger-kernel") if (version := _installed(name))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver[0] if driver else "",
        }
    else:
        facts |= {"cores": _cores(), "threads": torch.get_num_threads()}
        if hasattr(os, "getloadavg"):
            # Other work on the machine is the first suspect when CPU figures differ.
            facts["load_before"] = round(os.getloadavg()[0], 2)
    return facts


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU, {_cores()} cores ({name})"


def device_folder(facts: dict[str, Any]) -> str:
    """Folder name of a device's results: ``nvidia-h200``, ``cpu-2-cores``."""
    name = f"cpu-{facts['cores']}-cores" if "cores" in facts else str(facts["device"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(data: Any, path: Path) -> Path:
    """Write ``path`` in one step: readers see the old file or the new one, never a part. Raises :class:`BenchError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from error
    return path


@dataclass
class ResultFile:
    """One run of one suite. ``save`` is called after every group of rows, so that an interrupted run keeps what it has.

    Attributes:
        suite: ``kernels``, ``memory``, ``train`` or ``check``.
        facts: Of :func:`environment`.
        command: What was typed.
        size: One of ``SIZES``.
        directory: Results go to ``directory/<device>/<suite>-<date>.json``.
    """

    suite: str
    facts: dict[str, Any]
    command: list[str]
    size: str
    directory: Path
    part: tuple[int, int] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def path(self) -> Path:
        part = "" if self.part is None else f"-{self.part[0]}of{self.part[1]}"
        small = "-small" if self.size == "small" else ""
        stamp = re.sub(r"[-:]", "", str(self.facts["date"]))
        return self.directory.expanduser() / device_folder(self.facts) / f"{self.suite}{small}{part}-{stamp}.json"

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "size": self.size,
            "complete": self.complete,
            "environment": self.facts,
            "command": self.command,
            **({"part": f"{self.part[0]}/{self.part[1]}"} if self.part else {}),
            **self.extra,
            "rows": self.rows,
            "not_run": self.not_run,
        }

    def save(self) -> Path:
        return write_json(self.to_dict(), self.path)


def row_key(suite: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from the others of its suite."""
    return (suite, *(row.get(name) for name in KEY_FIELDS[suite]))


def load_results(where: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """The bench files at ``where`` (a file, or a folder with its subfolders), oldest first, each with its ``"path"``.

    Files that are no bench results (other JSON in the folder) are left out of a folder; as ``where`` itself they raise.

    Raises:
        BenchError: Nothing there, not JSON, or a schema newer than this version reads.
    """
    where = where.expanduser()
    if where.is_file():
        found = [_read(where, strict=True)]
    elif where.is_dir():
        found = [_read(path, strict=False) for path in sorted(where.rglob("*.json"))]
    else:
        raise BenchError(f"{where} does not exist; give a result of `npt bench`, or the folder it wrote to (--out)")
    results = [entry for entry in found if entry is not None]
    if strict and not results:
        raise BenchError(f"{where} holds no results of `npt bench`; run `npt bench kernels --out {where}` first")
    return sorted(results, key=lambda entry: str(entry["environment"].get("date", "")))


def _read(path: Path, *, strict: bool) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if strict:
            raise BenchError(f"{path} is not JSON: {error}") from None
        return None
    if is_gpu_check(data):
        data = from_gpu_check(data)
    if not isinstance(data, dict) or data.get("suite") not in SUITES or "schema" not in data:
        if strict:
            raise BenchError(f"{path} is no result of `npt bench` (it has no suite {', '.join(SUITES)})")
        return None
    if data["schema"] > SCHEMA:
        raise BenchError(f"{path} has schema {data['schema']}, this version reads up to {SCHEMA}; upgrade npt_kernels")
    return {**data, "path": path}


def newest_rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all files, of each key the newest one per device; every row gets ``"source"``, its file's dictionary.

    Rows of a check that time whole ops say themselves that they are of the suite ``kernels`` or ``memory``.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for row in result["rows"]:
            suite = row.get("suite", result["suite"])
            key = (result["environment"].get("device"), *row_key(suite, row))
            if row["status"] == "skipped" and key in rows:
                continue  # a provider missing in a later run takes nothing away from what was measured
            rows.pop(key, None)
            rows[key] = {**row, "suite": suite, "source": result}
    return list(rows.values())


def human_bytes(count: float) -> str:
    """``448 GiB``, ``117 MiB``, ``3.2 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
