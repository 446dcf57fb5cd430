"""Layers that return (hidden states, attention weights): GPT-J, CodeGen, GPT-Neo. Exact, and the model gets its pair."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, npt_scale, remove_npt, save_npt
from npt_kernels.training.objectives import enable_checkpointing
from tests.support.helpers import assert_unchanged, randomise, snapshot
from tests.support.tiny_families import build

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))
TYPES = ["gptj", "codegen", "gpt_neo"]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def converted(model_type, **overrides):
    model = build(model_type, **overrides)
    apply_npt(model, NPTConfig(layers="all", rank=8, init="small", targets=("gate", "up", "down")))
    randomise(model)
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_exact_writes_the_same_text_trains_and_comes_back(model_type):
    model = build(model_type)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before, wanted, written = snapshot(model), logits(model), model.generate(IDS, **settings)
    apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=CALIBRATION)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    assert torch.equal(model.generate(IDS, **settings), written)
    with npt_disabled(model):
        assert torch.equal(logits(model), wanted)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in npt_parameters(model))
    remove_npt(model)
    assert torch.equal(logits(model), wanted)
    assert_unchanged(model, before)


@pytest.mark.parametrize("model_type", TYPES)
def test_an_adapter_goes_round_and_the_strength_and_checkpointing_are_heard(model_type, tmp_path):
    model = converted(model_type)
    save_npt(model, tmp_path)
    fresh = build(model_type)
    load_npt(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    with npt_scale(model, 0.5):
        assert float((logits(model) - logits(fresh)).abs().max()) > 1e-4
    plain = [g.clone() for g in _gradients(model)]
    enable_checkpointing(model)
    model.train()
    for again, before in zip(_gradients(model), plain, strict=True):
        torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-6)


def _gradients(model):
    for p in model.parameters():
        p.grad = None
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return [p.grad for p in npt_parameters(model)]


def test_attention_weights_of_a_converted_layer_are_refused():
    model = build("gptj", attn_implementation="eager")
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    with pytest.raises(ValueError, match="output_attentions=False"):
        model(input_ids=IDS, output_attentions=True)
    with npt_disabled(model):
        assert len(model(input_ids=IDS, output_attentions=True).attentions) == 2
