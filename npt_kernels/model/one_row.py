"""One token on a CPU: the change's products in float32, the frozen ones in the model's dtype, without the op's bookkeeping.

In float32 and bfloat16 one call of compiled code (``kernels/native_row.py``), where it was built. Cold, 30 layers of SmolLM2's
shape at R = 78, 2 threads of an AMD EPYC with avx512_bf16, 2026-11-27: float32 .22–.34 ms a layer, and the *original's* MLP and
output projection by ``linear`` .70–.76; bfloat16 .20–.24 and .27–.37. Without it, and in float16, torch:

A product of one row with a narrow matrix is no work for a half-precision GEMM. Measured cold, SmolLM2 at R = 128 (Xeon with amx,
2 threads, 2026-11-27): ``addmm_(c, w_b_up)`` in bf16 45 us, in fp16 39, in float32 with the casts 26; ``a @ w_down`` 24, 23, 12;
held to AVX2 183, 166, 29 and 68, 69, 11. And the change is rounded once, not three times. With bf16 instructions ``mv`` reads a
frozen matrix in 98 us, ``linear`` in 140; without them, and in fp16, ``linear`` is as fast or faster. In float32 torch's
operations, and so their bits, are the op's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import get_activation
from ..component import NPComponent
from ..kernels.native_row import NativeRow, native_row
from ..kernels.steps import Projection
from ..rules import get_rule
from .fold import folded_weight

__all__ = ["OneRow", "serves"]


def serves(rule: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer's calls of one token are for :class:`OneRow`: the change is ``z @ w_b_up``."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and get_rule(rule).key == "none"
    )


_NOT_TRIED: Any = object()


class OneRow:
    """A component's tensors in float32, and the second half of a layer for one token with them.

    Args:
        component: Of rule ``self_key``.
        targets: Slot (``gate``, ``up``, ``down``) → target.
        projection: The output projection that is left out, or ``None``.
    """

    def __init__(self, component: NPComponent, targets: dict[str, str], projection: nn.Module | None) -> None:
        self.w_down = component.w_down.detach().float()
        values = {slot: component.w_b_up[target] for slot, target in targets.items() if target in component.w_b_up}
        self.values = {slot: value.detach().float() for slot, value in values.items()}
        self.folded = None if projection is None else folded_weight(self.w_down, projection, torch.float32)
        self._natives: dict[bool, Any] = {}

    def native(self, folds: bool, describe: Callable[[], dict[str, Any]]) -> NativeRow | None:
        """The compiled call for what is heard in this way, ``None`` where there is none; made again when a weight has moved.

        ``describe()``: what :func:`~..kernels.native_row.native_row` asks beside the component.
        """
        made = self._natives.get(folds, _NOT_TRIED)
        if made is None:
            return None
        if made is _NOT_TRIED or made.moved():
            bottleneck = self.folded if folds and self.folded is not None else (self.w_down.t(), None)
            self._natives[folds] = made = native_row(bottleneck, values=self.values, **describe())
        return made  # type: ignore[return-value]

    def bottleneck(self, heard: Tensor, folds: bool) -> Tensor:
        """``z [1, R]`` of the attention's output, or of the heads' if the projection is left out. Float32."""
        row = heard.reshape(1, -1).float()
        return F.linear(row, *self.folded) if folds and self.folded is not None else row @ self.w_down

    def mlp(
        self, u: Tensor, z: Tensor, scale: Tensor | None, projections: Any, act: str, moved: Tensor | None
    ) -> Tensor:
        """``MLP_Δ(u) [1, d]`` in ``u``'s dtype; ``moved``: the last linear's change, if it is made already."""
        gate, up, down = projections
        matched = z if scale is None else z * scale.float()
        inter = self._project(u, up, matched, "up")
        forward = get_activation(act).forward
        inter = forward(inter) if gate.weight is None else forward(self._project(u, gate, matched, "gate")).mul_(inter)
        out = _row_product(inter.to(u.dtype), down).float()
        if moved is not None:
            out += moved
        elif "down" in self.values:
            out.addmm_(z, self.values["down"])
        return out.to(u.dtype)

    def _project(self, u: Tensor, target: Projection, c: Tensor, slot: str) -> Tensor:
        y = _row_product(u, target).float()
        return y.addmm_(c, self.values[slot]) if slot in self.values else y


def _row_product(row: Tensor, target: Projection) -> Tensor:
    """``row [1, in] @ weightᵀ + bias``."""
    weight: Tensor = target.weight  # type: ignore[assignment]
    if row.dtype != torch.bfloat16 or not _bf16_instructions() or weight.stride(1) != 1:
        return F.linear(row, weight, target.bias)
    flat = torch.mv(weight, row[0]) if target.bias is None else torch.addmv(target.bias, weight, row[0])
    return flat.unsqueeze(0)


@lru_cache(maxsize=1)
def _bf16_instructions() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
