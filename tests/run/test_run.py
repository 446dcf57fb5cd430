"""Whole runs on tiny models: what is written, what is frozen, what a stop leaves behind."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal

import pytest
import torch
import yaml
from rich.console import Console

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters, remove_npt
from npt_kernels.configs.schema import RunConfig
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run import display
from npt_kernels.run.oom import memory_advice
from npt_kernels.run.run import TrainingError, run_training
from npt_kernels.training import loop
from npt_kernels.training.loop import is_out_of_memory
from tests.support.helpers import Words, tiny_model
from tests.support.runs import FAR, blocks, checksum, make_config, records, start


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, request):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if "writes_everything" not in request.node.name:
        # Half of a tiny run's time.
        monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_writes_everything_and_learns(tmp_path, family):
    summary, _ = start(
        tmp_path, family, sections={"model": FAR}, tokenizer=Words(), max_steps=20, eval_steps=8, save_steps=10,
        prediction_logging_steps=10, learning_rate=1e-2,
    )  # fmt: skip
    assert summary.trained.kl < 0.8 * summary.converted.kl
    assert summary.base.kl == 0 and summary.base.perplexity_ratio == 1
    assert summary.converted.base_nll == summary.base.base_nll == summary.trained.base_nll
    assert summary.steps == 20 and summary.tokens_per_second > 0 and summary.peak_memory["rss"] > 2**20
    for name in ("adapter", "metrics", "summary", "config", "samples"):
        assert summary.paths[name].exists()
    assert {p.name for p in summary.paths["plots"].glob("*.png")} >= {"loss.png", "perplexity.png", "delta_norms.png"}
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["trained"]["kl"] == summary.trained.kl and len(saved["fidelity_trained"]) == 3
    assert RunConfig.from_mapping(yaml.safe_load((tmp_path / "config.yaml").read_text())).training.max_steps == 20
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [r["stage"] for r in records(tmp_path, "eval")] == [
        "original", "after conversion", "training", "training", "after training",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints" / "end_to_end-000010" / "npt_config.json").is_file()
    assert (tmp_path / "samples.md").read_text().count("## ") == 3
    for text in ("KL(original‖converted)", "after conversion", "peak memory", "ratio to original", "1 2"):
        assert text in start.output
    # The adapter on disk is the trained one.
    fresh = tiny_model(family, layers=3)
    load_npt(fresh, tmp_path / "adapter")
    assert evaluate(fresh, blocks().heldout[:4]) == summary.trained


@pytest.mark.parametrize("mode", ["local", "end_to_end", "local+polish"])
def test_the_base_is_frozen_bit_for_bit(tmp_path, mode):
    model = tiny_model("llama", layers=3)
    before = checksum(model)
    _, model = start(tmp_path, model=model, mode=mode, polish_steps=3, weight_decay=0.1, learning_rate=1e-2)
    assert checksum(model) == before
    own = {id(p) for p in npt_parameters(model)}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in own)
    remove_npt(model)
    assert checksum(model) == before and not model.training


@pytest.mark.parametrize("mode", ["local", "local+polish"])
def test_local_training_lowers_the_layer_losses(tmp_path, mode):
    summary, _ = start(tmp_path, sections={"model": FAR}, mode=mode, max_steps=30, polish_steps=5, learning_rate=1e-2)
    log = records(tmp_path, "train")
    assert log[0]["phase"] == "local" and set(log[0]["layers"]) == {"0", "1", "2"}
    local = [r for r in log if r["phase"] == "local"]
    assert local[-1]["loss"] < 0.8 * local[0]["loss"]
    means = [
        sum(e.explained_variance for e in part) / 3 for part in (summary.fidelity_converted, summary.fidelity_trained)
    ]
    assert means[1] > means[0]
    assert [r["step"] for r in log if r["phase"] == "polish"][-1:] == ([5] if mode == "local+polish" else [])
    assert "EV worst/median/best" in start.output


def test_layer_objective_with_checkpointing_learns(tmp_path):
    sections = {"model": FAR, "optimization": {"gradient_checkpointing": True}}
    start(tmp_path, objective="layer", max_steps=20, learning_rate=1e-2, sections=sections)
    log = records(tmp_path, "train")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]


def test_conversion_only(tmp_path):
    summary, _ = start(tmp_path, mode="none")
    assert summary.trained is None and summary.steps == 0 and not records(tmp_path, "train")
    assert (tmp_path / "adapter" / "npt_model.safetensors").is_file()


@pytest.mark.parametrize("mode", ["local+polish", "end_to_end"])
def test_two_runs_give_the_same_bits(tmp_path, mode):
    states = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) + len(states))  # whatever the process did before
        summary, model = start(tmp_path / name, mode=mode, polish_steps=3, regularization_weight=1e-4)
        states.append(
            (adapter_state_dict(model), summary.trained, [r["loss"] for r in records(tmp_path / name, "train")])
        )
    (first, *numbers), (second, *others) = states
    assert numbers == others
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, other = start(tmp_path / "three", mode=mode, polish_steps=3, regularization_weight=1e-4, seed=1)
    assert any(not torch.equal(first[name], tensor) for name, tensor in adapter_state_dict(other).items())


def test_accumulation_equals_the_larger_batch(tmp_path):
    results = []
    for name, batch, accumulation in (("large", 8, 1), ("small", 2, 4)):
        _, model = start(tmp_path / name, batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3)
        results.append((adapter_state_dict(model), records(tmp_path / name, "train")))
    (large, large_log), (small, small_log) = results
    assert large_log[-1]["tokens"] == small_log[-1]["tokens"]
    assert small_log[-1]["loss"] == pytest.approx(large_log[-1]["loss"], rel=1e-4)
    for name, tensor in large.items():
        # Same gradient up to rounding; Adam turns rounding of tiny gradients into at most 2·lr per step.
        assert float((tensor - small[name]).abs().mean()) < 1e-5, name


def test_resume_starts_at_the_adapters_numbers_and_keeps_its_metrics(tmp_path):
    first, _ = start(tmp_path, max_steps=4)
    lines = len(records(tmp_path, "train"))
    second, _ = start(tmp_path, max_steps=4, resume=tmp_path / "adapter")
    assert second.converted == first.trained
    assert second.trained != first.trained
    assert len(records(tmp_path, "train")) > lines
    assert "resumed adapter" in start.output


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    steps = []
    plain = display.TrainingDisplay.step

    def press(self, report, eta, *, logged):
        plain(self, report, eta, logged=logged)
        steps.append(report.step)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(display.TrainingDisplay, "step", press)
    before = signal.getsignal(signal.SIGINT)
    model = tiny_model("llama", layers=3)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, model=model, max_steps=20)
    assert signal.getsignal(signal.SIGINT) is before
    assert steps == [1, 2, 3]
    assert "interrupted after 3 steps" in start.output and f"npt train --resume {tmp_path}" in start.output
    trained = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    fresh = tiny_model("llama", layers=3)
    load_npt(fresh, tmp_path / "adapter")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapter_state_dict(fresh).items())
    assert records(tmp_path, "save")[-1]["stopped"]


def test_an_interrupt_inside_a_step_saves_too(tmp_path, monkeypatch):
    plain = loop.KLObjective.accumulate
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(loop.KLObjective, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path)
    assert "interrupted after 2 steps; adapter of step 2 saved" in start.output
    load_npt(tiny_model("llama", layers=3), tmp_path / "adapter")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_with_the_last_good_adapter(tmp_path, monkeypatch, bad, where):
    plain = loop.KLObjective.accumulate
    calls, good = [], {}

    def broken(self, ids, share, backward):
        calls.append(1)
        if len(calls) < 4:
            return plain(self, ids, share, backward)
        good.update({name: tensor.clone() for name, tensor in adapter_state_dict(self.model).items()})
        losses = plain(self, ids, share, lambda loss: backward(loss * bad))
        return dataclasses.replace(losses, loss=losses.loss * bad) if where == "loss" else losses

    monkeypatch.setattr(loop.KLObjective, "accumulate", broken)
    with pytest.raises(
        TrainingError, match=rf"{where} is (nan|inf) at step 4 .*learning_rate \(now 0.003\).*step 3 saved"
    ):
        start(tmp_path)
    fresh = tiny_model("llama", layers=3)
    load_npt(fresh, tmp_path / "adapter")
    assert all(torch.equal(tensor, good[name]) for name, tensor in adapter_state_dict(fresh).items())
    assert all(tensor.isfinite().all() for tensor in good.values())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_out_of_memory_names_what_to_change_and_saves(tmp_path, monkeypatch, error):
    plain = loop.KLObjective.accumulate
    calls = []

    def hungry(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return plain(self, *args)

    monkeypatch.setattr(loop.KLObjective, "accumulate", hungry)
    with pytest.raises(TrainingError) as caught:
        start(tmp_path, sections={"optimization": {"oom_retry": False}})
    message = str(caught.value)
    assert "By the plan's count these would fit: " in message and "adapter of step 2 saved" in message
    changes = "optimization.gradient_checkpointing=true", "training.batch_size=2 training.gradient_accumulation_steps=2"
    assert any(f"{change} (same result)" in message for change in changes)
    assert "\n" not in message


def test_memory_advice_leaves_out_what_is_already_done(tmp_path):
    config = make_config(
        tmp_path, {"optimization": {"gradient_checkpointing": True}, "data": {"max_length": 128}, "model": {"dtype": "bfloat16"}},
        mode="local", batch_size=1,
    )  # fmt: skip
    assert "checkpointing" not in memory_advice(config, MemoryError()) and "batch_size" not in memory_advice(
        config, MemoryError()
    )
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"))
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_a_run_cannot_start_without_text(tmp_path):
    empty = torch.zeros(0, 16, dtype=torch.long)
    with pytest.raises(TrainingError, match="no training text"):
        start(tmp_path, text=dataclasses.replace(blocks(), train=empty))
    with pytest.raises(TrainingError, match="no held-out text"):
        start(tmp_path, text=dataclasses.replace(blocks(), heldout=empty))


def test_a_failed_conversion_leaves_the_model_alone(tmp_path):
    model = tiny_model("llama", layers=3)
    before = checksum(model)
    with pytest.raises(ValueError, match="larger than the hidden size 32"):
        start(tmp_path, model=model, sections={"model": {"rank": 64}})
    assert checksum(model) == before and "np_component" not in "".join(model.state_dict())


@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored"])
def test_rules_without_a_closed_form_train(tmp_path, rule):
    model = {**FAR, "rule": rule, "targets": ["gate", "down"]}
    summary, _ = start(tmp_path, sections={"model": model}, max_steps=20, learning_rate=1e-2)
    assert summary.trained.kl < summary.converted.kl


def test_bf16_autocast_keeps_fp32_masters(tmp_path):
    sections = {"model": FAR, "optimization": {"mixed_precision": "bf16"}}
    summary, model = start(tmp_path, sections=sections, max_steps=15, learning_rate=1e-2)
    assert all(p.dtype == torch.float32 for p in npt_parameters(model))
    assert summary.trained.kl < summary.converted.kl
    start(tmp_path, max_steps=1)  # and another precision in the same process


def test_a_converted_model_is_converted_anew_and_threads_come_back(tmp_path):
    model = tiny_model("llama", layers=3)
    apply_npt(model, NPTConfig(layers=[0], rank=2, init="small"))
    threads = torch.get_num_threads()
    summary, _ = start(tmp_path, model=model, max_steps=1, sections={"optimization": {"num_threads": threads}})
    assert summary.report.layers == (0, 1, 2) and torch.get_num_threads() == threads


def test_terminal_output_is_a_live_table(tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    run_training(make_config(tmp_path), tiny_model("llama", layers=3), None, blocks(), console=console)
    assert "learning rate" in stream.getvalue() and "time left" in stream.getvalue()
