"""One token on a CPU: within the op's error of float64, without compiled code its bits in float32, the original's text at full
rank."""

from __future__ import annotations

import copy

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.kernels import native
from npt_kernels.model import layer as layer_module
from npt_kernels.model import one_row
from npt_kernels.model.install import converted_layers
from tests.support.helpers import randomise, tiny_model, token_ids

IDS = token_ids(1, 1)


def converted(name, dtype, masters, **settings):
    model = (
        tiny_model(name, layers=2, hidden_size=64, num_attention_heads=2)
        if name == "llama"
        else tiny_model(name, layers=2)
    )
    model = model.to(dtype)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8, "init": "small"} | settings)))
    randomise(model)
    for layer in converted_layers(model).values():
        layer.np_component.to(masters)
    return model


@torch.no_grad()
def states(model, ids=IDS):
    """Behind the last converted layer, without the head's rounding."""
    base = model.base_model
    return base(input_ids=ids).last_hidden_state.double()


def in_float64(model):
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masters", [torch.float32, None])
@pytest.mark.parametrize(("fold", "norm_match"), [(None, None), (False, None), (None, False)])
@pytest.mark.parametrize("compiled", [True, False])
def test_within_twice_the_error_of_the_op(name, dtype, masters, fold, norm_match, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "compiled", None)
    elif dtype == torch.float16 or native.compiled is None:
        pytest.skip("no compiled code for it")
    model = converted(name, dtype, masters or dtype, fold=fold, norm_match=norm_match)
    exact = states(in_float64(model))
    mine = states(model)
    layer = next(iter(converted_layers(model).values()))
    row = layer.np_component.ready.row  # it was this way that ran
    assert any(made is not None for made in row._natives.values()) == compiled
    assert torch.equal(states(model), mine)
    monkeypatch.setattr(layer_module, "ready_half", lambda *_: None)
    theirs = states(model)
    error, usual = (float((got - exact).abs().max()) for got in (mine, theirs))
    assert (error > 0 or dtype == torch.float32) and error <= 2 * usual + torch.finfo(dtype).eps * float(
        exact.abs().max()
    )


@pytest.mark.parametrize("targets", [("gate",), ("up", "down"), ("down",)])
def test_targets_that_do_not_change(targets, monkeypatch):
    model = converted("llama", torch.bfloat16, torch.float32, targets=targets, fold=None)
    exact, mine = states(in_float64(model)), states(model)
    monkeypatch.setattr(layer_module, "ready_half", lambda *_: None)
    usual = float((states(model) - exact).abs().max())
    assert float((mine - exact).abs().max()) <= 2 * usual + 2**-8 * float(exact.abs().max())


def test_what_is_trained_counts_at_the_next_token():
    model = converted("llama", torch.bfloat16, torch.float32)
    before = states(model)
    component = next(iter(converted_layers(model).values())).np_component
    with torch.no_grad():
        component.w_b_up["down"].mul_(3)
    after = states(model)
    assert float((after - before).abs().max()) > 1e-2
    assert torch.equal(after, states(copy.deepcopy(model)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("fold", "norm_match"), [(None, None), (False, None), (None, False)])
def test_without_compiled_code_the_ops_bits_in_float32(name, fold, norm_match, monkeypatch):
    monkeypatch.setattr(native, "compiled", None)
    model = converted(name, torch.float32, torch.float32, fold=fold, norm_match=norm_match)
    mine = states(model)
    assert next(iter(converted_layers(model).values())).np_component.ready.row is not None
    monkeypatch.setattr(layer_module, "ready_half", lambda *_: None)
    assert torch.equal(mine, states(model))


def test_a_frozen_weight_that_moves_or_changes_counts_at_the_next_token():
    model = converted("llama", torch.float32, torch.float32)
    before = states(model)
    layer = next(iter(converted_layers(model).values()))
    for change in (
        lambda weight: weight.data.mul_(1.5),
        lambda weight: setattr(weight, "data", weight.data * 1.5),
    ):
        change(layer.mlp.gate_proj.weight)
        after = states(model)
        assert float((after - before).abs().max()) > 1e-2
        torch.testing.assert_close(after, states(copy.deepcopy(model)), rtol=0, atol=0)
        before = after


def test_other_rules_and_devices_keep_the_op():
    model = converted("llama", torch.bfloat16, torch.bfloat16, rule="rank1")
    states(model)
    assert next(iter(converted_layers(model).values())).np_component.ready.row is None
    assert not one_row.serves("self_key", torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_text_is_the_originals_at_full_rank(dtype):
    model = tiny_model("llama", layers=2).to(dtype)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = token_ids(1, 6)
    wanted = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=token_ids(8, 32))
    got = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    # Tokens may differ where two are as likely within the dtype; up to the first such one the logits agree.
    same = int((got.sequences == wanted.sequences)[0, 6:].long().cumprod(0).sum())
    assert same >= 1
    for mine, theirs in zip(got.logits[:same], wanted.logits[:same], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=40 * torch.finfo(dtype).eps * float(theirs.abs().max()))
