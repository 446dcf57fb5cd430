"""What every fault works with, and how a run that it stopped is brought to its end."""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .children import Child, begin
from .judge import Outcome, bits, bring_to_its_end, steps_done
from .place import Place

__all__ = ["Bench", "ended", "logged_steps", "uninterrupted"]


@dataclass
class Bench:
    """What every fault works with.

    Attributes:
        place: The model and text.
        scratch: A folder for the runs.
        expected: Bits of the run that nothing happened to.
        seconds: How long it took.
        random: Seeded; a fault draws its moments from it.
    """

    place: Place
    scratch: Path
    expected: dict[str, Any]
    seconds: float
    random: random.Random
    _count: int = 0

    def folder(self) -> Path:
        self._count += 1
        made = self.scratch / f"run-{self._count:03d}"
        made.mkdir(parents=True)
        return made


def uninterrupted(place: Place, folder: Path, *, fresh: bool = True) -> tuple[dict[str, Any], float]:
    """``(bits, seconds)`` of a run that nothing happens to; ``fresh``: one in a new interpreter must have the same bits."""
    folder.mkdir(parents=True)
    found, seconds = [], 0.0
    for number in range(1 + fresh):
        out = folder / f"out-{number}"
        child = begin(place.command(out), folder / f"log-{number}", fresh=number == 1)
        if child.wait() != 0:
            raise RuntimeError(f"a run without a fault failed: {child.out[-3000:]}")
        found.append(bits(out))
        seconds = seconds or child.seconds
    if found[0] != found[-1]:
        raise RuntimeError(f"a fork and a fresh interpreter give different bits: {found}")
    return found[0], seconds


def ended(bench: Bench, outcome: Outcome, out: Path, child: Child, *, command: list[str] | None = None) -> Outcome:
    """Brings a stopped run to its end and writes down how."""
    had = outcome.notes.pop("steps", None)
    before = steps_done(out)
    expected: dict[str, Any] | None = bench.expected
    if "saving failed" in child.out and "there is no checkpoint" in child.out and (out / "adapter").exists():
        # The trained components fitted on the disk, the optimizer did not: what goes on from them is another run.
        expected, outcome.result = (
            None,
            "one line that says why; the trained adapter is kept, there is no checkpoint yet",
        )
    how, bad, seconds = bring_to_its_end(bench.place, out, out.parent / "end.log", command=command, expected=expected)
    outcome.seconds += child.seconds + seconds
    outcome.result = outcome.result or f"{how}: same bits"
    outcome.bad = outcome.bad or bad
    if had is not None and expected is not None:
        outcome.lost = max(0, had - before)
    shutil.rmtree(out.parent, ignore_errors=True)
    return outcome


def logged_steps(child: Child) -> int:
    """Steps that the run had said it did: a lower bound of those that are lost by a kill."""
    found = re.findall(r"^(local|polish): step (\d+)/", child.out, re.MULTILINE)
    return sum(max((int(step) for name, step in found if name == phase), default=0) for phase in ("local", "polish"))
