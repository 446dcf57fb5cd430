"""Faults: one of two processes dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .children import ENVIRONMENT, ROOT, Child, begin
from .judge import Outcome, bits, steps_done
from .workbench import Bench

__all__ = ["a_rank_dies", "a_rank_dies_under_torchrun"]

#: A rank that waits for one that died says so within this time; gloo sees the broken connection, the rest is saving.
_SURVIVOR_SECONDS = 60


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _pair(arguments: list[str], folder: Path, name: str) -> list[Child]:
    """Two processes of one run, without a launcher that would end the second one."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        begin(arguments, folder / f"{name}-{rank}", environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def _whole(bench: Bench) -> tuple[dict[str, object], float]:
    """A run in two processes that nothing happens to."""
    folder = bench.folder()
    pair = _pair(bench.place.command(folder / "out"), folder, "whole")
    codes = [child.wait() for child in pair]
    if codes != [0, 0]:
        raise RuntimeError(
            f"two processes failed without a fault: {codes}\n{pair[0].out[-2000:]}\n{pair[1].out[-2000:]}"
        )
    return bits(folder / "out"), pair[0].seconds


def _go_on(bench: Bench, out: Path, folder: Path) -> tuple[list[Child], str]:
    there = steps_done(out) or (out / "adapter" / "npt_config.json").exists()
    pair = _pair(bench.place.resume(out) if there else bench.place.command(out), folder, "end")
    codes = [child.wait() for child in pair]
    return pair, "" if codes == [0, 0] else f"exit codes {codes}: {pair[0].out[-300:]}"


def _compare(out: Path, expected: dict[str, object], resumed: bool) -> str:
    names = list(expected) if resumed else ["adapter", "checkpoint", "optimizer", "steps"]
    found = bits(out)
    wrong = [name for name in names if found[name] != expected[name]]
    return f"other {', '.join(wrong)} than two processes without the fault" if wrong else ""


def a_rank_dies(bench: Bench, times: int) -> Iterator[Outcome]:
    """SIGKILL to rank 0 or 1 at a random moment, with no launcher: the other one ends by itself and says why."""
    if not times:
        return
    expected, seconds = _whole(bench)
    for number in range(times):
        folder, victim = bench.folder(), number % 2
        out, moment = folder / "out", bench.random.uniform(0.1, 0.8 * seconds)
        outcome = Outcome("a rank of two dies (gloo)", f"rank {victim}, after {moment:.2f} s")
        pair = _pair(bench.place.command(out), folder, "log")
        time.sleep(moment)
        sent = pair[victim].send(signal.SIGKILL)
        pair[victim].wait()
        other = pair[1 - victim]
        code = other.wait(_SURVIVOR_SECONDS)
        if code == 1000:
            outcome.bad = "the other one hung"
        elif sent and code != 0 and "Traceback" in other.out:
            outcome.bad = "a traceback: " + other.out.strip().splitlines()[-1][:300]
        elif sent and code not in (0, 2):
            outcome.bad = f"exit code {code}: {other.out[-300:]}"
        outcome.notes["survivor"] = other.errors()[:1]
        resumed = steps_done(out) > 0
        last, bad = _go_on(bench, out, folder)
        outcome.bad = outcome.bad or bad or _compare(out, expected, resumed)
        if code == 0 or not sent:
            outcome.result = "the other had all it needed, or the run was over; resumed by two: same bits"
        else:
            outcome.bad = outcome.bad or ("" if len(other.errors()) == 1 else f"{len(other.errors())} error lines")
            outcome.result = "the other ends with one line; resumed by two: same bits"
        outcome.seconds = sum(child.seconds for child in (*pair, *last))
        yield outcome
        shutil.rmtree(folder, ignore_errors=True)


def a_rank_dies_under_torchrun(bench: Bench, times: int) -> Iterator[Outcome]:
    """The same with the launcher that users have, which ends the other one."""
    if not times:
        return
    expected, _ = _whole(bench)
    for number in range(times):
        folder, victim = bench.folder(), number % 2
        out = folder / "out"
        outcome = Outcome("a rank of two dies (torchrun)", f"rank {victim}, behind the second checkpoint")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "npt_kernels",
        ]
        started = time.monotonic()
        with (folder / "log").open("wb") as stream:
            launcher = subprocess.Popen(
                [*command, *bench.place.command(out)],
                stdout=stream,
                stderr=stream,
                env={**os.environ, **ENVIRONMENT},
                cwd=ROOT,
            )
        while launcher.poll() is None and steps_done(out) < 4:
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if _rank_of(p) == victim]
        if ranks:
            ranks[0].kill()
        code = launcher.wait(120)
        outcome.bad = "" if ranks and code not in (0,) else f"exit code {code}, {len(ranks)} victims"
        outcome.seconds = time.monotonic() - started
        last, bad = _go_on(bench, out, folder)
        outcome.bad = outcome.bad or bad or _compare(out, expected, True)
        outcome.result = "the launcher ends the other; resumed by two: same bits"
        outcome.seconds += sum(child.seconds for child in last)
        yield outcome
        shutil.rmtree(folder, ignore_errors=True)


def _rank_of(process: psutil.Process) -> int | None:
    try:
        return int(process.environ().get("RANK", "-1"))
    except psutil.Error:
        return None
