"""The hand-written Hopper kernels (``csrc/``) as a backend: what can run, and the way to it. Loads no kernel.

Ran on an H200 for the first time on 2026-11-26 (benchmarks/results/nvidia-h200); docs/status.md says what is verified.
"""

from __future__ import annotations

import torch

from ..backend import Backend
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


BACKEND = Backend(
    name="cuda",
    load=_load,
    summary="hand-written Hopper kernels (sm_90a): fused segmented-K GEMMs; bf16, fp16; ran on an H200",
    automatic=False,  # one device, one day: only when asked for by name
    check=lambda call: _check(call.device, call.dtype),
    ops=("factored_linear", "mlp", "matched_norm"),
    absent=ABSENT,
    rules=frozenset(support.RULE_IDS),
)
