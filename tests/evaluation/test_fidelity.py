"""‖ΔW‖ over tokens: its distribution, on tokens spread over the whole text. Explained variance is tested with perplexity."""

from __future__ import annotations

import json

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.evaluation import fidelity
from npt_kernels.evaluation.fidelity import NormStatistics, delta_norms, layer_fidelity
from npt_kernels.model.install import converted_layers
from npt_kernels.model.visits import walk_layers
from tests.support.helpers import randomise, tiny_model, token_ids


def converted(family="llama", **settings):
    model = tiny_model(family, layers=3)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 8, "init": "small"} | settings)))
    randomise(model)
    return model


def test_statistics_of_known_numbers():
    found = NormStatistics.of(torch.arange(101.0).flip(0), 50.0)
    assert (found.tokens, found.mean, found.p50, found.p95, found.max) == (101, 50.0, 50.0, 95.0, 100.0)
    assert found.relative == {"mean": 1.0, "p50": 1.0, "p95": 1.9, "max": 2.0}
    one = NormStatistics.of(torch.tensor([3.0]), 2.0)
    assert one.mean == one.p50 == one.p95 == one.max == 3.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_of_every_token_of_every_batch(family):
    model, tokens = converted(family), token_ids(5, 8)
    expected: dict[int, dict[str, torch.Tensor]] = {}

    def visit(layer, h, a, y):
        expected[layer.npt_plan.index] = delta_norms(layer, h.flatten(0, 1), a.flatten(0, 1))

    walk_layers(model, tokens, visit)
    done: list[int] = []
    entries = layer_fidelity(model, tokens, norm_tokens=1000, batch_tokens=16, advance=done.append)
    assert done == [16, 16, 8]
    for entry in entries:
        assert list(entry.delta_statistics) == list(expected[entry.index])
        for target, found in entry.delta_statistics.items():
            whole = expected[entry.index][target]
            assert found.tokens == 40
            assert found.max == pytest.approx(float(whole.max()), rel=1e-5)
            assert found.mean == entry.delta_norm[target] == pytest.approx(float(whole.mean()), rel=1e-5)
            assert found.p50 == pytest.approx(float(whole.sort().values[19]), rel=1e-5)
            assert found.p95 == pytest.approx(float(whole.sort().values[38]), rel=1e-5)
            weight = fidelity._weight(converted_layers(model)[entry.index], target).norm()
            assert found.relative["max"] == pytest.approx(found.max / float(weight), rel=1e-5)
    text = json.dumps([entry.to_dict() for entry in entries])
    assert [fidelity.LayerFidelity.from_dict(entry) for entry in json.loads(text)] == entries
    assert json.loads(text)[0]["delta_statistics"][next(iter(expected[0]))]["p95"] > 0


def test_fewer_tokens_are_spread_over_the_text(monkeypatch):
    model, tokens = converted(), token_ids(6, 10)
    seen: list[torch.Tensor] = []
    original = fidelity.delta_norms

    def spy(layer, h, a):
        if layer.npt_plan.index == 0:
            seen.append(h)
        return original(layer, h, a)

    monkeypatch.setattr(fidelity, "delta_norms", spy)
    entries = layer_fidelity(model, tokens, norm_tokens=9, batch_tokens=20)
    assert entries[0].delta_statistics["gate"].tokens == 10
    embedded = model.get_input_embeddings()(tokens).flatten(0, 1)[::6]
    torch.testing.assert_close(torch.cat(seen), embedded)


@pytest.mark.parametrize("rule", ["self_key", "rank1", "diagonal", "anchored"])
def test_the_down_projection_too_equals_built_matrices(rule):
    model = converted(rule=rule, rank=3, num_ranks=2)
    layer = converted_layers(model)[1]
    component, adapter = layer.np_component, layer.np_component.tensors()
    h, a = torch.randn(7, 32), torch.randn(7, 32)
    inter = []
    mlp = layer.npt_plan.shape.linear(layer, "down")
    norms = delta_norms(layer, h, a)["down"]
    # The intermediate from explicit gate and up.
    u, key_scale = layer.npt_mlp_input(h, a)
    z = component(a) if key_scale is None else component(a) * key_scale[:, None]
    for target in ("gate", "up"):
        v_a, v_b = component.rule.vectors(z, u, adapter.w_a_up.get(target), adapter.w_b_up[target], 2, component.scale)
        weight = layer.npt_plan.shape.linear(layer, target).weight
        inter.append(u @ weight.t() + torch.einsum("tni,ti,tno->to", v_a, u, v_b))
    x = torch.nn.functional.silu(inter[0]) * inter[1]
    v_a, v_b = component.rule.vectors(
        component(a), x, adapter.w_a_up.get("down"), adapter.w_b_up["down"], 2, component.scale
    )
    delta = torch.einsum("tno,tni->toi", v_b, v_a)
    assert delta.shape[1:] == mlp.weight.shape
    torch.testing.assert_close(norms, delta.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4)
