"""Modules of a converted layer that are more than plain: hooks fire, wrapped linears work, replaced code is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from npt_kernels import NPTConfig, apply_npt, npt_parameters, remove_npt
from npt_kernels.model import mlp as mlp_module
from tests.support.helpers import ALL_RULES, assert_unchanged, randomise, snapshot, tiny_model, token_ids

peft = pytest.importorskip("peft")
IDS = token_ids()
LINEARS = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}
LAYER = 1


def layer_of(model):
    base = getattr(model, "base_model", model)
    return (base.transformer.h if hasattr(base, "transformer") else base.h if hasattr(base, "h") else base.layers)[
        LAYER
    ]


def parts(model):
    layer = layer_of(model)
    gpt2 = hasattr(layer, "ln_2")
    return {
        "norm": layer.ln_2 if gpt2 else layer.post_attention_layernorm, "mlp": layer.mlp,
        "act": layer.mlp.act if gpt2 else layer.mlp.act_fn,
        **{name: getattr(layer.mlp, name) for name in LINEARS["gpt2" if gpt2 else "llama"]},
    }  # fmt: skip


def converted(name="llama", rule="self_key", **settings):
    model = tiny_model(name)
    apply_npt(model, NPTConfig(layers=[LAYER], rank=8, rule=rule, **settings))
    randomise(model)
    return model


def run(model, seed=0):
    """Logits, and gradients of the NPT parameters and of the embeddings' output."""
    for parameter in model.parameters():
        parameter.grad = None
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in npt_parameters(model)], embedded.grad


