"""Checkpoints on disk: whole or not there, rotated, never of half an update."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters
from npt_kernels.run import state as run_state
from npt_kernels.run.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    list_checkpoints,
    load_optimizer,
    open_checkpoint,
    save_checkpoint,
)
from npt_kernels.run.resume import find_resume
from npt_kernels.run.state import RunState
from npt_kernels.training.loop import TrainingError
from tests.support.helpers import tiny_model
from tests.support.runs import FAR, PowerCut, start, stop_at


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Half of a tiny run's time, and nothing of what is tested here.
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


class Writer:
    """Saves checkpoints of a tiny converted model with a used optimizer."""

    def __init__(self, folder):
        from accelerate import Accelerator

        self.folder, self.model = folder, tiny_model("llama", layers=2)
        apply_npt(self.model, NPTConfig(layers="all", rank=4, init="small"))
        self.accelerator = Accelerator()
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(npt_parameters(self.model), lr=1e-2))
        self.step_once()

    def step_once(self):
        for parameter in npt_parameters(self.model):
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, step, **settings):
        values = {"run": "a", "phase": "local", "objective": "local", "step": step, "total_steps": step, "keep": 2}
        values |= {"output_dir": self.folder.parent, "state": {"step": step}} | settings
        return save_checkpoint(self.folder, self.model, self.accelerator, **values)


def test_moments_and_random_numbers_come_back(tmp_path):
    writer = Writer(tmp_path)
    checkpoint = open_checkpoint(writer.save(1))
    want = random.random(), np.random.rand(), torch.rand(3)
    moments = {k: v.clone() for k, v in writer.optimizer.state[npt_parameters(writer.model)[0]].items()}
    writer.step_once()
    assert load_optimizer(checkpoint, writer.accelerator) == []
    got = random.random(), np.random.rand(), torch.rand(3)
    assert got[:2] == want[:2] and torch.equal(got[2], want[2])
    restored = writer.optimizer.state[npt_parameters(writer.model)[0]]
    assert moments.keys() == restored.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(restored[name], value) for name, value in moments.items())
    assert checkpoint.state() == {"step": 1}


def test_older_checkpoints_of_this_run_go_and_those_of_others_stay(tmp_path):
    writer = Writer(tmp_path)
    writer.save(9, run="another")
    for step in (1, 2, 3):
        writer.save(step)
    assert sorted(os.listdir(tmp_path)) == ["local-000002", "local-000003", "local-000009"]
    # Resumed from step 2, the run comes by step 3 again: the newest is the one that was written last.
    again = writer.save(3)
    assert again.name == "local-000003.2"
    assert [c.path.name for c in list_checkpoints(tmp_path)[0]] == ["local-000003.2", "local-000003", "local-000009"]
    assert find_resume(tmp_path).checkpoint.path == again
    writer.save(1, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["local-000001", "local-000009"]


#: All by which a save changes the disk or waits for it.
OPERATIONS = [
    "os.fsync", "os.replace", "pathlib.Path.rename", "pathlib.Path.mkdir", "pathlib.Path.write_text", "torch.save",
    "safetensors.torch.save_file", "shutil.rmtree", "pathlib.Path.unlink",
]  # fmt: skip


def cut_power(monkeypatch, after):
    """From the ``after``-th operation on, none happens any more: neither the save nor its cleaning up. Returns the count."""
    from pydoc import locate

    count = []

    def wrap(plain):
        def operation(*args, **kwargs):
            count.append(1)
            if len(count) > after:
                raise PowerCut
            return plain(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(name, wrap(locate(name)))
    return count


@pytest.mark.parametrize("keep", [1, 2])
def test_a_power_cut_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, keep):
    writer = Writer(tmp_path / "start" / "checkpoints")
    for step in (1, 2):
        writer.save(step, keep=keep)
    kept = {}
    for after in range(100):
        folder = tmp_path / f"cut-{after}" / "checkpoints"
        shutil.copytree(tmp_path / "start" / "checkpoints", folder)
        writer.folder = folder
        with monkeypatch.context() as patch:
            count = cut_power(patch, after)
            with contextlib.suppress(PowerCut):
                writer.save(3, keep=keep)
        point = find_resume(folder.parent)
        assert point.notes == [], "half of a checkpoint was taken for one"
        assert point.checkpoint.state() == {"step": point.checkpoint.step}
        load_npt(tiny_model("llama", layers=2), point.adapter)
        kept[after] = point.checkpoint.step
        if len(count) <= after:
            break
        if after % 5 == 0:
            # The next process clears up what this one left behind.
            writer.save(4, keep=keep)
            assert [c.step for c in list_checkpoints(folder)[0]] == [4, kept[after]][:keep]
            assert not [name for name in os.listdir(folder) if name.startswith(".")]
    steps = list(kept.values())
    assert steps == sorted(steps) and set(steps) == {2, 3} and len(steps) > 20


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    plain, calls = run_state.save_checkpoint, []

    def full(*args, **kwargs):
        calls.append(kwargs["step"])
        if kwargs["step"] == 2:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    monkeypatch.setattr(run_state, "save_checkpoint", full)
    summary, _ = start(tmp_path, sections={"model": FAR}, max_steps=5, save_steps=2)
    assert "step 2: no checkpoint, it could not be written: [Errno 28] No space left on device" in start.output
    assert summary.steps == 5 and calls == [2, 4, 5]


def test_a_disk_that_stays_full_names_the_last_checkpoint(tmp_path, monkeypatch):
    plain = run_state.save_checkpoint

    def full(*args, **kwargs):
        if kwargs["step"] > 2:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    monkeypatch.setattr(run_state, "save_checkpoint", full)
    stop_at(monkeypatch, 3, "ctrl-c")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, sections={"model": FAR}, save_steps=2)
    last = tmp_path / "checkpoints" / "end_to_end-000002"
    assert f"saving failed ([Errno 28] No space left on device): the last checkpoint is {last}" in start.output


def test_a_last_save_that_fails_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "save_checkpoint", full)
    with pytest.raises(
        TrainingError, match=r"No space left on device; and saving failed .*there is no checkpoint"
    ) as caught:
        start(tmp_path, sections={"model": FAR}, max_steps=2)
    assert "\n" not in str(caught.value)


def test_half_an_update_is_never_saved(tmp_path, monkeypatch):
    plain, calls = torch.optim.AdamW.step, []

    def interrupted(self, closure=None):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].zero_()
            raise KeyboardInterrupt
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, sections={"model": FAR}, save_steps=1)
    last = tmp_path / "checkpoints" / "end_to_end-000002"
    assert f"in the middle of an update, which cannot be saved, and the last checkpoint is {last}" in start.output
    assert find_resume(tmp_path).checkpoint.path == last


# ---- checkpoints that are not what was written -----------------------------------------------------------------------


def damaged(path, *parts):
    with pytest.raises(DamagedCheckpoint) as caught:
        RunState.load(open_checkpoint(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and all(part in message for part in (str(path), *parts)), message


def test_a_manifest_cut_at_any_byte_is_damaged(tmp_path):
    path = Writer(tmp_path).save(1)
    whole = (path / MANIFEST).read_bytes()
    for length in range(len(whole.rstrip())):
        (path / MANIFEST).write_bytes(whole[:length])
        damaged(path)


def test_a_manifest_with_any_other_digit_is_damaged(tmp_path):
    path = Writer(tmp_path).save(1)
    whole = (path / MANIFEST).read_text()
    for place in [index for index, sign in enumerate(whole) if sign.isdigit()]:
        other = str((int(whole[place]) + 1) % 10)
        (path / MANIFEST).write_text(whole[:place] + other + whole[place + 1 :])
        damaged(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1}, {"step": 2**70}, {"step": True}, {"step": "1"}, {"serial": None}, {"serial": 1.5}, {"run": ["a"]},
        {"output_dir": 3}, {"files": []}, {"files": {"../state.pt": {"bytes": 0, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 0, "sha256": ""}}}, {"files": {"a\0": {"bytes": 0, "sha256": ""}}},
        {"files": {"state.pt": 3}}, {"files": {"state.pt": {"bytes": "3", "sha256": ""}}}, {"format_version": "one"},
        {"format_version": 99},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_one_line(changes, tmp_path):
    # Of an earlier version, without a sum of its own.
    path = Writer(tmp_path).save(1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    damaged(path, "format_version 99" if changes == {"format_version": 99} else MANIFEST)
    assert list_checkpoints(tmp_path)[0] == [] and len(list_checkpoints(tmp_path)[1]) == 1


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    path = Writer(tmp_path).save(1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert open_checkpoint(path).step == 1


@pytest.mark.parametrize(
    "state",
    [
        [1, 2], torch.ones(3), {"step": 1}, {"progress": 3, "window": []}, {"progress": {"nonsense": 1}, "window": []},
        {"progress": {}, "window": [{"step": 1}]}, {"window": []},
    ],
    ids=lambda state: str(state)[:40],
)  # fmt: skip
def test_a_state_that_is_none_is_one_line(state, tmp_path):
    damaged(Writer(tmp_path).save(1, state=state))


def test_moments_of_another_optimizer_are_one_line(tmp_path):
    writer = Writer(tmp_path)
    checkpoint = open_checkpoint(writer.save(1))
    for content in ({"state": {}, "param_groups": []}, [3]):
        torch.save(content, checkpoint.file("optimizer.bin"))
        with pytest.raises(ValueError, match=r"optimizer.bin of .* cannot be loaded into this run") as caught:
            load_optimizer(checkpoint, writer.accelerator)
        assert "\n" not in str(caught.value)
