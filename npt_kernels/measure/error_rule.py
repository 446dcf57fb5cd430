"""The 2× rule: how far a result may be from float64, told by how far PyTorch's own computation in the same dtype is.

    max|actual − truth| ≤ factor · max|reference − truth| + floor · eps · max(max|truth|, max terms)

over the whole tensor **and** in every block of ``BLOCK`` rows with the block's own maxima; ``factor`` and ``floor`` are 2.
``truth`` is float64 on the very same (rounded) inputs, ``reference`` plain PyTorch with ordinary autograd in the dtype tested.
The floor is what rounding the result twice costs, for a reference that was lucky. A zeroed block fails: its error is
max|truth|, the floor at most 1.6 % of that (bfloat16).

``terms``: for results that are **one number per token**, such as the gradient of a key scale, which is a sum of R products of
rounded factors. Each product is off by some eps of *itself*, independently, so the sum is off by about eps · √(Σ terms²), however
far the terms cancel; |truth| says nothing about it. Where a block holds thousands of numbers its maxima say it well enough;
where it holds one (one token), a reference that happens to be right to a tenth of that leaves nothing to compare with. Seen: one
token of an 8B MLP in float16, two backends alike 1.67 × over the bound; plain PyTorch against this package's eager code, 150
random MLPs of one token (d = 256): 6 over it in float16, 3 in bfloat16, none with ``terms``; the error is 0.83 eps · √(Σ terms²)
root mean square in both. Terms that do not cancel have √(Σ terms²) ≤ |sum|, so nothing is loosened for them; a dropped term of 64
moves the sum by an eighth of √(Σ terms²), 60 times the floor in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BLOCK", "Excess", "worst_excess"]

#: Rows of a block.
BLOCK = 16


@dataclass(frozen=True)
class Excess:
    """The place where an error is largest compared with its bound.

    Attributes:
        ratio: Error ÷ bound; at most 1 is right, infinite where something is not finite or has a wrong shape or dtype.
        where: ``all``, or the block's first row.
        error, bound, reference: The largest error there, what it may be, and plain PyTorch's.
    """

    ratio: float
    where: str = "all"
    error: float = 0.0
    bound: float = 0.0
    reference: float = 0.0

    def __str__(self) -> str:
        return f"({self.where}): error {self.error:.3e} > {self.bound:.3e}, reference {self.reference:.3e}"


def worst_excess(
    actual: Tensor,
    reference: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 2.0,
    blocks: bool = True,
    terms: Tensor | None = None,
) -> Excess:
    """The rule (module docstring) on tensors of one shape; rows are the first dimension.

    Args:
        actual, reference: In the dtype under test.
        truth: float64.
        factor, floor: Of the rule; other values only with a reason.
        blocks: Whether blocks of rows are held to it too.
        terms: √(Σ terms²) of every number of ``truth``, for sums that are one number per row.
    """
    if not actual.shape == reference.shape == truth.shape or actual.dtype != reference.dtype:
        return Excess(float("inf"), "shape or dtype")
    if truth.numel() == 0:
        return Excess(0.0)
    if not all(bool(tensor.isfinite().all()) for tensor in (actual, reference, truth)):
        return Excess(float("inf"), "not finite")
    eps = torch.finfo(actual.dtype).eps
    exact = _rows(truth.double())
    error, allowed = ((_rows(tensor.detach().double()) - exact).abs().amax(1) for tensor in (actual, reference))
    size = exact.abs().amax(1)
    if terms is not None:
        size = torch.maximum(size, _rows(terms.double()).amax(1))
    columns = torch.stack((error, allowed, size))
    groups = columns.amax(1, keepdim=True)
    if blocks:
        padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % BLOCK))
        groups = torch.cat((groups, padded.reshape(3, -1, BLOCK).amax(2)), 1)
    error, allowed, size = groups
    bound = factor * allowed + floor * eps * size
    ratio = torch.where(error == 0, torch.zeros_like(error), error / bound)
    worst = int(ratio.argmax())
    where = "all" if worst == 0 else f"rows {(worst - 1) * BLOCK}…"
    return Excess(*(float(ratio[worst]), where, float(error[worst]), float(bound[worst]), float(allowed[worst])))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
