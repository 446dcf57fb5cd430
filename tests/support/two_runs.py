"""Whole runs in two processes, and what happens when something goes wrong in one of them; called by two_processes.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from npt_kernels import npt_parameters
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run import checkpoints
from npt_kernels.run.run import run_training
from npt_kernels.training.distributed import World
from npt_kernels.training.objectives import LocalObjective
from tests.support.helpers import Words, tiny_model
from tests.support.runs import FAR, blocks, make_config

#: Name → (mode of distribution, what happens on one rank, sections of the configuration, training keys).
RUNS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("ddp", "", {}, {}),
    "fsdp": ("fsdp", "", {}, {}),
    "uneven, ddp": ("ddp", "", {"model": FAR}, {"mode": "end_to_end", "objective": "layer"}),
    "uneven, fsdp": ("fsdp", "", {"model": FAR}, {"mode": "end_to_end", "objective": "layer"}),
    "ctrl-c": ("ddp", "ctrl-c", {}, {}),
    "resumed": ("ddp", "", {}, {}),
    "nan": ("fsdp", "nan", {}, {}),
    "memory": ("ddp", "memory", {}, {}),
    "memory, no retry": ("ddp", "memory", {"optimization": {"oom_retry": False}}, {}),
    "disk": ("ddp", "disk", {}, {}),
    "differ": ("ddp", "differ", {}, {}),
}
#: In this step of the first phase something happens.
STEP = 3


def one_run(world: World, name: str, directory: Path) -> dict[str, Any]:
    """``local+polish`` with evaluation, samples and checkpoints, unless the entry of ``RUNS`` says otherwise."""
    mode, fault, sections, training = RUNS[name]
    # One process does in two micro-batches what two do in one each.
    settings = {
        "mode": "local+polish", "max_steps": 5, "polish_steps": 2, "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-2,
        "prediction_logging_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2 // world.size,
    }  # fmt: skip
    sections = {"optimization": {}, **sections}
    sections["optimization"] = {"distributed": mode, **sections["optimization"]}
    if name.startswith("uneven"):
        settings["batch_size"] = 4  # nine sequences: a step of eight, a step of one
        sections["optimization"]["gradient_checkpointing"] = True
    folder = directory / (name if name != "resumed" else "ctrl-c")
    config = make_config(folder, sections, **(settings | training))
    world.sharded = mode == "fsdp" and world.size > 1
    model, stream = tiny_model("llama", layers=3), io.StringIO()
    found: dict[str, Any] = {}
    try:
        with faulty(world, fault, model):
            summary = run_training(
                config, model, Words(), blocks(9 if name.startswith("uneven") else 24),
                resume=folder if name == "resumed" else None,
                console=Console(file=stream, width=200) if world.is_main else Console(quiet=True), world=world,
            )  # fmt: skip
        found["trained"], found["fidelity"] = summary.trained, summary.fidelity_trained
    except (Exception, KeyboardInterrupt) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["output"], found["adapter"] = stream.getvalue(), adapter_state_dict(model)
    return found


@contextlib.contextmanager
def faulty(world: World, fault: str, model: Any) -> Iterator[None]:
    """``fault`` happens on the last rank (``disk``: on the first) in step ``STEP``, once."""
    plain: Callable[..., Any] = LocalObjective.accumulate_group
    plain_save = checkpoints.save_npt
    calls: list[int] = []

    def accumulate(self: Any, batches: Any, shares: Any, backward: Any) -> Any:
        calls.append(1)
        losses = plain(self, batches, shares, backward)
        if len(calls) != STEP or world.rank != world.size - 1:
            return losses
        if fault == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if fault == "memory":
            raise MemoryError("no more")
        if fault == "differ":
            with torch.no_grad():
                npt_parameters(model)[0].view(-1)[0] += 1e-3
        if fault == "nan":
            return [dataclasses.replace(entry, loss=entry.loss * float("nan")) for entry in losses]
        return losses

    def save(*args: Any) -> Any:
        if fault == "disk" and world.is_main and STEP <= len(calls) < 5:
            raise OSError("No space left on device")
        return plain_save(*args)

    with (
        mock.patch.object(LocalObjective, "accumulate_group", accumulate),
        mock.patch.object(checkpoints, "save_npt", save),
    ):
        yield
