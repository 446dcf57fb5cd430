"""The output projection that a converted layer leaves out: the same values, and called whenever it is somebody's business."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, remove_npt, save_npt
from npt_kernels.activations import get_activation
from npt_kernels.model.install import converted_layers
from npt_kernels.model.linears import linear_bias, linear_weight
from npt_kernels.model.norms import norm_eps, norm_weight
from tests.support.helpers import (
    ALL_RULES,
    GemmMeter,
    assert_unchanged,
    assert_within_twice,
    randomise,
    snapshot,
    tiny_model,
    token_ids,
)

IDS = token_ids()
NAMES = ("llama", "gpt2", "wide heads", "bias")


def base(name="llama", dtype=torch.float32):
    if name == "wide heads":  # o is wider than a
        model = tiny_model("llama", layers=2, head_dim=12)
    elif name == "bias":
        model = tiny_model("llama", layers=2, attention_bias=True)
    else:
        model = tiny_model(name, layers=2)
    return model.to(dtype)


def converted(name="llama", dtype=torch.float32, **settings):
    model = base(name, dtype)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8} | settings)))
    randomise(model)
    return model


def projections(model):
    return [getattr(layer.npt_plan.shape.attention_module(layer), layer.npt_plan.projection)
            for layer in converted_layers(model).values()]  # fmt: skip


class Calls:
    """How often the output projections compute, seen without a hook on them."""

    def __init__(self, model, monkeypatch):
        self.count = 0
        modules = projections(model)
        original = type(modules[0]).npt_original_class.forward

        def forward(module, *args, **kwargs):
            self.count += any(module is m for m in modules)
            return original(module, *args, **kwargs)

        kind = nn.Linear if isinstance(modules[0], nn.Linear) else type(modules[0]).npt_original_class
        monkeypatch.setattr(kind, "forward", forward)


def watched(model):
    """A hook that reads the attention's output of every layer, so that the projections are called."""
    return [layer.npt_plan.shape.attention_module(layer).register_forward_hook(lambda *_: None)
            for layer in converted_layers(model).values()]  # fmt: skip


def run(model, ids=IDS):
    """Logits; gradients of the NP parameters and of the embeddings."""
    for parameter in model.parameters():
        parameter.grad = None
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in npt_parameters(model)), embedded.grad]


def assert_alike(one, two, tolerance):
    for a, b in zip(one, two, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_equals_the_layer_with_its_projection(name, rule, monkeypatch):
    model = converted(name, torch.float64, rule=rule)
    folded = run(model)
    handles = watched(model)
    called = run(model)
    for handle in handles:
        handle.remove()
    # transformers' RMSNorm computes in float32 whatever it is given.
    assert_alike(folded, called, 1e-5 if name != "gpt2" else 1e-11)
    calls = Calls(model, monkeypatch)
    with torch.no_grad():
        model(input_ids=IDS)
        assert calls.count == 0
        watched(model)
        model(input_ids=IDS)
        assert calls.count == 2


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula(name):
    """``y = h + m + MLP``, gate and up changed by z/ρ, ρ the norm of ``h + m``, ``m = z @ w_b_up[down]``; written out."""
    model = converted(name, torch.float64)
    layer = converted_layers(model)[1]
    plan, component = layer.npt_plan, layer.np_component
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(h=args[0], y=out))
    heads = projections(model)[1].register_forward_pre_hook(lambda _, args: seen.update(o=args[0]))
    with torch.no_grad():
        model(input_ids=IDS)  # calls the projection, for the hook on it
        heads.remove()
        projection = projections(model)[1]
        a = seen["o"] @ linear_weight(projection).t()
        a = a if linear_bias(projection) is None else a + linear_bias(projection)
        model(input_ids=IDS)  # folded
        h, y = seen["h"], seen["y"]
        z = a @ component.w_down
        m = z @ component.w_b_up[plan.down]
        norm, total, x = plan.shape.norm(layer), h + m, h
        if plan.norm_kind == "layer":
            total, x = total - total.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
        scale = (total.square().mean(-1, keepdim=True) + norm_eps(norm)).rsqrt()
        u = x * scale * norm_weight(norm, plan.norm_kind)
        u = u if getattr(norm, "bias", None) is None else u + norm.bias
        act = get_activation(plan.act).forward

        def linear(target, u, z):
            module = plan.shape.linear(layer, target)
            out = u @ linear_weight(module).t() + z @ component.w_b_up[target]
            return out if linear_bias(module) is None else out + linear_bias(module)

        first, *rest = [t for t in plan.shape.targets if t != plan.down]
        inter = act(linear(first, u, z * scale))
        for target in rest:
            inter = inter * linear(target, u, z * scale)
        expected = h + linear(plan.down, inter, z)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_is_exact(name):
    model = base(name, torch.float64)
    with torch.no_grad():
        original = model(input_ids=IDS).logits
        apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=token_ids(8, 32))
        assert all(layer.npt_plan.projection for layer in converted_layers(model).values())
        torch.testing.assert_close(model(input_ids=IDS).logits, original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_with_the_projection(dtype):
    truth = converted("wide heads", torch.float64)
    model = base("wide heads").to(dtype)
    for to, of in zip(model.parameters(), base("wide heads", torch.float64).parameters(), strict=True):
        of.data.copy_(to.data)
    apply_npt(model, NPTConfig(layers="all", rank=8))
    with torch.no_grad():
        for to, of in zip(model.parameters(), truth.parameters(), strict=True):
            to.copy_(of)
            of.copy_(to)
        folded, wanted = model(input_ids=IDS).logits, truth(input_ids=IDS).logits
        watched(model)
        called = model(input_ids=IDS).logits
    assert_within_twice(folded.flatten(0, 1), called.flatten(0, 1), wanted.flatten(0, 1).double(), blocks=False)


def test_dropout_behind_the_projection_keeps_it(monkeypatch):
    model = converted("gpt2")
    assert all(not layer.npt_plan.folds_in_training for layer in converted_layers(model).values())
    calls = Calls(model, monkeypatch)
    with torch.no_grad():
        model.train()(input_ids=IDS)
        assert calls.count == 2
        model.eval()(input_ids=IDS)
        assert calls.count == 2
    without = tiny_model("gpt2", layers=2, resid_pdrop=0.0)
    apply_npt(without, NPTConfig(layers="all", rank=8))
    assert all(layer.npt_plan.folds_in_training for layer in converted_layers(without).values())


def test_hooks_on_attention_and_projection_act():
    model = converted()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        for module in (projections(model)[0], converted_layers(model)[0].self_attn):
            steer = module.register_forward_hook(
                lambda _, __, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
            )
            assert float((model(input_ids=IDS).logits - before).abs().max()) > 1e-3
            steer.remove()
            assert torch.equal(model(input_ids=IDS).logits, before)


def test_lora_on_the_projection_acts_and_trains():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    model = converted()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    wrapped = peft.get_peft_model(model, lora)
    logits = wrapped(input_ids=IDS).logits
    assert float((logits - before).detach().abs().max()) > 1e-3
    logits.square().mean().backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_" in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():  # folded again, with the merged weight
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits.detach(), rtol=1e-3, atol=1e-4)


