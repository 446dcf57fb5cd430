"""The GPU machine's commands without a GPU: the cuda rows of `npt bench check` and gpu-sanitize's shapes run with the launches
replaced by their definition; both say what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_launch import CALLS, LAUNCHES, install

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import sanitize_cuda
from typer.testing import CliRunner

from npt_kernels.bench.single_kernels import cuda_kernels
from npt_kernels.cli import main as cli
from npt_kernels.kernels.cuda import support as _cuda
from npt_kernels.kernels.cuda.choose import Epilogue


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(_cuda, "unavailable", lambda device, dtype: None)


def test_the_check_runs_cuda(on_cpu: None, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--backends", "eager,cuda", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(cli.app, ["bench", "check", *arguments])
    result: dict[str, Any] = json.loads(next(tmp_path.rglob("*.json")).read_text())
    rows: list[dict[str, Any]] = result["rows"]
    assert outcome.exit_code == 0, [row for row in rows if row["status"] not in ("ok", "checked", "skipped")]
    ran = {row["op"] for row in rows if row.get("kind") == "numerics" and row["provider"] == "cuda"}
    assert ran == {"mlp", "factored_linear", "coefficients", "value_grads", "matched_norm"}, "linear is not its"
    names = [row["case"] for row in rows if row.get("kind") == "kernel"]
    for start in ("1-3 ", "5 ", "5c ", "6 ", "6b ", "7 ", "7b ", "8 "):
        assert any(name.startswith(start) for name in names), start
    timed = [row for row in rows if "kind" not in row or row["kind"] == "kernel"]
    assert {row["status"] for row in timed} <= {"ok", "checked", "skipped"}
    assert any(
        row["provider"] == "cuda" and row["status"] == "checked" for row in timed if row.get("suite") == "kernels"
    )
    assert "FAILED" not in outcome.output
    assert {"coefficients", "value_grads", "reduce", "launch"} <= set(LAUNCHES)


def test_rows_compute_what_they_are_compared_with(on_cpu: None) -> None:
    for kernel in cuda_kernels(small=True):
        name, (contenders, _) = kernel.name, kernel.make(torch.device("cpu"))
        want = contenders["cuBLAS + elementwise" if "cuBLAS + elementwise" in contenders else kernel.baseline](0)
        for label, call in contenders.items():
            if label not in ("cuda", "cuda dual", "cuda dual, cooperative", "cuda, no cluster", "cuda, not split"):
                continue
            got = call(0)
            pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
            for g, w in pairs:
                error = (g.double() - w.double()).norm() / w.double().norm()
                assert error < 0.02, (name, label, float(error))


def test_sanitizer_shapes_reach_every_family(on_cpu: None) -> None:
    done = list(sanitize_cuda.exercise("cpu", (20, 70)))
    assert len(done) == 2 * 2 * 4
    assert {epilogue for epilogue, _ in CALLS} == set(Epilogue)
    assert set(LAUNCHES) == {"launch", "coefficients", "value_grads", "rule", "reduce"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_sanitize_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (([], "no CUDA GPU"), (["--tools", "leakcheck"], "'leakcheck' is not one of")):
        with pytest.raises(SystemExit) as stopped:
            sanitize_cuda.main(arguments)
        assert stopped.value.code == 2
        assert part in capsys.readouterr().err
