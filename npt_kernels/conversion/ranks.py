"""Allotting ranks over layers: one global ranking of directions by what each is worth."""

from __future__ import annotations

import heapq

from torch import Tensor

__all__ = ["allot_ranks"]


def allot_ranks(worths: list[Tensor], mean_rank: int, multiple: int = 8) -> list[int]:
    """Ranks per layer whose mean is at most ``mean_rank``, each a multiple of ``multiple`` (or the layer's full width).

    Greedy over blocks of ``multiple`` directions, most worth first; exact for this objective because worths descend
    within a layer. Every layer gets one block at least. ``worths``: per layer ``[d]``, descending, in one common unit.
    Raises ``ValueError`` if the mean exceeds the widths.
    """
    widths = [len(worth) for worth in worths]
    if mean_rank > sum(widths) / len(widths):
        raise ValueError(f"rank='auto:{mean_rank}' exceeds the hidden size {max(widths)}")
    multiple = min(multiple, mean_rank)
    budget = mean_rank * len(worths)
    ranks = [0] * len(worths)
    blocks = [[float(part.sum()) / len(part) for part in worth.split(multiple)] for worth in worths]
    heap = [(-float("inf"), layer, 0) for layer in range(len(worths))]
    heapq.heapify(heap)
    while heap and budget > 0:
        _, layer, block = heapq.heappop(heap)
        size = min(multiple, widths[layer] - ranks[layer])
        if size > budget:
            continue
        ranks[layer] += size
        budget -= size
        if block + 1 < len(blocks[layer]):
            heapq.heappush(heap, (-blocks[layer][block + 1], layer, block + 1))
    return ranks