def assert_same(one, two, tolerance=2e-5):
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=tolerance)
    for a, b in zip([*one[1], one[2]], [*two[1], two[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.filterwarnings("ignore:npt_kernels")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("norm_match", [True, False])
def test_hooks_fire_and_change_nothing_by_themselves(name, rule, norm_match):
    model = converted(name, rule, norm_match=norm_match)
    fused = run(model)
    fired: dict[str, int] = {}
    for part, module in parts(model).items():
        module.register_forward_pre_hook(lambda m, args, part=part: fired.__setitem__(part, fired.get(part, 0) + 1))
        module.register_forward_hook(lambda m, args, out, part=part: fired.__setitem__(part, fired[part] + 100))
    called = run(model)
    assert fired == dict.fromkeys(parts(model), 101), "every module once, as in the original layer"
    assert_same(called, fused)


@pytest.mark.filterwarnings("ignore:npt_kernels")
def test_a_hook_on_the_mlp_alone_leaves_the_fused_op():
    model = converted()
    fused, seen = run(model), []
    handle = parts(model)["mlp"].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    again = run(model)
    assert torch.equal(again[0], fused[0]) and len(seen) == 1 and seen[0][1].shape == seen[0][0].shape
    handle.remove()
    steer = torch.randn(32)
    parts(model)["mlp"].register_forward_hook(lambda m, args, out: out + steer)
    assert (run(model)[0] - fused[0]).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:npt_kernels")
def test_an_ablation_by_hook_takes_the_change_along():
    """What a hook puts in the place of down_proj's output is what the layer adds: the delta is not added behind it."""
    model = converted()
    outputs = []
    layer_of(model).register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
    parts(model)["mlp"].register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    model(input_ids=IDS)
    assert torch.equal(*outputs[0])


@pytest.mark.filterwarnings("ignore:npt_kernels")
def test_global_hooks_see_the_linears():
    from torch.nn.modules.module import register_module_forward_hook

    model, seen = converted(), set()
    handle = register_module_forward_hook(lambda m, args, out: seen.add(id(m)) if True else None)
    try:
        run(model)
    finally:
        handle.remove()
    assert {id(module) for module in parts(model).values()} <= seen


# ---- PEFT -----------------------------------------------------------------------------------------------------------------

TUNERS = {
    "lora": lambda names: peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False),
    "dora": lambda names: peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, use_dora=True),
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
    "oft": lambda names: peft.OFTConfig(r=0, oft_block_size=8, target_modules=names, init_weights=False),
    "vera": lambda names: peft.VeraConfig(r=4, target_modules=names, init_weights=False, d_initial=0.5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("target", ["gate_proj", "up_proj", "down_proj", "q_proj"])
def test_peft_behind_the_conversion(tuner, target):
    model = converted()
    plain = model(input_ids=IDS).logits.detach()
    tuned = peft.get_peft_model(model, TUNERS[tuner]([target]))
    for p in npt_parameters(model):
        p.requires_grad_(True)
    logits = tuned(input_ids=IDS).logits
    logits.square().mean().backward()
    inside = [
        (n, p) for n, p in tuned.named_parameters() if p.requires_grad and f".{LAYER}." in n and "np_component" not in n
    ]
    assert inside and all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in inside), [n for n, _ in inside]
    assert all(p.grad is not None for p in npt_parameters(model))
    assert (logits - plain).abs().max() > 1e-3
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_peft_on_the_attention_in_both_orders():
    orders = []
    for first in ("npt", "peft"):
        model = tiny_model("llama")
        config = NPTConfig(layers=[LAYER], rank=8)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        if first == "npt":
            apply_npt(model, config)
            randomise(model)
            tuned = peft.get_peft_model(model, lora)
        else:
            tuned = peft.get_peft_model(model, lora)
            apply_npt(tuned, config)
            randomise(tuned)
        torch.manual_seed(5)
        with torch.no_grad():
            for n, p in sorted(tuned.named_parameters()):
                if "lora" in n:
                    p.copy_(torch.randn(p.shape) * 0.1)
        orders.append(tuned(input_ids=IDS).logits.detach())
    torch.testing.assert_close(*orders, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*adapter:UserWarning")
def test_peft_on_the_mlp_before_the_conversion_is_refused():
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["down_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"mlp.down_proj .*peft") as caught:
        apply_npt(model, NPTConfig(layers=[LAYER], rank=8))
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_what_peft_froze_is_said():
    model = converted()
    mlp_module._warn_frozen.cache_clear()
    mlp_module._say_called.cache_clear()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"]))
    tuned.train()
    with pytest.warns(UserWarning) as said:
        tuned(input_ids=IDS)
    texts = [str(w.message) for w in said if "npt_kernels" in str(w.message)]
    assert any("mlp.down_proj is peft.tuners" in text for text in texts)
    assert any("requires_grad_(True) for p in npt_parameters(model)" in text for text in texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned(input_ids=IDS)  # once


# ---- other kinds of linears -------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def test_a_linear_of_its_own_kind_before_is_refused():
    model = tiny_model("llama")
    layer_of(model).mlp.up_proj.__class__ = Scaled
    with pytest.raises(ValueError, match=r"mlp.up_proj .*forward of its own"):
        apply_npt(model, NPTConfig(layers=[LAYER], rank=8))


@pytest.mark.filterwarnings("ignore:npt_kernels")
def test_a_linear_of_its_own_kind_afterwards_is_called():
    model, halved = converted(), converted()
    layer_of(model).mlp.up_proj.__class__ = Scaled
    with torch.no_grad():
        layer_of(halved).mlp.up_proj.weight.mul_(0.5)
    assert_same(run(model), run(halved))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:npt_kernels")
def test_pruned_and_parametrised_weights(when):
    plain, changed = tiny_model("llama"), tiny_model("llama")
    up = layer_of(changed).mlp.up_proj

    def change():
        prune.l1_unstructured(up, "weight", amount=0.5)
        parametrizations.orthogonal(layer_of(changed).mlp.gate_proj)

    if when == "before":
        change()
    config = NPTConfig(layers=[LAYER], rank=8)
    apply_npt(changed, config)
    if when == "after":
        change()
    with torch.no_grad():
        layer_of(plain).mlp.up_proj.weight.mul_(up.weight_mask)
        layer_of(plain).mlp.gate_proj.weight.copy_(layer_of(changed).mlp.gate_proj.weight)
    apply_npt(plain, config)
    for model in (plain, changed):
        randomise(model)
    with torch.no_grad():
        torch.testing.assert_close(changed(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_hook_that_changes_an_output_before_the_conversion_is_refused():
    model = tiny_model("llama")
    layer_of(model).mlp.down_proj.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"mlp.down_proj has a hook that changes its output"):
        apply_npt(model, NPTConfig(layers=[LAYER], rank=8))


def test_a_replaced_forward_of_the_mlp():
    model = tiny_model("llama")
    mlp = layer_of(model).mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"replaced mlp.forward"):
        apply_npt(model, NPTConfig(layers=[LAYER], rank=8))
    del mlp.forward
    before = snapshot(model)
    apply_npt(model, NPTConfig(layers=[LAYER], rank=8))
    mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match=rf"mlp.forward of layer {LAYER} was replaced"):
        model(input_ids=IDS)
    del mlp.forward
    kept, layer_of(model).mlp = mlp, type(mlp).npt_original_class(model.config)
    with pytest.raises(RuntimeError, match=rf"the MLP of layer {LAYER} was replaced by a LlamaMLP"):
        model(input_ids=IDS)
    layer_of(model).mlp = kept
    remove_npt(model)
    assert_unchanged(model, before)
