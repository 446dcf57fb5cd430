"""Gate and up in one linear (Phi-3, GLM): the same numbers as of two linears; hooks and adapters on the one act on both."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters, remove_npt, save_npt
from npt_kernels.conversion.quantise import quantise_base
from tests.support.helpers import ALL_RULES, assert_unchanged, randomise, snapshot
from tests.support.tiny_families import build

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))


class TwoLinears(nn.Module):
    """The same MLP with a gate and an up projection."""

    def __init__(self, mlp):
        super().__init__()
        width, rows = mlp.gate_up_proj.in_features, mlp.gate_up_proj.out_features // 2
        self.gate_proj, self.up_proj = nn.Linear(width, rows, bias=False), nn.Linear(width, rows, bias=False)
        self.down_proj, self.act_fn = copy.deepcopy(mlp.down_proj), mlp.activation_fn
        with torch.no_grad():
            self.gate_proj.weight.copy_(mlp.gate_up_proj.weight[:rows])
            self.up_proj.weight.copy_(mlp.gate_up_proj.weight[rows:])

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def twin_of(model):
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.mlp = TwoLinears(layer.mlp)
    return twin


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model):
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return [p.grad.clone() for p in npt_parameters(model)]


def fully_converted(model_type="phi3", **overrides):
    model = build(model_type, **overrides)
    wanted = logits(model)
    apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=CALIBRATION)
    return model, wanted


@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("gate",), ("up", "down")])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_numbers_of_two_linears(rule, targets):
    model = build("glm")
    twin = twin_of(model)
    for each in (model, twin):
        apply_npt(each, NPTConfig(layers="all", rank=4, rule=rule, targets=targets, init="small"))
        randomise(each)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_hook_fires_once_a_call_and_acts_on_both_halves():
    model = build("glm")
    twin = twin_of(model)
    for each in (model, twin):
        apply_npt(each, NPTConfig(layers="all", rank=4, init="small"))
        randomise(each)
    unhooked, calls = logits(model), []
    factors = torch.linspace(0.5, 1.5, 96)

    def scaled(by):
        return lambda module, args, out: calls.append(1) or out * by

    mine, theirs = model.model.layers[1].mlp, twin.model.layers[1].mlp
    mine.gate_up_proj.register_forward_hook(scaled(factors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the linears are called
        got = logits(model)
        assert len(calls) == 1
        theirs.gate_proj.register_forward_hook(scaled(factors[:48]))
        theirs.up_proj.register_forward_hook(scaled(factors[48:]))
        torch.testing.assert_close(got, logits(twin), rtol=1e-5, atol=1e-5)
    assert float((got - unhooked).abs().max()) > 1e-2


def test_lora_on_the_one_linear_trains_and_merges():
    peft = pytest.importorskip("peft")
    model, plain = fully_converted()
    settings = peft.LoraConfig(r=4, target_modules=["gate_up_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, settings)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        adapters = [p.grad for n, p in wrapped.named_parameters() if "lora_" in n]
        assert len(adapters) == 4 and all(g is not None and bool(g.abs().max() > 0) for g in adapters)
        apart = logits(wrapped)
        assert float((apart - plain).abs().max()) > 1e-2
        torch.testing.assert_close(logits(wrapped.merge_and_unload()), apart, rtol=1e-4, atol=1e-5)


def test_what_is_written_into_the_weight_counts_at_the_next_call():
    """The kept half of a layer for decoding reads the rows anew: another ``.data`` leaves no view behind."""
    model, wanted = fully_converted()
    linear = model.model.layers[0].mlp.gate_up_proj
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    before = linear.weight.data.clone()
    linear.weight.data = torch.zeros_like(before)
    silent = logits(model)
    assert float((silent - wanted).abs().max()) > 1e-2
    linear.weight.data = before
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_saved_loaded_and_taken_off(tmp_path):
    model, wanted = fully_converted()
    save_npt(model, tmp_path)
    fresh = build("phi3")
    before = snapshot(fresh)
    load_npt(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    remove_npt(fresh)
    assert_unchanged(fresh, before)
    assert torch.equal(logits(fresh), wanted)


def test_a_quantised_base_is_read_by_halves_too():
    model = build("phi3", hidden_size=64, intermediate_size=64)
    quantise_base(model, "int8")
    wanted = logits(model)
    apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=CALIBRATION)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    assert all(bool(g.abs().max() > 0) for g in gradients(model))


def test_what_would_not_be_exact_is_refused():
    odd = build("phi3")
    odd.model.layers[0].mlp.gate_up_proj = nn.Linear(32, 95, bias=False)
    with pytest.raises(ValueError, match="95 outputs, not two equal halves"):
        apply_npt(odd, NPTConfig(layers=[0], rank=4, init="small"))
    with pytest.raises(ValueError, match="cannot be converted"):
        apply_npt(build("phi3", resid_pdrop=0.1), NPTConfig(layers="all", rank=4, init="small"))
