"""One command for a GPU machine: are the kernels right at real sizes, are they deterministic, how fast are they.

    python benchmarks/gpu_check.py                        # on a GPU: at most 8 minutes, writes benchmarks/results/<device>/
    python benchmarks/gpu_check.py --device cpu --small   # anywhere: the same code, tiny shapes (TRITON_INTERPRET=1: Triton too)

Exit code: 0 all numerics passed, 1 some failed, 2 all that ran passed but time ran out before the last of them.
Timings never change the exit code. A CPU run times nothing worth reporting; it says so in its file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks._harness.contenders import workloads  # noqa: E402
from benchmarks._harness.report import table, write_result  # noqa: E402
from npt_kernels.bench.results import environment  # noqa: E402
from npt_kernels.measure.check import check_case, repeat_case  # noqa: E402
from npt_kernels.measure.problems import Problem  # noqa: E402
from npt_kernels.measure.shapes import MODELS, SMALL_MODELS, Case, numeric_cases, repeat_cases  # noqa: E402
from npt_kernels.measure.timing import clocks, compare, compare_graphs, settle_power  # noqa: E402
from npt_kernels.ops.registry import BACKENDS, available_backends, explain  # noqa: E402

#: Shares of the budget after which numerics, repeats and timings stop starting new work.
SHARES = {"numerics": 0.5, "repeats": 0.62, "timings": 0.95}


def usable_backends(device: torch.device, asked: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """(backends that run on the device, reason for each that does not)."""
    usable, reasons = [], {}
    for name in asked or available_backends():
        explanation = explain("mlp", device=device, dtype=torch.bfloat16, act="silu", backend=name)
        if explanation.chosen == name:
            usable.append(name)
        else:
            reasons[name] = explanation.reasons[name]
    return usable, reasons


def lacks(backend: str, case: Case) -> bool:
    """Whether a case is about an op that the backend does not implement at all (kernels that are no op: all but eager's)."""
    return case.op in BACKENDS["eager"].modules and BACKENDS[backend].lacks(case.op) is not None


def peak_memory(case: Case, backend: str, device: torch.device) -> float:
    """Peak of forward + backward of local training beyond inputs, weights, gate and up, in units of one ``T × f`` tensor."""
    problem = Problem(case, device)
    trained = [n for n in problem.tensors if n == "w_down" or n.endswith(("_key", "_value"))]
    leaves = {n: t.detach().requires_grad_(n in trained) for n, t in problem.tensors.items()}

    def step() -> None:
        y = problem.call(leaves, backend)["y"]
        torch.autograd.grad(y, [leaves[n] for n in trained], problem.upstream["y"])

    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    unit = case.tokens * case.model.f * case.dtype.itemsize
    return (torch.cuda.max_memory_allocated(device) - before) / unit - (2 if case.model.gated else 1)


def measure(
    result: dict[str, Any], small: bool, compiled: bool, device: torch.device, late: Callable[[str], bool]
) -> None:
    """Fill ``timings``, ``ceilings``, ``clocks`` and ``memory`` of the result."""
    cuda = device.type == "cuda"
    rounds = 30 if cuda else 1  # a dry run shows that the code runs, nothing more
    result["clocks"] = {"before": clocks()}
    result["ceilings"] = settle_power(device, 2.5)
    for workload in workloads(SMALL_MODELS if small else MODELS, result["backends"], small, compiled):
        if late("timings"):
            result["not_run"].append(f"timing {workload.name}")
            continue
        modes = ["graph", "eager"] if cuda and workload.tokens <= 256 else ["eager"]
        try:
            contenders, sets = workload.make(device)
            for mode in modes:
                function = compare_graphs if mode == "graph" else compare
                measured = function(contenders, workload.baseline, device, rounds=rounds, sets=sets)
                result["timings"].append(
                    {
                        "name": workload.name,
                        "mode": mode,
                        "baseline": workload.baseline,
                        "sets": sets,
                        "contenders": measured,
                    }
                )
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            result["timings"].append(
                {
                    "name": workload.name,
                    "mode": "eager",
                    "baseline": workload.baseline,
                    "contenders": {"all": {"error": message}},
                }
            )
        contenders = {}
        if cuda:
            torch.cuda.empty_cache()
        print(f"timed {workload.name}", flush=True)
    if cuda and not late("timings"):
        case = Case("mlp", (SMALL_MODELS if small else MODELS)["8B"], 8192, torch.bfloat16)
        result["memory"] = {f"8B T=8192 {name}": peak_memory(case, name, device) for name in result["backends"]}
    result["clocks"]["after"] = clocks()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="tiny shapes; what CI runs")
    parser.add_argument("--backends", help="comma-separated; default: every one that runs on the device")
    parser.add_argument("--budget", type=float, default=470, help="seconds (default: 470)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of results")
    parser.add_argument("--no-timings", action="store_true", help="numerics and repeats only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the contenders")
    parser.add_argument("--only", default="", help="numeric cases whose text contains this, such as 'mlp 70B'")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, "gpu_check: torch sees no CUDA GPU here; --device cpu --small runs the same code at tiny shapes\n"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    elif not options.small:
        parser.exit(2, "gpu_check: real sizes need a GPU; add --small for a CPU\n")
    else:
        torch.set_num_threads(1)  # tiny shapes: a pool of threads only waits for itself, for seconds on a busy machine
    backends, unusable = usable_backends(device, options.backends.split(",") if options.backends else None)
    if options.backends and unusable:
        parser.exit(2, "".join(f"gpu_check: backend {name} cannot run: {why}\n" for name, why in unusable.items()))

    result: dict[str, Any] = {
        "environment": environment(device), "command": sys.argv if arguments is None else arguments, "small": options.small,
        "backends": backends, "unusable_backends": unusable, "numerics": [], "repeats": [], "not_run": [], "timings": [],
    }  # fmt: skip
    if device.type == "cpu":
        result["note"] = "dry run on a CPU: its timings say nothing about any GPU"
    print(f"{result['environment']['device']}: backends {', '.join(backends)}", flush=True)
    for name, why in unusable.items():
        print(f"  not {name}: {why}")

    def late(stage: str) -> bool:
        return time.perf_counter() - started > SHARES[stage] * options.budget

    for case in numeric_cases(options.small):
        if options.only not in str(case):
            continue
        for backend in backends:
            if lacks(backend, case):
                continue
            if late("numerics"):
                result["not_run"].append(f"{backend} {case}")
                continue
            record = check_case(case, backend, device)
            result["numerics"].append(record)
            print(
                f"{'ok    ' if record['passed'] else 'FAILED'} {backend:7s} {case} ({record['seconds']} s)", flush=True
            )
    for case, times in repeat_cases(options.small):
        for backend in backends:
            if backend == "eager" or options.only not in str(case) or lacks(backend, case):
                continue
            if late("repeats"):
                result["not_run"].append(f"repeat {backend} {case}")
                continue
            deadline = started + SHARES["repeats"] * options.budget
            result["repeats"].append(repeat_case(case, times, backend, device, deadline))
            print(f"repeated {result['repeats'][-1]['times']} times: {backend} {case}", flush=True)
    numerics_missing = list(result["not_run"])
    result["failed"] = [r["case"] for r in result["numerics"] + result["repeats"] if not r["passed"]]
    result["incomplete"] = numerics_missing + [r["case"] for r in result["repeats"] if not r.get("complete", True)]
    if not options.no_timings:
        compiled = device.type == "cuda" and not options.no_compile
        measure(result, options.small, compiled, device, late)
    result["seconds"] = round(time.perf_counter() - started, 1)
    path = write_result(result, options.out)
    print(f"\n{table(result)}\n{result['seconds']} s; {path}")
    if result["failed"]:
        return 1
    return 2 if result["incomplete"] else 0


if __name__ == "__main__":
    sys.exit(main())
