"""A disk that does not take what is written: what libraries say of it, a log that waits, a run that goes on or says one line."""

from __future__ import annotations

import errno
import json
import os

import pytest
import safetensors
import torch

from npt_kernels import durable_files
from npt_kernels.configs.schema import ConfigError
from npt_kernels.durable_files import AppendedFile, disk_errors, is_disk_error, write_whole
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run import checkpoints
from npt_kernels.run.resume import find_resume, resumed_config
from npt_kernels.training.loop import TrainingError
from tests.support.runs import FAR, PowerCut, make_config, records, start, stop_at


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """The stream of an appended file, with so many bytes left."""

    def __init__(self, stream, left):
        self.stream, self.left = stream, left

    def write(self, data):
        if not self.left:
            full()
        size = min(self.left, len(data), 5)  # a short write is none
        self.left -= size
        return self.stream.write(data[:size])

    def close(self):
        self.stream.close()


@pytest.mark.parametrize("left", range(0, 22))
def test_a_log_has_whole_lines_or_none(tmp_path, left):
    path = tmp_path / "log"
    path.write_text("before\n")
    file = AppendedFile(path)
    file._stream = disk = Disk(file._stream, left)
    written = [file.add(f"line {i}\n") for i in range(3)]
    # Without room a line waits, and the next is written with it or not at all.
    assert written == [left >= 7 * (i + 1) for i in range(3)]
    assert path.read_text() == "before\n" + "".join(f"line {i}\n" for i in range(sum(written)))
    assert (file.problem is None) == all(written)
    disk.left = 1000
    assert file.add("last\n") and file.problem is None
    file.close()
    assert path.read_text() == "before\nline 0\nline 1\nline 2\nlast\n"


def test_closing_tries_once_more_and_never_raises(tmp_path):
    path = tmp_path / "log"
    file = AppendedFile(path)
    file._stream = disk = Disk(file._stream, 0)
    file.add("line\n")
    disk.left = 3
    file.close()
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "error",
    [
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_say_is_an_error_of_the_disk(tmp_path, error):
    with pytest.raises(OSError, match=str(tmp_path)) as caught, disk_errors(tmp_path):
        raise error
    assert is_disk_error(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ValueError("I know nothing"), FileNotFoundError("x")]
)
def test_what_is_none_passes(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_the_reason_is_the_systems(tmp_path, monkeypatch):
    """torch says "unexpected pos"; a small file in its place says why."""
    plain = type(tmp_path).open

    def opened(self, *args, **kwargs):
        if ".probe" in self.name:
            full()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "open", opened)
    with pytest.raises(OSError, match="No space left on device") as caught, disk_errors(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert caught.value.errno == errno.ENOSPC


def test_a_file_is_replaced_whole_or_not(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "one\n")
    monkeypatch.setattr(durable_files, "sync_file", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "two\n")
    assert path.read_text() == "one\n" and os.listdir(tmp_path) == ["config.yaml"]
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        config.save()
    assert path.read_text() == "one\n"


# ---- runs ------------------------------------------------------------------------------------------------------------

SETTINGS = {"sections": {"model": FAR}, "max_steps": 5, "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    path = tmp_path_factory.mktemp("untouched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])
        return adapter_state_dict(start(path, **SETTINGS)[1])


def same(model, other):
    found = adapter_state_dict(model)
    return all(torch.equal(found[name], tensor) for name, tensor in other.items())


def test_torch_that_cannot_write_a_checkpoint_costs_the_checkpoint(tmp_path, monkeypatch, untouched):
    plain, calls = torch.save, []

    def save(obj, file, *args, **kwargs):
        if str(file).endswith("state.pt"):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        return plain(obj, file, *args, **kwargs)

    monkeypatch.setattr(checkpoints.torch, "save", save)
    summary, model = start(tmp_path, **SETTINGS)
    assert "step 2: no checkpoint, it could not be written" in start.output
    assert summary.steps == 5 and len(calls) == 3 and same(model, untouched)


def test_a_log_that_waits_is_complete_in_the_end(tmp_path, monkeypatch, untouched):
    plain, calls = AppendedFile.add, []

    def add(self, text):
        calls.append(text)
        if self.path.name == "metrics.jsonl" and '"step": 2,' in text:
            self._stream, kept = Disk(self._stream, 9), self._stream
            done = plain(self, text)
            self._stream = kept
            return done
        return plain(self, text)

    monkeypatch.setattr(AppendedFile, "add", add)
    summary, model = start(tmp_path, **SETTINGS)
    assert start.output.count("note: the log cannot be written ([Errno 28]") == 1
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert summary.steps == 5 and same(model, untouched)


def test_a_checkpoint_waits_for_its_log(tmp_path, monkeypatch, untouched):
    """One with a gap in its log would be resumed with the gap."""
    plain = AppendedFile.add

    def add(self, text):
        if self.path.name == "metrics.jsonl" and '"step": 2,' in (self._waiting.decode() + text):
            self._waiting += text.encode() * ('"step": 3,' not in text)
            self.problem = OSError(errno.ENOSPC, "No space left on device")
            if '"step": 3,' not in text:
                return False
        return plain(self, text)

    monkeypatch.setattr(AppendedFile, "add", add)
    _, model = start(tmp_path, **SETTINGS)
    assert "step 2: no checkpoint, it could not be written: [Errno 28]" in start.output
    assert "end_to_end-000002" not in os.listdir(tmp_path / "checkpoints")
    text = (tmp_path / "checkpoints" / "end_to_end-000004" / "metrics.jsonl").read_text()
    steps = [record["step"] for record in map(json.loads, text.splitlines()) if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4] and same(model, untouched)


def test_a_disk_that_fills_up_behind_the_training_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", full)
    with pytest.raises(TrainingError, match=r"No space left.*; adapter of step 5 saved in .*Go on with") as caught:
        start(tmp_path, **SETTINGS)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    summary, _ = start(tmp_path, resume=tmp_path, **SETTINGS)
    assert summary.steps == 5


# ---- a run without a checkpoint --------------------------------------------------------------------------------------


def test_stopped_before_its_first_checkpoint_a_run_keeps_its_configuration(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        stop_at(patch, 1, "crash")
        start(path, **SETTINGS)
    point = find_resume(path)
    assert point.checkpoint is None and point.adapter == path / "adapter"
    config = resumed_config(point, path)
    assert config.training.max_steps == 5 and config.model.rank == FAR["rank"] and config.output_dir == path
    # Moved, it goes on where it is; the adapter by itself is nobody's run.
    moved = path.rename(tmp_path / "moved")
    assert resumed_config(find_resume(moved), moved).output_dir == moved
    assert resumed_config(find_resume(moved / "adapter"), moved / "adapter").model.base_model_name == "demo"
    assert resumed_config(find_resume(moved), moved, name="small").model.base_model_name != "demo"
