"""The GPU machine's commands without a GPU: gpu_check's cuda rows and gpu-sanitize's shapes run with the launches replaced by
their definition; both say what is missing."""

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

from benchmarks import gpu_check
from benchmarks._harness.cuda_kernels import cuda_rows
from npt_kernels.kernels import cuda as _cuda
from npt_kernels.kernels.cuda.choose import Epilogue


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(_cuda, "unavailable", lambda device, dtype: None)


def test_gpu_check_runs_cuda(on_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--small", "--backends", "eager,cuda", "--out", str(tmp_path)]
    code = gpu_check.main(arguments)
    result: dict[str, Any] = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert code == 0, [r for r in result["numerics"] + result["repeats"] if not r["passed"]]
    ran = {r["op"] for r in result["numerics"] if r["backend"] == "cuda"}
    assert ran == {"mlp", "factored_linear", "coefficients", "skinny"}, "matched_norm and linear are not its"
    names = [group["name"] for group in result["timings"]]
    for row in ("1-3 ", "5 ", "5c ", "6 ", "6b ", "7 ", "7b ", "8 "):
        assert any(name.startswith(row) for name in names), row
    for group in result["timings"]:
        assert not any("error" in entry for entry in group["contenders"].values()), group
    assert "FAILED" not in capsys.readouterr().out
    assert {"coefficients", "value_grads", "reduce", "launch"} <= set(LAUNCHES)


def test_rows_compute_what_they_are_compared_with(on_cpu: None) -> None:
    for name, baseline, _, make in cuda_rows(small=True):
        contenders, _ = make(torch.device("cpu"))
        want = contenders["cuBLAS + elementwise" if "cuBLAS + elementwise" in contenders else baseline](0)
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
