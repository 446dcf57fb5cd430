"""Checkpoints and resume: the same bits as without a stop, whatever stopped the run and whenever; damage is seen and named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import Words, tiny_model, token_ids
from runs import FAR, blocks, make_config, records, start

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters
from npt_kernels.configs.schema import ConfigError
from npt_kernels.models.checkpoints import adapter_state_dict
from npt_kernels.training import checkpoints, display, run
from npt_kernels.training.checkpoints import list_checkpoints, load_optimizer, open_checkpoint, save_checkpoint
from npt_kernels.training.loop import TrainingError
from npt_kernels.training.resuming import find_resume


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Half of a tiny run's time, and nothing of what is tested here.
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


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


#: Everything happens now and then, and not always in the same step.
STEPS = {
    "max_steps": 7,
    "polish_steps": 5,
    "save_steps": 3,
    "eval_steps": 2,
    "prediction_logging_steps": 4,
    "logging_steps": 3,
}
MODES = {
    "local": {"mode": "local", **STEPS},
    "kl": {"mode": "end_to_end", **STEPS},
    "local+polish": {"mode": "local+polish", "regularization_weight": 1e-4, "warmup_steps": 2, **STEPS},
    "accumulation": {"mode": "end_to_end", "objective": "layer", "batch_size": 3, "gradient_accumulation_steps": 3, **STEPS},
}  # fmt: skip


def measured(path):
    """All that was measured, without times and places."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kinds = ("train", "eval", "fidelity", "samples")
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines if line["kind"] in kinds]


def found(summary):
    values = summary.to_dict()
    return {name: values[name] for name in values.keys() - {"seconds", "tokens_per_second", "peak_memory", "paths"}}


def assert_same_run(one, other):
    (path, summary, model), (other_path, other_summary, other_model) = one, other
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(other_model)[name]), name
    assert measured(path) == measured(other_path)
    assert found(summary) == found(other_summary)
    assert (path / "samples.md").read_text() == (other_path / "samples.md").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Mode → ``(path, summary, model)`` of a run without a stop; each is run once."""
    done = {}

    def run_of(mode):
        if mode not in done:
            path = tmp_path_factory.mktemp("uninterrupted")
            done[mode] = path, *start(path, sections={"model": FAR}, tokenizer=Words(), **MODES[mode])
        return done[mode]

    return run_of


@pytest.mark.parametrize(
    ("mode", "number", "how"),
    [
        ("local", 5, "crash"), ("kl", 4, "crash"), ("kl", 4, "ctrl-c"), ("accumulation", 6, "ctrl-c"),
        # in the first phase; in its last step; in the first of the second; later, after a checkpoint of the second
        ("local+polish", 5, "crash"), ("local+polish", 7, "ctrl-c"), ("local+polish", 8, "crash"),
        ("local+polish", 9, "ctrl-c"), ("local+polish", 11, "crash"),
    ],
)  # fmt: skip
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, mode, number, how):
    settings = {"sections": {"model": FAR}, "tokenizer": Words(), **MODES[mode]}
    with monkeypatch.context() as patch, pytest.raises(PowerCut if how == "crash" else KeyboardInterrupt):
        stop_at(patch, number, how)
        start(tmp_path, **settings)
    torch.manual_seed(number)  # another process has other random numbers
    summary, model = start(tmp_path, resume=tmp_path, **settings)
    assert "resumed from" in start.output and "note" not in start.output
    assert_same_run((tmp_path, summary, model), uninterrupted(mode))
