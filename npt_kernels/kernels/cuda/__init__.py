"""The hand-written Hopper kernels (``csrc/``) as a backend: what can run, and the way to it. Loads no kernel.

Ran on an H200 for the first time on 2026-11-26 (benchmarks/history/nvidia-h200); docs/status.md says what is verified.
"""

from __future__ import annotations

import torch

from ..backend import Backend, Call
from ..steps import Steps
from . import support

__all__ = ["BACKEND"]

#: Ops without a kernel → why.
ABSENT = {
    "linear": "it has no kernel for the explicit form (nothing fuses there); use 'eager' or 'triton'",
}


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    """:func:`.support.unavailable`, of which ``torch.compile`` keeps the answer: it cannot trace the import of the module."""
    return support.unavailable(device, dtype)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: 1.1 s for whoever imports an op.
_check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> Steps:
    from .steps import CudaSteps

    return CudaSteps()


#: Tokens × weights of a projection from which a forward takes the GPU longer than it takes Python: 1,024 tokens of Llama-3.1-8B.
#: On two H200s its MLP then takes 0.97 of the frozen one's time, ``eager`` 1.11 (8,192 tokens: 0.93, 1.09). With half of that a
#: host may be slower than the GPU: whole Llama-3.2-1B, 2,048 tokens, 22.6 ms on ``cuda``, 18.3 on ``eager`` (f5b5cb0).
WORTH = 1024 * 4096 * 14336
#: The same with a backward: local training 0.65 of the frozen MLP, ``eager`` 0.80; whole Llama-3.1-8B by four sequences of 2,048
#: 16,461 tokens/s, ``eager`` 15,131 (2026-11-27, 483e7c1). By one sequence the host decides: faster on one of three H200s.
WORTH_TRAINING = 8 * WORTH
#: In a CUDA graph Python costs nothing: one token 0.95 of the frozen MLP, whole models 1.139 for ``eager``'s 1.162 (8B), 1.229
#: (1B). From here to WORTH the vendor's GEMM is as fast or faster.
FEW_TOKENS = 16


def _measured_faster(call: Call) -> bool:
    if call.op != "mlp" or not call.sizes or call.dtype != torch.bfloat16 or call.device.type != "cuda":
        return False
    if any(size % 8 for size in call.sizes):  # a step would go to the vendor's GEMM, and say so
        return False
    if call.tokens * call.sizes[0] * call.sizes[1] >= (WORTH_TRAINING if call.trains else WORTH):
        return True
    return not call.trains and 0 < call.tokens <= FEW_TOKENS and torch.cuda.is_current_stream_capturing()


BACKEND = Backend(
    name="cuda",
    load=_load,
    summary="hand-written Hopper kernels (sm_90a): fused segmented-K GEMMs; bf16, fp16; ran on an H200",
    automatic=_measured_faster,
    unasked="the mlp in bfloat16: from 1,024 tokens of Llama-3.1-8B's widths on, 8,192 with gradients; up to 16 in CUDA graphs",
    check=lambda call: _check(call.device, call.dtype),
    ops=("factored_linear", "mlp", "matched_norm"),
    absent=ABSENT,
    rules=frozenset(support.RULE_IDS),
)
