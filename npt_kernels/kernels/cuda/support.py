"""What the Hopper kernels can run, the way to the compiled module, and the rules that they know. Loads no kernel by itself."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch

__all__ = ["EMULATED", "RULE_IDS", "extension", "unavailable"]

#: ``NPT_EMULATE=1``: the same kernels and host code on CPU tensors (tools/emulator, a development tool of a checkout).
EMULATED = os.environ.get("NPT_EMULATE") == "1"

#: Numbers of the rules that the kernels know (npt::RuleId): a new rule needs an entry and a branch in csrc.
RULE_IDS = {"rank1": 0, "diagonal": 1, "anchored": 2, "self_key": 3}


@lru_cache(maxsize=None)
def _import() -> ModuleType | str:
    try:
        return importlib.import_module("npt_kernels._cuda_emulated" if EMULATED else "npt_kernels._cuda")
    except ImportError as error:
        if EMULATED:
            return f"NPT_EMULATE=1, but the emulator is not built: run `make emulator` in a checkout ({error})"
        if "_cuda" in str(error) and "No module" in str(error):
            return (
                "its kernels are not built in this installation; install the CUDA toolkit 12.5 or newer (nvcc on PATH), "
                "then NPT_CUDA=1 pip install -e . (says what is missing)"
            )
        return f"its kernels do not load: {error}"


def extension() -> ModuleType:
    """The compiled module. Raises ``ImportError`` with the way to get it."""
    module = _import()
    if isinstance(module, str):
        raise ImportError(f"npt_kernels cuda: {module}")
    return module


@lru_cache(maxsize=None)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why its kernels cannot run there, or ``None``."""
    if device.type != ("cpu" if EMULATED else "cuda"):
        where = "NPT_EMULATE=1 runs it on CPU tensors" if EMULATED else "it needs an sm_90 GPU (H100, H200)"
        return f"the tensors are on {device}, and {where}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {dtype}, and it has bfloat16 and float16"
    module = _import()
    if isinstance(module, str):
        return module
    if EMULATED:
        return None
    capability = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if capability != (9, 0):
        return (
            f"{device} is sm_{capability[0]}{capability[1]}, and its instructions (wgmma, sm_90a) exist on sm_90 only"
        )
    return None
