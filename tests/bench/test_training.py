"""``npt bench train``: the package's own loop at tiny size, the published loop beside it, figures that add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.bench import training, training_shapes
from npt_kernels.bench.results import BenchError, ResultFile, environment
from npt_kernels.bench.training import measure_row, plan_rows, predict, run_train
from npt_kernels.bench.training_shapes import MODELS, SETTINGS, TrainRow, TrainShape, find_model, run_config
from npt_kernels.estimate.model_sizes import meta_model
from npt_kernels.measure.random_model_step import build_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CEILINGS = {"gemm_tflops": 0.05, "copy_tbs": 0.01}
TINY = {
    "llama": TrainShape("Tiny Llama", {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": None,
        "eos_token_id": None,
    }),
    "gpt2": TrainShape("Tiny GPT-2", {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "vocab_size": 64,
        "bos_token_id": None, "eos_token_id": None,
    }),
}  # fmt: skip


def row(setting="resident", mode="local", converted="all", model="llama", **changes):
    values = {"rank": 4, "batch": 2, "sequence": 12, "dtype": torch.float32} | changes
    return TrainRow(TINY[model], converted, mode, setting, **values)


@pytest.mark.parametrize("mode", ["local", "end_to_end"])
@pytest.mark.parametrize("model", TINY)
def test_a_row(model, mode):
    measured = measure_row(row(model=model, mode=mode), CPU, CEILINGS)
    assert measured["status"] == "ok", measured
    assert measured["steps"] == training.TIMED_STEPS
    low, high = measured["tokens_per_s_p10_p90"]
    assert 0 < low <= measured["tokens_per_s"] <= high
    parts = measured["seconds_per_step"]
    assert min(parts.values()) > 0
    assert parts["forward"] + parts["backward"] + parts["optimizer"] == pytest.approx(parts["total"], abs=1e-5)
    assert measured["mfu"] == pytest.approx(measured["tflops"] / 0.05, abs=0.01)
    held = 4 * (measured["np_parameters"] + measured["frozen_parameters"])
    adam = 2 * 4 * measured["np_parameters"]
    assert measured["peak_bytes"] >= held + adam, "weights and moments are alive at the end of the second step"
    assert measured["peak_bytes"] < 4 * held
    json.dumps(measured)


def test_four_layers():
    measured = measure_row(row(converted="4"), CPU, CEILINGS)
    every = measure_row(row(), CPU, CEILINGS)
    assert measured["np_parameters"] * 5 == every["np_parameters"] * 4


@pytest.mark.parametrize("model", TINY)
def test_the_published_loop_is_the_published_form(model):
    loop = row("published loop", "end_to_end", "4", model, batch=1)
    measured = measure_row(loop, CPU, CEILINGS)
    assert measured["status"] == "ok", measured
    assert "mfu" not in measured, "it does far more arithmetic than its mode needs"
    form = measure_row(row("published form", "end_to_end", "4", model, batch=1), CPU, CEILINGS)
    assert form["status"] == "ok" and form["np_parameters"] == measured["np_parameters"]


@pytest.mark.parametrize("rule", ["self_key", "rank1", "anchored"])
@pytest.mark.parametrize("model", TINY)
def test_token_by_token_computes_what_the_layer_computes(model, rule):
    made = build_model(dict(TINY[model].numbers), torch.float32)
    apply_npt(made, NPTConfig(rule=rule, rank=4, num_ranks=2))
    training._randomise(made)
    expected = training._student_outputs(made)
    with training_shapes._token_by_token(made):
        actual = training._student_outputs(made)
        for parameter in npt_parameters(made):
            parameter.data.zero_()
        without = training._student_outputs(made)
    for a, e, w in zip(actual, expected, without, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
        assert (a - w).abs().max() > 0.3 * e.abs().max(), "the weight change must matter for this to say anything"
    assert all("npt_student" not in layer.__dict__ for layer in training.converted_layers(made).values())


def test_streamed_layers_leave_the_device():
    measured = measure_row(row("streamed", batch=4, sequence=8), CPU, CEILINGS)
    assert measured["status"] == "ok", measured
    resident = measure_row(row(batch=4, sequence=8), CPU, CEILINGS)
    layers = 5 * 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert layers <= measured["home_bytes"] < 1.05 * layers
    assert measured["peak_bytes"] < resident["peak_bytes"] - 0.4 * layers, "two layers of five are in the buffers"
    assert "home_bytes" not in resident


@pytest.mark.parametrize(("setting", "share"), [("8bit", 0.3), ("4bit", 0.2)])
def test_quantised_bases(setting, share):
    pytest.importorskip("bitsandbytes")
    numbers = dict(TINY["llama"].numbers) | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = TrainShape("Wider", numbers)
    dense, small = (
        measure_row(TrainRow(model, "all", "local", s, 4, 2, 12, torch.float32), CPU, CEILINGS)
        for s in ("resident", setting)
    )
    assert small["status"] == "ok", small
    layers = 5 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert dense["peak_bytes"] - small["peak_bytes"] > (1 - share) * layers - 4 * 64 * 128 * 4
    assert small["flops_per_token"] == dense["flops_per_token"], "what is stored does not change what is computed"


#: Large enough that the scratch memory inside operators, which the meter sees and the plan does not count, is nothing.
WIDER = TrainShape("Wider", dict(TINY["llama"].numbers) | {
    "hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "num_hidden_layers": 4,
})  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        ("resident", "local"),
        ("resident", "end_to_end"),
        ("streamed", "local"),
        ("8bit", "local"),
        ("4bit", "end_to_end"),
    ],
)
def test_the_prediction_is_near_what_is_measured(setting, mode):
    if "bit" in setting:
        pytest.importorskip("bitsandbytes")
    measured = measure_row(TrainRow(WIDER, "all", mode, setting, 8, 2, 48, torch.float32), CPU, CEILINGS)
    assert measured["status"] == "ok", measured
    # On a CPU the plan counts the home of streamed layers, the measurement leaves it out.
    whole = measured["peak_bytes"] + measured.get("home_bytes", 0)
    assert 0.9 < measured["predicted_bytes"] / whole < 1.1
    assert "predicted_seconds" not in measured, "rates are known of GPUs only"


def test_predictions_of_the_goals():
    """At real size on an H200: what a person reads in the dry run, and the goals as far as a prediction can tell."""
    from npt_kernels.estimate.devices import GPUS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "local_gpu", lambda: GPUS["H200"])
        rows = plan_rows("full", torch.bfloat16, shapes=["8b"], modes=["local"], settings=["resident", "streamed"])
        found = {row.setting: predict(row, torch.device("cuda")) for row in rows if row.converted == "all"}
    assert found["resident"]["predicted_bytes"] < 20 * 2**30 and found["streamed"]["predicted_bytes"] < 8 * 2**30
    assert all(0.5 < entry["predicted_seconds"] < 4 for entry in found.values())
    assert predict(row("published loop", "end_to_end", "4", batch=1), CPU) == {}


def test_the_goals_rows_train_as_the_goals_say():
    rows = plan_rows(
        "full", torch.bfloat16, shapes=["llama-3.1-8b"], modes=["local"], settings=["resident", "streamed"]
    )
    for entry in (entry for entry in rows if entry.converted == "all"):
        config = run_config(entry)
        assert (entry.sequence, entry.rank, entry.batch) == (2048, 64, 8)
        assert config.training.batch_size == 1 and config.training.gradient_accumulation_steps == 8
        assert config.optimization.micro_batches_per_layer == (8 if entry.setting == "streamed" else 1)
        assert config.optimization.mixed_precision == "bf16" and not config.optimization.gradient_checkpointing


def test_what_was_predicted_stays_beside_a_failure(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(training, "quantise", full)
    measured = measure_row(row(), CPU, CEILINGS)
    assert (measured["status"], measured["reason"]) == ("failed", "out of memory")
    assert measured["predicted_bytes"] > 0


def test_training_needs_no_library_that_a_plain_gpu_machine_lacks(tmp_path):
    """bitsandbytes, torchao, datasets and gguf are not there: dense settings run, 8bit says what is missing."""
    code = """
