"""Without gradients a layer keeps what it found out about itself: the same bits as the long way, nothing kept when it moved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, remove_npt
from npt_kernels.model import layer as layer_module
from npt_kernels.model.install import converted_layers
from npt_kernels.ops import registry
from tests.support.helpers import ALL_RULES, randomise, tiny_model, token_ids

IDS = token_ids()


def converted(name="llama", dtype=torch.float32, masters=None, **settings):
    model = tiny_model(name, layers=2).to(dtype)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8, "init": "small"} | settings)))
    randomise(model)
    if masters is not None:
        for layer in converted_layers(model).values():
            layer.np_component.to(masters)
    return model


def first(model):
    return next(iter(converted_layers(model).values()))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


@pytest.fixture
def the_long_way(monkeypatch):
    def run(model, ids=IDS):
        with monkeypatch.context() as patch:
            patch.setattr(layer_module, "ready_half", lambda *_: None)
            return logits(model, ids)

    return run


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(("fold", "norm_match"), [(None, None), (False, None), (None, False)])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_same_bits(name, rule, fold, norm_match, length, the_long_way):
    model, ids = converted(name, rule=rule, fold=fold, norm_match=norm_match), token_ids(2, length)
    expected = the_long_way(model, ids)
    assert first(model).np_component.ready is None
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
    assert first(model).np_component.ready is not None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "masters"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_same_bits_in_half_precision(name, dtype, masters, the_long_way):
    model = converted(name, dtype, masters)
    expected = the_long_way(model)
    logits(model)
    assert torch.equal(logits(model), expected)
    assert first(model).np_component.ready.casts == (masters != dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generated_text_is_that_of_the_long_way(name, monkeypatch):
    model = converted(name)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(IDS, **settings)
    monkeypatch.setattr(layer_module, "ready_half", lambda *_: None)
    assert torch.equal(ours, model.generate(IDS, **settings))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def scaled(plain):
    made = Scaled(plain.in_features, plain.out_features, bias=plain.bias is not None)
    made.load_state_dict(plain.state_dict())
    return made.requires_grad_(False)


def _move(what):
    """Something done to a llama-like layer after a call."""

    def doubled(module):
        module.register_forward_hook(lambda module, args, out: 2 * out)

    def shadow(module):
        plain = module.forward
        module.forward = lambda x: 2 * plain(x)

    moves = {
        "hook on a linear": lambda layer: doubled(layer.mlp.gate_proj),
        "pre-hook on a linear": lambda layer: layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        "hook on the mlp": lambda layer: doubled(layer.mlp),
        "hook on the norm": lambda layer: doubled(layer.post_attention_layernorm),
        "hook on the activation": lambda layer: doubled(layer.mlp.act_fn),
        "hook on the output projection": lambda layer: doubled(layer.self_attn.o_proj),
        "hook on the attention": lambda layer: layer.self_attn.register_forward_hook(
            lambda module, args, out: (2 * out[0], *out[1:])
        ),
        "another linear": lambda layer: setattr(layer.mlp, "up_proj", scaled(layer.mlp.up_proj)),
        "another output projection": lambda layer: setattr(layer.self_attn, "o_proj", scaled(layer.self_attn.o_proj)),
        "another forward of a linear": lambda layer: shadow(layer.mlp.down_proj),
        "another forward of the norm": lambda layer: shadow(layer.post_attention_layernorm),
        "another weight": lambda layer: setattr(
            layer.mlp.gate_proj, "weight", nn.Parameter(2 * layer.mlp.gate_proj.weight, requires_grad=False)
        ),
        "a bias": lambda layer: setattr(
            layer.mlp.gate_proj, "bias", nn.Parameter(torch.ones(layer.mlp.gate_proj.out_features), requires_grad=False)
        ),
        "a weight in place": lambda layer: layer.mlp.gate_proj.weight.mul_(2),
        "a weight's data": lambda layer: layer.mlp.gate_proj.weight.data.mul_(2),
        "the output projection in place": lambda layer: layer.self_attn.o_proj.weight.mul_(2),
        "the output projection's data": lambda layer: layer.self_attn.o_proj.weight.data.mul_(2),
        "the output projection's data, another": lambda layer: setattr(
            layer.self_attn.o_proj.weight, "data", 2 * layer.self_attn.o_proj.weight.data
        ),
        "the norm's weight": lambda layer: layer.post_attention_layernorm.weight.mul_(2),
        "the norm's epsilon": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 1.0),
        "the component": lambda layer: [p.mul_(2) for p in layer.np_component.parameters()],
        "another value of the component": lambda layer: layer.np_component.w_b_up.__setitem__(
            "up", nn.Parameter(2 * layer.np_component.w_b_up["up"])
        ),
        "the component switched off": lambda layer: setattr(layer.np_component, "enabled", False),
        "the student": lambda layer: setattr(layer, "npt_student", lambda h, a: h + a),
    }  # fmt: skip
    return moves if what is None else moves[what]


@pytest.mark.parametrize("fold", [None, False])
@pytest.mark.parametrize("what", _move(None))
def test_what_moves_is_seen(what, fold, the_long_way):
    model = converted(fold=fold)
    for p in npt_parameters(model):
        p.requires_grad_(False)
    before = logits(model)
    logits(model)
    with torch.no_grad():
        _move(what)(first(model))
    expected = the_long_way(model)
    assert not torch.equal(expected, before)
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_casts_follow_the_masters(the_long_way):
    model = converted(dtype=torch.bfloat16, masters=torch.float32)
    before = logits(model)
    optimizer = torch.optim.SGD(npt_parameters(model), lr=0.5)
    for _ in range(2):
        model(input_ids=IDS).logits.float().square().mean().backward()
        optimizer.step()
        assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), the_long_way(model))


def test_other_calls_go_the_long_way(the_long_way, monkeypatch):
    model = converted()
    plain = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), the_long_way(model))
        assert not torch.equal(logits(model), plain)
    seen = []
    handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    logits(model)
    handle.remove()
    assert seen.count("LlamaMLP") == 2
    monkeypatch.setattr(registry, "_DEFAULT_BACKEND", "no such backend")
    with pytest.raises(registry.BackendUnavailableError, match="no such backend"):
        logits(model)
    monkeypatch.undo()
    assert torch.equal(logits(model), plain)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    assert torch.equal(logits(model), plain)
    grown = model(input_ids=IDS).logits
    assert grown.requires_grad


def test_whoever_is_inside_sees_the_original():
    model = tiny_model("llama", layers=2)
    original = logits(model)
    apply_npt(model, NPTConfig(layers="all", rank=8, init="small"))
    randomise(model)
    changed = logits(model)
    with npt_disabled(model):
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), changed)
    remove_npt(model)
    assert torch.equal(logits(model), original)


def test_copies_keep_nothing_of_the_first(the_long_way):
    model = converted()
    before = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert first(twin).np_component.ready is None
        with torch.no_grad():
            first(twin).mlp.gate_proj.weight.mul_(2)
        assert torch.equal(logits(twin), the_long_way(twin))
        assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)
