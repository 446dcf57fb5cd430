"""``npt_kernels._cpu``, the compiled loops for CPUs (``csrc/cpu``), and what callers ask before they hand it addresses.

Where no C++ compiler was found at installation it is not there; ``native_row`` and ``native_activation`` then leave the work
to torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..activations import ACTIVATIONS

try:  # after torch: it looks for torch's OpenMP runtime
    compiled: Any = importlib.import_module("npt_kernels._cpu")
except ImportError:
    compiled = None

__all__ = ["ACTS", "DTYPES", "act_number", "available", "compiled", "traced"]

#: The numbers of ``csrc/cpu/kinds.h``.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
_NUMBERS = {name: ACTS[activation.name] for name, activation in ACTIVATIONS.items() if activation.name in ACTS}


def available() -> str:
    """What the compiled loops run on: ``"avx512, libgomp.so.1"``; empty where they were not built."""
    return "" if compiled is None else f"{compiled.INSTRUCTIONS}, {compiled.RUNTIME.rsplit('/', 1)[-1] or 'one thread'}"


def act_number(name: str) -> int | None:
    """The number of an activation by any of its names, ``None`` for one that is not compiled."""
    return _NUMBERS.get(name)


def traced() -> bool:
    """Whether tensors are not the numbers themselves: dispatch modes (fake tensors, counters), vmap and its kind, a trace."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )
