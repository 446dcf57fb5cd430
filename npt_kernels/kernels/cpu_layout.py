"""The second operand of a product as torch's own half-precision GEMM for CPUs reads it fast.

Where oneDNN has no instructions for a dtype, torch computes the product itself, and is five times slower if the second operand
does not run along K. Measured with ``ONEDNN_MAX_CPU_ISA=AVX2`` (Xeon, 1 thread, 2026-11-26), SmolLM2's shapes, 512 tokens, bf16:
``a @ w_down`` 44.1 ms, with a K-contiguous copy 7.6; ``addmm_(c, w_b_up)`` 127.9 and 24.5; one token .083 and .014. The copy:
.05 ms. With instructions (AVX-512 bf16, AMX) and in float32 the layout makes no difference.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["k_contiguous"]


@lru_cache(maxsize=None)
def _multiplied_by_torch(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def k_contiguous(operand: Tensor) -> Tensor:
    """``operand [K, N]`` itself, or a copy that runs along K where that is the faster one to multiply with."""
    if torch.compiler.is_compiling():  # the compiler chooses layouts
        return operand
    if operand.element_size() != 2 or operand.device.type != "cpu" or not _multiplied_by_torch(operand.dtype):
        return operand
    return operand if operand.stride(0) == 1 else operand.t().contiguous().t()
