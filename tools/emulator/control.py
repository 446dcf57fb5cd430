"""The emulated machine from Python: its schedules, its statistics, launches that overlap."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from names import extension

__all__ = ["EARLIEST", "LATEST", "Emulator", "Schedule", "schedules"]

_STATS = ("launches", "threads", "switches", "wgmma", "tma_loads", "tma_stores", "phases", "overlapped")


class Schedule(NamedTuple):
    """Who runs when. ``mode``: asynchronous work at once (0), as late as is legal (1), or as drawn from the seed (2)."""

    seed: int
    mode: int = 2


EARLIEST, LATEST = Schedule(0, 0), Schedule(1, 1)


def schedules(count: int, seed: object) -> tuple[Schedule, ...]:
    """The two extremes and ``count - 2`` drawn ones; the same for the same seed."""
    draw = random.Random(str(seed))
    return (EARLIEST, LATEST, *(Schedule(draw.randrange(1 << 30)) for _ in range(count - 2)))[:count]


class Emulator:
    """The machine inside the emulated module."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(extension().__file__)
        self._library.emu_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self._library.emu_flush.restype = ctypes.c_char_p

    def follow(self, schedule: Schedule) -> None:
        """Launches from here on follow it."""
        self._library.emu_configure(schedule.seed, schedule.mode, 0)

    @contextmanager
    def overlapping(self, seed: int) -> Iterator[None]:
        """Launches return before they have ended, as on a GPU; all have ended when the block has. Raises ``RuntimeError``."""
        self._library.emu_configure(seed, 2, 1)
        try:
            yield
            self.wait()
        finally:
            self._library.emu_flush()
            self.follow(EARLIEST)

    def wait(self) -> None:
        """Until everything that was launched has ended. Raises ``RuntimeError``."""
        message = self._library.emu_flush().decode()
        if message:
            raise RuntimeError(f"emulator: {message}")

    def stats(self) -> dict[str, int]:
        """What it has done since it was loaded."""
        values = (ctypes.c_uint64 * len(_STATS))()
        self._library.emu_stats(values)
        return dict(zip(_STATS, values, strict=True))
