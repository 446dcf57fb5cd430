"""A second weight change beside a converted layer's component: the formula, its start, gradients, files, what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from npt_kernels import (
    NPTConfig,
    add_extra,
    apply_npt,
    load_npt,
    npt_disabled,
    npt_parameters,
    remove_extra,
    remove_npt,
    save_npt,
)
from npt_kernels.model.extra import extra_components
from npt_kernels.model.install import converted_layers
from npt_kernels.rules import RULES
from tests.support.helpers import randomise, tiny_model, token_ids

ROOT = Path(__file__).resolve().parents[2]
IDS = token_ids(2, 7)


def converted(name="llama", dtype=torch.float64, **settings):
    model = tiny_model(name, layers=3).to(dtype)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 6, "init": "small"} | settings)))
    randomise(model)
    return model.eval()


def extended(model, rule="diagonal", rank=4, **settings):
    """With an extra change that is not zero."""
    for component in add_extra(model, rank, rule=rule, **settings).values():
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in component.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fold", [None, False])
def test_starts_as_the_model_that_it_is_put_on(name, rule, fold):
    model = converted(name, fold=fold)
    before, params = logits(model), list(npt_parameters(model))
    made = add_extra(model, 4, rule=rule, num_ranks=2 if rule == "rank1" else 1)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)  # linears are called, not fused
    assert [id(p) for p in npt_parameters(model)] == [id(p) for c in made.values() for p in c.parameters()]
    assert all(p.requires_grad for p in npt_parameters(model)) and not any(p.requires_grad for p in params)
    assert any(float(p.detach().abs().max()) > 0 for p in npt_parameters(model))
    remove_extra(model)
    assert torch.equal(logits(model), before) and all(p.requires_grad for p in params)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("own", ["self_key", "rank1"])
def test_is_the_sum_of_both_changes(rule, own):
    """One layer, every W + ΔW_t + ΔE_t built."""
    model = extended(converted("llama", rule=own, layers=[1]), rule)
    layer = converted_layers(model)[1]
    generator = torch.Generator().manual_seed(5)
    h, a = (torch.randn(1, 4, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    u, scale = layer.npt_mlp_input(h, a)
    flat_a, inputs = a[0], u[0]

    def project(slot, x):
        weight = getattr(layer.mlp, f"{slot}_proj").weight
        keys, values = layer.np_component.vectors(flat_a, x, slot)
        if scale is not None and slot != "down":
            values = values * scale.reshape(-1, 1, 1)
        more_keys, more_values = layer.np_extra.vectors(flat_a, x, slot)
        rows = [
            F.linear(row, weight + v.t() @ k + w.t() @ e)
            for row, k, v, e, w in zip(x, keys, values, more_keys, more_values, strict=True)
        ]
        return torch.stack(rows)

    expected = h[0] + project("down", F.silu(project("gate", inputs)) * project("up", inputs))
    torch.testing.assert_close(layer.npt_student(h, a)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule):
    model = extended(converted("llama", layers=[1]), rule, rank=2, targets=["gate", "down"])
    layer = converted_layers(model)[1]
    h, a = (torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = list(layer.np_extra.parameters())

    def function(h, a, *_):
        return layer.npt_student(h, a)

    assert torch.autograd.gradcheck(function, (h, a, *parameters), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_generation_checkpointing_autocast_and_the_original(name):
    model = converted(name, torch.float32)
    with npt_disabled(model):
        original = logits(model)
    extended(model)
    with_extra = logits(model)
    with npt_disabled(model):
        assert torch.equal(logits(model), original)
    assert not torch.allclose(with_extra, original, atol=1e-3)
    kept = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False)
    assert torch.equal(kept, whole)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), with_extra, rtol=0.2, atol=0.2)

    def gradients():
        model.zero_grad(set_to_none=True)
        model(input_ids=IDS).logits.square().mean().backward()
        return [p.grad.clone() for p in npt_parameters(model)]

    plain = gradients()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    model.train()
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.equal(one, other) and float(one.abs().max()) > 0


def test_copies_are_their_own():
    model = extended(converted(dtype=torch.float32))
    before, twin = logits(model), copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in npt_parameters(model):
            parameter.mul_(2)
    assert torch.equal(logits(twin), before) and torch.equal(logits(again), before)
    assert not torch.equal(logits(model), before)


def test_three_steps_leave_all_else_bit_identical():
    model = extended(converted(dtype=torch.float32))
    own = {id(p) for p in npt_parameters(model)}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in own}
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any(name.endswith("np_component.w_down") for name in frozen)
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


def test_saved_and_loaded_in_another_process(tmp_path):
    model = extended(converted(dtype=torch.float32), layers=[0, 2], targets=["up"])
    wanted = logits(model)
    save_npt(model, tmp_path / "adapter")
    header = json.loads((tmp_path / "adapter" / "npt_config.json").read_text())
    assert header["extra"] == {
        "rank": 4,
        "rule": "diagonal",
        "num_ranks": 1,
        "scale": 1.0,
        "targets": ["up"],
        "layers": [0, 2],
    }
    torch.save(wanted, tmp_path / "wanted.pt")
    code = f"""
