"""``npt_scale`` and ``layers=``: the strength of the weight changes, for some layers, for whoever is inside the block."""

from __future__ import annotations

import threading

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, npt_scale, remove_npt, save_npt
from npt_kernels.component import NPComponent
from npt_kernels.evaluation.fidelity import delta_norms
from npt_kernels.model.install import converted_layers
from npt_kernels.model.select import find_layers
from npt_kernels.model.visits import walk_layers
from tests.support.helpers import MODELS, assert_unchanged, randomise, snapshot, tiny_model, token_ids
from tests.support.tiny_families import build

IDS = token_ids()


def converted(name="llama", **settings):
    model = tiny_model(name)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8} | settings)))
    randomise(model, scale=0.3)
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


@torch.no_grad()
def logits_with_attention_times(model, factor, layers):
    """Of the original, with the attention output of some layers multiplied."""
    shapes = find_layers(model)[1]
    handles = []
    for index in layers:
        attention = next(m for n, m in shapes[index].named_children() if n in ("self_attn", "attn", "attention"))

        def hook(module, args, output):
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        handles.append(attention.register_forward_hook(hook))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi", "gpt_neox", "arcee"])
def test_an_exact_model_hears_that_much_of_its_attention(model_type, fold):
    original, model = build(model_type), build(model_type)
    apply_npt(model, NPTConfig(layers="all", rank=1.0, fold=fold), calibration=token_ids(16, 32, seed=5))
    full = logits(model)
    for scale in (0, 0.5, -1.0, 2.0):
        want = logits_with_attention_times(original, scale, (0, 1))
        with npt_scale(model, scale):
            got = logits(model)
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
        assert (got - full).abs().max() > 0.05 * full.abs().max(), "that is another model"
    want = logits_with_attention_times(original, 0.5, (1,))
    with npt_scale(model, 0.5, layers=[-1]):
        assert (logits(model) - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored", "self_key"])
def test_one_is_every_bit_and_a_half_is_half_of_the_change(name, rule):
    model = converted(name, rule=rule, num_ranks=2, rank=4)
    on = logits(model)
    with npt_scale(model, 1):
        assert torch.equal(logits(model), on)
        with torch.enable_grad():
            through_autograd = model(input_ids=IDS).logits
    assert torch.equal(through_autograd, model(input_ids=IDS).logits)
    component = converted_layers(model)[0].np_component
    a, targets = torch.randn(5, 32), component.target_shapes
    for target, (d_in, _) in targets.items():
        u = torch.randn(5, d_in)
        v_a, v_b = component.vectors(a, u, target)
        with npt_scale(model, 0.5):
            scaled = component.vectors(a, u, target)
        assert torch.equal(scaled[0], v_a) and torch.equal(scaled[1], 0.5 * v_b) and v_b.abs().max() > 0
    with npt_scale(model, 0.5), torch.no_grad():
        half = logits(model)
        values = {n: p.clone() for n, p in model.named_parameters() if ".w_b_up." in n}
    # The same as halved parameters, where the norm knows the change from them alone.
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in values:
                p.mul_(0.5)
    if converted_layers(model)[0].npt_plan.matches_change or rule != "self_key":
        torch.testing.assert_close(half, logits(model), rtol=1e-5, atol=1e-5)
    assert (half - on).abs().max() > 1e-2


def test_zero_is_the_original_only_beside_the_attention_residual():
    plain = logits(tiny_model("llama"))
    model = converted(attention_residual=True)
    with npt_scale(model, 0.0):
        torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    model = converted()
    with npt_scale(model, 0.0):
        assert (logits(model) - plain).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_are_those_of_the_scaled_model_also_when_recomputed_outside(checkpointing):
    """``checkpointing``: reentrant or not; the block ends, and another begins, before the backward."""
    model = converted()
    for parameter in npt_parameters(model):
        parameter.data = parameter.data.double()
    model.double().train()
    direction = {p: torch.randn_like(p) for p in npt_parameters(model)}

    def loss():
        return model(input_ids=IDS, use_cache=False).logits.square().mean()

    with npt_scale(model, 0.3), torch.no_grad():
        sides = []
        for step in (1e-3, -2e-3):
            for p, d in direction.items():
                p.add_(d, alpha=step)
            sides.append(float(loss()))
        for p, d in direction.items():
            p.add_(d, alpha=1e-3)
    slope = (sides[0] - sides[1]) / 2e-3
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with npt_scale(model, 0.3):
        value = loss()
    with npt_scale(model, 2.0):
        value.backward()
    found = sum(float((p.grad * d).sum()) for p, d in direction.items())
    assert abs(slope) > 1e-2 and abs(found - slope) < 1e-3 * abs(slope)


@torch.no_grad()
def test_the_last_block_holds_and_ends_in_any_order():
    model = converted()
    on = logits(model)
    with npt_scale(model, 0.5):
        half = logits(model)
    with npt_scale(model, 0.2), npt_scale(model, 0.5):
        assert torch.equal(logits(model), half)
    outer, inner, off = npt_scale(model, 0.5), npt_scale(model, 0.2), npt_disabled(model)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert not torch.equal(logits(model), half) and not torch.equal(logits(model), on)
    off.__enter__()
    assert torch.equal(logits(model), logits(tiny_model("llama").requires_grad_(False)))
    inner.__exit__(None, None, None)
    off.__exit__(None, None, None)
    assert torch.equal(logits(model), on)


@torch.no_grad()
def test_other_threads_other_models_and_files_know_nothing_of_it(tmp_path):
    model, other = converted(), converted()
    on, files = logits(model), save_npt(model, tmp_path / "before")
    seen = []
    with npt_scale(model, 0.5):
        thread = threading.Thread(target=lambda: seen.append(logits(model)))
        thread.start()
        thread.join()
        assert torch.equal(logits(other), on)
        inside = save_npt(model, tmp_path / "inside")
    assert torch.equal(seen[0], on)
    name = "npt_model.safetensors"
    assert (inside / name).read_bytes() == (files / name).read_bytes()


@torch.no_grad()
def test_some_layers_only():
    model, plain = converted(), tiny_model("llama")
    original = logits(plain)
    on = logits(model)
    with npt_disabled(model, layers="all"):
        assert torch.equal(logits(model), original)
    with npt_disabled(model, layers=[0, 1]), npt_disabled(model, layers="2:"):
        assert torch.equal(logits(model), original)
    with npt_disabled(model, layers=[2]):
        part = logits(model)
        assert [layer.np_component.enabled for layer in converted_layers(model).values()] == [True, True, False, True]
    layer = converted_layers(model)[2].np_component
    layer.enabled = False
    assert torch.equal(logits(model), part) and not torch.equal(part, on)
    layer.enabled = True
    with npt_scale(model, 0.5, layers=[1]):
        assert [layer.np_component.strength for layer in converted_layers(model).values()] == [1.0, 0.5, 1.0, 1.0]
    assert torch.equal(logits(model), on)


@torch.no_grad()
def test_what_is_measured_is_the_scaled_change():
    model = converted(rule="rank1")
    seen = {}

    def visit(layer, h, a, y):
        with npt_scale(model, 1.0):
            seen["full"] = delta_norms(layer, h.flatten(0, 1), a.flatten(0, 1))
        with npt_scale(model, 0.25):
            seen["quarter"] = delta_norms(layer, h.flatten(0, 1), a.flatten(0, 1))

    walk_layers(model, IDS, visit)
    for target, norms in seen["full"].items():
        torch.testing.assert_close(seen["quarter"][target], norms / 4, rtol=1e-5, atol=0)
        assert norms.min() > 0


@torch.no_grad()
def test_what_was_kept_for_decoding_is_not_taken_for_another_strength():
    """Between two calls the strength, or a parameter, is another; then the first again."""
    model = converted().eval()
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def written(scale):
        with npt_scale(model, scale):
            return torch.stack(model.generate(IDS, **settings).logits)

    first = {scale: written(scale) for scale in (1.0, 0.5, 2.0)}
    for scale in (2.0, 1.0, 0.5, 1.0):
        assert torch.equal(written(scale), first[scale])
    assert not torch.equal(first[0.5], first[1.0])
    with npt_scale(model, 0.5):
        before = logits(model)
        npt_parameters(model)[-1].mul_(3.0)
        assert not torch.equal(logits(model), before)


def test_compiled_without_a_break_and_without_the_wrong_strength():
    model = tiny_model("llama", layers=2)
    apply_npt(model, NPTConfig(layers="all", rank=8))
    randomise(model, scale=0.3)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager", fullgraph=True)
    for scale in (1.0, 0.5, 0.25, 1.0, 0.0):
        with npt_scale(model, scale):
            want = logits(model, use_cache=False)
            torch.testing.assert_close(compiled(IDS), want, rtol=1e-5, atol=1e-5)
    with npt_disabled(model, layers=[1]):
        torch.testing.assert_close(compiled(IDS), logits(model, use_cache=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": "0.5"}, TypeError, r"scale='0\.5' must be a number, such as 0\.5"),
        ({"scale": True}, TypeError, "scale=True must be a number"),
        ({"scale": float("nan")}, ValueError, "scale=nan must be finite"),
        ({"scale": 0.5, "layers": [0]}, ValueError, r"layers=\[0\]: layer 0 is not converted; converted are 2, 3"),
        ({"scale": 0.5, "layers": "lower_half"}, ValueError, "layers='lower_half': layer 0 is not converted"),
        ({"scale": 0.5, "layers": [9]}, ValueError, r"layers contains 9, but the model has 4 layers \(0 … 3\)"),
        ({"scale": 0.5, "layers": "some"}, ValueError, "layers='some' is not understood"),
        ({"scale": 0.5, "layers": 2}, TypeError, r"layers=2 must be a list of indices .*use \[2\]"),
    ],
)
def test_what_cannot_be_asked_for(arguments, error, message):
    model = converted(layers="upper_half")
    with pytest.raises(error, match=message):
        with npt_scale(model, **arguments):
            pass
    with npt_scale(model, 0.5, layers="all"):
        assert [layer.np_component.strength for layer in converted_layers(model).values()] == [0.5, 0.5]


def test_a_model_without_npt_and_what_is_left_behind():
    model = tiny_model("llama")
    for block in (lambda: npt_scale(model, 0.5), lambda: npt_disabled(model)):
        with pytest.raises(ValueError, match="has no NPT layers"):
            with block():
                pass
    before = snapshot(model)
    apply_npt(model, NPTConfig(layers="all", rank=4))
    with npt_scale(model, 0.5):
        remove_npt(model)
        assert_unchanged(model, before)
    assert NPComponent(8, {"down": (8, 8)}, rank=2).strength == 1.0