import importlib.machinery, sys
gone = ("bitsandbytes", "torchao", "datasets", "gguf", "matplotlib", "liger_kernel", "wandb")
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] in gone else find(name, path, target)
)
from npt_kernels.cli.main import app
app(["bench", "train", "--small", "--device", "cpu", "--shape", "gpt2", "--mode", "local", "--converted", "all", "--tokens", "8",
     "--rank", "2", "--setting", "resident,streamed,8bit", "--out", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(next(tmp_path.rglob("*.json")).read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "unavailable"]
    assert "bitsandbytes is not installed" in rows[2]["reason"]


def test_a_wrong_loop_is_not_reported(monkeypatch):
    right = training_shapes._loop_student
    monkeypatch.setattr(training_shapes, "_loop_student", lambda layer, h, a: right(layer, h, 1.01 * a))
    measured = measure_row(row("published loop", "end_to_end", "4"), CPU, CEILINGS)
    assert measured["status"] == "wrong" and "not timed" in measured["reason"]
    assert not {"tokens_per_s", "peak_bytes", "mfu"} & set(measured)


def test_what_this_version_cannot_run_says_so(monkeypatch):
    monkeypatch.setattr(training, "availability", lambda *_: "no such thing here")
    measured = measure_row(row("streamed"), CPU, CEILINGS)
    assert measured["status"] == "unavailable" and measured["reason"] == "not available: no such thing here"


def test_a_failing_row_does_not_end_the_run(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(training, "_peak", fails)
    result = ResultFile("train", environment(CPU), [], "small", tmp_path)
    run_train([row()], CPU, result)
    data = json.loads(result.path.read_text())
    assert data["complete"] and data["rows"][0]["status"] == "failed"
    assert data["rows"][0]["reason"] == "RuntimeError: no luck"


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch, tmp_path):
    original = training.measure_row

    def interrupted(one, *args):
        if one.mode == "end_to_end":
            raise KeyboardInterrupt
        return original(one, *args)

    monkeypatch.setattr(training, "measure_row", interrupted)
    result = ResultFile("train", environment(CPU), [], "small", tmp_path)
    rows = [row(), row(mode="end_to_end"), row(converted="4")]
    with pytest.raises(KeyboardInterrupt):
        run_train(rows, CPU, result)
    data = json.loads(result.path.read_text())
    assert len(data["rows"]) == 1 and data["not_run"] == [str(rows[1]), str(rows[2])] and not data["complete"]


def test_several_sequences_at_once(tmp_path):
    (row,) = plan_rows(
        "small", torch.float32, shapes=["8b"], modes=["local"], settings=["resident"], converted=["4"], micro_batch=2
    )
    measured = measure_row(row, CPU, CEILINGS)
    assert measured["status"] == "ok" and measured["micro_batch"] == 2 and " by 2 " in str(row)
    accelerate = run_config(row).training
    assert (accelerate.batch_size, accelerate.gradient_accumulation_steps) == (2, 1)
    with pytest.raises(BenchError, match="--micro-batch 3 must divide the 2 sequences"):
        plan_rows("small", torch.float32, shapes=["8b"], micro_batch=3)


def test_plans():
    rows = plan_rows("full", torch.bfloat16)
    assert {r.model.title for r in rows} == {"GPT-2", "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.1-8B"}
    assert {r.setting for r in rows} == set(SETTINGS) and {r.converted for r in rows} == {"all", "4"}
    assert {r.mode for r in rows} == {"local", "end_to_end"}
    assert all(r.sequence <= r.model.longest for r in rows), "GPT-2 has 1024 positions"
    small = plan_rows("small", torch.float32)
    assert {r.model.title for r in small} == {"GPT-2 ÷8", "Llama-3.1-8B ÷8"}
    cpu = plan_rows("cpu", torch.float32)
    assert {r.model.title for r in cpu} == {"SmolLM2-135M", "GPT-2"} and {r.rank for r in cpu} == {128, 8}
    assert {r.setting for r in cpu} == {"resident", "published form", "published loop"}
    (asked,) = plan_rows("cpu", torch.float32, shapes=["gpt2"], settings=["streamed"])
    assert asked.sequence == 256
    (one,) = plan_rows("full", torch.bfloat16, shapes=["8b"], modes=["local"], settings=["resident"], converted=["all"],
                       tokens=[512], ranks=[16])  # fmt: skip
    assert str(one) == "Llama-3.1-8B all layers local resident 8x512 r=16"
    assert find_model("smollm2").title == find_model("SMOLLM2-135m").title == "SmolLM2-135M"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"shapes": ["llama-3.1-9b"]}, "--shape 'llama-3.1-9b' is not known; did you mean 'Llama-3.1-8B'"),
        ({"modes": ["decode"]}, "--mode 'decode' is not known"),
        ({"settings": ["steamed"]}, "--setting 'steamed' is not known; did you mean 'streamed'"),
        ({"converted": ["5"]}, "--converted '5' is not known"),
        ({"ranks": [0]}, "--rank 0 must be at least 1"),
    ],
)
def test_what_does_not_exist(filters, message):
    with pytest.raises(BenchError, match=message):
        plan_rows("full", torch.float32, **filters)


@pytest.mark.parametrize("name", MODELS)
def test_small_models_can_be_built(name):
    model = meta_model(name, dict(MODELS[name].small().numbers))
    assert sum(p.numel() for p in model.parameters()) < 4e7
    real = meta_model(name, dict(MODELS[name].numbers))
    sizes = {"GPT-2": 124e6, "SmolLM2-135M": 135e6, "Llama-3.2-1B": 1.236e9, "Llama-3.1-8B": 8.03e9}
    assert sum(p.numel() for p in real.parameters()) == pytest.approx(sizes[name], rel=0.01)
