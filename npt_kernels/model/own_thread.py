"""Hooks that act in the thread that put them up, and in no other.

A module is shared by all threads, and so is its list of hooks: while one thread measures a model (``visits.py``), another may be
answering requests with it. Unconfined, the answer ran into the measurement's hooks, whose exception ended it, and the
measurement took the answer's hidden states for its own (seen: 33 of 91 forwards ended by the exception that stops a walk).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["OwnThread", "any_acts_here"]


class OwnThread:
    """``hook`` where it is called in the thread that made this; elsewhere nothing.

    Elsewhere it takes any arguments: torch may have forgotten by then, the hook being removed, that it wants ``kwargs`` too.
    A copy of it does nothing: whoever copies a module while another thread measures it gets one that nobody measures.
    """

    def __init__(self, hook: Callable[..., Any] | None) -> None:
        self.hook = hook
        self.thread = None if hook is None else threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        if self.hook is None or self.thread != threading.get_ident():
            return None
        return self.hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnThread, (None,)


def any_acts_here(hooks: Mapping[int, Any]) -> bool:
    """Whether one of a module's hooks does anything in this thread."""
    # A list first: another thread may put one up, or take one down, meanwhile.
    return any(not isinstance(hook, OwnThread) or hook.thread == threading.get_ident() for hook in list(hooks.values()))
