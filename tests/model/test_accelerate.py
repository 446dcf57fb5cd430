"""Converted models under what accelerate and torch wrap around them: prepare, compile, checkpointing, device maps.

Wrapped by DDP or ``fully_shard`` in two processes: ``tests/training/test_distributed.py``.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState
from transformers import CompileConfig

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, save_npt
from npt_kernels.training.objectives import KLObjective, LocalObjective
from tests.support.helpers import randomise, tiny_model, token_ids

IDS = token_ids()
#: Layer 1 on disk, as a device map does when a model does not fit.
DEVICE_MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def converted():
    model = tiny_model("llama", layers=3)
    apply_npt(model, NPTConfig(layers="all", rank=6, init="small"))
    randomise(model)
    return model


def step(model, accelerator=None):
    """Gradients of the language-model loss."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    (accelerator.backward if accelerator else torch.Tensor.backward)(loss)
    grads = [p.grad.clone() for p in npt_parameters(model)]
    model.zero_grad()
    return grads


@pytest.mark.parametrize(  # every pair of them
    ("precision", "dynamo", "checkpointing"),
    [("no", "no", False), ("bf16", "no", True), ("bf16", "aot_eager", False), ("no", "aot_eager", True)],
)
def test_prepared_compiled_checkpointed_unwrapped_saved(tmp_path, precision, dynamo, checkpointing):
    """Together they run (accelerate replaces forward, twice here: once a recursion without end) and gives these gradients."""
    model = converted()
    want = step(model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, dynamo_backend=dynamo)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared, optimizer = accelerator.prepare(prepared, optimizer)
    assert (prepared is not model) == (dynamo != "no")
    for got, expected in zip(step(prepared, accelerator), want, strict=True):
        scale = float(expected.abs().max())
        assert scale > 1e-4
        assert (got - expected).abs().max() <= (1e-5 if precision == "no" else 0.1) * scale
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False, keep_torch_compile=False)
    assert bare is model
    # What was prepared can be saved as it is, too.
    for name, wrapped in (("bare", bare), ("prepared", prepared)):
        fresh = tiny_model("llama", layers=3)
        load_npt(fresh, save_npt(wrapped, tmp_path / name))
        assert all(torch.equal(a, b) for a, b in zip(npt_parameters(fresh), npt_parameters(model), strict=True))


def test_a_device_map_trains():
    """Hooks of ``device_map`` on every module; all weights stay on the device."""
    model, plain = converted(), converted()
    dispatch_model(model, {name: "cpu" for name in DEVICE_MAP}, force_hooks=True)
    assert hasattr(model.model.layers[1].mlp.gate_proj, "_hf_hook")
    for objective in (LocalObjective, KLObjective):
        for each in (model, plain):
            objective(each).accumulate(IDS, 1.0, lambda loss: loss.backward())
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(npt_parameters(model), npt_parameters(plain), strict=True)
        )
        model.zero_grad()
        plain.zero_grad()


def test_an_offloaded_layer_runs_if_accelerate_is_told_to_bring_all_of_it(tmp_path):
    model = converted()
    with torch.no_grad():
        want = model(IDS).logits
        with npt_disabled(model):
            original = model(IDS).logits
        dispatch_model(
            model, DEVICE_MAP, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True,
            preload_module_classes=["LlamaDecoderLayer"],
        )  # fmt: skip
        assert model.model.layers[1].mlp.gate_proj.weight.is_meta
        assert torch.equal(model(IDS).logits, want)
        with npt_disabled(model):
            assert torch.equal(model(IDS).logits, original)


def test_an_offloaded_layer_is_named_with_the_mend():
    model = converted()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match=r"weights of layer 0 are offloaded.*preload_module_classes=\['LlamaDecoderLayer'\]"
    ):
        model(IDS)


def test_converting_an_offloaded_layer_is_refused_or_skipped_with_the_reason(tmp_path):
    model = tiny_model("llama", layers=3)
    dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with pytest.raises(ValueError, match=r"layer 1 cannot be converted: it has no weights yet .*'meta'"):
        apply_npt(model, NPTConfig(layers=[0, 1], rank=4, init="small"))
    report = apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    assert report.layers == (0, 2) and "no weights yet" in report.skipped[1]
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_with_a_static_cache_compiled_without_a_graph_break(name):
    """As transformers does by itself on a GPU: the forward of every step is one compiled graph."""
    model = tiny_model(name, layers=2)
    apply_npt(model, NPTConfig(layers="all", rank=6, init="small"))
    randomise(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    want = model.generate(IDS, **settings)
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True
    assert torch.equal(model.generate(IDS, compile_config=compiled, **settings), want)
    assert calls, "it was not compiled"
