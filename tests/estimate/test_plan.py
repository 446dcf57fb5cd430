"""Plans: the numbers of the run itself, from config.json alone."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from npt_kernels import apply_npt
from npt_kernels.configs import load_run_config, named_configs, parse_yaml
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.estimate.printing import print_configuration, print_plan
from npt_kernels.estimate.terms import MemoryTerm
from npt_kernels.estimate.whole_run import Plan, make_plan

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a plan used the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def plan_of(folder: Path, numbers: dict[str, Any], **sections: dict[str, Any]) -> Plan:
    (folder / "config.json").write_text(json.dumps(numbers))
    model = {"base_model_name": str(folder), "rank": 8, **sections.pop("model", {})}
    data = {"dataset_name": "demo", "max_length": 16, **sections.pop("data", {})}
    return make_plan(RunConfig.from_mapping({"model": model, "data": data, **sections}), "cpu")


def printed(plan: Plan) -> str:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=200))
    return stream.getvalue()


def terms(plan: Plan, phase: str) -> dict[str, MemoryTerm]:
    return {term.name: term for term in next(p for p in plan.phases if p.name == phase).terms}


@pytest.mark.parametrize("numbers", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "model",
    [
        {"npt_layers": "all"},
        {"npt_layers": "upper_half", "rule": "rank1", "targets": ["gate"], "num_ranks": 2},
        {"npt_layers": [0, -1], "rule": "diagonal", "rank": 0.5},
        {"npt_layers": "1:3", "rule": "anchored", "rank": [4, 12]},
    ],
)
def test_the_plan_has_the_numbers_of_the_conversion(
    numbers: dict[str, Any], model: dict[str, Any], folder: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = plan_of(folder, numbers, model=model)
    values = {key: value for key, value in numbers.items() if key != "model_type"}
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(numbers["model_type"], **values))
    report = apply_npt(real, plan.config.npt_config())
    assert plan.adapter.layers == list(report.layers)
    assert plan.adapter.parameters == [layer.parameters for layer in report.converted]
    assert plan.model.parameters == report.base_parameters
    assert plan.model.num_layers == report.num_layers == 4
    assert plan.adapter.ranks == [layer.rank * plan.config.model.num_ranks for layer in report.converted]
    assert tuple(plan.adapter.targets) == report.converted[0].targets
    assert plan.model.family == report.converted[0].shape


@pytest.mark.parametrize("name", list(named_configs()))
def test_every_named_configuration_plans_without_network(name: str, tmp_path: Path) -> None:
    config = load_run_config(name, None, [f"paths.cache_dir={tmp_path}"])
    text = printed(make_plan(config, "cpu"))
    for part in (config.model.base_model_name, "trainable", "frozen layers", "steps", "sum"):
        assert part in text


def test_the_demo_in_numbers(tmp_path: Path) -> None:
    plan = make_plan(load_run_config("demo", None, [f"paths.cache_dir={tmp_path}"]), "cpu")
    assert (plan.model.num_layers, len(plan.adapter.layers), plan.model.hidden_size) == (30, 30, 576)
    assert plan.model.parameters == 134_515_008
    assert plan.adapter.total == 30 * 184 * (576 + 1536 + 1536 + 576)
    assert (plan.tokens_per_step, plan.steps) == (1024, 40)
    assert plan.dtype is torch.float32
    assert plan.device_bytes < 4 * 2**30
    assert make_plan(plan.config, "cuda").dtype is torch.bfloat16


def test_memory_terms_follow_the_settings(folder: Path) -> None:
    def phase(name: str, **sections: dict[str, Any]) -> dict[str, int]:
        sections.setdefault("model", {})["init"] = "small"
        sections.setdefault("optimization", {}).setdefault("mixed_precision", "no")
        sections.setdefault("training", {}).setdefault("mode", "end_to_end" if name == "end_to_end" else "local")
        return {key: term.bytes for key, term in terms(plan_of(folder, LLAMA, **sections), name).items()}

    whole = phase("end_to_end")
    assert whole["frozen layers"] == 2 * phase("end_to_end", model={"dtype": "bfloat16"})["frozen layers"]
    assert whole["Adam moments"] == 2 * whole["NP parameters"]
    assert phase("local")["activations"] < whole["activations"]
    assert phase("end_to_end", optimization={"gradient_checkpointing": True})["activations"] < whole["activations"]
    assert phase("end_to_end", training={"batch_size": 8})["activations"] == pytest.approx(
        2 * whole["activations"], rel=0.05
    )
    names = {p.name for p in plan_of(folder, LLAMA, training={"mode": "none"}).phases}
    assert names == {"load", "evaluation", "generation", "conversion"}


@pytest.mark.parametrize(
    ("sections", "steps", "why"),
    [
        ({"training": {"mode": "none"}}, 0, "conversion only"),
        ({"data": {"num_train_samples": 100}, "training": {"num_epochs": 2}}, 50, "100 sequences"),
        ({"data": {"num_train_samples": 100}, "training": {"max_steps": 7}}, 7, "training.max_steps"),
        ({"data": {"num_train_samples": 100}, "training": {"gradient_accumulation_steps": 8}}, 4, "100 sequences"),
        ({"data": {"dataset_name": "a/b"}}, None, "known once it is read"),
        ({"data": {"dataset_name": "a/b"}, "training": {"max_steps": 7}}, 7, "at most"),
        (
            {"data": {"num_train_samples": 8}, "training": {"mode": "local+polish", "polish_steps": 5}},
            7,
            "then 5 of polish",
        ),
    ],
)
def test_steps(folder: Path, sections: dict[str, Any], steps: int | None, why: str) -> None:
    plan = plan_of(folder, LLAMA, **sections)
    assert plan.steps == steps
    assert why in plan.steps_from
    assert why in printed(plan)


def test_steps_from_the_size_of_local_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 10_000)
    plan = plan_of(folder, LLAMA, data={"train_files": [str(tmp_path / "*.txt")], "max_length": 50})
    assert plan.steps is not None and 45 <= plan.steps <= 60


@pytest.mark.parametrize(
    ("numbers", "sections", "message"),
    [
        (LLAMA, {"model": {"rank": 64}}, "rank=64 of layer 0 is larger than the hidden size 32"),
        (LLAMA, {"model": {"rank": "auto:64"}}, "rank='auto:64' exceeds the hidden size 32"),
        (LLAMA, {"model": {"rank": "auto:8", "rule": "rank1"}}, "allotted by the closed form"),
        (LLAMA, {"model": {"rank": [4, 4]}}, "rank lists 2 numbers, but 4 layers"),
        (LLAMA, {"model": {"npt_layers": [9]}}, "layers contains 9, but the model has 4"),
        (LLAMA, {"model": {"npt_layers": "7:9"}}, "selects no layer"),
        (LLAMA, {"model": {"targets": ["c_fc"]}}, "targets contains 'c_fc'"),
        (LLAMA, {"data": {"max_length": 65}}, "data.max_length=65 exceeds the 64 positions"),
        (GPT2, {"data": {"max_length": 65}}, "data.max_length=65 exceeds the 64 positions"),
        ({**LLAMA, "model_type": "no-such"}, {}, "its configuration builds no causal model"),
        ({**LLAMA, "hidden_act": "mish"}, {}, "its activation"),
        ({"model_type": "bert", "is_decoder": True}, {}, "no decoder layers that NPT knows"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    numbers: dict[str, Any], sections: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, numbers, **sections)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_without_effect_are_noted(folder: Path) -> None:
    plan = plan_of(folder, LLAMA, optimization={"use_cpu_offload": True, "mixed_precision": "fp16"})
    text = printed(plan)
    assert "optimization.use_cpu_offload: nothing to do" in text
    assert "mixed_precision=fp16" in text


def test_the_printed_configuration_can_be_used_again(tmp_path: Path) -> None:
    config = load_run_config("demo", None, [f"paths.cache_dir={tmp_path}", "model.npt_layers=4:8"])
    stream = io.StringIO()
    print_configuration(make_plan(config, "cpu"), Console(file=stream, width=60))
    text = stream.getvalue()
    assert RunConfig.from_mapping(parse_yaml(text, "printed")) == config
    assert yaml.safe_load(text)["evaluation"]["prompts"] == config.evaluation.prompts
