"""Base models: local folders load, everything else fails within seconds in one line."""

from __future__ import annotations

import functools
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from npt_kernels.base_model import loading
from npt_kernels.base_model.loading import load_model, load_model_config, quantization_notes, resolve_dtype
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.conversion.quantise import quantise_base
from npt_kernels.measure.allocations import memory_meter
from npt_kernels.offload import streaming_notes
from npt_kernels.quantised.linear import QuantisedLinear


def run_config(name: str = "demo", **sections: dict[str, Any]) -> RunConfig:
    model = {"base_model_name": name, **sections.pop("model", {})}
    return RunConfig.from_mapping({"model": model, **sections})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_local_directory(tiny: Path) -> None:
    model, tokenizer = load_model(run_config(str(tiny), data={"max_length": 32}), "cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._name_or_path == str(tiny)
    assert tokenizer("a")["input_ids"] == [1]
    model, _ = load_model(run_config(str(tiny), model={"dtype": "bfloat16"}, data={"max_length": 8}), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_sequences_longer_than_the_model_takes(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length=33 exceeds the 32 positions .*use 32 or less"):
        load_model(run_config(str(tiny), data={"max_length": 33}), "cpu")


def test_auto_dtype_follows_the_device() -> None:
    assert resolve_dtype(run_config(), torch.device("cpu")) is torch.float32
    assert resolve_dtype(run_config(), torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype(run_config(model={"dtype": "float16"}), torch.device("cpu")) is torch.float16


def test_paths_that_lead_nowhere(tmp_path: Path, tiny: Path) -> None:
    for name in ("./none", str(tmp_path / "none"), "~/none-such-model", "a/b/c"):
        with pytest.raises(ConfigError, match="is not a directory; give the folder"):
            load_model(run_config(name), "cpu")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"without config\.json"):
        load_model(run_config(str(empty)), "cpu")
    (empty / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model_type"):
        load_model_config(str(empty))
    (empty / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="could not be loaded") as caught:
        load_model(run_config(str(empty)), "cpu")
    assert "\n" not in str(caught.value)
    (tiny / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(run_config(str(tiny), data={"max_length": 8}), "cpu")


@pytest.mark.parametrize("name", ["some-organisation/some-model", "some-model"])
def test_a_hub_id_without_network_fails_fast(name: str, offline: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=r"cannot be reached .*hf download .*'demo'"):
        load_model(run_config(name), "cpu")
    assert time.perf_counter() - start < 3


def test_a_network_that_swallows_packets_fails_fast(offline: pytest.MonkeyPatch) -> None:
    offline.setattr(loading, "_probe", lambda endpoint, timeout: time.sleep(60))
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="no answer within 2 s"):
        load_model(run_config("a/b"), "cpu")
    assert time.perf_counter() - start < 3


def test_hub_offline_is_respected(offline: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    offline.setattr(constants, "HF_HUB_OFFLINE", True)
    offline.setattr(loading, "_probe", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_model(run_config("a/b"), "cpu")


def test_what_is_no_hub_id(offline: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="neither a local directory nor a hub id"):
        load_model(run_config("no spaces allowed"), "cpu")


def test_a_cached_hub_model_needs_no_network(tiny: Path, tmp_path: Path, offline: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit, repository = "0" * 40, tmp_path / "hub" / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    tiny.rename(repository / "snapshots" / commit)
    offline.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    offline.setattr(loading, "_probe", lambda *_: pytest.fail("the network was asked"))
    config = load_model_config_from(tmp_path / "hub", offline)
    assert config["hidden_size"] == 8
    # Whole, it is loaded without a question to anybody: transformers' own took 24 s of trying again.
    offline.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"{host} was asked"))
    model, tokenizer = load_model(run_config("a/b", data={"max_length": 8}), "cpu")
    assert model.config._name_or_path == "a/b" and model.config.hidden_size == 8 and tokenizer("a")["input_ids"] == [1]


def load_model_config_from(hub: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``load_model_config`` with another hub cache: the library binds its location when it is imported."""
    import huggingface_hub

    original = huggingface_hub.try_to_load_from_cache
    patch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: original(*args, cache_dir=str(hub), **kwargs)
    )
    return load_model_config("a/b")


def test_configurations_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_probe", lambda *_: pytest.fail("the network was asked"))
    assert load_model_config("demo", cache_dir=tmp_path)["hidden_size"] == 576
    assert load_model_config("meta-llama/Llama-3.1-8B")["intermediate_size"] == 14336
    with pytest.raises(
        ConfigError, match=r"not on this machine, and a plan uses no network.*hf download a/b config\.json"
    ):
        load_model_config("a/b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 12}))
    assert load_model_config(str(tmp_path)) == {"model_type": "gpt2", "n_embd": 12}
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        load_model_config(str(tmp_path))


QUANTISED = {
    "use_8bit": ({"use_8bit": True}, "int8", "bitsandbytes"),
    "use_4bit": ({"use_4bit": True}, "nf4", "bitsandbytes"),
    "torchao int8": ({"quantization": "int8", "quantization_library": "torchao"}, "int8", "torchao"),
    "int4": ({"quantization": "int4"}, "int4", "torchao"),
    "fp8": ({"quantization": "fp8"}, "fp8", "torchao"),
    "both said": ({"use_8bit": True, "quantization": "int8", "quantization_library": "torchao"}, "int8", "torchao"),
}


@pytest.mark.parametrize("keys", QUANTISED)
def test_quantised_bases_load_on_a_cpu(keys: str, tiny: Path) -> None:
    optimization, format, library = QUANTISED[keys]
    config = run_config(str(tiny), optimization=optimization, data={"max_length": 8})
    model, _ = load_model(config, "cpu")
    made = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert len(made) == 2 * 7
    assert {(m.format, m.library) for m in made} == {(format, library)}
    assert not model.training
    dense, _ = load_model(run_config(str(tiny), data={"max_length": 8}), "cpu")
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        a, b = model(ids).logits, dense(ids).logits
    assert 0 < (a - b).norm() < 0.2 * b.norm()


def test_a_checkpoint_that_is_stored_quantised(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    stored = tmp_path / "stored"
    AutoTokenizer.from_pretrained(tiny).save_pretrained(stored)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(tiny, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(
        stored
    )
    model, _ = load_model(run_config(str(stored), data={"max_length": 8}), "cpu")
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 2 * 7
    dense, _ = load_model(run_config(str(tiny), data={"max_length": 8}), "cpu")
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        a, b = model(ids).logits, dense(ids).logits
    assert 0 < (a - b).norm() < 0.05 * b.norm()
    with pytest.raises(
        ConfigError, match=r"stored quantised already \(bitsandbytes\); set optimization\.quantization=none"
    ):
        load_model(run_config(str(stored), optimization={"use_4bit": True}, data={"max_length": 8}), "cpu")


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_missing_quantisation_library_is_named(library: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == library else find(name))
    config = run_config(str(tiny), optimization={"quantization": "int8", "quantization_library": library})
    other = "torchao" if library == "bitsandbytes" else "bitsandbytes"
    with pytest.raises(ConfigError, match=rf"='int8' needs {library}: pip install {library} .*library={other}.*=none"):
        load_model(config, "cpu")


def test_weights_that_a_format_cannot_hold_are_named(tiny: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((tiny / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "intermediate_size": 18})).save_pretrained(tiny)
    with pytest.raises(ConfigError, match=r"quantization='int4': layer 0: mlp\.down_proj: .*18 input features"):
        load_model(run_config(str(tiny), optimization={"quantization": "int4"}, data={"max_length": 8}), "cpu")


@pytest.mark.parametrize(
    ("optimization", "message"),
    [
        ({"use_8bit": True, "use_4bit": True}, "use_8bit and optimization.use_4bit are both true; set one"),
        ({"use_8bit": True, "quantization": "fp8"}, "use_8bit=true is short for quantization=int8, but .*='fp8'"),
        ({"use_4bit": True, "quantization": "int8"}, "use_4bit=true is short for quantization=nf4, but .*='int8'"),
        (
            {"quantization": "nf4", "quantization_library": "torchao"},
            "'nf4' does not exist in .*='torchao'; there is int8",
        ),
        ({"use_4bit": True, "quantization_library": "torchao"}, "'nf4' does not exist in .*nf4 by bitsandbytes"),
        ({"quantization": "fp8", "quantization_library": "bitsandbytes"}, "fp8 by torchao"),
    ],
)
def test_quantisation_keys_that_disagree(optimization: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run_config(optimization=optimization)
    assert "\n" not in str(caught.value)


def test_memory_keys_are_never_silent() -> None:
    config = run_config(optimization={"use_cpu_offload": True, "use_8bit": True})
    for device, first in (("cpu", "optimization.use_cpu_offload:"), ("cuda", "optimization.stream_layers=host:")):
        notes = [*streaming_notes(config, device), *quantization_notes(config, torch.device(device))]
        assert notes[0].startswith(first)
        assert "optimization.quantization=int8: all linears of the decoder layers, by bitsandbytes" in notes[-1]
        assert ("verified on a CPU only" in notes[-1]) == (device == "cuda")
    (note,) = quantization_notes(run_config(optimization={"quantization_library": "torchao"}), torch.device("cpu"))
    assert "nothing to do without optimization.quantization" in note
    assert streaming_notes(run_config(), "cpu") == quantization_notes(run_config(), torch.device("cpu")) == []


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_quantised_base_is_streamed(where: str, tiny: Path, tmp_path: Path) -> None:
    """Its codes are moved, and what is moved computes the same."""
    from npt_kernels import NPTConfig, apply_npt, npt_parameters
    from npt_kernels.offload import LayerStreamer, load_for_streaming
    from npt_kernels.training.objectives import KLObjective, LocalObjective

    paths, ids = {"cache_dir": str(tmp_path / "cache")}, torch.arange(16).view(2, 8)
    gradients: dict[str, list[torch.Tensor]] = {}
    for mode in ("off", where):
        optimization = {"use_4bit": True, "stream_layers": mode}
        config = run_config(str(tiny), optimization=optimization, paths=paths, data={"max_length": 8})
        to_host = None if mode == "off" else functools.partial(load_for_streaming, config, "cpu")
        model, _ = load_model(config, "cpu", to_host=to_host)
        assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 2 * 7
        apply_npt(model, NPTConfig(layers="all", rule="rank1", rank=2, init="published"))

        def train(model: Any = model, mode: str = mode) -> None:
            for objective in (LocalObjective(model), KLObjective(model)):
                objective.accumulate(ids, 1.0, lambda loss: loss.backward())
            gradients[mode] = [p.grad.clone() for p in npt_parameters(model)]

        if mode == "off":
            train()
        else:
            with LayerStreamer(model, "cpu", where=mode, folder=tmp_path if mode == "disk" else None):
                train()
    for a, b in zip(gradients["off"], gradients[where], strict=True):
        assert torch.equal(a, b) and bool(a.any())


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantised_base_is_never_dense_as_a_whole(tiny: Path, tmp_path: Path, format: str) -> None:
    """Files in bfloat16, base in float32: the codes are those of the whole cast model, one dense weight at a time."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "wide"
    config = LlamaConfig(
        vocab_size=16, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    run = run_config(
        str(folder), model={"dtype": "float32"}, data={"max_length": 32}, optimization={"quantization": format}
    )
    with memory_meter() as traces:
        model, _ = load_model(run, "cpu")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = sum(p.numel() * 4 for p in whole.parameters())
    quantise_base(whole, format)
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    # The mapping of the file counts as an allocation, though its pages are the file's.
    mapped = (folder / "model.safetensors").stat().st_size
    held = traces[0].peak - mapped
    assert held < dense / 2, (held, mapped, dense)
