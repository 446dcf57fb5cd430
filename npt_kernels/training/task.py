"""Fine-tuning: cross-entropy of the next token, on text or on responses to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..argument_checks import autocast_dtype
from ..masked_ids import unmask
from ..model.head import CHUNK_ELEMENTS, OutputHead
from .objectives import Backward, EndToEnd, Losses

__all__ = ["TaskObjective", "cross_entropy"]


def cross_entropy(states: Tensor, labels: Tensor, head: OutputHead) -> Tensor:
    """Mean of −log p(label) in nats over ``states [T, d]`` and ``labels [T]``; 0 for T = 0.

    Logits exist for a chunk of tokens at a time, and again in the backward.
    """

    weight, bias, dtype = head.weight, head.bias, autocast_dtype(states)
    if weight is not None and dtype is not None:
        # Autocast would cast the whole head anew for every chunk.
        states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def chunk_sum(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = rows if weight is None else F.linear(rows, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")

    size = max(1, CHUNK_ELEMENTS // head.vocabulary)
    sums: list[Any] = [
        checkpoint(chunk_sum, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(states.split(size), labels.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / max(1, len(labels))


class TaskObjective(EndToEnd):
    """Cross-entropy of the next token under the converted model, mean over the tokens that count.

    Micro-batches may count different numbers of tokens (:mod:`npt_kernels.masked_ids`): each weighs by them in its process, so
    that a step is the mean over its tokens however it was cut.
    """

    name = "task"

    def __init__(self, model: nn.Module, **weights: float) -> None:
        super().__init__(model, **weights)
        self.head = OutputHead(model)

    def accumulate(self, ids: Tensor, share: float, backward: Backward) -> Losses:
        ids, counted = unmask(ids)
        states, _, penalties = self._student(lambda: self.head.states(ids), keep_outputs=False)
        states, labels = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()  # type: ignore[index]
        if counted is not None:
            chosen = counted[:, 1:].flatten()
            states, labels = states[chosen], labels[chosen]
        return self._finish(cross_entropy(states, labels, self.head), penalties, share, backward, {})

    def accumulate_group(self, batches: Sequence[Tensor], shares: Sequence[float], backward: Backward) -> list[Losses]:
        counts = [int((ids[:, 1:] >= 0).sum()) for ids in batches]
        total, own = max(1, sum(counts)), sum(shares)
        return super().accumulate_group(batches, [own * count / total for count in counts], backward)
