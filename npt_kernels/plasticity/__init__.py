"""Context as weights: write a fact into them, move a context between runs, act on a condition, look at what attention changed.

Reading order: ``facts`` (what is to be learned) → ``moments`` (which directions of a weight's input are in use) → ``rome`` and
``context`` (two ways to find a low-rank change) → ``edit`` (a change that can be stored, applied and undone) → ``recall`` and
``learn`` (what it did, measured). ``transfer`` and ``inspection`` work on converted models. All access to the rest of the
package goes through ``hooks``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edit import Edit, active_edits, apply_edit, undo_edit
    from .facts import Fact, read_facts
    from .learn import Learned, Limits, learn
    from .moments import SecondMoments, collect_second_moments

#: Loaded at first use: ``npt --help`` must not wait for torch.
_LAZY = {
    "Edit": ".edit",
    "Fact": ".facts",
    "Learned": ".learn",
    "Limits": ".learn",
    "SecondMoments": ".moments",
    "active_edits": ".edit",
    "apply_edit": ".edit",
    "collect_second_moments": ".moments",
    "learn": ".learn",
    "read_facts": ".facts",
    "undo_edit": ".edit",
}

__all__ = [
    "Edit",
    "Fact",
    "Learned",
    "Limits",
    "SecondMoments",
    "active_edits",
    "apply_edit",
    "collect_second_moments",
    "learn",
    "read_facts",
    "undo_edit",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
