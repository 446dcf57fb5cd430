"""Fine-tuning: cross-entropy of the next token, on text or on responses to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..argument_checks import autocast_dtype
from ..masked_ids import unmask
from ..model.head import CHUNK_ELEMENTS, OutputHead
from .objectives import Backward, EndToEnd, Losses

__all__ = ["TaskObjective", "cross_entropy"]


class _CrossEntropy(torch.autograd.Function):
    """As ``losses._KLDivergence``: the gradient is made in the forward, where the logits exist, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.dtype, wide, dtype = states.dtype, torch.promote_types(states.dtype, torch.float32), autocast_dtype(states)
        rows, count = states.detach(), len(states)
        if weight is not None and dtype is not None:
            # Autocast would cast the whole head anew for every chunk.
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # float16 cannot hold it before the loss scale, which comes with the backward.
        kept = torch.float32 if states.dtype == torch.float16 else states.dtype
        gradient = torch.empty_like(rows, dtype=kept) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide if rows.device.type == "mps" else torch.float64, device=rows.device)
        chunk = max(1, CHUNK_ELEMENTS // (rows.shape[-1] if weight is None else len(weight)))
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, count, chunk):
                part, wanted = rows[start : start + chunk], labels[start : start + chunk].unsqueeze(1)
                log_p = (part if weight is None else F.linear(part, weight, bias)).to(wide).log_softmax(-1)
                total -= log_p.gather(1, wanted).sum()
                if gradient is not None:
                    # d(−log p) / d logits = softmax − the label's unit vector
                    d = log_p.exp_().scatter_add_(1, wanted, log_p.new_full((len(part), 1), -1.0))
                    d = d if weight is None else (d.to(weight.dtype) @ weight).to(wide)
                    gradient[start : start + chunk] = d.div_(count)
                    del d
                del log_p
        ctx.save_for_backward(gradient)
        return (total / max(count, 1)).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else (gradient * grads[0].to(gradient.dtype)).to(ctx.dtype)), None, None, None


def cross_entropy(states: Tensor, labels: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Mean of −log p(label) in nats: a scalar, 0 for T = 0. Only ``states`` gets a gradient.

    Args:
        states: Logits ``[T, vocab]``; or, with ``weight [vocab, d]`` and ``bias [vocab]`` of a frozen head, its input ``[T, d]``.
            Then logits exist for a chunk of tokens at a time.
        labels: ``[T]``, int64.
    """
    return _CrossEntropy.apply(states, labels, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


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
        return self._finish(
            cross_entropy(states, labels, self.head.weight, self.head.bias), penalties, share, backward, {}
        )

    def accumulate_group(self, batches: Sequence[Tensor], shares: Sequence[float], backward: Backward) -> list[Losses]:
        counts = [int((ids[:, 1:] >= 0).sum()) for ids in batches]
        total, own = max(1, sum(counts)), sum(shares)
        return super().accumulate_group(batches, [own * count / total for count in counts], backward)
