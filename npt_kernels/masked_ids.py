"""Token ids of which some are read but not counted: a prompt, padding. ``i`` of them stands in the tensor as ``~i``, below 0.

So a text with a mask is one int64 tensor wherever texts go: shuffled, dealt to processes, fingerprinted, resumed.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["plain_ids", "unmask"]


def plain_ids(ids: Tensor) -> Tensor:
    """What a model reads: ``ids`` of any shape with ``~i`` taken for ``i``."""
    return ids.where(ids >= 0, ~ids)


def unmask(ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(what a model reads, which tokens count)``, both of the shape of ``ids``; ``None``: all of them."""
    counted = ids >= 0
    return (ids, None) if bool(counted.all()) else (plain_ids(ids), counted)
