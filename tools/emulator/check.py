"""Runs every Hopper kernel on this CPU under adversarial schedules and prints a table (``make check-emulated``).

Each launch: NaN-framed outputs, small integers (exact) or random numbers against float64, the same bits in every schedule.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


@dataclass
class Row:
    """What a job did for one family."""

    family: str
    cases: int
    schedules: int
    launches: int
    faults: list[str]
    seconds: float


def _jobs(family: str, bf16: bool) -> list[tuple[str, int]]:
    """("gemm" or "low_rank", index of the instance) of what is compiled and asked for."""
    from names import DTYPES, gemm_kernels, low_rank_kernels

    jobs = []
    for kind, kernels in (("gemm", gemm_kernels()), ("low_rank", low_rank_kernels())):
        jobs += [(kind, i) for i, k in enumerate(kernels) if not bf16 or "bfloat16" in str(DTYPES[k["dtype"]])]
    return [job for job in jobs if re.search(family, _label(job))]


def _label(job: tuple[str, int]) -> str:
    from names import gemm_kernels, gemm_label, low_rank_kernels, low_rank_kind

    return gemm_label(gemm_kernels()[job[1]]) if job[0] == "gemm" else low_rank_kind(low_rank_kernels()[job[1]])["kind"]


def run_job(job: tuple[str, int], schedules: int, shapes: int, stop_at_fault: bool = False) -> list[Row]:
    """All cases of one instance."""
    import control
    import torch
    from gemm_cases import gemm_cases
    from low_rank_cases import low_rank_cases
    from names import gemm_kernels, low_rank_kernels

    torch.set_num_threads(1)
    kind, index = job
    cases = (
        gemm_cases(gemm_kernels()[index], index, shapes)
        if kind == "gemm"
        else low_rank_cases(low_rank_kernels()[index], index, shapes)
    )
    emulator, rows = control.Emulator(), []
    for number, case in enumerate(cases):
        start, before = time.perf_counter(), emulator.stats()["launches"]
        fault = case.fault(emulator, control.schedules(schedules, (job, number)))
        rows.append(
            Row(case.family, 1, schedules, emulator.stats()["launches"] - before, [f"{case.what}\n    {fault}"] if fault else [],
                time.perf_counter() - start)
        )  # fmt: skip
        if fault and stop_at_fault:
            break
    return rows


def table(rows: Sequence[Row], instances: int) -> str:
    """Sums by family."""
    sums: dict[str, Row] = {}
    for row in rows:
        have = sums.setdefault(row.family, Row(row.family, 0, row.schedules, 0, [], 0.0))
        have.cases += row.cases
        have.launches += row.launches
        have.faults += row.faults
        have.seconds += row.seconds
    lines = [f"{'family':28} {'cases':>6} {'schedules':>9} {'launches':>9} {'failed':>7} {'CPU s':>7}"]
    lines += [
        f"{r.family:28} {r.cases:6} {r.schedules:9} {r.launches:9} {len(r.faults):7} {r.seconds:7.1f}"
        for r in sorted(sums.values(), key=lambda r: r.family)
    ]
    launches, failed = sum(r.launches for r in rows), sum(len(r.faults) for r in rows)
    lines.append(f"{instances} kernels, {len(rows)} cases, {launches} launches, {failed} failed")
    return "\n".join(lines)


def check(schedules: int, shapes: int, jobs: int, family: str, bf16: bool, stop: bool) -> tuple[list[Row], int]:
    """Rows, and how many kernels were run; ``stop``: up to the first fault."""
    work: list[Any] = _jobs(family, bf16)
    if stop:
        rows: list[Row] = []
        for number, job in enumerate(work):
            rows += run_job(job, schedules, shapes, stop_at_fault=True)
            if rows[-1:] and rows[-1].faults:
                return rows, number + 1
        return rows, len(work)
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_job, job, schedules, shapes) for job in work]
        return [row for future in futures for row in future.result()], len(work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schedules", type=int, default=4, help="for each case: earliest, latest, then drawn ones (default: 4)"
    )
    parser.add_argument("--shapes", type=int, default=1, help="shapes of each instance, up to 8 (default: 1)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--family", default="", help="only families that match this regular expression")
    parser.add_argument("--bf16", action="store_true", help="only bfloat16 instances")
    parser.add_argument("--stop", action="store_true", help="stop at the first fault")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        rows, instances = check(
            options.schedules, options.shapes, options.jobs, options.family, options.bf16, options.stop
        )  # fmt: skip
    except ImportError as error:
        print(f"check-emulated: {error}", file=sys.stderr)
        return 2
    for row in rows:
        for fault in row.faults:
            print(f"FAILED {fault}", file=sys.stderr)
    print(table(rows, instances))
    print(f"{time.perf_counter() - start:.0f} s with {options.jobs} jobs")
    return 1 if any(row.faults for row in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
