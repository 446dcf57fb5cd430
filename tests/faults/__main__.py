"""``python -m tests.faults``: every fault so many times, and a table of what came out.

The same ``--seed`` draws the same moments; what happens at a moment is the machine's affair. Exit code 1 where anything is bad.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .catalogue import FAULTS
from .children import ROOT, import_all
from .judge import Outcome
from .place import make_place
from .workbench import Bench, uninterrupted

HEAD = "| fault | times | what came out | bad | steps done again |\n|---|---:|---|---:|---:|"


def run(only: str, share: float, seed: int, scratch: Path, brief: bool = False) -> tuple[list[Outcome], dict[str, Any]]:
    """All faults whose name contains ``only``, ``share`` of a full run's count each; ``brief``: the few of CI."""
    import_all()
    place = make_place(scratch / "place")
    expected, seconds = uninterrupted(place, scratch / "uninterrupted", fresh=not brief)
    outcomes: list[Outcome] = []
    for name, (fault, full, few, settings) in FAULTS.items():
        times = few if brief else max(1, round(full * share))
        if only not in name or not times:
            continue
        # Each has its own moments, whatever else runs.
        bench = Bench(place, scratch / name.replace(" ", "-"), expected, seconds, random.Random(f"{seed} {name}"))
        for outcome in _tried(name, fault(bench, times, **settings)):
            outcomes.append(outcome)
            said = f"BAD: {outcome.bad}" if outcome.bad else outcome.result
            print(f"{outcome.fault}, {outcome.how}: {said} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True)
    return outcomes, {"seconds of a run": round(seconds, 2), "bits": expected}


def _tried(name: str, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The outcomes; a fault that ends in an error of its own is a bad one, and the others are tried all the same."""
    try:
        yield from outcomes
    except Exception:
        yield Outcome(name, "the test itself", "", traceback.format_exc())


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: one row a fault and result."""
    rows: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.fault, outcome.result].append(outcome)
    lines = [HEAD]
    for (fault, result), group in rows.items():
        lost = [outcome.lost for outcome in group]
        again = f"{min(lost)} – {max(lost)}" if any(lost) else "0"
        lines.append(f"| {fault} | {len(group)} | {result} | {sum(bool(o.bad) for o in group)} | {again} |")
    everything = [outcome for group in rows.values() for outcome in group]
    lines.append(f"| **all** | **{len(everything)}** | | **{sum(bool(o.bad) for o in everything)}** | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="another number draws other moments (default 0)")
    parser.add_argument("--share", type=float, default=1.0, help="of a full run's counts (default 1)")
    parser.add_argument("--brief", action="store_true", help="the short form, a minute: a few of the commonest faults")
    parser.add_argument("--only", default="", help="only faults whose name contains this: " + ", ".join(FAULTS))
    parser.add_argument("--json", type=Path, help="write every outcome there")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it (default: a temporary one)")
    arguments = parser.parse_args()
    started = time.monotonic()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="npt-faults-") as temporary:
        scratch = arguments.keep or Path(temporary)
        outcomes, facts = run(arguments.only, arguments.share, arguments.seed, scratch, arguments.brief)
    print(table(outcomes))
    seconds = time.monotonic() - started
    print(f"\nseed {arguments.seed}, commit {commit}, {seconds:.0f} s")
    if arguments.json:
        record = {
            "commit": commit, "date": time.strftime("%Y-%m-%d"), "seed": arguments.seed, "seconds": round(seconds), **facts,
            "table": table(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes],
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    for outcome in outcomes:
        if outcome.bad:
            print(f"BAD {outcome.fault}, {outcome.how}: {outcome.bad}", file=sys.stderr)
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
