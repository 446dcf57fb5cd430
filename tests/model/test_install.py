"""Conversion of real (tiny, random) models: in place, on the instance, undone bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, remove_npt
from npt_kernels.config import resolve_layers
from npt_kernels.model.norms import matched_norm
from tests.support.helpers import MODELS, assert_unchanged, randomise, snapshot, tiny_model, token_ids

IDS = token_ids()
models = pytest.mark.parametrize("name", MODELS)
ALL = NPTConfig(layers="all", rank=8)


def converted(name="llama", config=ALL, **kwargs):
    model = tiny_model(name, **kwargs)
    report = apply_npt(model, config)
    randomise(model)
    return model, report


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@models
@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored", "self_key"])
def test_disabled_and_removed_are_bitwise_the_original(name, rule):
    model = tiny_model(name)
    before, original = snapshot(model), logits(model)
    report = apply_npt(model, NPTConfig(layers="all", rank=4, num_ranks=2, rule=rule))
    randomise(model)
    changed = logits(model)
    assert (changed - original).abs().max() > 1e-2, "conversion does something"
    with npt_disabled(model):
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), changed)
    assert report.layers == (0, 1, 2, 3)
    remove_npt(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), original)


@models
def test_layer_computes_the_definition(name):
    """h + MLP_Δ(u; a) written out with plain modules and explicit ΔW."""
    model, _ = converted(name, NPTConfig(layers=[1], rank=4, rule="rank1", num_ranks=2, norm_match=True))
    layer = (model.transformer.h if name == "gpt2" else model.model.layers)[1]
    seen = {}
    layer.register_forward_hook(lambda m, args, out: seen.update(h=args[0], out=out))
    attention = layer.attn if name == "gpt2" else layer.self_attn
    attention.register_forward_hook(lambda m, args, out: seen.update(a=out[0] if isinstance(out, tuple) else out))
    logits(model)
    h, a = (seen[n].flatten(0, 1).double() for n in ("h", "a"))
    norm, mlp = (layer.ln_2 if name == "gpt2" else layer.post_attention_layernorm), layer.mlp
    u, key_scale = matched_norm(norm, "layer" if name == "gpt2" else "rms", h, a)
    z = a @ layer.np_component.w_down.double()

    def target(slot, linear, x, bottleneck):
        weight = (linear.weight.t() if name == "gpt2" else linear.weight).double()
        key, value = (getattr(layer.np_component, p)[slot].double() for p in ("w_a_up", "w_b_up"))
        out = x @ weight.t() + (0 if linear.bias is None else linear.bias.double())
        for j in range(2):
            block = slice(4 * j, 4 * j + 4)
            v_a, v_b = bottleneck[:, block] @ key[block], bottleneck[:, block] @ value[block]
            out = out + v_b * (v_a * x).sum(-1, keepdim=True)
        return out

    scaled = z * key_scale.unsqueeze(-1)
    if name == "gpt2":
        expected = h + target("c_proj", mlp.c_proj, mlp.act(target("c_fc", mlp.c_fc, u, scaled)), z)
    else:
        inter = mlp.act_fn(target("gate", mlp.gate_proj, u, scaled)) * target("up", mlp.up_proj, u, scaled)
        expected = h + target("down", mlp.down_proj, inter, z)
    torch.testing.assert_close(seen["out"].flatten(0, 1).double(), expected, rtol=2e-5, atol=2e-5)


def test_report():
    model, report = converted(
        "llama", NPTConfig(layers="upper_half", rank=[4, 8], targets=("gate", "down"), rule="anchored")
    )
    assert report.layers == (2, 3) and report.num_layers == 4 and report.skipped == {} and report.calibration == {}
    first, second = report.converted
    assert (first.index, first.shape, first.rule, first.rank, first.targets) == (
        2,
        "llama-like",
        "anchored",
        4,
        ("gate", "down"),
    )
    assert second.rank == 8
    assert report.parameters == sum(p.numel() for p in npt_parameters(model)) == first.parameters + second.parameters
    assert report.base_parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    text = str(report)
    assert "converted 2 of 4 llama-like layers: 2-3" in text and "rank 4 to 8, mean 6.0" in text
    assert f"{report.parameters:,} trainable" in text


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3]), ("upper_half", [2, 3]), ("lower_half", [0, 1]), ([0, 3], [0, 3]), ([-1], [3]), ((3, 1), [1, 3]),
        ("1:3", [1, 2]), ("2:", [2, 3]), (":1", [0]), ("-2:", [2, 3]), ("0,2", [0, 2]), ("3", [3]), (range(2), [0, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_layer_selection(layers, expected):
    assert resolve_layers(NPTConfig(layers=layers, rank=8).layers, 4) == expected
    model, report = converted("gpt2", NPTConfig(layers=layers, rank=8))
    assert list(report.layers) == expected
    assert [hasattr(layer, "np_component") for layer in model.transformer.h] == [i in expected for i in range(4)]


@pytest.mark.parametrize(("rank", "expected"), [(8, 8), ("8", 8), (0.5, 16), (1.0, 32), (0.25, 8), (0.01, 1)], ids=str)
def test_rank_forms(rank, expected):
    _, report = converted("llama", NPTConfig(layers=[0], rank=rank))
    assert report.converted[0].rank == expected


def test_odd_number_of_layers_halves():
    assert resolve_layers("upper_half", 5) == [2, 3, 4] and resolve_layers("lower_half", 5) == [0, 1]


@models
def test_other_instances_and_the_class_are_left_alone(name):
    model, other = tiny_model(name), tiny_model(name)
    before, original = snapshot(other), logits(other)
    layer = (other.transformer.h if name == "gpt2" else other.model.layers)[0]
    forward = type(layer).forward
    apply_npt(model, ALL)
    randomise(model)
    mine = (model.transformer.h if name == "gpt2" else model.model.layers)[0]
    assert type(layer).forward is forward
    assert isinstance(mine, type(layer)) and type(mine) is not type(layer)
    assert type(mine).__name__ == type(layer).__name__, "_no_split_modules goes by the name"
    assert_unchanged(other, before)
    assert torch.equal(logits(other), original)
    fresh = tiny_model(name)
    assert torch.equal(logits(fresh), original), "a model made later is the plain one"


@models
def test_generate_with_cache_equals_without(name):
    model, _ = converted(name)
    kwargs = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS, use_cache=True, **kwargs)
    without = model.generate(IDS, use_cache=False, **kwargs)
    assert with_cache.shape == (2, 22)
    assert torch.equal(with_cache, without)


@models
def test_step_by_step_logits_equal_one_pass(name):
    model, _ = converted(name)
    full = logits(model)
    cache, steps = None, []
    with torch.no_grad():
        for i in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


@models
def test_padding_does_not_change_a_row(name):
    model, _ = converted(name)
    short = IDS[:1, :8]
    alone = logits(model, short)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    batch = torch.cat([padded, IDS[1:]])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[:1, 4:], alone, rtol=1e-4, atol=1e-5)
    out = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    single = model.generate(
        short, attention_mask=torch.ones_like(short), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(out[0, -5:], single[0, -5:])


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad for p in npt_parameters(model)]


@models
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    """All gradients are there (the first layer's too) and equal those without checkpointing."""
    kwargs = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    model, _ = converted(name, NPTConfig(layers="all", rank=4, rule="rank1"), **kwargs)
    model.train()
    want = [g.clone() for g in gradients(model)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model)
    for g, w in zip(got, want, strict=True):
        assert g is not None and g.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for n, p in model.named_parameters() if "np_component" not in n)


