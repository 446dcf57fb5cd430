"""All faults, and how often each is tried in a full run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

from .damage import damaged_newest_checkpoint, vanishing_stream, vanishing_text
from .disks import full_disk, read_only_output, short_files
from .judge import Outcome
from .ranks import a_rank_dies, a_rank_dies_under_torchrun
from .stops import kill_at_random, kill_inside_a_checkpoint, signal_at_random

__all__ = ["FAULTS"]

#: Name → (what to do, how often, keyword arguments). The second number is that of the short form, for CI.
FAULTS: dict[str, tuple[Callable[..., Iterator[Outcome]], int, int, dict[str, Any]]] = {
    "kill": (kill_at_random, 30, 2, {}),
    "kill in checkpoint": (kill_inside_a_checkpoint, 15, 1, {}),
    "SIGTERM": (signal_at_random, 10, 1, {}),
    "SIGINT": (signal_at_random, 10, 1, {"number": signal.SIGINT}),
    "SIGINT twice": (signal_at_random, 6, 0, {"number": signal.SIGINT, "twice": True}),
    "full disk": (full_disk, 12, 2, {}),
    "short files": (short_files, 4, 0, {}),
    "read-only": (read_only_output, 6, 1, {}),
    "damaged checkpoint": (damaged_newest_checkpoint, 45, 2, {}),
    "vanishing text": (vanishing_text, 9, 0, {}),
    "vanishing stream": (vanishing_stream, 4, 0, {}),
    "rank": (a_rank_dies, 6, 0, {}),
    "rank, torchrun": (a_rank_dies_under_torchrun, 2, 0, {}),
}
