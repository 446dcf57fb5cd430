"""Progress of long work: a bar on a terminal (rich, extra ``[train]``), a line every ten seconds in a log, or silence."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["SECONDS_BETWEEN_LINES", "Progress", "progress_bar"]

#: ``True``: a bar. A function: it gets a line every ten seconds. ``False``: nothing.
Progress = bool | Callable[[str], None]

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(title: str, total: int, unit: str, *, enabled: Progress) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)``; what is shown is title, share done and time left. A bar goes to standard error and vanishes."""
    if callable(enabled):
        yield _lines(title, total, unit, enabled)
        return
    if not enabled or importlib.util.find_spec("rich") is None:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(title: str, total: int, unit: str, say: Callable[[str], None]) -> Callable[[int], None]:
    started = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal said, done
        done += n
        now = time.monotonic()
        if now - said < SECONDS_BETWEEN_LINES or done >= total:
            return
        said = now
        left = round((now - started) * (total - done) / done) if done else 0
        say(f"{title}: {done:,} of {total:,} {unit}, about {left // 60}:{left % 60:02d} left")

    return advance