def test_only_np_parameters_train_and_flags_come_back():
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = snapshot(model)
    apply_npt(model, ALL)
    mine = {id(p) for p in npt_parameters(model)}
    assert mine == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(npt_parameters(model)) == 4 * 4
    remove_npt(model)
    assert_unchanged(model, before)


def test_conversion_of_a_submodule_is_undone_from_above():
    model = tiny_model("llama")
    before = snapshot(model)
    apply_npt(model.model, ALL)
    assert len(npt_parameters(model)) == 16
    remove_npt(model)
    assert_unchanged(model, before)


def test_nested_disabled_and_exceptions():
    model, _ = converted()
    on = logits(model)
    with npt_disabled(model) as same:
        assert same is model
        off = logits(model)
        with npt_disabled(model):
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off), "still disabled after the inner block"
    assert torch.equal(logits(model), on)
    with pytest.raises(KeyError), npt_disabled(model):
        raise KeyError
    assert torch.equal(logits(model), on)
    assert not torch.equal(on, off)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copies(name, way):
    model, _ = converted(name)
    want = logits(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(twin), want)
    with torch.no_grad():
        npt_parameters(twin)[0].add_(1)
    assert torch.equal(logits(model), want), "the copy shares nothing"
    remove_npt(twin)
    remove_npt(model)
    assert torch.equal(logits(twin), logits(model))


def test_state_dict():
    model, _ = converted()
    other = tiny_model("llama", seed=5)
    plain_keys = set(other.state_dict())
    apply_npt(other, ALL)
    state = model.state_dict()
    assert plain_keys < set(state)
    assert {k for k in set(state) - plain_keys if ".np_component." not in k} == set()
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_seed_and_inits():
    def start(**kwargs):
        model = tiny_model("llama")
        apply_npt(model, NPTConfig(layers="all", rank=4, rule="rank1", **kwargs))
        return [p.detach().clone() for p in npt_parameters(model)], logits(model)

    small, same, other = start(seed=1), start(seed=1), start(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(small[0], same[0], strict=True))
    assert not torch.equal(small[0][0], other[0][0])
    assert torch.equal(small[1], other[1]), "small: ΔW = 0, so the start does not depend on the seed"
    published = start(init="published")
    stds = [float(p.std()) for p in published[0]]
    assert all(0.005 < s < 0.015 for s in stds)
    assert not torch.equal(published[1], small[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_dtypes(name, dtype):
    model = tiny_model(name).to(dtype)
    apply_npt(model, ALL)
    randomise(model)
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in npt_parameters(model))
    out = model(input_ids=IDS, use_cache=False).logits
    assert out.dtype == dtype and out.isfinite().all()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.abs().max() > 0 for p in npt_parameters(model))


