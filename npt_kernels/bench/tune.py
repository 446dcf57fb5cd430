"""Re-tuning: time every candidate tile of a kernel on this GPU and write the table that :func:`lookup` reads."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..durable_files import write_whole
from ..kernels.triton.support import TRITON_INSTALLED
from ..kernels.triton.tables import USER_TABLES_VARIABLE, check_table, clear_cache, table_path

__all__ = ["find_tunables", "tune", "write_table"]

#: Modules that may have ``tunables()``.
MODULES = (
    "npt_kernels.kernels.triton.tunables",
    "npt_kernels.kernels.triton.coefficients",
    "npt_kernels.kernels.triton.value_grads",
)


def find_tunables() -> dict[str, dict[str, Any]]:
    """Kernel → what its module says about tuning it."""
    found: dict[str, dict[str, Any]] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        if hasattr(module, "tunables"):
            found |= module.tunables()
    return found


def tune(
    kernels: Sequence[str] | None = None,
    shapes: Mapping[str, Sequence[Mapping[str, int]]] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 15,
    report: Callable[[str], None] = print,
) -> Path:
    """Measure candidate tiles and write the best of each shape to a table.

    Args:
        kernels: Names as in :func:`find_tunables`; all of them by default.
        shapes: Kernel → shapes to measure, instead of those that its module lists.
        out: File to write. Default: this GPU's table in ``NPT_TUNING_DIR``, or ``./tuning/<gpu>.json``.
        dtype: Of the operands.
        rounds: Timed launches a candidate; candidates are interleaved, so a clock that drifts favours none.
        report: Receives progress, one line at a time.

    Returns:
        The file written.

    Raises:
        RuntimeError: There is no CUDA GPU or no Triton, or no candidate of a shape ran.
        ValueError: An unknown kernel, or a file that is in the way.
    """
    if not TRITON_INSTALLED:
        raise RuntimeError("tuning needs a CUDA GPU and triton, which is not installed (pip install triton)")
    available = find_tunables()
    names = list(available if kernels is None else kernels)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(f"kernel {unknown[0]!r} cannot be tuned; choose from {', '.join(available)}")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA GPU, and torch sees none on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = Path(out) if out is not None else table_path(gpu, Path(os.environ.get(USER_TABLES_VARIABLE, "tuning")))
    _old_entries(path)  # minutes of measuring must not end at a file that cannot be continued
    source = f"measured: {gpu}, torch {torch.__version__}, {datetime.now(timezone.utc):%Y-%m-%d}, median of {rounds}"
    entries: list[dict[str, Any]] = []
    for name in names:
        spec = available[name]
        todo = list((shapes or {}).get(name, spec["shapes"]))
        for number, shape in enumerate(todo, 1):
            config, best, tried = _best(spec, dict(shape), dtype, device, rounds)
            # Every entry would match its own point only; _ranges widens it to the points up to the next one.
            entries.append(
                {"kernel": name, "at": {key: shape[key] for key in spec["keys"]}, "config": config, "us": best}
            )
            report(f"{name} {number}/{len(todo)} {dict(shape)}: {best:.1f} us with {config} ({tried} candidates ran)")
    return write_table(path, _ranges(entries, str(dtype).removeprefix("torch."), source), gpu)


def _best(
    spec: Mapping[str, Any], shape: dict[str, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[dict[str, Any], float, int]:
    """(config, median microseconds, candidates that ran) of one shape."""
    torch.manual_seed(0)
    run = spec["prepare"](shape, dtype, device)
    alive: list[dict[str, Any]] = []
    candidates = spec["candidates"]
    for config in candidates(dtype) if callable(candidates) else candidates:
        try:
            run(config)
            torch.cuda.synchronize(device)
        except Exception as error:  # a tile that does not fit this chip: not an error of the tuner
            if "out of resource" not in str(error).lower() and type(error).__name__ not in (
                "OutOfResources",
                "CompilationError",
            ):
                raise
        else:
            alive.append(config)
    if not alive:
        raise RuntimeError(f"no candidate runs at {shape}")
    times: dict[int, list[float]] = {i: [] for i in range(len(alive))}
    # A first sweep drops what is more than half slower than the best, so that the rest gets the rounds.
    survivors = range(len(alive))
    for sweep, count in enumerate((3, rounds)):
        for _ in range(count):
            for i in itertools.chain(survivors, reversed(survivors)):
                times[i].append(_microseconds(run, alive[i]))
        if sweep == 0:
            fastest = min(statistics.median(times[i]) for i in survivors)
            survivors = [i for i in survivors if statistics.median(times[i]) <= 1.5 * fastest]  # type: ignore[assignment]
    best = min(survivors, key=lambda i: statistics.median(times[i]))
    return alive[best], statistics.median(times[best]), len(alive)


def _microseconds(run: Callable[[dict[str, Any]], object], config: dict[str, Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(config)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _ranges(entries: Iterable[dict[str, Any]], dtype: str, source: str) -> list[dict[str, Any]]:
    """Measured points → entries in the order of lookup: each answers up to its own coordinates, the last of all beyond."""
    result = []
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_kernel.setdefault(entry["kernel"], []).append(entry)
    for kernel, points in by_kernel.items():
        points.sort(key=lambda e: tuple(e["at"].values()))
        for point in points:
            when: dict[str, Any] = {"dtype": dtype}
            for key, value in point["at"].items():
                largest = value == max(p["at"][key] for p in points)
                when[key] = [None, None if largest else value]
            measured = f"{source}, {point['us']:.1f} us at {point['at']}"
            result.append({"kernel": kernel, "when": when, "config": point["config"], "source": measured})
    return result


def _old_entries(path: Path) -> list[dict[str, Any]]:
    """What a file to be written holds already; none if it does not exist."""
    try:
        return check_table(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is in the way: no tuning table can be read from it ({error})") from error


def write_table(path: Path, entries: list[dict[str, Any]], gpu: str) -> Path:
    """Put ``entries`` before those of the file that they do not replace (same kernel and dtype), atomically."""
    check_table({"entries": entries})
    replaced = {(e["kernel"], str(e.get("when", {}).get("dtype"))) for e in entries}
    kept = [e for e in _old_entries(path) if (e["kernel"], str(e.get("when", {}).get("dtype"))) not in replaced]
    table = {"note": f"{gpu}. First match wins; see README.md.", "entries": entries + kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(entry, ensure_ascii=False) for entry in table["entries"])
    text = f'{{\n  "note": {json.dumps(table["note"])},\n  "entries": [\n{lines}\n  ]\n}}\n'
    write_whole(path, text)
    clear_cache()
    return path
