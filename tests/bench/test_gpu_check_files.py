"""The committed records of the first GPU run, written by ``benchmarks/gpu_check.py``, are read under today's names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from npt_kernels.bench.report import Collected, collect
from npt_kernels.bench.report.goals import UNVERIFIED, verdicts
from npt_kernels.bench.report.page import render
from npt_kernels.bench.results import KEY_FIELDS, load_results

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "history" / "nvidia-h200"
GPU = "NVIDIA H200"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files alone: later records would speak too."""
    place = tmp_path_factory.mktemp("nvidia-h200")
    for name in ("gpu_check-20261126T073403Z.json", "gpu_check-20261126T073508Z.json"):
        shutil.copy(RECORDS / name, place)
    return place


@pytest.fixture(scope="module")
def collected(folder: Path) -> Collected:
    return collect(folder)


def test_whole_ops_are_rows_of_the_suite_kernels(collected: Collected) -> None:
    setting = {"op": "mlp", "shape": "Llama-3.1-8B", "mode": "local", "tokens": 8192, "rank": 64, "launch": "eager"}
    rows = {row["provider"]: row for row in collected.of("kernels", GPU, **setting)}
    assert rows.keys() >= {"frozen", "kconcat", "eager", "triton", "cuda"}
    assert rows["cuda"]["ratio"] == pytest.approx(0.6361) and rows["frozen"]["us"] == pytest.approx(9083.12)
    graph = collected.of("kernels", GPU, mode="decode", tokens=1, launch="graph", provider="cuda")
    assert [row["ratio"] for row in graph] == pytest.approx([0.9455], abs=1e-3)
    (norm,) = collected.of("kernels", GPU, op="norm", provider="triton")
    assert norm["rank"] is None and norm["size"] == "full"
    for row in collected.rows:
        assert set(KEY_FIELDS[row["suite"]]) <= row.keys(), row


def test_single_kernels_numerics_and_memory(collected: Collected) -> None:
    (store,) = collected.of("check", GPU, kind="kernel", case="1-3 cuda store 8192^3", provider="cuda")
    assert store["ratio"] == pytest.approx(0.9949) and store["baseline"] == "cuBLAS"
    numerics = collected.of("check", GPU, kind="numerics", provider="triton")
    assert len(numerics) == 40, "of 41: the forward-only case had the name of the whole one"
    wrong = {row["case"]: row["reason"] for row in numerics if row["status"] == "wrong"}
    assert wrong["mlp 8B T=1 float16 self_key R=64"].startswith("d key_scale is off by 1.67 times")
    assert len(wrong) == 2 and all(row["status"] == "ok" for row in collected.of("check", GPU, kind="repeat"))
    (peak,) = collected.of("memory", GPU, provider="cuda")
    assert peak["peak_units"] == pytest.approx(3.2946) and peak["shape"] == "Llama-3.1-8B"


def test_no_goal_is_unverified_where_a_record_has_its_figure(collected: Collected) -> None:
    unverified = {v.goal.what for v in verdicts(collected) if v.measured == UNVERIFIED}
    assert unverified == {
        "against the published per-token loop", "training Llama-3.1-8B, all 32 layers, local",
        "the same, frozen layers streamed", "call overhead over F.linear",
        "perplexity NPT ÷ original, conversion alone, all layers",
        "perplexity NPT ÷ original, and KL, held-out text, all layers",
        "the same at 1.10 × the original's multiplications (o_proj folded)",
        "on a CPU: ÷ the fastest of K-concatenation, torch.compile and LoRA of the same rank",
        "on a CPU: forward ÷ frozen", "the same for one token",
    }  # fmt: skip
    (strongest,) = [v for v in verdicts(collected) if v.goal.what.startswith("against the strongest")]
    assert strongest.measured.endswith("torch.compile not measured")


def test_the_page_shows_them(collected: Collected, folder: Path) -> None:
    text = render(collected)
    assert "1-3 cuda store 8192^3" in text and "mlp 8B T=1 float16 self_key R=64" in text
    assert len(load_results(folder)) == 2
