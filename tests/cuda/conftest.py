"""The numerics on a GPU are collected only where an sm_90 GPU is; everything else here runs on any machine."""

from __future__ import annotations

import torch


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


collect_ignore = [] if _has_hopper() else ["test_cuda_gpu.py"]
