"""``python -m tests.fuzz``: every target in processes of their own, and a table of what came out.

A target that crashes, hangs, or takes more memory than it may is a finding like a wrong answer. The same ``--seed`` draws the
same cases. Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

#: Cases of each target in a full run.
OP_CASES = {"eager": 3000, "triton": 150, "cuda": 150}
FILE_CASES = {
    "config file": 12000, "config override": 12000, "text .txt": 15000, "text .jsonl": 15000, "text .json": 10000,
    "text .parquet": 8000, "adapter config": 8000, "adapter weights": 8000, "published .pt": 6000, "checkpoint": 5000,
}  # fmt: skip
#: Seconds of one case; the interpreter and the emulator take some.
CASE_SECONDS = {"eager": 20.0, "triton": 120.0, "cuda": 120.0, "files": 20.0}
#: Bytes of address space beyond what the process has when it starts.
MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Target:
    name: str
    room: str  # files, or the backend of an op
    cases: int  # 0: all there are

    @property
    def environment(self) -> dict[str, str]:
        if self.room == "triton":
            return {"NPT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
        if self.room == "cuda":
            return {"NPT_BACKEND": "cuda", "NPT_EMULATE": "1"}
        return {"NPT_BACKEND": "eager"}


def targets(share: float = 1.0) -> list[Target]:
    """All of them, the longest first; ``share`` of the cases of a full run."""
    from .files import EVERY
    from .ops import OPS

    emulated = any(Path("npt_kernels").glob("_cuda_emulated*.so"))
    rooms = ["eager", "triton"] + (["cuda"] if emulated else [])
    ops = [Target(op, room, max(5, round(OP_CASES[room] * share))) for room in reversed(rooms) for op in OPS]
    files = [Target(name, "files", max(20, round(cases * share))) for name, cases in FILE_CASES.items()]
    return ops + files + [Target(name, "files", 0) for name in EVERY]


def work(name: str, room: str, cases: int, seed: int) -> dict[str, int]:
    """The cases of a target, here. Raises for the first finding, with the smallest arguments that show it."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from .files import EVERY, FILES
    from .ops import OPS, check_op
    from .outcome import time_limit

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    counts: collections.Counter[str] = collections.Counter()
    if name in EVERY:
        for word in EVERY[name]():
            counts[word] += 1
        return counts

    phases = (Phase.generate, Phase.shrink) if room in ("eager", "files") else (Phase.generate,)

    @seeded(seed)
    @settings(max_examples=cases, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with time_limit(CASE_SECONDS[room]):
            counts[check_op(name, data.draw) if name in OPS else FILES[name](data.draw)] += 1

    run()
    return counts


def in_a_process(target: Target, seed: int) -> tuple[Target, dict[str, int], str, float]:
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--worker", target.name, "--room", target.room]
    command += ["--cases", str(target.cases), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **target.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    counts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    finding = "" if done.returncode == 0 else f"exit code {done.returncode}\n{done.stderr[-6000:]}"
    return target, counts, finding, time.monotonic() - started


def table(rows: list[tuple[Target, dict[str, int], str, float]]) -> str:
    lines = [
        "| target | where | cases | right or read | NaN as F.linear | read with a warning | refused in one line | bad | s |",
        "|---|---|" + "---:|" * 6,
    ]
    total = collections.Counter[str]()
    for target, counts, finding, seconds in rows:
        good = {
            "right": counts.get("right", 0) + counts.get("read", 0),
            "nan": counts.get("NaN as F.linear", 0),
            "warned": counts.get("read with a warning", 0),
            "refused": counts.get("refused", 0) + counts.get("not written", 0),
            "bad": int(bool(finding)),
        }
        good["cases"] = sum(counts.values()) + good["bad"]
        total.update(good)
        numbers = (f"{good[key]:,}" for key in ("cases", "right", "nan", "warned", "refused", "bad"))
        lines.append(f"| {target.name} | {target.room} | {' | '.join(numbers)} | {seconds:.0f} |")
    numbers = (f"**{total[key]:,}**" for key in ("cases", "right", "nan", "warned", "refused", "bad"))
    return "\n".join([*lines, f"| **all** | | {' | '.join(numbers)} | |"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="another number draws other cases (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--share", type=float, default=1.0, help="of a full run's cases (default 1)")
    parser.add_argument("--only", default="", help="only targets whose name or place contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--room", help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.room, arguments.cases, arguments.seed)))
        return 0
    started, rows = time.monotonic(), []
    chosen = [t for t in targets(arguments.share) if arguments.only in f"{t.name} {t.room}"]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda target: in_a_process(target, arguments.seed), chosen):
            rows.append(row)
            print(f"{row[0].name} ({row[0].room}): {sum(row[1].values()):,} cases, {row[3]:.0f} s", file=sys.stderr)
            if row[2]:
                print(f"FOUND in {row[0].name} ({row[0].room}), seed {arguments.seed}: {row[2]}", file=sys.stderr)
    print(table(rows))
    print(f"\nseed {arguments.seed}, {time.monotonic() - started:.0f} s with {arguments.jobs} processes")
    return 1 if any(row[2] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
