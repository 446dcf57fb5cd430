"""``npt plan`` and ``npt train --dry-run`` as a user runs them: no weights, no network, seconds."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from npt_kernels.cli.main import app
from npt_kernels.configs.models import KNOWN_MODELS

RUNNER = CliRunner()
GIB = 2**30

#: A file in the form that earlier NPT users have (``config_optimized``): their keys only.
PUBLISHED = """
model:
  base_model_name: {model}
  npt_layers: upper_half
  rank: 8
  modulation_scale: 0.1
training:
  batch_size: 1
  gradient_accumulation_steps: 8
  learning_rate: 1e-4
  num_epochs: 1
  warmup_steps: 100
  weight_decay: 0.01
  max_grad_norm: 1.0
  equivalence_weight: 1.0
  regularization_weight: 0.01
  logging_steps: 10
  prediction_logging_steps: 50
  eval_steps: 100
  save_steps: 500
data:
  dataset_name: wikitext
  dataset_config: wikitext-2-raw-v1
  max_length: 256
  num_train_samples: 1000
  num_eval_samples: 100
wandb:
  enabled: false
  project: npt
  entity: null
  tags: [npt]
optimization:
  use_cpu_offload: true
  use_8bit: false
  mixed_precision: fp16
paths:
  output_dir: ./outputs
  cache_dir: {cache}
  checkpoint_dir: ./checkpoints
"""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a plan loaded weights or used the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)


def run(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def as_json(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("plan", *arguments, "--json"))
    return result


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """Llama-3.1-8B as a local folder: config.json and nothing else."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KNOWN_MODELS["meta-llama/Llama-3.1-8B"]))
    return folder


def test_a_small_model_is_planned_at_settings_that_it_can_have(tmp_path: Path) -> None:
    """`optimized` asks for rank 1024 and 2048 tokens."""
    numbers = dict(KNOWN_MODELS["openai-community/gpt2"]) | {"n_embd": 64, "n_head": 4, "n_positions": 128}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    found = as_json("--model", str(tmp_path), "--gpu-memory", "24GiB")
    assert found["config"]["model"]["rank"] == "auto:16" and found["config"]["data"]["max_length"] == 128
    assert as_json("--model", str(tmp_path), "--cpu", "model.rank=8")["config"]["model"]["rank"] == 8


def test_dry_run_of_the_published_configuration(eight: Path, tmp_path: Path) -> None:
    """The issue's example: `npt train optimized --dry-run` with a config_optimized-style file, from a local config.json."""
    file = tmp_path / "config_optimized.yaml"
    file.write_text(PUBLISHED.format(model=eight, cache=tmp_path))
    text = run("train", "optimized", "--dry-run", "--config", str(file))
    for part in (
        "32 llama-like layers, hidden size 4096",
        "16 layers (upper_half)",
        "8,030,261,248",
        "by phase",
        "local",
    ):
        assert part in text
    assert not (tmp_path / "outputs").exists()


def test_dry_run_of_optimized_itself(tmp_path: Path) -> None:
    text = run("train", "optimized", "--dry-run", f"paths.cache_dir={tmp_path}")
    assert "32 layers (all), rule self_key, rank mean 1024" in text and "memory at the peak" in text


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_known_models_have_their_published_sizes(name: str, parameters: int) -> None:
    plan = as_json("--model", name, "model.rank=64", "model.init=small", "training.mode=local", "--gpu", "H200")
    assert plan["model"]["parameters"] == parameters
    assert plan["peak"]["device_bytes"] > 2 * parameters


