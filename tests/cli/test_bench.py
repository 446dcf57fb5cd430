"""``npt bench``: options reach the suites, results are files, bad input is one line; ``tune``: what it hands to the tuner."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from npt_kernels.bench import tune as tuner
from npt_kernels.cli import main as cli


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
    for part in (
        "--out",
        "--dtype",
        "--rounds",
        "NPT_TUNING_DIR",
        "npt bench tune coefficients value_grads",
        "CUDA GPU",
    ):
        assert part in text
    pytest.importorskip("triton")
    assert all(name in text for name in tuner.find_tunables())


def test_arguments_reach_the_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def measure(kernels: Any, shapes: Any, out: Any, **options: Any) -> Path:
        options.pop("report")("value_grads 1/1: 2.0 us")
        seen.append((kernels, shapes, out, options))
        return Path("table.json")

    monkeypatch.setattr(tuner, "tune", measure)
    result = npt("bench", "tune", "value_grads", "--out", "x.json", "--dtype", "fp16", "--rounds", "3")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "2.0 us" in result.stdout and "written: table.json" in result.stdout
    assert npt("bench", "tune").exit_code == 0
    assert seen == [
        (["value_grads"], None, Path("x.json"), {"dtype": torch.float16, "rounds": 3}),
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
    message = error_of("bench", "tune", "value_grad")
    assert "'value_grad'" in message and "coefficients" in message and "value_grads" in message


def test_a_file_in_the_way_is_found_before_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "My GPU")
    monkeypatch.setattr(tuner, "_best", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "notes.json").write_text("{not json")
    assert "notes.json is in the way" in error_of("bench", "tune", "value_grads", "--out", "notes.json")


# ---- the suites ------------------------------------------------------------------------------------------------------

TINY = ["--small", "--op", "mlp", "--shape", "gpt2", "--provider", "eager", "--tokens", "3", "--rank", "4"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def only_file(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("*.json")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_help_of_the_suites_teaches() -> None:
    text = npt("bench", "--help").stdout
    assert all(name in text for name in ("kernels", "memory", "train", "report", "compare", "tune", "Ctrl-C"))
    from npt_kernels.bench.providers import PROVIDERS
    from npt_kernels.bench.registry import OPS
    from npt_kernels.bench.training_shapes import SETTINGS
    from npt_kernels.measure.reference import MODES

    kernels, train = npt("bench", "kernels", "--help").stdout, npt("bench", "train", "--help").stdout
    assert all(name in kernels for name in (*PROVIDERS, *MODES, *OPS, "--dry-run", "--small", "--part", "--out"))
    assert all(name in train for name in (*SETTINGS, "--converted", "--dry-run"))
    assert "--png" in npt("bench", "report", "--help").stdout and "--force" in npt("bench", "compare", "--help").stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, npt_kernels.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_kernels(tmp_path: Path, no_gpu: None) -> None:
    result = npt("bench", "kernels", *TINY, "--mode", "forward,local", "--rounds", "2", "--out", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "no CUDA GPU here: using the CPU, at small sizes" in result.stderr
    assert "written: out/cpu-" in result.stdout and "mlp forward, GPT-2 ÷16" in result.stdout
    data = only_file(tmp_path / "out")
    assert data["complete"] and data["size"] == "small" and data["suite"] == "kernels"
    assert [(r["mode"], r["provider"], r["status"]) for r in data["rows"]] == [
        ("forward", "frozen", "ok"), ("forward", "eager", "ok"), ("local", "frozen", "ok"), ("local", "eager", "ok"),
    ]  # fmt: skip


def test_memory(tmp_path: Path, no_gpu: None) -> None:
    result = npt("bench", "memory", *TINY, "--mode", "local", "-o", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = only_file(tmp_path / "out")["rows"]
    assert [row["provider"] for row in rows] == ["frozen", "eager"] and all(row["peak_bytes"] > 0 for row in rows)
    assert "KiB" in result.stdout


def test_train(tmp_path: Path, no_gpu: None) -> None:
    pytest.importorskip("accelerate")
    arguments = ["--shape", "gpt2", "--mode", "local", "--setting", "resident", "--converted", "4", "--tokens", "8"]
    result = npt("bench", "train", "--small", *arguments, "--rank", "2", "--out", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    (row,) = only_file(tmp_path / "out")["rows"]
    assert row["status"] == "ok" and row["tokens_per_s"] > 0
    assert "GPT-2 ÷8 4 layers local resident 2x8 r=2" in result.stdout


@pytest.mark.parametrize("suite", ["kernels", "memory", "train"])
def test_a_dry_run_runs_nothing(suite: str, tmp_path: Path, no_gpu: None) -> None:
    result = npt("bench", suite, "--small", "--dry-run", "--out", "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "about" in result.stdout and "GPT-2" in result.stdout
    assert not (tmp_path / "out").exists()
    if suite == "memory":  # the one row at real size: 448 GiB by formula
        assert re.search(r"linear +local +Llama-3.1-8B +2048 +64 ", result.stdout)
    if suite == "kernels":
        assert "80 groups" in result.stdout and "not cuda anywhere" in result.stdout


def test_parts_are_the_whole(tmp_path: Path, no_gpu: None) -> None:
    seen = []
    for part in ("1/2", "2/2"):
        arguments = [*TINY[:-4], "--mode", "forward", "--rounds", "1", "--part", part, "--out", part[0]]
        assert npt("bench", "kernels", *arguments).exit_code == 0
        data = only_file(tmp_path / part[0])
        assert data["part"] == part
        seen += [(row["tokens"], row["rank"]) for row in data["rows"] if row["provider"] == "eager"]
    assert seen == [(1, 16), (16, 16), (64, 16), (64, 4)]


def test_wrong_numbers_are_exit_code_1(tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from npt_kernels.bench import providers

    right = providers.PROVIDERS["eager"]

    def prepare(problem: Any, mode: str) -> Any:
        call = right.prepare(problem, mode)
        return lambda: {name: value * 1.1 for name, value in call().items()}

    monkeypatch.setitem(providers.PROVIDERS, "eager", replace(right, prepare=prepare))
    result = npt("bench", "kernels", *TINY, "--mode", "forward", "--rounds", "1", "--out", "out")
    assert result.exit_code == 1
    assert "wrong: eager, mlp forward GPT-2 ÷16 3 4: y is off by" in result.stderr and "WRONG" in result.stdout


def test_ctrl_c_says_what_is_kept(tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from npt_kernels.bench import kernels

    original = kernels.measure_setting

    def interrupted(setting: Any, *args: Any, **options: Any) -> Any:
        if setting.mode == "local":
            raise KeyboardInterrupt
        return original(setting, *args, **options)

    monkeypatch.setattr(kernels, "measure_setting", interrupted)
    result = npt("bench", "kernels", *TINY, "--mode", "forward,local,decode", "--rounds", "1", "--out", "out")
    assert result.exit_code == 130
    assert "stopped: 2 rows kept in out/cpu-" in result.stderr and "2 groups not run" in result.stderr
    data = only_file(tmp_path / "out")
    assert not data["complete"] and len(data["rows"]) == 2 and len(data["not_run"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--op", "mpl"], "--op 'mpl' is not known; did you mean 'mlp'?"),
        (["kernels", "--shape", "gpt3"], "--shape 'gpt3' is not known; did you mean 'GPT-2'?"),
        (["memory", "--provider", "kconact"], "did you mean 'kconcat'? (there are: frozen, eager, kconcat"),
        (["train", "--setting", "resdent"], "--setting 'resdent' is not known; did you mean 'resident'?"),
        (["kernels", "--tokens", "many"], "--tokens 'many' is not a whole number above 0"),
        (["kernels", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["kernels", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["kernels", "--part", "3/2"], "--part '3/2' must look like 2/5"),
        (["kernels", "--part", "1/900", "--tokens", "1", "--rank", "4", "--op", "norm"], ""),
        (["kernels", "--dtype", "int4"], "--dtype 'int4' is not one of bf16, fp16, fp32"),
        (["kernels", "--device", "tpu"], "--device 'tpu' is not a device"),
        (["kernels", "--device", "mps"], "--device 'mps' is not supported"),
        (["kernels", "--device", "cuda"], "torch sees no CUDA GPU here"),
        (["report", "--in", "nowhere"], "nowhere does not exist"),
        (["compare", "a.json", "b.json"], "a.json does not exist"),
    ],
)
def test_bad_input_of_the_suites(arguments: list[str], message: str, no_gpu: None) -> None:
    result = npt(
        "bench", *arguments, *(["--small", "--dry-run"] if arguments[0] in ("kernels", "memory", "train") else [])
    )
    if not message:
        assert result.exit_code in (0, 2)
        return
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = (text for text in result.stderr.splitlines() if text.startswith("error: "))
    assert message in line


def test_a_folder_that_cannot_be_written(tmp_path: Path, no_gpu: None) -> None:
    (tmp_path / "taken").write_text("")
    result = npt("bench", "kernels", *TINY, "--out", "taken")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_report_and_compare(tmp_path: Path, no_gpu: None) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("old", "new"):
        assert npt("bench", "memory", *TINY, "--mode", "forward,local", "--out", folder).exit_code == 0
    result = npt("bench", "report", "--in", "old", "--out", "page", "--png", "images")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "page/report.html: 4 rows of 1 files" in result.stdout
    assert "GPT-2 ÷16" in (tmp_path / "page" / "report.html").read_text()
    same = npt("bench", "compare", "old", "new")
    assert same.exit_code == 0 and "0 worse, 0 better, 4 the same" in same.stdout
    (path,) = (tmp_path / "new").rglob("*.json")
    data = json.loads(path.read_text())
    data["rows"][1]["peak_bytes"] *= 2
    removed = data["rows"].pop()
    path.write_text(json.dumps(data))
    worse = npt("bench", "compare", "old", str(path))
    assert worse.exit_code == 1 and "1 worse" in worse.stdout and "peak_bytes" in worse.stdout
    assert f"missing: memory mlp GPT-2 ÷16 {removed['mode']} T=3 r=4" in worse.stdout
    data["rows"][1]["peak_bytes"] //= 2
    path.write_text(json.dumps(data))
    assert npt("bench", "compare", "old", "new").exit_code == 0
    assert npt("bench", "compare", "old", "new", "--strict").exit_code == 1
    data["environment"]["device"] = "another"
    path.write_text(json.dumps(data))
    assert "different devices" in error_of("bench", "compare", "old", "new")
    assert npt("bench", "compare", "old", "new", "--force").exit_code == 0
