"""Gate and up in one linear (Phi-3, GLM), and layers that return (hidden states, attention weights) (GPT-J, CodeGen, GPT-Neo)."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, remove_npt, save_npt
from npt_kernels.model.linears import LinearHalf, linear_weight
from tests.support.helpers import assert_unchanged, randomise, snapshot
from tests.support.tiny_families import build

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))
TYPES = ["phi3", "glm", "gptj", "codegen", "gpt_neo"]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def converted(model_type):
    model = build(model_type)
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


@pytest.mark.parametrize("model_type", ["phi3", "gptj"])
def test_an_adapter_goes_round_bit_for_bit(model_type, tmp_path):
    model = converted(model_type)
    save_npt(model, tmp_path)
    fresh = build(model_type)
    load_npt(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_halves_are_views_that_follow_their_linear():
    source = torch.nn.Linear(8, 12)
    gate, up = (linear_weight(LinearHalf(source, part)) for part in (0, 1))
    assert torch.equal(torch.cat([gate, up]), source.weight)
    assert gate.data_ptr() == source.weight.data_ptr() and gate.is_contiguous() and up.is_contiguous()
    half = LinearHalf(source, 1)
    x = torch.randn(3, 8)
    torch.testing.assert_close(half(x), torch.nn.functional.linear(x, half.weight, half.bias))
    source.weight = torch.nn.Parameter(torch.zeros_like(source.weight))
    assert not half.weight.any()


def test_a_hook_on_the_fused_linear_fires_once_and_is_heard():
    model = converted("phi3")
    wanted, calls = logits(model), []
    linear = model.model.layers[0].mlp.gate_up_proj
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    handle.remove()
    linear.register_forward_hook(lambda m, i, out: out * 3)
    assert float((logits(model) - wanted).abs().max()) > 1e-2


def test_lora_on_the_fused_linear_has_its_effect_and_gradients():
    peft = pytest.importorskip("peft")
    model = converted("phi3")
    wanted = logits(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["gate_up_proj"], init_lora_weights=False))
    got = logits(tuned)
    assert float((got - wanted).abs().max()) > 1e-3
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in tuned.named_parameters() if "lora" in name]
    assert gradients and all(g is not None and bool(g.abs().max() > 0) for g in gradients)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), got, rtol=1e-4, atol=1e-4)


def test_dropout_between_attention_and_residual_is_refused():
    model = build("phi3", resid_pdrop=0.1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="with dropout on"):
        apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    assert_unchanged(model, before)


def test_attention_weights_of_a_converted_layer_are_refused():
    model = build("gptj", attn_implementation="eager")
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    with pytest.raises(ValueError, match="output_attentions=False"):
        model(input_ids=IDS, output_attentions=True)
    with npt_disabled(model):
        assert len(model(input_ids=IDS, output_attentions=True).attentions) == 2
