"""``npt bench check``: are the kernels right at real sizes, are they deterministic, how fast are they.

Numerics by the 2× rule, repeats that must be bitwise equal, then timings, all within a budget of seconds, most important first.
The file is written after every case. A CUDA error may be *sticky*: every later call of the process fails. The check notices,
says after which case, and stops; with ``isolate`` cases run in another process, which such an error or a hang ends, and a fresh
one does the rest.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.against_truth import check_case, repeat_case
from ..measure.shapes import Case
from ..measure.timing import clocks, settle_power
from ..ops.registry import BACKENDS, available_backends, explain
from .check_cases import numeric_cases, repeat_cases, timings
from .kernels import short_reason
from .results import BenchError, ResultFile

__all__ = ["CheckOptions", "device_works", "exit_code", "run_check", "usable_backends"]

#: Shares of the budget after which numerics, repeats and timings stop starting new work.
SHARES = {"numerics": 0.5, "repeat": 0.62, "timings": 0.95}
#: Seconds without an answer after which a case in another process is taken to hang. Compilation of a real size takes up to 40.
HANGS_AFTER = 180.0


@dataclass(frozen=True)
class CheckOptions:
    """What the command line says.

    Attributes:
        backends: Of :func:`usable_backends`.
        small: Tiny shapes.
        only: Cases whose text contains this.
        budget: Seconds.
        timings: Whether anything is timed.
        compiled: Whether torch.compile is among what is timed.
        isolate: Whether cases run in another process.
    """

    backends: Sequence[str]
    small: bool = False
    only: str = ""
    budget: float = 470.0
    timings: bool = True
    compiled: bool = True
    isolate: bool = False


@dataclass(frozen=True)
class Task:
    """One case on one backend; ``times`` counts for ``kind`` ``repeat``, the other is ``numerics``."""

    kind: str
    case: Case
    backend: str
    times: int = 1

    def __str__(self) -> str:
        return f"{'repeat ' if self.kind == 'repeat' else ''}{self.backend} {self.case}"


def usable_backends(device: torch.device, asked: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """``(backends that run on the device, reason for each other)``; :class:`BenchError` if one that is asked for cannot."""
    usable, reasons = [], {}
    for name in asked or available_backends():
        if name not in BACKENDS:
            raise BenchError(f"--backends {name!r} is not known (there are: {', '.join(BACKENDS)})")
        explanation = explain("mlp", device=device, dtype=torch.bfloat16, act="silu", backend=name)
        if explanation.chosen == name:
            usable.append(name)
        elif asked:
            raise BenchError(f"--backends {name}: it cannot run here: {explanation.reasons[name]}")
        else:
            reasons[name] = explanation.reasons[name]
    return usable, reasons


def plan_tasks(options: CheckOptions) -> list[Task]:
    """Numerics, then repeats (not of eager, which is PyTorch's own). What a backend does not implement is left out."""
    tasks = [Task("numerics", case, backend) for case in numeric_cases(options.small) for backend in options.backends]
    tasks += [Task("repeat", case, backend, times) for case, times in repeat_cases(options.small)
              for backend in options.backends if backend != "eager"]  # fmt: skip
    return [task for task in tasks if options.only in str(task.case) and not _lacks(task.backend, task.case)]


def _lacks(backend: str, case: Case) -> bool:
    # Kernels that are no op (coefficients, value_grads) have no entry there; every backend has them.
    return case.op in BACKENDS["eager"].ops and BACKENDS[backend].lacks(case.op) is not None


# ---- one case --------------------------------------------------------------------------------------------------------


def device_works(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal instruction or address every call of the process fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        works = float(torch.ones(2, device=device).sum()) == 2
        gc.collect()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return works


def _perform(task: Task, device: torch.device, seconds: float) -> dict[str, Any]:
    """The task's row; ``device_lost`` in it if the device does not work afterwards."""
    if task.kind == "numerics":
        row = check_case(task.case, task.backend, device)
    else:
        row = repeat_case(task.case, task.times, task.backend, device, seconds)
    lost = {} if device_works(device) else {"device_lost": True}
    return {"kind": task.kind, "launch": None, **row, **lost}


def _serve(pipe: Any, device: torch.device, threads: int) -> None:
    """The other process: performs tasks until the pipe closes."""
    torch.set_num_threads(threads)
    while True:
        try:
            task, seconds = pipe.recv()
        except EOFError:
            return
        pipe.send(_perform(task, device, seconds))


class _Here:
    """Performs tasks in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def perform(self, task: Task, seconds: float) -> dict[str, Any]:
        return _perform(task, self.device, seconds)

    def close(self) -> None: ...


class _Elsewhere:
    """Performs tasks in another process; one that lost its device, ended or hangs is replaced for the next task."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process: Any = None
        self._pipe: Any = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self.device, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def perform(self, task: Task, seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        row: dict[str, Any] = {"kind": task.kind, "launch": None, "case": str(task.case), "provider": task.backend,
                               "op": task.case.op, "status": "failed"}  # fmt: skip
        limit = HANGS_AFTER + (seconds if task.kind == "repeat" else 0)
        try:
            self._pipe.send((task, seconds))
            if self._pipe.poll(limit):
                row = self._pipe.recv()
                if row.pop("device_lost", False):
                    row["note"] = "the device was in an error state afterwards; another process went on"
                    self.close()
                return row
            row["reason"] = f"no answer for {limit:.0f} s: it hangs"
        except (EOFError, OSError):
            self._process.join()
            row["reason"] = f"its process ended with exit code {self._process.exitcode}"
        self.close()
        return row

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


# ---- the command -----------------------------------------------------------------------------------------------------


def run_check(
    options: CheckOptions, device: torch.device, result: ResultFile, say: Callable[[str], None] = print
) -> ResultFile:
    """Everything that fits the budget; ``say`` gets a line a case. ``Ctrl-C`` comes through, the file has what was done."""
    started = time.perf_counter()

    def left(stage: str) -> float:
        return SHARES[stage] * options.budget - (time.perf_counter() - started)

    tasks = plan_tasks(options)
    groups = timings(options.small, options.backends, options.compiled) if options.timings else []
    result.not_run = [*map(str, tasks), *(f"timing {group.name}" for group in groups)]
    result.extra["backends"] = list(options.backends)
    if device.type == "cpu":
        result.extra["note"] = "dry run on a CPU: its timings say nothing about any GPU"
    result.save()
    runner = _Elsewhere(device) if options.isolate else _Here(device)
    try:
        for position, task in enumerate(tasks):
            if left(task.kind) <= 0:
                continue
            row = runner.perform(task, left(task.kind))
            lost = row.pop("device_lost", False)
            result.rows.append(row)
            result.not_run.remove(str(task))
            if lost:
                result.extra["stopped"] = _stopped(str(task), len(tasks) - position - 1, "cases", options.isolate)
            result.save()
            say(_line(row))
            if lost:
                return result
    finally:
        runner.close()
    if groups:
        _time(groups, device, result, lambda: left("timings") <= 0, say)
    result.complete = not result.not_run
    result.extra["seconds"] = round(time.perf_counter() - started, 1)
    result.save()
    return result


def _stopped(what: str, remaining: int, kind: str, isolated: bool) -> str:
    hint = "" if isolated else " (--isolate runs them in processes of their own)"
    return f"the device is in an error state after {what}; the remaining {remaining} {kind} did not run{hint}"


def _time(
    groups: Sequence[Any],
    device: torch.device,
    result: ResultFile,
    late: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    rounds = 30 if device.type == "cuda" else 1  # a dry run shows that the code runs, nothing more
    result.extra["clocks"] = {"before": clocks()}
    ceilings = settle_power(device, 2.5)
    result.extra["ceilings"] = ceilings
    for position, group in enumerate(groups):
        if late():
            continue
        try:
            result.rows.extend(group.rows(device, ceilings, rounds))
        except Exception as error:
            failed = {"kind": "kernel", "case": group.name, "launch": None, "provider": "all", "status": "failed"}
            result.rows.append({**failed, "reason": short_reason(error)})
        result.not_run.remove(f"timing {group.name}")
        result.save()
        say(f"timed   {group.name}")
        if not device_works(device):
            result.extra["stopped"] = _stopped(f"timing {group.name}", len(groups) - position - 1, "timings", True)
            break
    result.extra["clocks"]["after"] = clocks()


def _line(row: dict[str, Any]) -> str:
    status = "ok" if row["status"] == "ok" else str(row["status"]).upper()
    how = f"{row['times']} times" if row["kind"] == "repeat" and "times" in row else f"{row.get('seconds', 0)} s"
    reason = f": {row['reason']}" if row.get("reason") else ""
    return f"{status:7s} {row['kind']} {row['provider']} {row['case']} ({how}){reason}"


def exit_code(result: ResultFile) -> int:
    """0: all numerics and repeats passed; 1: some failed, or the device was lost; 2: all that ran passed, time ran out first."""
    own = [row for row in result.rows if row.get("kind") in ("numerics", "repeat")]
    if "stopped" in result.extra or any(row["status"] in ("wrong", "failed") for row in own):
        return 1
    unfinished = [name for name in result.not_run if not name.startswith("timing ")]
    return 2 if unfinished or any(row["status"] == "incomplete" for row in own) else 0
