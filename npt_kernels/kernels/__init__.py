"""Who computes: one file or folder a backend. Nothing here knows of autograd, models or runs.

A backend is a module named below with a ``BACKEND`` (:class:`.backend.Backend`) and, behind it, one file of steps: a subclass
of :class:`.eager.EagerSteps` that overrides what it fuses. The plans of forward and backward are in ``ops/``, written once.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from .backend import Backend

__all__ = ["NAMES", "backends"]

#: Modules of this folder, in the order in which the automatic choice tries them.
NAMES = ("cuda", "triton", "eager")


@lru_cache(maxsize=1)
def backends() -> dict[str, Backend]:
    """Name → backend, in order of preference. Loads no kernel."""
    found = (import_module(f"{__name__}.{name}").BACKEND for name in NAMES)
    return {backend.name: backend for backend in found}
