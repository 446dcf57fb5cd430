"""Faults: signals at random moments."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from .children import begin
from .judge import Outcome
from .workbench import Bench, ended, logged_steps

__all__ = ["kill_at_random", "kill_inside_a_checkpoint", "signal_at_random"]


def kill_at_random(bench: Bench, times: int) -> Iterator[Outcome]:
    """SIGKILL at a moment of the whole run; every third run is killed again while it goes on."""
    for number in range(times):
        folder = bench.folder()
        out, fresh = folder / "out", number % 10 == 0
        moment = bench.random.uniform(0.02, bench.seconds * (2.5 if fresh else 1.0))
        outcome = Outcome("kill -9 at a random moment", f"after {moment:.2f} s{', fresh interpreter' if fresh else ''}")
        child = begin(bench.place.command(out), folder / "log", fresh=fresh)
        time.sleep(moment)
        child.send(signal.SIGKILL)
        child.wait()
        outcome.notes["steps"] = logged_steps(child)
        if number % 3 == 2:
            again = bench.random.uniform(0.02, bench.seconds)
            second = begin(bench.place.resume(out), folder / "log2")
            time.sleep(again)
            second.send(signal.SIGKILL)
            second.wait()
            outcome.how += f", again {again:.2f} s into the resumed run"
        yield ended(bench, outcome, out, child)


def kill_inside_a_checkpoint(bench: Bench, times: int) -> Iterator[Outcome]:
    """SIGKILL while the n-th checkpoint is being written."""
    for _ in range(times):
        folder = bench.folder()
        out, number = folder / "out", bench.random.randint(1, 8)
        pause = bench.random.uniform(0, 0.03)
        outcome = Outcome("kill -9 inside a checkpoint", f"{pause * 1e3:.1f} ms into checkpoint {number}")
        child = begin(bench.place.command(out), folder / "log")
        writing, seen, there = out / "checkpoints" / ".writing", 0, False
        while not child.ended():
            now = writing.exists()
            seen += now and not there
            there = now
            if seen == number:
                time.sleep(pause)
                break
            time.sleep(0.0005)
        child.send(signal.SIGKILL)
        child.wait()
        outcome.notes |= {"steps": logged_steps(child), "inside": writing.exists()}
        yield ended(bench, outcome, out, child)


def signal_at_random(
    bench: Bench, times: int, *, number: int = signal.SIGTERM, twice: bool = False
) -> Iterator[Outcome]:
    """SIGTERM or Ctrl-C: the step is finished, all is saved; exit code and one line say so. ``twice``: again 50 ms later."""
    name = signal.Signals(number).name
    for _ in range(times):
        folder = bench.folder()
        out, moment = folder / "out", bench.random.uniform(0.05, bench.seconds)
        outcome = Outcome(f"{name}{', twice' if twice else ''}", f"after {moment:.2f} s")
        child = begin(bench.place.command(out), folder / "log")
        time.sleep(moment)
        sent = child.send(number)
        if sent and twice:
            time.sleep(0.05)
            child.send(number)
        child.wait()
        outcome.notes["steps"] = logged_steps(child)
        training = "interrupted after" in child.out
        if not sent or (child.code == 0 and not training):
            outcome.notes["late"] = True
        elif child.code not in (130, -number):
            outcome.bad = f"exit code {child.code}: {child.out[-300:]}"
        elif "Traceback" in child.out:
            outcome.bad = "a traceback: " + child.out.strip().splitlines()[-1][:200]
        outcome.notes["saved"] = training
        if training and not twice and "Go on with: npt train --resume" not in child.out:
            outcome.bad = outcome.bad or "it does not say how to go on"
        yield ended(bench, outcome, out, child)
