"""Faults: files that are not what they were, or not there."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .children import begin
from .judge import Outcome, bits, bring_to_its_end, one_line, passed_over, steps_done
from .place import Place
from .workbench import Bench, ended

__all__ = ["damaged_newest_checkpoint", "vanishing_stream", "vanishing_text"]

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "zeros": lambda data: b"\0" * len(data),
    "gone": lambda data: None,
}


def damaged_newest_checkpoint(bench: Bench, times: int) -> Iterator[Outcome]:
    """One file of the newest checkpoint is another; every file and damage once if ``times`` suffices."""
    folder = bench.folder()
    child = begin(bench.place.command(folder / "out"), folder / "log")
    while not child.ended() and steps_done(folder / "out") < 8:
        time.sleep(0.002)
    child.send(signal.SIGKILL)
    child.wait()
    newest = max(
        (p for p in (folder / "out" / "checkpoints").iterdir() if p.name[0] != "."), key=lambda p: p.stat().st_mtime
    )
    files = sorted(path.name for path in newest.iterdir())
    cases = [(name, how) for name in files for how in DAMAGE]
    bench.random.shuffle(cases)
    for name, how in cases[:times]:
        copy = bench.folder()
        shutil.copytree(folder / "out", copy / "out")
        file = copy / "out" / "checkpoints" / newest.name / name
        data = DAMAGE[how](file.read_bytes())
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        outcome = Outcome("a damaged newest checkpoint", f"{name} {how}")
        # The run wrote down where it writes; it was moved.
        resumed = begin(bench.place.resume(copy / "out", f"paths.output_dir={copy / 'out'}"), copy / "log")
        resumed.wait()
        outcome.seconds = resumed.seconds
        if resumed.code != 0:
            outcome.bad = f"exit code {resumed.code}: {resumed.out[-300:]}"
        elif passed_over(resumed.out) != 1 or newest.name not in resumed.out:
            outcome.bad = "it does not say which checkpoint it passed over"
        elif wrong := [key for key, value in bits(copy / "out").items() if value != bench.expected[key]]:
            outcome.bad = f"other {', '.join(wrong)}"
        outcome.result = "named and passed over, the one before taken: same bits"
        yield outcome
        shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def vanishing_text(bench: Bench, times: int) -> Iterator[Outcome]:
    """The text file is moved away before the run, in it, or before it is resumed; then it comes back."""
    for number in range(times):
        folder, when = bench.folder(), ("before", "while it runs", "before it is resumed")[number % 3]
        place = _own_text(bench.place, folder)
        away, out = place.text.with_name("away"), folder / "out"
        outcome = Outcome("a text file that vanishes", when)
        if when == "before":
            place.text.rename(away)
            child = begin(place.command(out), folder / "log")
            child.wait()
            outcome.bad = "" if child.code == 2 else f"exit code {child.code}"
            outcome.bad = outcome.bad or one_line(child) or ("" if place.text.name in child.errors()[0] else "no name")
            outcome.result = "one line that names it; with the file: same bits"
        else:
            child = begin(place.command(out), folder / "log")
            time.sleep(bench.random.uniform(0.1, bench.seconds))
            if when == "while it runs":
                place.text.rename(away)
                child.wait()
                # It is read whole at the start: from then on nobody misses it.
                early = child.code == 2 and not one_line(child)
                outcome.bad = "" if child.code == 0 or early else f"exit code {child.code}: {child.out[-300:]}"
                outcome.result = "one line" if early else "not missed: same bits"
            else:
                child.send(signal.SIGKILL)
                child.wait()
                place.text.rename(away)
                resumed = begin(place.resume(out) if steps_done(out) else place.command(out), folder / "log2")
                resumed.wait()
                outcome.bad = "" if resumed.code == 2 else f"exit code {resumed.code}"
                outcome.bad = outcome.bad or one_line(resumed)
                outcome.result = "one line that names it; with the file: same bits"
        away.rename(place.text)
        yield ended(bench, outcome, out, child, command=place.command(out))


def vanishing_stream(bench: Bench, times: int) -> Iterator[Outcome]:
    """The same where the text is read while the run goes on (``data.streaming``)."""
    for _ in range(times):
        folder = bench.folder()
        place = _own_text(bench.place, folder)
        heldout = place.text.with_name("heldout.txt")
        heldout.write_text(place.text.read_text()[2000:4000])
        streamed = ["data.streaming=true", f'data.eval_files=["{heldout}"]']
        whole = begin(place.command(folder / "whole", *streamed), folder / "whole.log")
        whole.wait()
        outcome, out = Outcome("a streamed text file that vanishes", "while it runs"), folder / "out"
        if whole.code != 0:
            outcome.bad = f"exit code {whole.code} without a fault: {whole.out[-300:]}"
            yield outcome
            return
        child = begin(place.command(out, *streamed), folder / "log")
        moment = bench.random.uniform(0.1, whole.seconds)
        time.sleep(moment)
        away = place.text.with_name("away")
        place.text.rename(away)
        child.wait()
        outcome.how += f", after {moment:.2f} s"
        outcome.result = (
            "an open file is not missed: same bits" if child.code == 0 else "one line; with the file: same bits"
        )
        outcome.bad = "" if child.code == 0 else one_line(child)
        away.rename(place.text)
        expected = bits(folder / "whole")
        _, bad, seconds = bring_to_its_end(
            place, out, folder / "end.log", command=place.command(out, *streamed), expected=expected
        )
        outcome.seconds, outcome.bad = child.seconds + seconds, outcome.bad or bad
        yield outcome
        shutil.rmtree(folder, ignore_errors=True)


def _own_text(place: Place, folder: Path) -> Place:
    """The same with a text of its own, which may vanish."""
    shutil.copytree(place.folder / "model", folder / "place" / "model")
    shutil.copy(place.text, folder / "place" / "text.txt")
    own = Place(folder / "place")
    own.config.write_text(place.config.read_text().replace(str(place.folder), str(own.folder)))
    return own
