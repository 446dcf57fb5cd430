"""The result file and the short table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "table", "write_result"]

ROOT = Path(__file__).resolve().parents[2]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or "",
        "interpreter": os.environ.get("TRITON_INTERPRET", "") not in ("", "0"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver[0] if driver else "",
        }
    return facts


def write_result(result: dict[str, Any], directory: Path) -> Path:
    """``<directory>/<device>/gpu_check-<date>.json``, in one step."""
    device = re.sub(r"[^a-z0-9]+", "_", result["environment"]["device"].lower()).strip("_")
    folder = directory / device
    folder.mkdir(parents=True, exist_ok=True)
    stamp = re.sub(r"[-:]", "", result["environment"]["date"])
    path = folder / f"gpu_check-{stamp}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.replace(temporary, path)
    return path


def table(result: dict[str, Any]) -> str:
    """What a person wants to see at the end."""
    lines = []
    numerics, repeats = result["numerics"], result["repeats"]
    for title, records in (("numerics", numerics), ("repeats", repeats)):
        bad = [r for r in records if not r["passed"]]
        lines.append(f"{title}: {len(records) - len(bad)} of {len(records)} passed")
        for record in bad:
            worst = max(record.get("ratios", {"": float("nan")}).items(), key=lambda item: item[1])
            why = record.get("error") or (
                f"{record['different']} of {record['times']} runs differ" if "different" in record
                else f"{worst[0]}: error {worst[1]:.2f} times its bound"
            )  # fmt: skip
            lines.append(f"  FAILED {record['backend']:7s} {record['case']}: {why}")
    for name in result["not_run"]:
        lines.append(f"  not run (out of time): {name}")
    ceilings = result.get("ceilings", {})
    if ceilings:
        lines.append(f"ceilings of this run: {ceilings['gemm_tflops']} TFLOP/s, {ceilings['copy_tbs']} TB/s")
    for group in result["timings"]:
        lines.append(f"{group['name']} ({group['mode']}; ratio to {group['baseline']})")
        for name, entry in group["contenders"].items():
            if "error" in entry:
                lines.append(f"  {name:24s} failed: {entry['error']}")
            else:
                low, high = entry.get("ratio_p10_p90", (float("nan"),) * 2)
                ratio = entry.get("ratio", float("nan"))
                lines.append(f"  {name:24s} {entry['us']:12.1f} us   {ratio:6.3f}  [{low:.3f}, {high:.3f}]")
    for name, value in result.get("memory", {}).items():
        lines.append(f"peak memory beyond inputs, weights, gate and up, {name}: {value:.3f} of one T×f tensor")
    return "\n".join(lines)
