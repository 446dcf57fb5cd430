"""Faults: a disk that is full, or that may not be written to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from .children import Child, begin
from .judge import Outcome, one_line
from .small_disk import as_nobody, may_mount, shorter_files, small_disk, writable
from .workbench import Bench, ended, logged_steps

__all__ = ["full_disk", "read_only_output", "short_files"]

#: A run's output and three checkpoints take 900 KB.
_DISK = 4096


def _judge(outcome: Outcome, child: Child, whole: str, stopped: str, *, reason: str = "") -> None:
    """What came out of a run on such a disk: it ended, or it stopped with one line, which names the ``reason``."""
    if child.code == 0:
        outcome.result = f"{whole}: same bits"
        return
    outcome.bad = one_line(child) if child.code == 2 else f"exit code {child.code}: {child.out[-600:]}"
    if not outcome.bad and reason not in child.errors()[0]:
        outcome.bad = f"it does not say why: {child.errors()[0]}"
    outcome.result = f"one line that says why; {stopped}: same bits"


def full_disk(bench: Bench, times: int) -> Iterator[Outcome]:
    """A real one (tmpfs) that is full from a random moment on: for good, or for a while; or full before the run begins.

    Where this user may not mount one, :func:`short_files` in its place.
    """
    if not may_mount(bench.folder() / "try"):
        yield from short_files(bench, times)
        return
    for number in range(times):
        folder, kind = bench.folder(), ("for good", "for a while", "before the run", "for good")[number % 4]
        moment = 0.0 if kind == "before the run" else bench.random.uniform(0.1, bench.seconds * 0.9)
        outcome = Outcome("a full disk (tmpfs)", f"{kind}, after {moment:.2f} s")
        with small_disk(folder / "disk", _DISK) as disk:
            out = folder / "disk" / "out"
            if kind == "before the run":
                disk.fill(bench.random.choice([0, 4096, 20000]))
            child = begin(bench.place.command(out), folder / "log")
            if moment:
                time.sleep(moment)
                disk.fill(bench.random.choice([0, 0, 8192]))
            if kind == "for a while":
                time.sleep(0.4)
                disk.make_room()
            child.wait()
            outcome.notes["steps"] = logged_steps(child)
            disk.make_room()
            _judge(outcome, child, "the run went on and ended", "with room, resumed", reason="No space left")
            yield ended(bench, outcome, out, child)


def short_files(bench: Bench, times: int) -> Iterator[Outcome]:
    """Writes that fail beyond a size (``RLIMIT_FSIZE``: EFBIG where a full disk gives ENOSPC); needs no right to mount."""
    for number in range(times):
        folder, limit = bench.folder(), (0, 3000, 9000, 24000)[number % 4]
        out, outcome = folder / "out", Outcome("writes that fail (RLIMIT_FSIZE)", f"beyond {limit:,} bytes")
        # What it prints goes through a pipe, which the limit does not meet.
        read, write = os.pipe()
        limited = shorter_files(limit)

        def before(write: int = write, limited=limited) -> None:  # type: ignore[no-untyped-def]
            os.dup2(write, 1)
            os.dup2(write, 2)
            limited()

        child = begin(bench.place.command(out), folder / "log", before=before)
        os.close(write)
        text = b""
        while block := os.read(read, 65536):
            text += block
        os.close(read)
        child.wait()
        child.log.write_bytes(text)
        outcome.notes["steps"] = logged_steps(child)
        _judge(outcome, child, "the run went on and ended", "without the limit")
        yield ended(bench, outcome, out, child)


def read_only_output(bench: Bench, times: int) -> Iterator[Outcome]:
    """Folders that may not be written to, before the run or from a random moment on; as root the run is somebody else's."""
    # Temporary folders are for their owner alone; the child may be nobody.
    for parent in (bench.folder(), bench.scratch, bench.scratch.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    for number in range(times):
        folder, kind = bench.folder(), ("before the run", "while it runs")[number % 2]
        out, outcome = folder / "out", Outcome("a read-only output", kind)
        out.mkdir()
        writable(out, kind != "before the run")
        child = begin(bench.place.command(out), folder / "log", before=as_nobody)
        if kind == "while it runs":
            moment = bench.random.uniform(0.1, bench.seconds * 0.8)
            time.sleep(moment)
            writable(out, False)
            outcome.how += f", after {moment:.2f} s"
        child.wait()
        outcome.notes["steps"] = logged_steps(child)
        writable(out, True)
        _judge(outcome, child, "the run ended", "writable again", reason="ermission denied")
        yield ended(bench, outcome, out, child)