import torch
from npt_kernels import load_npt
from npt_kernels.model.extra import extra_components
from tests.model.test_extra import logits
from tests.support.helpers import tiny_model
torch.set_num_threads({torch.get_num_threads()})
model = tiny_model("llama", layers=3).eval()
load_npt(model, {str(tmp_path / "adapter")!r})
assert list(extra_components(model)) == [0, 2]
assert torch.equal(logits(model), torch.load({str(tmp_path / "wanted.pt")!r}))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.stdout == "same\n", done.stderr[-2000:]
    remove_extra(model)
    save_npt(model, tmp_path / "plain")
    load_npt(model, tmp_path / "adapter")
    assert torch.equal(logits(model), wanted)
    load_npt(model, tmp_path / "plain")
    assert not extra_components(model)
    remove_npt(model)
    assert not any("np_extra" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0"), ({"rank": "4"}, "rank='4'"), ({"rank": 5}, "rank 5"), ({"rule": "rank2"}, "rank2"),
        ({"layers": [0, 9]}, "extra.layers.9"), ({"layers": []}, "layers=[]"), ({"targets": ["nose"]}, "'nose'"),
        (None, "configuration none"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, change, message):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = extended(converted(dtype=torch.float32))
    save_npt(model, tmp_path)
    before = logits(model)
    weights = tmp_path / "npt_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        header = json.loads(file.metadata()["npt_config"])
    header["extra"] = header["extra"] | change if change is not None else None
    save_file(load_file(weights), weights, metadata={"npt_config": json.dumps(header)})
    (tmp_path / "npt_config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError) as error:
        load_npt(model, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


def test_what_it_refuses():
    plain = tiny_model("llama", layers=3)
    with pytest.raises(ValueError, match="no NPT layers"):
        add_extra(plain, 4)
    model = converted(layers=[1])
    for bad, message in (
        ({"rank": 0}, "rank=0"), ({"rank": 4, "rule": "nose"}, "nose"), ({"rank": 4, "layers": [0]}, "layer 0 is not converted"),
        ({"rank": 4, "targets": ["nose"]}, "nose"), ({"rank": 4, "num_ranks": 0}, "num_ranks=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            add_extra(model, **bad)
        assert "\n" not in str(error.value) and not extra_components(model)
    with pytest.raises(ValueError, match="nothing to remove"):
        remove_extra(model)
    add_extra(model, 4, layers="all")
    with pytest.raises(ValueError, match="has an extra change already"):
        add_extra(model, 4)


def test_beside_a_kept_residual_and_a_wrapped_linear():
    model = converted(attention_residual=True, rule="diagonal")
    before = logits(model)
    extended(model, "self_key")
    assert not torch.allclose(logits(model), before)
    layer = converted_layers(model)[1]
    counted = []
    handle = layer.mlp.up_proj.register_forward_hook(lambda *_: counted.append(1))
    torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)
    handle.remove()
    assert counted == [1, 1]
