"""Streaming as a run asks for it: modes, room on the host, mapped loading, and whole runs that equal resident ones."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from npt_kernels.base_model import loading
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.model.select import find_layers
from npt_kernels.offload import load_for_sharding, load_for_streaming, setup, stream_mode, streaming, streaming_notes
from npt_kernels.offload.weights import is_mapped, layer_tensors
from npt_kernels.run.run import run_training
from tests.support.helpers import Words, tiny_model, token_ids


def config(tmp_path: Path, **sections) -> RunConfig:
    base = {"paths": {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}}
    return RunConfig.from_mapping(base | sections)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of 3 layers in fp32."""
    path = tmp_path / "model"
    tiny_model("llama", layers=3).save_pretrained(path)
    return path


def load(config: RunConfig, folder: Path, device: str, dtype: torch.dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.from_pretrained(folder)

    def from_files(dtype):
        return AutoModelForCausalLM.from_pretrained(folder, config=model_config, dtype=dtype)

    return load_for_streaming(config, device, dtype, model_config, from_files)


def matrices(model):
    return [t for layer in find_layers(model)[1] for t in layer_tensors(layer).values() if t.dim() == 2]


@pytest.mark.parametrize(
    ("keys", "cpu", "cuda"),
    [
        ({}, "off", "off"),
        ({"use_cpu_offload": True}, "off", "host"),
        ({"stream_layers": "host"}, "host", "host"),
        ({"stream_layers": "disk", "use_cpu_offload": True}, "disk", "disk"),
    ],
)
def test_modes(tmp_path, keys, cpu, cuda):
    run = config(tmp_path, optimization=keys)
    assert (stream_mode(run, "cpu"), stream_mode(run, torch.device("cuda", 1))) == (cpu, cuda)


def test_streaming_and_sharding_move_the_same_weights(tmp_path):
    run = config(tmp_path, optimization={"stream_layers": "host", "distributed": "fsdp"})
    with pytest.raises(ConfigError, match=r"stream_layers=host and optimization\.distributed=fsdp.*keep one"):
        stream_mode(run, "cuda")


def test_notes_say_what_surprises(tmp_path):
    assert streaming_notes(config(tmp_path), "cuda") == []
    notes = streaming_notes(config(tmp_path, optimization={"stream_layers": "host"}, training={"mode": "local"}), "cpu")
    assert len(notes) == 1 and "only costs time" in notes[0]
    run = config(
        tmp_path, optimization={"stream_layers": "disk", "micro_batches_per_layer": 4}, training={"mode": "local"}
    )
    (unverified, few) = streaming_notes(run, "cuda")
    assert "not been verified on a GPU" in unverified
    assert "micro_batches_per_layer=4 exceeds training.gradient_accumulation_steps=1" in few
    run = config(tmp_path, optimization={"stream_layers": "disk", "micro_batches_per_layer": 4})
    text = " ".join(streaming_notes(run, "cuda"))
    assert (
        "three times per micro-batch; training.mode=local" in text and "no effect with training.mode=end_to_end" in text
    )


# ---- room and loading ------------------------------------------------------------------------------------------------


def test_too_little_host_memory_is_one_line_before_anything_is_loaded(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(setup, "free_host_memory", lambda: 1000)
    run = config(
        tmp_path,
        model={"base_model_name": str(folder)},
        optimization={"stream_layers": "host"},
        data={"max_length": 16},
    )
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("loaded"))
    tokenizer = "transformers.AutoTokenizer.from_pretrained"
    monkeypatch.setattr(tokenizer, lambda *_, **__: None)
    with pytest.raises(ConfigError) as caught:
        loading.load_model(run, "cpu", to_host=functools.partial(load_for_streaming, run, "cpu"))
    message = str(caught.value)
    assert "\n" not in message and "needs 0.0 GiB" in message and "0.0 GiB are free" in message
    assert str(folder) in message and "optimization.stream_layers=disk" in message


def test_offload_without_room_means_disk(tmp_path, folder, monkeypatch):
    run = config(tmp_path, optimization={"use_cpu_offload": True})
    monkeypatch.setattr(setup, "free_host_memory", lambda: 1000)
    model = load(run, folder, "cuda", torch.float32)
    assert run.optimization.stream_layers == "disk" == stream_mode(run, "cuda")
    assert all(is_mapped(t) for t in matrices(model))
    run = config(tmp_path, optimization={"use_cpu_offload": True})
    monkeypatch.setattr(setup, "free_host_memory", lambda: 2**40)
    load(run, folder, "cuda", torch.float32)
    assert run.optimization.stream_layers == "host"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_to_be_sharded_is_mapped_in_whatever_dtype(tmp_path, folder, dtype):
    """In the dtype of its files it is the files; in another, the bits of the whole cast model, and nothing stays behind."""
    from transformers import AutoModelForCausalLM

    run = config(tmp_path)
    model = load_for_sharding(run, dtype, None, lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert model.state_dict().keys() == whole.keys() and model.config.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name
    assert len(matrices(model)) == 3 * 7 and all(is_mapped(t) for t in matrices(model))
    assert not list((tmp_path / "cache" / "streaming").iterdir())


def test_need_counts_every_tensor_once_and_pinned_powers_of_two(monkeypatch):
    model = tiny_model("llama", layers=2, tie_word_embeddings=True)
    layer = sum(p.numel() for p in find_layers(model)[1][0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 2 * layer
    assert setup.host_need(model, torch.float32, "cpu") == 4 * (rest + 3 * layer)
    power = next(2**k for k in range(40) if 2**k >= 2 * layer)
    assert setup.host_need(model, torch.bfloat16, "cuda") == 2 * rest + 2 * power + 2 * layer
    assert 0 < setup.free_host_memory() < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(setup, "free_host_memory", lambda: 3 * 2**30)
    run = RunConfig.from_mapping({"optimization": {"stream_layers": "host"}})
    assert setup._settle_mode(run, "host", 2**29) == "host"
    with pytest.raises(ConfigError, match=r"needs 4\.0 GiB of host memory \(4 processes\)"):
        setup._settle_mode(run, "host", 2**30)


def test_a_container_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(setup, "Path", lambda name: tmp_path / Path(name).name)
    assert setup.free_host_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert setup.free_host_memory() > 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_loads_nothing_into_memory_and_leaves_no_file(tmp_path, folder, dtype):
    plain = type(tiny_model("llama", layers=3)).from_pretrained(folder, dtype=dtype)
    model = load(config(tmp_path, optimization={"stream_layers": "disk"}), folder, "cpu", dtype)
    assert model.config.dtype == dtype
    for (name, a), (other, b) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype == dtype and torch.equal(a, b)
    assert all(is_mapped(t) for t in matrices(model))
    assert not list((tmp_path / "cache" / "streaming").iterdir())


def test_is_mapped_tells_files_from_memory(folder):
    assert all(is_mapped(t) for t in load_file(folder / "model.safetensors").values())
    assert not is_mapped(torch.zeros(100000)) and not is_mapped(torch.zeros(0))


# ---- whole runs ------------------------------------------------------------------------------------------------------


@dataclass
class Blocks:
    train: torch.Tensor
    calibration: torch.Tensor
    heldout: torch.Tensor
    sources: list[str]


def run(tmp_path: Path, name: str, mode: str, **optimization):
    data = {
        "model": {"rank": 8, "basis": "fisher"},
        "training": {"mode": mode, "batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 3, "num_epochs": 9,
                     "polish_steps": 2, "learning_rate": 1e-3},
        "evaluation": {"tokens": 60, "prompts": ["1 2"], "max_new_tokens": 3},
        "optimization": optimization,
        "paths": {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    stream = io.StringIO()
    model = tiny_model("llama", layers=3)
    text = Blocks(token_ids(24, 16, 1), token_ids(8, 16, 2), token_ids(6, 16, 3), ["random numbers"])
    summary = run_training(RunConfig.from_mapping(data), model, Words(), text, console=Console(file=stream, width=250))
    return summary, load_file(tmp_path / name / "adapter" / "npt_model.safetensors"), stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("local", {"stream_layers": "host", "micro_batches_per_layer": 3}),
        ("local+polish", {"stream_layers": "disk"}),
        ("end_to_end", {"stream_layers": "host", "gradient_checkpointing": True}),
    ],
)
def test_a_streamed_run_is_bitwise_the_resident_one(tmp_path, monkeypatch, mode, keys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    resident, expected, before = run(
        tmp_path, "resident", mode, gradient_checkpointing="gradient_checkpointing" in keys
    )
    streamed, adapter, output = run(tmp_path, "streamed", mode, **keys)
    assert adapter.keys() == expected.keys() and all(torch.equal(adapter[n], expected[n]) for n in expected)
    assert streamed.trained == resident.trained and streamed.converted == resident.converted
    assert streamed.samples_trained == resident.samples_trained
    assert "streaming:" not in before
    where = "mapped files" if keys["stream_layers"] == "disk" else "in host memory"
    assert "streaming: 3 layers of" in output and where in output and "TFLOP/s" not in output
    assert output.index("streaming:") < output.index("original: perplexity")


def test_the_arithmetic_of_a_loaded_model(tmp_path):
    model = tiny_model("llama", layers=3)
    run_config = config(
        tmp_path, model={"rank": 0.5}, data={"max_length": 20},
        training={"batch_size": 3, "gradient_accumulation_steps": 2}, optimization={"micro_batches_per_layer": 8},
    )  # fmt: skip
    plan = setup.transfer_plan(run_config, model, [1000, 3000, 2000], where="host")
    attention = 2 * 32 * 32 + 2 * 32 * 16
    components = 16 * (32 + 48 + 48 + 32)
    work = 2 * attention + 2 * 32 * 20 + 14 * 32 * 48 + 6 * components
    assert plan.compute_seconds == pytest.approx(60 * work / 400e12)
    assert (plan.tokens, plan.micro_batches, plan.layer_bytes) == (60, 2, 3000)  # a step has two micro-batches
    for rank, mean in (("auto:8", 8), (5, 5), ([4, 8, 12], 8)):
        run_config.model.rank = rank
        assert setup._mean_rank(run_config, 32) == mean
    gpt2 = setup.transfer_plan(run_config, tiny_model("gpt2", layers=2), [10], where="disk")
    attention = 32 * 96 + 32 * 32
    assert gpt2.compute_seconds == pytest.approx(
        60 * (2 * attention + 2 * 32 * 20 + 10 * 32 * 128 + 6 * 8 * (32 + 128 + 32)) / 400e12
    )


def test_off_is_nothing_at_all(tmp_path):
    model = tiny_model("llama", layers=2)
    with streaming(config(tmp_path), model, "cpu", say=lambda line: pytest.fail(line)) as streamer:
        assert streamer is None
        assert not any(module._forward_pre_hooks for module in model.modules())