def test_a_gpu_that_is_too_small(eight: Path) -> None:
    text = run("plan", "--model", str(eight), "--gpu-memory", "24GiB")
    assert "does not fit 24.00 GiB on each GPU" in text
    assert "these changes do, cheapest first" in text
    plan = as_json("--model", str(eight), "--gpu-memory", "24GiB")
    assert plan["fits"] is False and plan["suggestions"]
    for entry in plan["suggestions"]:
        assert entry["line"] in text
        # Pasted behind the command, it fits.
        again = as_json(*entry["line"].split(), "--model", str(eight), "--gpu-memory", "24GiB")
        assert again["fits"] is True
        assert again["peak"]["device_bytes"] + again["peak"]["reserve_bytes"] == entry["device_bytes"] <= 24 * GIB


def test_a_gpu_that_is_large_enough(eight: Path) -> None:
    text = run("plan", "--model", str(eight), "--gpu", "h200", "model.rank=64", "training.mode=local")
    assert "fits 139.00 GiB on each GPU" in text and "largest training.batch_size that fits is" in text
    assert "predicted (not measured)" in text and "NVIDIA H200 data sheet" in text


def test_many_gpus() -> None:
    model = ("--model", "meta-llama/Llama-3.1-405B", "model.rank=64", "model.init=small", "training.mode=local")
    one = as_json(*model, "--gpu", "H200")
    assert one["fits"] is False
    many = as_json(*model, "--gpu", "H200", "--gpus", "64", "optimization.distributed=fsdp")
    assert many["fits"] is True and many["parallel"]["devices"] == 64 and many["parallel"]["shard"] is True
    assert many["tokens_per_step"] == 64 * one["tokens_per_step"]
    assert many["predicted"][0]["transfer"] > 0


def test_json_is_complete_and_alone(eight: Path) -> None:
    plan = as_json("--model", str(eight), "--gpu", "H100", "--host-memory", "256GiB")
    assert {phase["name"] for phase in plan["phases"]} == {
        "load", "evaluation", "generation", "conversion", "local", "end_to_end",
    }  # fmt: skip
    for phase in plan["phases"]:
        device = sum(term["bytes"] for term in phase["terms"] if term["where"] == "device")
        assert device == phase["device_bytes"] == phase["moments"][phase["moment"]]
    assert plan["budget"] == {"device": 79 * GIB, "host": 256 * GIB, "phases": {}}
    assert all(step["what"] == "predicted, not measured" for step in plan["predicted"])


def test_the_cpu_plans_too(tmp_path: Path) -> None:
    plan = as_json("demo", "--cpu", f"paths.cache_dir={tmp_path}")
    assert plan["device"] == "cpu" and plan["predicted"] == [] and plan["fits"] in (True, None)
    small = as_json("demo", "--cpu", "--host-memory", "1GiB", f"paths.cache_dir={tmp_path}")
    assert small["fits"] is False and small["suggestions"]


def test_without_a_gpu_named_the_plan_says_how(monkeypatch: pytest.MonkeyPatch, eight: Path) -> None:
    from npt_kernels.estimate import whole_run

    monkeypatch.setattr(whole_run, "choose_device", lambda: torch.device("cuda"))
    assert "name the GPU to see whether it fits: --gpu H100" in run("plan", "--model", str(eight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "lots"], "--gpu-memory 'lots' is not a size; write it like 24GiB"),
        (["--gpu", "H1000"], "--gpu 'H1000' is not known; choose one of B200"),
        (["--cpu", "--gpu", "H100"], "--cpu plans for the CPU"),
        (["--model", "nobody/knows"], "is not on this machine, and a plan uses no network"),
        (["optimized", "small"], "only one NAME is taken"),
        (["optimized", "model.rank=5000"], "rank=5000 of layer 0 is larger than the hidden size 4096"),
        (["optimized", "training.batchsize=2"], "did you mean 'training.batch_size'?"),
        (["optimised"], "did you mean 'optimized'?"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    text = run("plan", *arguments, code=2)
    assert message in text.replace("\n", " ")
    assert "Traceback" not in text


def test_help_teaches() -> None:
    text = run("plan", "--help")
    assert "npt plan --model meta-llama/Llama-3.1-8B --gpu-memory 24GiB" in text
    assert "plan" in run("--help")
