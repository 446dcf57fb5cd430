"""GPU tests are collected where a GPU is; without one there is nothing to skip."""

from __future__ import annotations

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_streamer_gpu.py"]
