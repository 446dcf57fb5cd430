"""The numerics are collected only where an sm_90 GPU is or NPT_EMULATE=1; everything else here runs on any machine."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from npt_kernels.kernels.cuda.support import EMULATED
from tests.support.cuda_layout import build_layout


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


collect_ignore = [] if _has_hopper() or EMULATED else ["test_gpu.py"]
collect_ignore += [] if _has_hopper() else ["test_instances.py"]
collect_ignore += [] if EMULATED else ["test_emulated_model.py", "test_emulated_offsets.py"]


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/common/layout.h, compiled with g++."""
    return build_layout(tmp_path_factory.mktemp("layout"))
