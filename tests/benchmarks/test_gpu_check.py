"""``benchmarks/gpu_check.py`` in its dry mode, and that it fails where it must."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from benchmarks import gpu_check  # noqa: E402
from npt_kernels.kernels.triton.numerics import INTERPRET  # noqa: E402
from npt_kernels.measure import check as checking  # noqa: E402
from npt_kernels.measure import timing  # noqa: E402
from npt_kernels.measure.problems import Problem  # noqa: E402
from npt_kernels.measure.shapes import numeric_cases, repeat_cases  # noqa: E402

CPU = torch.device("cpu")


def run(tmp_path, *arguments):
    code = gpu_check.main(["--device", "cpu", "--small", "--out", str(tmp_path), *arguments])
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 1
    return code, json.loads(files[0].read_text())


def test_dry_run(tmp_path, capsys):
    code, result = run(tmp_path, "--backends", "eager")
    assert code == 0 and result["failed"] == [] and result["incomplete"] == []
    assert len(result["numerics"]) == len(list(numeric_cases(small=True)))
    assert {"device", "commit", "date", "torch", "triton"} <= set(result["environment"])
    assert "says nothing" in result["note"] or "say nothing" in result["note"]
    for group in result["timings"]:
        assert group["contenders"][group["baseline"]]["ratio"] == 1
        assert not any("error" in entry for entry in group["contenders"].values()), group
    assert "numerics: 41 of 41 passed" in capsys.readouterr().out


@pytest.mark.skipif(not INTERPRET, reason="kernels were defined without TRITON_INTERPRET=1")
@pytest.mark.parametrize("only", ["GPT-2", "linear 8B", "T=16 bfloat16 rank1"])
def test_dry_run_of_triton(tmp_path, only):
    code, result = run(tmp_path, "--backends", "eager,triton", "--no-timings", "--only", only)
    assert code == 0, [r for r in result["numerics"] + result["repeats"] if not r["passed"]]
    assert {r["backend"] for r in result["numerics"]} == {"eager", "triton"}


@pytest.mark.parametrize("damage", ["zero", "nan", "raise", "shift"])
def test_wrong_results_fail(tmp_path, monkeypatch, damage, capsys):
    original = Problem.call

    def damaged(self, tensors, backend):
        outputs = original(self, tensors, backend)
        y = next(iter(outputs.values()))
        if y.dtype == torch.float64 or y.shape[0] != self.case.tokens:
            return outputs  # truth and reference rows stay right
        if damage == "raise":
            raise RuntimeError("illegal memory access")
        y = y.detach().clone()
        y[-1:] = {"zero": 0.0, "nan": float("nan"), "shift": y[-1:] * 1.1}[damage]
        return {next(iter(outputs)): y}

    monkeypatch.setattr(Problem, "call", damaged)
    monkeypatch.setattr(
        checking, "sample_rows", lambda tokens, widest: torch.arange(tokens - 1, -1, -1)[: max(1, tokens - 1)]
    )
    code, result = run(tmp_path, "--backends", "eager", "--no-timings", "--only", "linear 8B-small T=70")
    assert code == 1 and result["failed"]
    assert "FAILED" in capsys.readouterr().out


def test_out_of_time_is_not_success(tmp_path):
    code, result = run(tmp_path, "--backends", "eager", "--budget", "0")
    assert code == 2 and len(result["incomplete"]) == len(list(numeric_cases(small=True)))


def test_refusals(capsys):
    for arguments in (["--device", "cpu"], *([["--device", "cuda"]] if not torch.cuda.is_available() else [])):
        with pytest.raises(SystemExit) as stopped:
            gpu_check.main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu", "--small", "--backends", "nonsense"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("gpu_check: ") for line in lines) and "nonsense" in lines[-1]


def test_real_cases_cover_what_was_promised():
    cases = list(numeric_cases(small=False))
    assert any(c.tokens * c.model.f > 2**31 and c.op == "mlp" for c in cases)
    assert {c.op for c in cases} == {"linear", "factored_linear", "mlp", "matched_norm", "coefficients", "skinny"}
    assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16}
    assert {c.model.name for c in cases} == {"8B", "70B", "GPT-2"}
    assert {c.rule for c in cases} == {"rank1", "diagonal", "anchored", "self_key"}
    assert max(times for _, times in repeat_cases(small=False)) == 1000


def test_two_times_rule():
    truth = torch.randn(40, 8, dtype=torch.float64)
    reference = truth.bfloat16()
    assert checking.worst_ratio(reference.clone(), reference, truth) <= 1
    for row in (0, 39):
        wrong = reference.clone()
        wrong[row] = 0
        assert checking.worst_ratio(wrong, reference, truth) > 1
    assert checking.worst_ratio(reference * float("nan"), reference, truth) == float("inf")
    assert checking.worst_ratio(reference[:3], reference, truth) == float("inf")
    assert checking.worst_ratio(reference[:0], reference[:0], truth[:0]) == 0
    assert checking.worst_ratio(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.float64)) == 0


def test_sampled_rows_include_the_ends_and_the_crossings():
    rows = checking.sample_rows(131072, 28672)
    assert rows[0] == 0 and rows[-1] == 131071 and len(rows.unique()) == len(rows)
    assert 2**31 // 28672 in rows
    assert torch.equal(checking.sample_rows(100, 28672), torch.arange(100))
    assert checking.sample_rows(100_003, 8)[-1] == 100_002


def test_a_contender_that_fails_is_reported_and_left_out():
    def broken(_):
        raise RuntimeError("does not fit")

    measured = timing.compare({"a": lambda _: None, "b": broken, "c": lambda _: None}, "a", CPU, rounds=2, sets=2)
    assert measured["b"] == {"error": "RuntimeError: does not fit"}
    assert measured["a"]["ratio"] == 1 and measured["c"]["rounds"] == 2
