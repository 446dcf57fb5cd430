"""The MLP's activation and its gradients on a CPU, each in one pass of compiled code (``csrc/cpu/activation.cpp``).

Torch takes two passes forward and four backward, the last with the exponentials of the first again. [1024, 1536] in float32 on
two cores of an AMD EPYC: silu 322 v 431 µs and 420 v about 1,000; gelu_tanh 374 v 1,299 and 567 v about 2,800 (2026-11-27).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

__all__ = ["activated", "gradients"]

# Its erf is a call for every number: 40 times as long as torch's.
_TORCH = native.ACTS["gelu"]


def _number(act: str, first: Tensor, *more: Tensor | None) -> int | None:
    """The activation's number where these can be read: numbers in one order, of one dtype, shape and device."""
    number = native.act_number(act)
    if (
        native.compiled is None
        or number is None
        or number == _TORCH
        or first.dtype not in native.DTYPES
        or native.traced()
    ):
        return None
    for tensor in (first, *more):
        if tensor is not None and not (
            type(tensor) is Tensor
            and tensor.is_cpu
            and tensor.is_contiguous()
            and tensor.dtype is first.dtype
            and tensor.shape == first.shape
        ):
            return None
    return number


def activated(act: str, gate: Tensor, up: Tensor | None, over_gate: bool) -> Tensor | None:
    """``act(gate) ⊙ up``, ``act(gate)`` without ``up``, float32 or bfloat16; ``None`` where it is left to torch.

    ``over_gate``: written over ``gate``, which nobody reads again.
    """
    number = _number(act, gate, up)
    if number is None:
        return None
    inter = gate if over_gate else torch.empty_like(gate)
    native.compiled.activate(
        native.DTYPES[gate.dtype], number, gate.data_ptr(), 0 if up is None else up.data_ptr(), inter.data_ptr(), gate.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return inter


def gradients(
    act: str, dinter: Tensor, gate: Tensor, up: Tensor | None, want_gate: bool, want_up: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """``(dinter ⊙ up ⊙ act'(gate), dinter ⊙ act(gate))``, the wanted ones; ``None`` where it is left to torch.

    ``dinter`` is written over. Without ``up`` there is the first alone, ``dinter ⊙ act'(gate)``.
    """
    number = _number(act, dinter, gate, up)
    if number is None:
        return None
    dgate = dinter if want_gate else None
    dup = (torch.empty_like(dinter) if want_gate else dinter) if want_up and up is not None else None
    native.compiled.activate_backward(
        native.DTYPES[gate.dtype], number, dinter.data_ptr(), gate.data_ptr(), 0 if up is None else up.data_ptr(),
        0 if dgate is None else dgate.data_ptr(), 0 if dup is None else dup.data_ptr(), gate.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return dgate, dup
