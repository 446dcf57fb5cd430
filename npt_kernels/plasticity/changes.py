"""A low-rank change of one matrix, and what may switch it on: the data that edits are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerChange", "Trigger"]

#: Token runs, each of which is a mention of one subject.
Trigger = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class LayerChange:
    """The change of one matrix ``[out, in]``.

    Attributes:
        v_a: ``[k, in]``, float32: what each term answers to.
        v_b: ``[k, out]``, float32: what it adds.
        group: ``[k]``, int64: which fact each term belongs to.
    """

    v_a: Tensor
    v_b: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        k = len(self.v_a)
        if self.v_a.dim() != 2 or self.v_b.dim() != 2 or len(self.v_b) != k or self.group.shape != (k,) or k < 1:
            raise ValueError(
                f"v_a {list(self.v_a.shape)}, v_b {list(self.v_b.shape)}, group {list(self.group.shape)}: expected [k, in], "
                "[k, out], [k] with k ≥ 1"
            )
        if not (bool(self.v_a.isfinite().all()) and bool(self.v_b.isfinite().all())):
            raise ValueError("the change has values that are not finite")

    @property
    def norm(self) -> float:
        """``‖ΔW‖`` (Frobenius) without building ΔW."""
        a, b = self.v_a.double(), self.v_b.double()
        return float(((a @ a.t()) * (b @ b.t())).sum().clamp_min(0).sqrt())

    def dense(self) -> Tensor:
        """``ΔW [out, in]``, float32."""
        return self.added_to(torch.zeros(self.v_b.shape[1], self.v_a.shape[1]))

    def added_to(self, weight: Tensor) -> Tensor:
        """``weight + ΔW`` in float32 (float64 for a float64 weight), term by term.

        Elementwise, not a GEMM: a product's order of summation depends on the number of threads, and an edit must give the
        same bits in every process.
        """
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        total = weight.to(wide, copy=True)
        v_a, v_b = self.v_a.to(total), self.v_b.to(total)
        for a, b in zip(v_a, v_b, strict=True):
            total += b.unsqueeze(1) * a
        return total
