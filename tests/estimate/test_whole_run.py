"""The whole of ``npt train``, from the original's evaluation to the last one, against the plan's peak."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from npt_kernels.estimate.byte_count import count_bytes, peak
from npt_kernels.measure.live_bytes import LiveBytes
from npt_kernels.measure.random_model_step import build_model
from npt_kernels.run.run import run_training
from tests.support.plan_cases import FAMILIES, config_of, sizes_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {"training__mode": "local+polish", "training__polish_steps": 2, "training__eval_steps": 1, "training__batch_size": 4},
        {"training__mode": "end_to_end", "model__init": "closed_form", "training__batch_size": 8},
        {"training__mode": "local", "optimization__stream_layers": "host", "model__basis": "pca", "model__init": "closed_form"},
    ],
    ids=lambda keys: keys["training__mode"],
)  # fmt: skip
def test_the_peak_of_a_whole_run(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(paths__output_dir=str(tmp_path), training__max_steps=2, **keys)
    numbers = FAMILIES[family]
    predicted = peak(count_bytes(*sizes_of(numbers, config), config, torch.device("cpu")))
    model = build_model(numbers, torch.float32)

    def ids(rows: int, seed: int) -> torch.Tensor:
        return torch.randint(300, (rows, 64), generator=torch.Generator().manual_seed(seed))

    blocks = SimpleNamespace(train=ids(32, 1), calibration=ids(4, 2), heldout=ids(2, 3), sources=["random numbers"])
    with LiveBytes(include=[model, blocks.train, blocks.calibration, blocks.heldout]) as live:
        texts = live.current - sum(p.numel() * 4 for p in model.parameters())
        run_training(config, model, None, blocks, console=Console(file=io.StringIO()))
    assert predicted == pytest.approx(live.peak - texts, rel=0.1)
