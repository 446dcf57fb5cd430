"""``npt bench kernels`` refuses wrong numbers, keeps what is finished, and its times and ratios are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from npt_kernels.bench import kernels
from npt_kernels.bench.grid import Setting
from npt_kernels.bench.kernels import measure_setting, run_kernels
from npt_kernels.bench.providers import PROVIDERS
from npt_kernels.bench.results import ResultFile, environment
from npt_kernels.measure.shapes import ModelShape

CPU = torch.device("cpu")
MODEL = ModelShape("tiny", 24, 40, title="Tiny")
CEILINGS = {"gemm_tflops": 0.05, "copy_tbs": 0.01}


def setting(*providers, mode="forward", tokens=20, dtype=torch.float32):
    chosen = tuple(PROVIDERS[p] if isinstance(p, str) else p for p in providers)
    return Setting("mlp", MODEL, mode, tokens, 4, "self_key", dtype, chosen)


def measured(*args, **changes):
    return {row["provider"]: row for row in measure_setting(setting(*args, **changes), CPU, CEILINGS, rounds=3)}


def broken(damage, name="broken"):
    """A provider that is right but for one thing."""
    right = PROVIDERS["eager"]

    def prepare(problem, mode):
        call = right.prepare(problem, mode)

        def damaged():
            results = call()
            if damage == "raises":
                raise RuntimeError("illegal memory access\nmore")
            if damage == "no gradient":
                results.pop("sum d w_down")
            elif damage == "short":
                results["y"] = results["y"][:-1]
            elif damage == "dtype":
                results["y"] = results["y"].double()
            else:
                y = results["y"].clone()
                y[-1] = {"zero row": 0.0, "nan": float("nan"), "scaled": y[-1] * 1.01}[damage]
                results["y"] = y
            return results

        return damaged

    return replace(right, name=name, prepare=prepare)


@pytest.mark.parametrize("damage", ["zero row", "nan", "scaled", "no gradient", "short", "dtype"])
def test_a_wrong_provider_is_not_reported(damage):
    rows = measured("frozen", broken(damage), "eager", mode="local")
    wrong = rows["broken"]
    assert wrong["status"] == "wrong" and "not timed" in wrong["reason"]
    assert not {"us", "ratio", "tflops", "roofline_share"} & set(wrong)
    assert rows["eager"]["status"] == "ok" and rows["eager"]["us"] > 0
    json.dumps(wrong, allow_nan=False)  # infinite errors must still be JSON


def test_a_wrong_baseline_takes_the_ratios_with_it():
    rows = measured(broken("zero row", "frozen"), "eager")
    assert rows["frozen"]["status"] == "wrong" and "us" not in rows["frozen"]
    assert rows["eager"]["us"] > 0 and "ratio" not in rows["eager"]


def test_a_provider_that_raises_does_not_end_the_run():
    rows = measured("frozen", broken("raises"), "eager")
    assert rows["broken"]["status"] == "failed"
    assert rows["broken"]["reason"] == "RuntimeError: illegal memory access"
    assert rows["eager"]["status"] == "ok"


def test_rows_hold_what_they_should():
    rows = measured("frozen", "eager", "kconcat", "liger", "loop")
    frozen, eager = rows["frozen"], rows["eager"]
    assert frozen["ratio"] == 1 and frozen["ratio_p10_p90"] == [1, 1]
    assert eager["ratio_p10_p90"][0] <= eager["ratio"] <= eager["ratio_p10_p90"][1]
    assert eager["us_p10_p90"][0] <= eager["us"] <= eager["us_p10_p90"][1]
    assert eager["tflops"] == pytest.approx(eager["tflops"])
    flops = 2 * 20 * (3 * 24 * 40) + 2 * 20 * 4 * (40 + 40 + 24 + 24)
    assert eager["tflops"] * eager["us"] * 1e6 == pytest.approx(flops, rel=0.05, abs=eager["us"] * 1e6 * 5e-5)
    assert eager["roofline_share"] == pytest.approx(eager["roofline_us"] / eager["us"], abs=1e-3)
    assert eager["check"]["error_over_bound"] <= 1
    assert rows["liger"]["status"] == "skipped" and "us" not in rows["liger"]
    assert "GPU" in rows["liger"]["reason"] or "pip install liger-kernel" in rows["liger"]["reason"]
    assert eager["shape"] == "Tiny" and eager["dtype"] == "float32" and eager["launch"] == "eager"


def test_slow_calls_are_estimated_first():
    rows = measure_setting(setting("frozen", "loop", tokens=64), CPU, CEILINGS, rounds=2, slow_limit=1e-6)
    assert rows[1]["status"] == "skipped" and "--slow-limit" in rows[1]["reason"]


def test_interpreted_kernels_are_checked_but_not_timed(monkeypatch):
    interpreted = replace(PROVIDERS["eager"], name="triton")
    rows = measured("frozen", interpreted)
    assert rows["triton"]["status"] == "checked" and "us" not in rows["triton"]
    assert rows["triton"]["check"]["error_over_bound"] <= 1


def new_file(tmp_path):
    return ResultFile("kernels", environment(CPU), ["npt"], "small", tmp_path)


def test_a_run_writes_everything(tmp_path):
    result = run_kernels([setting("frozen", "eager"), setting("frozen", tokens=3)], CPU, new_file(tmp_path), rounds=2)
    data = json.loads(result.path.read_text())
    assert data == result.to_dict() and data["complete"] and data["not_run"] == []
    assert data["schema"] == 1 and data["suite"] == "kernels" and len(data["rows"]) == 3
    assert data["ceilings"]["gemm_tflops"] > 0 and data["ceilings"]["copy_tbs"] > 0
    overhead = {entry["provider"]: entry for entry in data["host_overhead"]}
    assert overhead["frozen"]["over_frozen_us"] == 0 and overhead["eager"]["host_us"] > 0
    assert list(tmp_path.rglob("*.tmp")) == []


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, monkeypatch):
    settings = [setting("frozen", tokens=tokens) for tokens in (2, 3, 4, 5)]
    original = kernels.measure_setting

    def interrupted(one, *args, **options):
        if one.tokens == 4:
            raise KeyboardInterrupt
        return original(one, *args, **options)

    monkeypatch.setattr(kernels, "measure_setting", interrupted)
    result = new_file(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_kernels(settings, CPU, result, rounds=2)
    data = json.loads(result.path.read_text())
    assert not data["complete"]
    assert [row["tokens"] for row in data["rows"]] == [2, 3]
    assert data["not_run"] == [str(settings[2]), str(settings[3])]
