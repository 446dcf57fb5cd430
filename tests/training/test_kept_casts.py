"""Copies of frozen weights in autocast's dtype: bit for bit what autocast makes, made once, never stale."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.training.kept_casts import KeptCasts, kept_casts
from npt_kernels.training.loop import make_objective
from tests.support.helpers import randomise, tiny_model, token_ids
from tests.support.runs import make_config

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def converted(family: str) -> nn.Module:
    model = tiny_model(family, layers=2)
    apply_npt(model, NPTConfig(layers=[1], rank=4, init="small"))
    randomise(model, 0.12)
    return model


def gradients(model: nn.Module, objective: str, tmp_path, kept: KeptCasts | None, steps: int = 2) -> list[torch.Tensor]:
    goal = make_objective(objective, model, make_config(tmp_path), {})
    for step in range(steps):
        ids = token_ids(2, 12, seed=step)
        if kept is None:
            with torch.autocast(**AUTOCAST):
                goal.accumulate_group([ids], [1.0], lambda loss: loss.backward())
        else:
            with torch.autocast(**AUTOCAST), kept:
                goal.accumulate_group([ids], [1.0], lambda loss: loss.backward())
    return [p.grad.clone() for p in npt_parameters(model)]


@pytest.mark.parametrize("objective", ["local", "kl", "layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_have_the_bits_that_autocast_gives(family, objective, tmp_path):
    model = converted(family)
    expected = gradients(copy.deepcopy(model), objective, tmp_path, None)
    kept = kept_casts(model, make_config(tmp_path))
    got = gradients(model, objective, tmp_path, kept)
    assert any(g.count_nonzero() for g in expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    linears = 2 * (7 if family == "llama" else 4)
    assert len(kept._copies) >= linears, "the frozen linears of both layers"
    trained = {id(p) for p in npt_parameters(model)}
    assert not trained & set(kept._copies)


def test_a_copy_is_made_once(tmp_path):
    model = converted("llama")
    kept = kept_casts(model, make_config(tmp_path))
    gradients(model, "kl", tmp_path, kept, steps=1)
    first = {key: low for key, (_, low) in kept._copies.items()}
    gradients(model, "kl", tmp_path, kept, steps=1)
    assert first.keys() == kept._copies.keys()
    assert all(kept._copies[key][1] is low for key, low in first.items())


def test_the_conversion_has_the_bits_that_autocast_gives(tmp_path):
    plain, other = tiny_model("llama", layers=2), tiny_model("llama", layers=2)
    config = NPTConfig(layers="all", rank=8, basis="fisher")
    tokens = token_ids(8, 32)
    with torch.autocast(**AUTOCAST):
        apply_npt(plain, config, tokens)
    kept = kept_casts(other, make_config(tmp_path))
    with torch.autocast(**AUTOCAST), kept:
        apply_npt(other, config, tokens)
    assert kept._copies
    for mine, theirs in zip(npt_parameters(other), npt_parameters(plain), strict=True):
        assert mine.count_nonzero() and torch.equal(mine, theirs)


def test_a_weight_that_was_changed_or_trains_is_cast_anew():
    linear = nn.Linear(8, 8)
    linear.weight.requires_grad_(False)
    x = torch.randn(3, 8)
    kept = KeptCasts(linear.parameters())
    with torch.autocast(**AUTOCAST), kept:
        before = linear(x)
        linear.weight.mul_(2)
        assert torch.equal(linear(x), F.linear(x.bfloat16(), linear.weight.detach().bfloat16(), linear.bias.bfloat16()))
        assert not torch.equal(linear(x), before)
        linear.weight.requires_grad_(True)
        linear(x).sum().backward()
    assert linear.weight.grad.count_nonzero() == 64


def test_only_the_thread_that_entered_it_sees_copies():
    linear = nn.Linear(8, 8)
    linear.weight.requires_grad_(False)
    x, found = torch.randn(3, 8), []
    expected = linear(x)
    with torch.autocast(**AUTOCAST), KeptCasts(linear.parameters()):
        linear(x)
        thread = threading.Thread(target=lambda: found.append(linear(x).detach()))
        thread.start()
        thread.join()
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected)


def test_none_is_kept_outside_autocast_or_in_float64():
    linear = nn.Linear(8, 8)
    linear.weight.requires_grad_(False)
    kept = KeptCasts(linear.parameters())
    with kept:
        assert linear(torch.randn(3, 8)).dtype == torch.float32
    assert not kept._copies


@pytest.mark.parametrize(
    "optimization",
    [{"stream_layers": "disk"}, {"use_cpu_offload": True}, {"quantization": "int8"}, {"use_4bit": True}],
    ids=lambda o: next(iter(o)),
)
def test_bases_that_are_not_whole_in_memory_keep_nothing(optimization, tmp_path):
    config = make_config(tmp_path, {"optimization": optimization})
    assert kept_casts(tiny_model("llama", layers=1), config) is None
    assert kept_casts(tiny_model("llama", layers=1), make_config(tmp_path), sharded=True) is None
