"""Tile tables per GPU: :func:`lookup` answers from JSON files, :func:`tune` measures and writes them.

Nothing is measured at import or at a first call; ``npt bench tune`` (or :func:`tune`) does when asked. Format: README.md here.
"""

from __future__ import annotations

from typing import Any

from .reading import clear_cache, device_name, lookup

__all__ = ["clear_cache", "device_name", "lookup", "tune"]


def __getattr__(name: str) -> Any:
    if name == "tune":  # imports the kernels, hence Triton: only when used
        from .tuner import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
