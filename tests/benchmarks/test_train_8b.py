"""``benchmarks/train_8b.py`` at its tiny size: the code that a GPU will run, every row of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_8b
from npt_kernels.configs.schema import RunConfig

FAST = ["--small", "--sequence", "16", "--steps", "1"]


def run(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert train_8b.main([*FAST, "--out", str(out), *arguments]) == code
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("mode", train_8b.MODES)
def test_dense_rows(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"resident-{mode}", f"streamed-{mode}"]
    result = run(tmp_path / "out.json", "--rows", ",".join(rows))
    assert [entry["row"] for entry in result["rows"]] == rows and result["not_run"] == []
    for entry in result["rows"]:
        assert entry["status"] == "measured"
        assert entry["tokens_per_step"] == 2 * 16 and len(entry["seconds"]) == 1
        assert entry["tokens_per_second"] == pytest.approx(32 / entry["seconds_median"])
        assert 0.9 < entry["predicted_over_measured"] < 1.1
        assert entry["mfu"] is None and entry["goal"] is None, "a CPU has no peak and no goal"
        assert RunConfig.from_mapping(entry["config"]).training.mode == mode
    resident, streamed = (entry["peak"]["allocated_bytes"] for entry in result["rows"])
    assert streamed > resident, "on a CPU home and buffers lie in the same memory"
    assert {"commit", "date", "torch", "device"} <= result["environment"].keys()
    text = capsys.readouterr().out
    assert all(row in text for row in rows) and "of measured" in text


@pytest.mark.parametrize("row", ["8bit-local", "4bit-end_to_end"])
def test_quantised_rows(row: str, tmp_path: Path) -> None:
    (entry,) = run(tmp_path / "out.json", "--rows", row)["rows"]
    assert entry["status"] == "measured" and 0.9 < entry["predicted_over_measured"] < 1.1


def test_a_row_that_fails_says_why_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: Any, config: RunConfig) -> None:
        if config.optimization.use_8bit:
            raise ModuleNotFoundError("No module named 'npt_kernels.nothing'", name="npt_kernels.nothing")
        if config.optimization.use_4bit:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(train_8b, "quantise", missing)
    result = run(tmp_path / "out.json", "--rows", "8bit-local,4bit-local,resident-local", code=1)
    eight, four, resident = result["rows"]
    assert eight["status"] == four["status"] == "failed" and resident["status"] == "measured"
    assert eight["reason"].startswith("this build has not got it: ModuleNotFoundError")
    assert four["reason"] == "OutOfMemoryError: CUDA out of memory."
    assert eight["predicted"]["tensors_bytes"] > 0, "what was predicted stays beside a failure"


def test_an_interrupt_keeps_the_rows_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = train_8b.measure

    def stop(config: RunConfig, *rest: Any) -> dict[str, Any]:
        if config.training.mode == "end_to_end":
            raise KeyboardInterrupt
        return measure(config, *rest)

    monkeypatch.setattr(train_8b, "measure", stop)
    rows = "resident-local,resident-end_to_end,streamed-local"
    result = run(tmp_path / "out.json", "--rows", rows, code=130)
    assert [entry["row"] for entry in result["rows"]] == ["resident-local"]
    assert result["not_run"] == ["resident-end_to_end", "streamed-local"]


def test_dry_run_predicts_every_row_of_the_full_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train_8b.main(["--dry-run", "--out", str(tmp_path / "none.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicted, not measured")
    assert [line.split()[0] for line in lines[1:]] == train_8b.ROWS
    assert not (tmp_path / "none.json").exists()
    # The goals of the issue, as far as a prediction can tell: 20 GiB resident, 8 GiB streamed.
    sizes = {line.split()[0]: float(line.split("tensors ")[1].split()[0]) for line in lines[1:]}
    for row, (_, gib) in train_8b.GOALS.items():
        assert sizes[row] < gib


def test_goals_are_judged_at_the_full_shape_on_a_gpu_only() -> None:
    entry = {"tokens_per_second": 20_000.0, "peak": {"allocated_bytes": 19 * 2**30}}
    full = train_8b.Settings(train_8b.SHAPE, torch.device("cuda"), 64, 2048, 1, 8, 5)
    goal = train_8b._goal("resident-local", entry, full)
    assert goal is not None and goal["met"] is True
    missed = train_8b._goal("streamed-local", entry, full)
    assert missed is not None and missed["met"] is False
    assert train_8b._goal("8bit-local", entry, full) is None
    small = train_8b.Settings(train_8b.SMALL, torch.device("cuda"), 64, 2048, 1, 8, 5)
    assert train_8b._goal("resident-local", entry, small) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "resident-locl"], "there is no row 'resident-locl'; did you mean 'resident-local'?"),
        (["--rows", ","], "--rows is empty"),
        (["--small", "--steps", "-1"], "--steps -1 must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_8b.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_8b.main([]) == 2
    assert "--small runs the same code" in capsys.readouterr().err
