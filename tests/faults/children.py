"""``npt`` in a process of its own, which begins in milliseconds: forked from one that has everything imported.

What such a child does from there on is what ``npt`` does: the command line's own ``main``, its files, signals and exit code. Its
interpreter is not fresh, though; so some of the runs start one (``fresh=True``: ``python -m npt_kernels``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["ROOT", "Child", "begin", "import_all"]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT),
    "MPLBACKEND": "agg",
}  # fmt: skip


def import_all() -> None:
    """What ``npt train`` imports on its way, before anything is forked."""
    import accelerate
    import matplotlib.pyplot
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    import npt_kernels.cli.train
    import npt_kernels.evaluation.plots
    import npt_kernels.run.run

    torch.set_num_threads(1)
    assert accelerate and matplotlib and transformers and modeling_llama and npt_kernels.run.run


class Child:
    """A process that runs ``npt``; ``out`` is all that it printed."""

    def __init__(self, pid: int, log: Path, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid, self.log, self.process, self.started = pid, log, process, time.monotonic()
        self.code: int | None = None
        self.seconds = 0.0

    def ended(self) -> bool:
        """Whether it is over; its exit code, negative for a signal, is then in ``code``."""
        if self.code is None:
            if self.process is not None:
                self.code = self.process.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            if self.code is not None:
                self.seconds = time.monotonic() - self.started
        return self.code is not None

    def send(self, number: int) -> bool:
        """Whether it was still there to get it."""
        if self.ended():
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, seconds: float = 120) -> int:
        """The exit code; 1000 for one that had to be ended because it hung.

        Time in which this process was stopped (a debugger, a machine that sleeps) is nobody's.
        """
        waited, before = 0.0, time.monotonic()
        while not self.ended():
            now = time.monotonic()
            waited, before = waited + min(now - before, 0.5), now
            if waited > seconds:
                os.kill(self.pid, signal.SIGKILL)
                while not self.ended():
                    time.sleep(0.01)
                self.code = 1000
                break
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    @property
    def out(self) -> str:
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines that begin with ``error:``."""
        return [line for line in self.out.splitlines() if line.startswith("error: ")]


def begin(
    arguments: Sequence[str],
    log: Path,
    *,
    fresh: bool = False,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Child:
    """Start ``npt`` with these arguments.

    Args:
        arguments: Behind ``npt``.
        log: Where it prints, both streams.
        fresh: In a new interpreter.
        environment: Further variables.
        before: Called in the child first.
    """
    variables = {**ENVIRONMENT, **(environment or {})}
    if fresh:
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "npt_kernels", *arguments]
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**os.environ, **variables}, cwd=ROOT, preexec_fn=before
            )
        return Child(process.pid, log, process)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 1
    try:
        _become(arguments, log, variables, before)
        from npt_kernels.cli.main import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _become(
    arguments: Sequence[str], log: Path, variables: Mapping[str, str], before: Callable[[], None] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if before is not None:
        before()
    # Python's own objects: a test runner may have put others in their place.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(variables)
    sys.argv = ["npt", *arguments]