def test_follows_every_weight_it_is_made_of():
    model = converted("bias")
    model(input_ids=IDS)
    projection, component = projections(model)[0], converted_layers(model)[0].np_component
    with torch.no_grad():
        for tensor in (projection.weight, projection.bias, component.w_down, component.w_b_up["down"]):
            before = model(input_ids=IDS).logits
            tensor.mul_(1.5)
            changed = model(input_ids=IDS).logits
            assert not torch.equal(before, changed)
            assert torch.equal(changed, copy.deepcopy(model)(input_ids=IDS).logits)
            tensor.data.mul_(0.5)  # as PEFT merges: no version counts it
            if tensor is projection.weight or tensor is projection.bias:
                assert not torch.equal(model(input_ids=IDS).logits, changed)
            model.eval()
        projection.weight = nn.Parameter(projection.weight * 2, requires_grad=False)
        assert torch.equal(model(input_ids=IDS).logits, copy.deepcopy(model)(input_ids=IDS).logits)


def test_kept_while_nothing_changes_and_not_in_training():
    model = converted()
    component = converted_layers(model)[0].np_component
    with torch.no_grad():
        model(input_ids=IDS)
        kept = component.ready.folded
        assert kept is not None
        model(input_ids=IDS)
        assert component.ready.folded is kept
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # the long way keeps it too
        model(input_ids=IDS)
        assert component.ready is None and component._derived is not None
        handle.remove()
    model(input_ids=IDS)
    assert component.ready is None and component._derived is None


def test_original_is_the_original_beside_it():
    model = base()
    with torch.no_grad():
        original = model(input_ids=IDS).logits
        apply_npt(model, NPTConfig(layers="all", rank=8))
        randomise(model)
        served = model(input_ids=IDS).logits
        wrong = []

        def teach():
            with torch.no_grad(), npt_disabled(model):
                wrong.extend(1 for _ in range(40) if not torch.equal(model(input_ids=IDS).logits, original))

        thread = threading.Thread(target=teach)
        thread.start()
        wrong.extend(1 for _ in range(40) if not torch.equal(model(input_ids=IDS).logits, served))
        thread.join()
    assert not wrong


def test_attention_called_by_itself_returns_its_output():
    model = converted()
    layer = converted_layers(model)[0]
    seen = {}
    names = ("hidden_states",)
    handle = layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(zip(names, args, strict=True), **kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        handle.remove()
        with npt_disabled(model):
            wanted = layer.self_attn(**seen)[0]
        assert torch.equal(layer.self_attn(**seen)[0], wanted)


def test_copies_and_pickles_fold():
    model = converted()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(input_ids=IDS).logits, wanted)
            assert all(layer.npt_plan.projection for layer in converted_layers(twin).values())