def test_autocast():
    model, _ = converted()
    want = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in npt_parameters(model))
    assert (out.logits.float() - want).abs().max() < 0.05 * want.abs().max()


# ----------------------------------------------------------------------------------------------- accelerate


def test_accelerate_prepare():
    """Prepared and wrapped, forward and backward run (no recursion) and are what they were."""
    from accelerate import Accelerator

    model, _ = converted()
    want = logits(model)
    grads = [g.clone() for g in gradients(model)]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared, _ = accelerator.prepare(prepared, optimizer)  # a second time, as careless scripts do
    assert torch.equal(logits(prepared), want)
    prepared.zero_grad()
    loss = prepared(input_ids=IDS, labels=IDS, use_cache=False).loss
    accelerator.backward(loss)
    bare = accelerator.unwrap_model(prepared)
    for p, g in zip(npt_parameters(bare), grads, strict=True):
        torch.testing.assert_close(p.grad, g)
    optimizer.step()
    assert not torch.equal(logits(prepared), want)


def hooked_model():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            type(self).calls += 1
            return args, kwargs

    model = tiny_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer, Counting())
    return model, Counting


def test_hooks_of_accelerate_survive_conversion_and_removal():
    plain, _ = converted()
    want, original = logits(plain), logits(tiny_model("llama"))
    model, hook = hooked_model()
    apply_npt(model, ALL)
    randomise(model)
    hook.calls = 0  # the conversion tried a layer
    assert torch.equal(logits(model), want), "the hooked layer runs the converted forward"
    assert hook.calls == 4
    remove_npt(model)
    assert torch.equal(logits(model), original)
    assert hook.calls == 8


def test_hooks_added_after_conversion():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, _ = converted()
    want, original = logits(model), logits(tiny_model("llama"))
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    assert torch.equal(logits(model), want)
    for layer in model.model.layers:
        remove_hook_from_module(layer)
    assert torch.equal(logits(model), want)
    remove_npt(model)
    assert torch.equal(logits(model), original)


def test_hooks_removed_between_conversion_and_removal():
    from accelerate.hooks import remove_hook_from_module

    original = logits(tiny_model("llama"))
    model, _ = hooked_model()
    apply_npt(model, ALL)
    for layer in model.model.layers:
        remove_hook_from_module(layer)
    remove_npt(model)
    assert torch.equal(logits(model), original)


def test_model_whose_hooks_were_removed_can_be_converted():
    from accelerate.hooks import remove_hook_from_module

    plain, _ = converted()
    model, _ = hooked_model()
    for layer in model.model.layers:
        remove_hook_from_module(layer)
    apply_npt(model, ALL)
    randomise(model)
    assert torch.equal(logits(model), logits(plain))


def test_dispatched_model():
    from accelerate import dispatch_model

    plain, _ = converted()
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = dispatch_model(tiny_model("llama"), device_map, force_hooks=True)
    apply_npt(model, ALL)
    randomise(model)
    assert torch.equal(logits(model), logits(plain))


def test_a_forward_replaced_by_another_library_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[3]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 3 .*replaced forward on this instance"):
        apply_npt(model, NPTConfig(layers=[3], rank=8))
    assert_unchanged(model, before)


def test_a_part_of_the_converted_model_is_not_undone_alone():
    """Half an undo would leave the base frozen and the rest believing it is converted."""
    model = tiny_model("llama")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_npt(model, NPTConfig(layers="all", rank=4))
    with pytest.raises(ValueError, match="is a part of the model that was converted"):
        remove_npt(model.model)
    assert len(npt_parameters(model)) > 0
    remove_npt(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_layers_that_are_one_module_are_refused():
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers 0 and 1 are one module"):
        apply_npt(model, ALL)
    assert_unchanged(model, before)


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, failing):
    from npt_kernels.model import install as install_module

    model = tiny_model("llama")
    before, original = snapshot(model), logits(model)
    real, count = install_module.convert_layer, iter(range(9))

    def convert(layer, plan, component):
        if next(count) == failing:
            raise MemoryError("no more")
        real(layer, plan, component)

    monkeypatch.setattr(install_module, "convert_layer", convert)
    with pytest.raises(MemoryError, match="no more"):
        apply_npt(model, ALL)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), original)
    monkeypatch.undo()
    apply_npt(model, ALL)
    remove_npt(model)
    assert_unchanged(model, before)
