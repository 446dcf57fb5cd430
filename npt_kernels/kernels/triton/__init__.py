"""The portable fused backend. Only this file and ``support`` may be imported without Triton; kernels load at their first use."""

from __future__ import annotations

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


BACKEND = Backend(
    name="triton",
    load=_load,
    summary="portable fused kernels: the delta and the activation inside the GEMM; CUDA devices, fp16, bf16, fp32",
    automatic=False,  # slower than eager below 1,000 tokens on an H200, the one GPU that it ran on
    check=_check,
    rules=frozenset(support.RULE_IDS),
)
