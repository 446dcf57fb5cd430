"""What a run left, as a few hashes; and a run brought to its end after a fault, as a user would who reads what it says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from npt_kernels.run.checkpoints import list_checkpoints

from .children import Child, begin
from .place import Place

__all__ = ["Outcome", "adapter_bits", "bits", "bring_to_its_end", "one_line", "steps_done"]


@dataclass
class Outcome:
    """One fault that was tried.

    Attributes:
        fault: Its row in the table.
        how: What exactly, to find it again.
        result: What came out, in the words of the table.
        bad: What must not be; empty: all is well.
        lost: Optimizer steps that had to be done again.
        seconds: Of all its processes.
    """

    fault: str
    how: str
    result: str = ""
    bad: str = ""
    lost: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def adapter_bits(folder: Path) -> str:
    """SHA-256 over names and values of the tensors: the file's header holds paths."""
    digest = hashlib.sha256()
    with safe_open(folder / "npt_model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def bits(out: Path) -> dict[str, Any]:
    """Of a finished run: weights, moments of the optimizer, every logged loss, every measured number."""
    folder = list_checkpoints(out / "checkpoints")[0][0].path
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in record.items() if k not in ("time", "seconds", "mfu")}
        for record in records
        if record["kind"] in ("train", "eval", "fidelity", "samples")
    ]
    return {
        "adapter": adapter_bits(out / "adapter"),
        "checkpoint": adapter_bits(folder),
        "optimizer": hashlib.sha256((folder / "optimizer.bin").read_bytes()).hexdigest()[:16],
        "measured": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
        "samples": hashlib.sha256((out / "samples.md").read_bytes()).hexdigest()[:16],
        "steps": json.loads((out / "summary.json").read_text())["steps"],
    }


def steps_done(out: Path) -> int:
    """Optimizer steps of the newest checkpoint."""
    return max((checkpoint.total_steps for checkpoint in list_checkpoints(out / "checkpoints")[0]), default=0)


def one_line(child: Child) -> str:
    """Why what a process printed is not *one clear error*: a traceback, or not exactly one line that begins with ``error:``."""
    if "Traceback" in child.out:
        return "a traceback: " + child.out.strip().splitlines()[-1][:300]
    if len(child.errors()) != 1:
        return f"{len(child.errors())} error lines with exit code {child.code}"
    return ""


def bring_to_its_end(
    place: Place,
    out: Path,
    log: Path,
    *,
    command: list[str] | None = None,
    start: Callable[..., Child] = begin,
    expected: Mapping[str, Any] | None = None,
) -> tuple[str, str, float]:
    """``(what happened, what must not be, seconds)``: ``--resume``; where that says there is nothing, the command again.

    ``expected``: of :func:`bits`; weights that differ from them must not be.
    """
    child = start(place.resume(out), log)
    child.wait()
    seconds, how = child.seconds, "resumed"
    nothing = "holds neither checkpoint nor adapter" in child.out or "does not exist" in child.out
    if child.code == 2 and nothing and not one_line(child):
        child = start(command or place.command(out), log)
        child.wait()
        seconds, how = seconds + child.seconds, "nothing was written yet; begun anew"
    elif "a plain adapter" in child.out:
        how = "the converted adapter was there; begun from it"
    if child.code != 0:
        return how, f"exit code {child.code}: {child.out.strip()[-400:]}", seconds
    if expected is not None:
        found = bits(out)
        # From the adapter the log has another beginning; the weights are what they would have been.
        same_log = how == "resumed" and not _from_an_adapter(out)
        names = list(expected) if same_log else ["adapter", "checkpoint", "optimizer", "steps"]
        if wrong := [name for name in names if found[name] != expected[name]]:
            return how, f"other {', '.join(wrong)} than without the fault", seconds
    return how, "", seconds


def _from_an_adapter(out: Path) -> bool:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return any(record["kind"] == "start" and record["resume"] for record in records)


def passed_over(text: str) -> int:
    """How many checkpoints a resumed run says that it passed over."""
    return len(re.findall(r"passed over", text))
