"""What every Triton kernel here needs about numbers: exact products, rounding, precision and the launch's device.

Two facts of Triton's CPU interpreter are handled here and nowhere else, so that kernels read as on a GPU:
``tl.dot`` of bf16 operands is wrong there (operands are cast to fp32, which is exact), and a cast from fp32 to bf16 truncates
instead of rounding (the value is rounded to nearest even first). Both branches are compile-time and vanish on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRET",
    "device_guard",
    "dot",
    "dot_precision",
    "multiprocessor_count",
    "next_power_of_2",
    "rounded",
    "tanh",
]

#: Whether kernels run in Triton's CPU interpreter; fixed at import, as Triton itself fixes it when a kernel is defined.
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

#: Programs to aim for when no GPU tells its own number (interpreter, AOT checks).
_DEFAULT_MULTIPROCESSORS = 132


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 ``x`` in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # A NaN whose payload sits in the low half must not become infinite (or zero) by the carry.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: IEEE fp32 unless the user let torch use TF32. Irrelevant for 16-bit operands."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU current for a launch: Triton launches on the current device, whatever the tensors' device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def multiprocessor_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; what an H100 has for anything else."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    index = device.index if device.index is not None else torch.cuda.current_device()
    count = _COUNTS.get(index)
    if count is None:
        count = _COUNTS[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return count


_COUNTS: dict[int, int] = {}


@triton.jit
def tanh(x):
    """``tanh`` of fp32 to about one unit in the last place on the whole line, from operations that every backend has.

    Near 0, ``1 − exp(−2x)`` cancels, so |x| < 0.6 uses ``x + x³ q(x²)`` with q a Chebyshev fit of degree 4 (relative error
    8.5e-8); elsewhere ``(1 − e)/(1 + e)`` with ``e = exp(−2|x|)``, which cannot overflow.
    """
    y = x * x
    q = -0.006276387591026873
    q = q * y + 0.021116213957297316
    q = q * y - 0.05387513819313647
    q = q * y + 0.13332924006452374
    q = q * y - 0.33333330431344643
    small = x + x * y * q
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.6, small, large)
