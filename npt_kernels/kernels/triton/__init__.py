"""The portable fused backend. Only this file and ``support`` may be imported without Triton; kernels load at their first use."""

from __future__ import annotations

from functools import lru_cache

import torch

from ...activations import get_activation
from ..backend import Backend, Call
from ..steps import Steps
from . import support

__all__ = ["BACKEND"]


def _check(call: Call) -> str | None:
    return support.why_not(call.device, call.dtype, None if call.act is None else get_activation(call.act).name)


def _load() -> Steps:
    from .steps import TritonSteps

    return TritonSteps()


def _measured_faster(call: Call) -> bool:
    """The norm in front of the MLP in one pass: 0.17 to 0.30 of the time of torch's frozen norm, at 1 to 8,192 tokens of
    Llama-3.1-8B's width, forward and backward; ``eager`` 1.8 to 2.7, ``cuda`` 0.20 to 0.37 (H200, 2026-11-27). A compiler fuses
    the plain form itself.
    """
    if (
        call.op != "matched_norm"
        or call.device.type != "cuda"
        or call.dtype != torch.bfloat16
        or torch.compiler.is_compiling()
    ):
        return False
    return _capability(call.device.index) == (9, 0)


@lru_cache(maxsize=None)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


BACKEND = Backend(
    name="triton",
    load=_load,
    summary="portable fused kernels: the delta and the activation inside the GEMM; CUDA devices, fp16, bf16, fp32",
    automatic=_measured_faster,  # of the other ops slower than eager below 1,000 tokens on an H200, and than cuda above
    check=_check,
    rules=frozenset(support.RULE_IDS),
    unasked="matched_norm in bfloat16 on sm_90 (H100, H200)",
)
