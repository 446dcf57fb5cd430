"""What the Triton backend can run, and the reason where it cannot. Imports neither Triton nor CUDA."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

__all__ = ["FUSED_ACTIVATIONS", "MINIMUM_CAPABILITY", "RULE_IDS", "TRITON_INSTALLED", "interpreting", "why_not"]

TRITON_INSTALLED: bool = importlib.util.find_spec("triton") is not None

#: Names (``npt_kernels.activations``, without aliases) whose value and derivative exist in ``epilogues.py``.
FUSED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")

#: Compile-time numbers of the rules that the kernels know (``rules.apply_rule``): a new rule needs an entry and a branch there.
RULE_IDS = {"rank1": 0, "diagonal": 1, "anchored": 2, "self_key": 3}

#: Triton's own lower limit for tensor-core code of the kind used here.
MINIMUM_CAPABILITY = (8, 0)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter. Triton reads the variable when a kernel is defined, so set it early."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=None)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not(device: torch.device, dtype: torch.dtype, act: str | None = None) -> str | None:
    """Reason why the Triton backend cannot run a call on such tensors, or ``None``.

    Args:
        device: Where the tensors are.
        dtype: Their dtype.
        act: Activation that has to be fused; its name without aliases (``Activation.name``). ``None``: none.
    """
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype not in _DTYPES:
        return f"its kernels compute in float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if act is not None and act not in FUSED_ACTIVATIONS:
        return f"act={act!r} has no fused kernel; fused are {', '.join(FUSED_ACTIVATIONS)}"
    if device.type == "cpu":
        return (
            None
            if interpreting()
            else "tensors are on the CPU (set TRITON_INTERPRET=1 before start to interpret kernels)"
        )
    if device.type != "cuda":
        return f"tensors are on {device.type!r}; it runs on CUDA devices"
    # While compiling, the device cannot be asked; the kernel launch itself still fails loudly on an old GPU.
    if not torch.compiler.is_compiling() and torch.version.hip is None:
        capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
        if capability < MINIMUM_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, below {MINIMUM_CAPABILITY[0]}.0"
    return None
