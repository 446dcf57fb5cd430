"""Several threads that do their work over and over, each of which knows the bits that it must get."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["REPEATS", "alike", "side_by_side"]

#: How often each thread works; ``make threads`` sets 1000.
REPEATS = int(os.environ.get("NPT_THREAD_REPEATS") or 12)


def alike(one: Any, other: Any) -> bool:
    """The same bits, in tensors, numbers and all that holds them."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def side_by_side(
    works: Mapping[str, Callable[[], Any]],
    repeats: int = REPEATS,
    shares: Mapping[str, float] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Every work in a thread of its own, ``repeats`` times each, against what it gives alone; how often each was done.

    Threads take turns every 20 µs, so that they meet in the middle of everything; in the interpreter's 5 ms these models run a
    whole forward.
    A work that is done goes on until all are, so that none ends its part alone.

    Args:
        works: Name → what to do; what it returns is compared.
        repeats: Of each.
        shares: Name → part of ``repeats``, for what is slow.
        expected: What each must return; default: what it returns here, now, with nothing beside it.
    """
    wanted = expected or {name: work() for name, work in works.items()}
    least = {name: max(1, round(repeats * (shares or {}).get(name, 1.0))) for name in works}
    done = dict.fromkeys(works, 0)
    start, wrong = threading.Barrier(len(works)), []

    def run(name: str) -> None:
        start.wait(30)
        try:
            while not wrong and any(done[other] < least[other] for other in works):
                if not alike(works[name](), wanted[name]):
                    wrong.append(f"{name}: other bits, time {done[name]}")
                done[name] += 1
        except BaseException:
            wrong.append(f"{name}: {traceback.format_exc()}")

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in works]
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong, "\n".join(wrong)
    return done
