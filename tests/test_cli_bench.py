"""``npt bench tune``: what it hands to the tuner and what it says when it cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from npt_kernels import cli, tuning
from npt_kernels.tuning import tuner


@pytest.fixture(autouse=True)
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NPT_DEBUG", raising=False)


def npt(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def error_of(*arguments: str) -> str:
    result = npt(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_help_teaches() -> None:
    assert "tune" in npt("bench", "--help").stdout and "npt bench tune" in npt("--help").stdout
    text = npt("bench", "tune", "--help").stdout
    for part in ("--out", "--dtype", "--rounds", "NPT_TUNING_DIR", "npt bench tune coefficients skinny", "CUDA GPU"):
        assert part in text
    pytest.importorskip("triton")
    assert all(name in text for name in tuner.find_tunables())


def test_arguments_reach_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def measure(kernels: Any, shapes: Any, out: Any, **options: Any) -> Path:
        options.pop("report")("skinny 1/1: 2.0 us")
        seen.append((kernels, shapes, out, options))
        return Path("table.json")

    monkeypatch.setattr(tuning, "tune", measure, raising=False)
    result = npt("bench", "tune", "skinny", "--out", "x.json", "--dtype", "fp16", "--rounds", "3")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "2.0 us" in result.stdout and "written: table.json" in result.stdout
    assert npt("bench", "tune").exit_code == 0
    assert seen == [
        (["skinny"], None, Path("x.json"), {"dtype": torch.float16, "rounds": 3}),
        (None, None, None, {"dtype": torch.bfloat16, "rounds": 15}),
    ]


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "--dtype 'int8' is not one of bf16, fp16, fp32" in error_of("bench", "tune", "--dtype", "int8")
    assert "--rounds 0" in error_of("bench", "tune", "--rounds", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in error_of("bench", "tune")
    monkeypatch.setattr(tuner, "TRITON_INSTALLED", False)
    assert "triton, which is not installed" in error_of("bench", "tune")


def test_unknown_kernel_names_what_exists() -> None:
    pytest.importorskip("triton")
    message = error_of("bench", "tune", "skiny")
    assert "'skiny'" in message and "coefficients" in message and "skinny" in message


def test_a_file_in_the_way_is_found_before_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "My GPU")
    monkeypatch.setattr(tuner, "_best", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "notes.json").write_text("{not json")
    assert "notes.json is in the way" in error_of("bench", "tune", "skinny", "--out", "notes.json")
