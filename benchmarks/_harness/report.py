"""The result file of ``gpu_check.py`` and its short table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from npt_kernels.bench.results import device_folder, write_json

__all__ = ["table", "write_result"]


def write_result(result: dict[str, Any], directory: Path) -> Path:
    """``<directory>/<device>/gpu_check-<date>.json``, in one step."""
    facts = result["environment"]
    stamp = re.sub(r"[-:]", "", facts["date"])
    return write_json(result, directory / device_folder(facts) / f"gpu_check-{stamp}.json")


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
