"""Walking a group of batches layer by layer: what each layer meets is what the model's own forward gives it, bit for bit."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled
from npt_kernels.model.install import converted_layers
from npt_kernels.model.select import find_layers
from npt_kernels.model.visits import walk_group, walk_layers
from npt_kernels.model.weight_location import compute_device, resident, set_residence
from tests.support.helpers import tiny_model, token_ids

SLIDING = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=4,
               use_sliding_window=True, attn_implementation="eager")  # fmt: skip


def converted(family, layers="all", **overrides):
    model = tiny_model(family, layers=3, **overrides)
    apply_npt(model, NPTConfig(layers=layers, rank=4, init="small"))
    return model


def met_by_walk_layers(model, batches):
    met = []
    for position, ids in enumerate(batches):
        walk_layers(model, ids, lambda layer, *t, p=position: met.append((p, layer.npt_plan.index, t)))
    return sorted(met, key=lambda entry: (entry[1], entry[0]))


def met_by_walk_group(model, batches):
    met = []
    walk_group(model, batches, lambda position, layer, *t: met.append((position, layer.npt_plan.index, t)))
    return met


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("gpt2", {}), ("mistral", {}), ("qwen2", SLIDING), ("llama", {"attn_implementation": "eager"})],
)
def test_group_meets_what_the_model_computes(family, overrides):
    model = converted(family, layers=[0, 2], **overrides)
    batches = [token_ids(2, 12), token_ids(2, 12, seed=3), token_ids(1, 7, seed=4), token_ids(2, 7, seed=5)]
    expected, actual = met_by_walk_layers(model, batches), met_by_walk_group(model, batches)
    assert [entry[:2] for entry in actual] == [(p, layer) for layer in (0, 2) for p in range(4)]
    for (p, layer, got), (q, other, wanted) in zip(actual, expected, strict=True):
        assert (p, layer) == (q, other)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_layers_may_have_different_masks():
    """With a window of 4 the result differs from full attention, so the sliding masks above were really used."""
    ids = [token_ids(1, 12)]
    full = SLIDING | {"layer_types": ["full_attention"] * 3}
    windowed, plain = (met_by_walk_group(converted("qwen2", **o), ids)[0][2][1] for o in (SLIDING, full))
    assert torch.equal(windowed[:, :4], plain[:, :4]) and not torch.allclose(windowed[:, 6:], plain[:, 6:])


def test_masks_that_depend_on_the_tokens_stay_with_their_batch():
    """Positions that start anew inside a sequence make transformers mask across that border: one text per batch."""
    model = converted("llama")

    def restart(module, args, kwargs):
        positions = torch.arange(12).expand_as(kwargs["input_ids"])
        border = int(kwargs["input_ids"][0, 0]) % 6 + 2
        return args, kwargs | {"position_ids": torch.where(positions < border, positions, positions - border)}

    model.model.register_forward_pre_hook(restart, with_kwargs=True)
    batches = [token_ids(1, 12, seed=s) for s in range(8)]
    assert len({int(ids[0, 0]) % 6 for ids in batches}) > 2
    for got, wanted in zip(met_by_walk_group(model, batches), met_by_walk_layers(model, batches), strict=True):
        assert got[:2] == wanted[:2] and all(torch.equal(a, b) for a, b in zip(got[2], wanted[2], strict=True))


def test_stops_behind_the_last_converted_layer_and_runs_the_others_once():
    model = converted("llama", layers=[1])
    layers = find_layers(model)[1]
    counts = [0, 0, 0, 0, 0]

    def count(position):
        def hook(*_):
            counts[position] += 1

        return hook

    for position, module in enumerate([*layers, model.lm_head, model.model.embed_tokens]):
        module.register_forward_hook(count(position))
    walk_group(model, [token_ids(), token_ids(seed=2)], lambda *_: None)
    assert counts == [2, 2, 0, 0, 2]


def test_masks_are_held_once_for_equal_shapes():
    model = converted("llama", attn_implementation="eager")
    masks = []

    def note(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    for layer in find_layers(model)[1]:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    walk_group(model, [*(token_ids(seed=s) for s in range(4)), token_ids(1, 5)], lambda *_: None)
    assert len(masks) == 15 and all(mask is not None for mask in masks)
    assert len({id(mask) for mask in masks}) == 2


def test_model_that_works_between_its_layers_is_walked_by_its_own_forward():
    model = converted("llama")
    decoder = model.model

    def forward(input_ids, **_):
        h = decoder.embed_tokens(input_ids)
        positions = torch.arange(h.shape[1]).unsqueeze(0)
        rotary = decoder.rotary_emb(h, positions)
        for layer in decoder.layers:
            h = layer(h * 1.5, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return decoder.norm(h)

    decoder.forward = forward
    batches = [token_ids(), token_ids(seed=2)]
    actual = sorted(met_by_walk_group(model, batches), key=lambda entry: (entry[1], entry[0]))
    expected = met_by_walk_layers(model, batches)
    assert len(actual) == 6
    for got, wanted in zip(actual, expected, strict=True):
        assert got[:2] == wanted[:2] and all(torch.equal(a, b) for a, b in zip(got[2], wanted[2], strict=True))


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = converted("llama")
    layers = list(find_layers(model)[1])

    def fail(position, layer, *_):
        if (position, layer.npt_plan.index) == (1, 1):
            raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        walk_group(model, [token_ids(), token_ids(seed=2)], fail)
    assert all(a is b for a, b in zip(find_layers(model)[1], layers, strict=True))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(layer.np_component.enabled for layer in converted_layers(model).values())
    model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        walk_group(model, [token_ids()], lambda *_: None)
    assert all(a is b for a, b in zip(find_layers(model)[1], layers, strict=True))


def test_no_batches_is_no_work_and_unconverted_models_are_refused():
    walk_group(converted("llama"), [], lambda *_: pytest.fail("nothing to visit"))
    with pytest.raises(ValueError, match="apply_npt"):
        walk_group(tiny_model("llama"), [token_ids()], lambda *_: None)


def test_the_group_visits_every_layer_inside_its_residence():
    model = converted("llama", layers=[1])
    log = []

    class Mover:
        device = torch.device("meta")

        @contextmanager
        def hold(self, layer):
            log.append(("in", layer))
            yield
            log.append(("out", layer))

    layers = find_layers(model)[1]
    assert compute_device(layers[0]) == torch.device("cpu")
    for layer in layers:
        set_residence(layer, Mover())
    assert compute_device(layers[0]) == torch.device("meta")
    walk_group(model, [token_ids(), token_ids(seed=2)], lambda position, layer, *_: log.append(position))
    expected = [("in", layers[0]), ("out", layers[0]), ("in", layers[1]), 0, 1, ("out", layers[1])]
    assert log == expected
    with pytest.raises(RuntimeError, match="already moved"):
        set_residence(layers[0], Mover())
    set_residence(layers[0], None)
    with resident(layers[0]):
        assert len(log) == len(expected)


def test_group_and_original_agree_with_hidden_states_of_the_model():
    model = converted("llama")
    ids = token_ids()
    with torch.no_grad(), npt_disabled(model):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    met = met_by_walk_group(model, [ids])
    assert all(torch.equal(t[0], hidden[index]) for _, index, t in met)
