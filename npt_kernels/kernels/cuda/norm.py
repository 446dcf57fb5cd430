"""``matched_norm`` on Hopper: one block a row, read once (csrc/norm/matched_norm.cuh). Maths: ops/matched_norm/README.md.

The gradients of weight and bias are sums over tokens that frozen norms do not ask for; they are the eager step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..eager import EagerSteps
from .launch import DTYPES, say_fallback, submit
from .rules import matrix, unit_rows

__all__ = ["MAX_WIDTH", "backward", "forward", "launch_norm", "norm_arguments"]

_EAGER = EagerSteps()

#: Longest row that a block of 512 threads keeps in registers.
MAX_WIDTH = 16384


def launch_norm(
    is_backward: bool, h: Tensor, a: Tensor, du: Tensor | None, u: Tensor | None, dh: Tensor | None, da: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, key_scale: Tensor | None, d_key_scale: Tensor | None, kind: str, eps: float,
) -> None:  # fmt: skip
    """``u`` and ``key_scale``, or ``dh`` and ``da`` where given."""
    arguments = norm_arguments(is_backward, h, a, du, u, dh, da, weight, bias, key_scale, d_key_scale, kind, eps)
    submit("norm", arguments, h.device)


def norm_arguments(
    is_backward: bool, h: Tensor, a: Tensor, du: Tensor | None, u: Tensor | None, dh: Tensor | None, da: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, key_scale: Tensor | None, d_key_scale: Tensor | None, kind: str, eps: float,
) -> Sequence[Any]:  # fmt: skip
    """The arguments of ``_cuda.norm`` but device and stream."""
    vectors = [0 if t is None else t.data_ptr() for t in (weight, bias, key_scale, d_key_scale)]
    return (
        is_backward, DTYPES[h.dtype], kind == "layer", eps, *map(matrix, (h, a, du, u, dh, da)), *vectors, *h.shape,
    )  # fmt: skip


def _refusal(tensors: Sequence[Tensor | None]) -> str | None:
    """Why the kernels do not take a call, or ``None``. The first tensor is h."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if first.shape[-1] > MAX_WIDTH:
        return f"d = {first.shape[-1]} is more than the {MAX_WIDTH} that a block holds"
    if first.dtype not in DTYPES or any(t.dtype != first.dtype for t in present):
        return f"its tensors are {', '.join(dict.fromkeys(str(t.dtype) for t in present))}, not of one 16-bit type"
    return None


def _elsewhere(h: Tensor, reason: str | None) -> bool:
    """Whether the eager step takes over: said once, but for empty tensors, which are nobody's."""
    if reason is not None:
        say_fallback("matched_norm", reason, where="as on 'eager'")
    return reason is not None or h.numel() == 0


def forward(
    h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """``(u [T, d], key_scale [T])``."""
    if _elsewhere(h, _refusal([h, a, weight, bias])):
        return _EAGER.matched_norm(h, a, weight, bias, kind, eps)
    u = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    key_scale = torch.empty(h.shape[0], dtype=h.dtype, device=h.device)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    launch_norm(
        False, unit_rows(h), unit_rows(a), None, u, None, None, weight, bias, key_scale, None, kind, float(eps)
    )  # fmt: skip
    return u, key_scale


def backward(
    du: Tensor | None,
    d_key_scale: Tensor | None,
    h: Tensor,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (h, a, weight, bias) where ``needs`` is true, in that order."""
    if _elsewhere(h, _refusal([h, a, weight, bias, du, d_key_scale])):
        return _EAGER.matched_norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device) if needs[0] else None
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if needs[1] else None
    if dh is not None or da is not None:
        launch_norm(
            True, unit_rows(h), unit_rows(a), None if du is None else unit_rows(du), None, dh, da,
            None if weight is None else weight.contiguous(), None, None,
            None if d_key_scale is None else d_key_scale.contiguous(), kind, float(eps),
        )  # fmt: skip
    grads = [grad for grad in (dh, da) if grad is not None]
    if any(needs[2:]):
        grads += _EAGER.matched_norm_backward(
            du, d_key_scale, h, a, weight, bias, kind, eps, [False, False, *needs[2:]]
        )
    return grads
