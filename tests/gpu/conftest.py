"""Tests of whole models on a GPU: collected only where torch sees one."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
