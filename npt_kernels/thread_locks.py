"""A lock for threads that a forked process does not inherit locked."""

from __future__ import annotations

import os
import threading

__all__ = ["ThreadLock"]


class ThreadLock:
    """A ``threading.RLock`` that is free in a forked child, whoever held it in the parent.

    A fork copies one thread. A lock that another one held would stay locked in the child for good, with nobody there to open it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> None:
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
