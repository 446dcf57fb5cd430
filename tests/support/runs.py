"""Whole runs on tiny models, for the tests of this folder."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
from typing import Any

import torch
from rich.console import Console

from npt_kernels.configs.schema import RunConfig
from npt_kernels.run import display
from npt_kernels.run.run import run_training
from tests.support.helpers import tiny_model, token_ids


@dataclasses.dataclass
class Blocks:
    train: torch.Tensor
    calibration: torch.Tensor
    heldout: torch.Tensor
    sources: list[str]


#: A start far from the original, so that a few steps show; the closed form leaves a random model little to learn.
FAR = {"rank": 16, "init": "small"}


def blocks(train=24):
    return Blocks(token_ids(train, 16, 1), token_ids(8, 16, 2), token_ids(6, 16, 3), ["random numbers"])


def make_config(path, sections: dict[str, dict[str, Any]] | None = None, **training) -> RunConfig:
    settings = {
        "mode": "end_to_end",
        "batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 6,
        "num_epochs": 20,
        "logging_steps": 2,
    }
    data: dict[str, Any] = {
        "model": {"rank": 8, "basis": "pca"},
        "optimization": {"mixed_precision": "no"},
        "training": settings | training,
        "evaluation": {"tokens": 60, "prompts": ["1 2", "3"], "max_new_tokens": 4},
        "paths": {"output_dir": str(path)},
    }
    for name, values in (sections or {}).items():
        data[name] = data.get(name, {}) | values
    return RunConfig.from_mapping(data)


def start(path, family="llama", *, sections=None, resume=None, tokenizer=None, text=None, model=None, **training):
    model = model or tiny_model(family, layers=3)
    stream = io.StringIO()
    console = Console(file=stream, width=150)
    config = make_config(path, sections, **training)
    try:
        summary = run_training(config, model, tokenizer, text or blocks(), resume=resume, console=console)
    finally:
        start.output = stream.getvalue()
    return summary, model


def records(path, kind):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def checksum(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "np_component" not in name:
            digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PowerCut(BaseException):
    """Nothing catches it: no rescue, no last save."""


def stop_at(monkeypatch, number, how):
    """Stop a run in its ``number``-th step, counted over phases: ``crash`` or ``ctrl-c``."""
    plain, steps = display.TrainingDisplay.step, []

    def step(self, report, eta, *, logged):
        plain(self, report, eta, logged=logged)
        steps.append(report.step)
        if len(steps) == number:
            if how == "crash":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(display.TrainingDisplay, "step", step)
