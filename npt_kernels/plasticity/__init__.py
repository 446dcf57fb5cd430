"""Context as weights: write a fact into them, move a context between runs, act on a condition, look at what attention changed.

Reading order: ``facts`` (what is to be learned) → ``moments`` (which directions of a weight's input are in use) → ``rome`` and
``context`` (two ways to find a low-rank change) → ``edit`` (a change that can be stored, applied and undone) → ``recall`` and
``learn`` (what it did, measured). ``deltas`` → ``transfer`` move a run's per-token changes to another run; ``sources`` →
``inspection`` say what those of one run are and where they came from; ``token_maps`` draws both. All access to the rest of the
package's models goes through ``hooks``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deltas import Deltas, capture, replay
    from .edit import Edit, active_edits, apply_edit, undo_edit
    from .facts import Fact, read_facts
    from .inspection import Inspected, inspect
    from .learn import Learned, Limits, learn
    from .moments import SecondMoments, collect_second_moments
    from .transfer import Transferred, transfer

#: Loaded at first use: ``npt --help`` must not wait for torch.
_LAZY = {
    "Deltas": ".deltas",
    "Edit": ".edit",
    "Fact": ".facts",
    "Inspected": ".inspection",
    "Learned": ".learn",
    "Limits": ".learn",
    "SecondMoments": ".moments",
    "Transferred": ".transfer",
    "active_edits": ".edit",
    "apply_edit": ".edit",
    "capture": ".deltas",
    "collect_second_moments": ".moments",
    "inspect": ".inspection",
    "learn": ".learn",
    "read_facts": ".facts",
    "replay": ".deltas",
    "transfer": ".transfer",
    "undo_edit": ".edit",
}

__all__ = [
    "Deltas",
    "Edit",
    "Fact",
    "Inspected",
    "Learned",
    "Limits",
    "SecondMoments",
    "Transferred",
    "active_edits",
    "apply_edit",
    "capture",
    "collect_second_moments",
    "inspect",
    "learn",
    "read_facts",
    "replay",
    "transfer",
    "undo_edit",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
