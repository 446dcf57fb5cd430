"""``npt bench check`` in its dry mode, that it fails where it must, and that a lost device ends it with what was done kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined

import pytest
import torch
from typer.testing import CliRunner, Result

from npt_kernels.bench import check_cases, device_check
from npt_kernels.bench.check_cases import numeric_cases, repeat_cases, timings
from npt_kernels.bench.device_check import CheckOptions, Task, exit_code, run_check, usable_backends
from npt_kernels.bench.results import ResultFile, environment
from npt_kernels.cli import main as cli
from npt_kernels.kernels.triton.numerics import INTERPRET
from npt_kernels.measure import against_truth as checking
from npt_kernels.measure import timing
from npt_kernels.measure.problems import Problem

CPU = torch.device("cpu")


def npt(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "check", *arguments])


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    outcome = npt("--device", "cpu", "--small", "--out", str(tmp_path), *arguments)
    (file,) = tmp_path.rglob("*.json")
    return outcome.exit_code, json.loads(file.read_text()), outcome.output


def of(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row.get("kind", row.get("suite")) == kind]


def test_dry_run(tmp_path: Path) -> None:
    code, result, output = run(tmp_path, "--backends", "eager")
    assert code == 0 and result["complete"] and result["not_run"] == [] and result["suite"] == "check"
    assert len(of(result, "numerics")) == len(list(numeric_cases(small=True)))
    assert {"device", "commit", "date", "torch", "triton"} <= set(result["environment"])
    assert "say nothing" in result["note"]
    assert all(row["status"] == "ok" for row in of(result, "numerics"))
    for row in of(result, "kernels"):
        assert row["status"] == "ok", row
        assert row["provider"] != "frozen" or row["ratio"] == 1
    assert {row["case"] for row in of(result, "kernel")} == {
        "value grads 8B T=40 R=8",
        "coefficients rank1 8B T=40 R=8",
    }
    assert [row["provider"] for row in of(result, "memory")] == ["frozen", "eager"]
    assert "numerics: 41 of 41 passed" in output and f"written: {next(tmp_path.rglob('*.json'))}" in output


@pytest.mark.skipif(not INTERPRET, reason="kernels were defined without TRITON_INTERPRET=1")
@pytest.mark.parametrize("only", ["GPT-2", "linear 8B", "T=16 bfloat16 rank1"])
def test_dry_run_of_triton(tmp_path: Path, only: str) -> None:
    code, result, _ = run(tmp_path, "--backends", "eager,triton", "--no-timings", "--only", only)
    assert code == 0, [row for row in result["rows"] if row["status"] != "ok"]
    assert {row["provider"] for row in of(result, "numerics")} == {"eager", "triton"}


@pytest.mark.parametrize("damage", ["zero", "nan", "raise", "shift"])
def test_wrong_results_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    original = Problem.call

    def damaged(self, tensors, backend):
        outputs = original(self, tensors, backend)
        y = next(iter(outputs.values()))
        if y.dtype == torch.float64 or y.shape[0] != self.case.tokens:
            return outputs  # truth and reference rows stay right
        if damage == "raise":
            raise RuntimeError("illegal memory access")
        y = y.detach().clone()
        y[-1:] = {"zero": 0.0, "nan": float("nan"), "shift": y[-1:] + 0.1 * y.abs().max()}[damage]
        return {next(iter(outputs)): y}

    monkeypatch.setattr(Problem, "call", damaged)
    monkeypatch.setattr(
        checking, "sample_rows", lambda tokens, widest: torch.arange(tokens - 1, -1, -1)[: max(1, tokens - 1)]
    )
    code, result, output = run(
        tmp_path, "--backends", "eager", "--no-timings", "--only", "mlp 8B-small T=16 bfloat16 rank1"
    )
    assert code == 1 and [row["status"] for row in result["rows"]] == ["failed" if damage == "raise" else "wrong"]
    assert "numerics: 0 of 1 passed" in output and ("FAILED" if damage == "raise" else "WRONG") in output


def test_out_of_time_is_not_success(tmp_path: Path) -> None:
    code, result, _ = run(tmp_path, "--backends", "eager", "--budget", "0", "--no-timings")
    assert code == 2 and len(result["not_run"]) == len(list(numeric_cases(small=True))) and not result["complete"]


def test_timings_that_did_not_fit_are_named_and_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_check.SHARES, "timings", 0.0)
    code, result, _ = run(tmp_path, "--backends", "eager", "--only", "value_grads")
    assert code == 0 and len(result["not_run"]) == len(timings(True, ["eager"], False))
    assert all(name.startswith("timing ") for name in result["not_run"])


def error_of(*arguments: str) -> str:
    outcome = npt(*arguments)
    assert outcome.exit_code == 2, outcome.output
    (line,) = outcome.stderr.strip().splitlines()
    return line


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA GPU here; --device cpu --small runs the same code" in error_of()
    assert "real sizes need a GPU" in error_of("--device", "cpu")
    assert "'nonsense' is not known (there are: " in error_of("--device", "cpu", "--small", "--backends", "nonsense")
    assert "--backends cuda: it cannot run here: " in error_of("--device", "cpu", "--small", "--backends", "cuda")
    assert not list(tmp_path.rglob("*.json"))
    usable, reasons = usable_backends(CPU)
    assert "eager" in usable and "cuda" in reasons


# ---- a device that is lost -------------------------------------------------------------------------------------------


def result_file(tmp_path: Path) -> ResultFile:
    return ResultFile("check", environment(CPU), ["npt"], "small", tmp_path)


OPTIONS = CheckOptions(["eager"], small=True, only="coefficients", timings=False)


def lose_device_after(monkeypatch: pytest.MonkeyPatch, cases: int) -> None:
    calls = iter(range(1000))
    monkeypatch.setattr(device_check, "device_works", lambda device: next(calls) < cases)


def test_a_lost_device_ends_the_run_and_the_file_has_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = device_check.plan_tasks(OPTIONS)
    lose_device_after(monkeypatch, 1)
    result = run_check(OPTIONS, CPU, result_file(tmp_path), lambda line: None)
    saved = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert saved["rows"] == result.rows and len(result.rows) == 2, "the case that broke it is in the file"
    assert saved["not_run"] == [str(task) for task in tasks[2:]]
    assert saved["stopped"] == (
        f"the device is in an error state after {tasks[1]}; the remaining {len(tasks) - 2} cases did not run "
        "(--isolate runs them in processes of their own)"
    )
    assert exit_code(result) == 1 and not saved["complete"]


def test_a_device_lost_while_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CheckOptions(["eager"], small=True, only="nothing like this", compiled=False)
    lose_device_after(monkeypatch, 2)
    result = run_check(options, CPU, result_file(tmp_path), lambda line: None)
    assert "after timing linear forward 8B-small T=40 r=8; the remaining" in result.extra["stopped"]
    assert exit_code(result) == 1


def test_the_file_is_written_after_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def say(line: str) -> None:
        seen.append(len(json.loads(next(tmp_path.rglob("*.json")).read_text())["rows"]))

    run_check(OPTIONS, CPU, result_file(tmp_path), say)
    assert seen == list(range(1, len(device_check.plan_tasks(OPTIONS)) + 1))


def broken(task: Task, device: torch.device, seconds: float) -> dict[str, Any]:
    """Stands in for ``_perform`` in the other process."""
    if task.case.tokens == 16 and task.case.rule == "rank1":
        os._exit(7)
    if task.case.rule == "diagonal":
        import time

        time.sleep(60)
    lost = {"device_lost": True} if task.case.rule == "anchored" else {}
    return {
        "kind": task.kind,
        "case": str(task.case),
        "provider": task.backend,
        "status": "ok",
        "pid": os.getpid(),
        **lost,
    }


def serve_broken(pipe: Any, device: torch.device, threads: int) -> None:
    device_check._perform = broken
    device_check._serve(pipe, device, threads)


def test_isolated_cases_survive_a_crash_a_hang_and_a_lost_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = device_check._serve
    monkeypatch.setattr(device_check, "_serve", serve_broken)
    monkeypatch.setattr(device_check, "HANGS_AFTER", 12.0)
    assert serve is not device_check._serve
    result = run_check(
        CheckOptions(["eager"], small=True, only="coefficients 8B-small T=16", timings=False, isolate=True),
        CPU, result_file(tmp_path), lambda line: None,
    )  # fmt: skip
    rank1, diagonal, anchored, self_key = result.rows
    assert (rank1["status"], rank1["reason"]) == ("failed", "its process ended with exit code 7")
    assert (diagonal["status"], diagonal["reason"]) == ("failed", "no answer for 12 s: it hangs")
    assert anchored["status"] == self_key["status"] == "ok"
    assert "error state afterwards" in anchored["note"] and anchored["pid"] != self_key["pid"] != os.getpid()
    assert result.not_run == [] and exit_code(result) == 1


# ---- the cases -------------------------------------------------------------------------------------------------------


def test_real_cases_cover_what_was_promised() -> None:
    cases = list(numeric_cases(small=False))
    assert any(c.tokens * c.model.f > 2**31 and c.op == "mlp" for c in cases)
    assert {c.op for c in cases} == {"linear", "factored_linear", "mlp", "matched_norm", "coefficients", "value_grads"}
    assert {c.dtype for c in cases} == {torch.bfloat16, torch.float16}
    assert {c.model.name for c in cases} == {"8B", "70B", "GPT-2"}
    assert {c.rule for c in cases} == {"rank1", "diagonal", "anchored", "self_key"}
    assert max(times for _, times in repeat_cases(small=False)) == 1000
    for small in (True, False):
        names = [str(case) for case in numeric_cases(small)]
        assert len(names) == len(set(names)), "a name stands for one case"


def test_real_timings_cover_the_goals() -> None:
    names = [timing.name for timing in timings(False, ["eager", "triton", "cuda"], True)]
    for name in (
        "mlp forward Llama-3.1-8B T=8192 r=64", "mlp forward GPT-2 T=8192 r=64", "linear forward Llama-3.1-8B T=8192 r=64",
        "mlp local Llama-3.1-8B T=8192 r=64", "mlp decode Llama-3.1-8B T=1 r=64", "linear forward Llama-3.1-8B T=8192 r=1024",
        "memory of mlp local Llama-3.1-8B T=8192 r=64", "1-3 cuda store 8192^3",
    ):  # fmt: skip
        assert name in names, name
    assert len(names) == len(set(names))
    assert not any("cuda" in timing.name for timing in timings(False, ["eager", "triton"], True))
    assert check_cases.SMALL_MODELS.keys() == {"8B", "70B", "GPT-2"}


def test_sampled_rows_include_the_ends_and_the_crossings() -> None:
    rows = checking.sample_rows(131072, 28672)
    assert rows[0] == 0 and rows[-1] == 131071 and len(rows.unique()) == len(rows)
    assert 2**31 // 28672 in rows
    assert torch.equal(checking.sample_rows(100, 28672), torch.arange(100))
    assert checking.sample_rows(100_003, 8)[-1] == 100_002


def test_a_contender_that_fails_is_reported_and_left_out() -> None:
    def broken(_):
        raise RuntimeError("does not fit")

    measured = timing.compare({"a": lambda _: None, "b": broken, "c": lambda _: None}, "a", CPU, rounds=2, sets=2)
    assert measured["b"] == {"error": "RuntimeError: does not fit"}
    assert measured["a"]["ratio"] == 1 and measured["c"]["rounds"] == 2