def test_removed_bit_for_bit():
    model = base()
    before = snapshot(model)
    apply_npt(model, NPTConfig(layers="all", rank=8))
    remove_npt(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    model = converted()
    plain = run(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_alike(run(model), plain, 1e-5)


def test_compiled_whole():
    model = converted()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_decodes_as_it_reads():
    model = converted()
    with torch.no_grad():
        generated = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for length in range(IDS.shape[1], generated.shape[1]):
            following = model(input_ids=generated[:, :length]).logits[:, -1].argmax(-1)
            assert torch.equal(following, generated[:, length])


def test_saved_says_it_and_older_ones_are_not(tmp_path):
    model = converted()
    save_npt(model, tmp_path)
    fresh = base()
    load_npt(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    # As written before there was one.
    file, weights = tmp_path / "npt_config.json", tmp_path / "npt_model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        header = json.loads(opened.metadata()["npt_config"])
    del header["config"]["fold"]
    save_file(load_file(weights), weights, metadata={"npt_config": json.dumps(header)})
    file.write_text(json.dumps(header))
    load_npt(fresh, tmp_path)
    plans = [layer.npt_plan for layer in converted_layers(fresh).values()]
    assert not any(plan.fold or plan.projection for plan in plans)
    old = converted(fold=False)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, old(input_ids=IDS).logits)


def test_folded_and_back(tmp_path):
    """The same components; at full rank the change of the output is the attention's output, so both ways agree."""
    calibration = token_ids(4, 32)
    model = base(dtype=torch.float64)
    with torch.no_grad():
        original = model(input_ids=IDS).logits
    report = apply_npt(model, NPTConfig(layers="all", rank=1.0, fold=False), calibration=calibration)
    assert "not computed" not in str(report) and not report.converted[0].fold
    save_npt(model, tmp_path)
    for fold in (True, False, None):
        report = load_npt(model, tmp_path, fold=fold)
        assert ("o_proj of the attention is not computed (fold)" in str(report)) == bool(fold)
        assert all(layer.npt_plan.fold == bool(fold) for layer in converted_layers(model).values())
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, original, rtol=1e-5, atol=1e-6)
    save_npt(model, tmp_path / "again")
    for name in ("npt_model.safetensors",):
        first, again = load_file(tmp_path / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(first[key], again[key]) for key in first) and first.keys() == again.keys()
    one = converted(rule="self_key", targets=("gate",), fold=False)
    save_npt(one, tmp_path / "gate")
    before = [p.clone() for p in npt_parameters(model)]
    with pytest.raises(ValueError, match="fold=True"):
        load_npt(model, tmp_path / "gate", fold=True)
    assert all(torch.equal(a, b) for a, b in zip(npt_parameters(model), before, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fold": 1}, "fold=1 must be True, False or None"),
        ({"fold": True, "rule": "rank1", "norm_match": True}, "fold=True cannot match the norm under rule='rank1'"),
        ({"fold": True, "targets": ("gate", "up")}, "add it, or use fold=False"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        apply_npt(base(), NPTConfig(layers="all", rank=8, **settings))


def test_without_the_last_target_or_with_a_key_the_norm_is_that_of_the_attention():
    for settings in ({"targets": ("gate", "up")}, {"rule": "rank1", "norm_match": True}, {"fold": False}):
        plans = [layer.npt_plan for layer in converted_layers(converted(**settings)).values()]
        assert not any(plan.fold or plan.projection for plan in plans)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_where_nothing_below_trains_are_the_same(name):
    """There that of 1/ρ is taken behind the linears; the products of ``du`` are not formed."""
    model = converted(name, torch.float64)
    layer = converted_layers(model)[1]
    generator = torch.Generator().manual_seed(0)
    h, a, upstream = (torch.randn(2, 5, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    found = []
    for through in (True, False):
        given = h.clone().requires_grad_(through)
        with GemmMeter() as meter:
            y = layer.npt_student(given, a)
            grads = torch.autograd.grad(y, list(layer.np_component.parameters()), upstream)
        found.append((grads, len(meter.products)))
    (exact, all_products), (ours, products) = found
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7 * float(two.abs().max()))
    # LayerNorm's bias is no multiple of 1/ρ.
    assert all_products - products == (0 if name == "gpt2" else 2)


def test_few_tokens_in_training_are_cheaper_with_the_projection(monkeypatch):
    model = converted()
    calls = Calls(model, monkeypatch)
    model(input_ids=IDS)
    assert calls.count == 0
    model(input_ids=IDS[:1, :7])  # fewer than the rank
    assert calls.count == 2
