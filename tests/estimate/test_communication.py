"""The tensor-parallel plan of docs/scaling.md is right: a layer split over f gives the whole one's output and gradients, with no
exchange but the sums that the plan names. And the bytes follow from it."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import npt_gated_mlp
from npt_kernels.component import NPComponent
from npt_kernels.estimate.communication import exchanges, pipeline_bubble, tensor_gradients, tensor_per_token
from npt_kernels.estimate.parallel import Parallel
from npt_kernels.rules import RULES
from tests.support.plan_cases import LLAMA, config_of, sizes_of

T, D, F, R, SHARDS = 24, 16, 40, 6, 4
TARGETS = {"gate": (D, F), "up": (D, F), "down": (F, D)}


def whole_component(rule: str) -> NPComponent:
    component = NPComponent(D, TARGETS, rank=R // 2, num_ranks=2, rule=rule, dtype=torch.float64)
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.normal_()
    return component


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_split_over_f_is_the_whole_layer(rule: str) -> None:
    x, a = torch.randn(T, D, dtype=torch.float64), torch.randn(T, D, dtype=torch.float64)
    gate, up = torch.randn(F, D, dtype=torch.float64), torch.randn(F, D, dtype=torch.float64)
    down, scale = torch.randn(D, F, dtype=torch.float64), torch.rand(T, dtype=torch.float64)
    component = whole_component(rule)
    dout = torch.randn(T, D, dtype=torch.float64)

    def run(keys: dict[str, torch.Tensor], columns: slice, down_value: bool) -> dict[str, torch.Tensor]:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in keys.items()}
        inputs = [t.clone().requires_grad_() for t in (x, a, scale)]
        adapter = {**leaves, "rule": rule, "num_ranks": 2, "scale": 1.0}
        if rule == "diagonal":  # gate and up share one matrix with the bottleneck
            adapter["w_a_up.gate"] = adapter["w_a_up.up"] = leaves["w_down"].t()
        if not down_value:
            del adapter["w_b_up.down"]
        out = npt_gated_mlp(
            inputs[0], inputs[1], gate[columns], up[columns], down[:, columns], adapter, key_scale=inputs[2]
        )
        out.backward(dout)
        grads = {name: t.grad if t.grad is not None else torch.zeros_like(t) for name, t in leaves.items()}
        return {"out": out.detach(), "dx": inputs[0].grad, "da": inputs[1].grad, "d_scale": inputs[2].grad, **grads}

    own = dict(component.state_dict())
    truth = run(own, slice(None), True)
    parts = []
    width = F // SHARDS
    for shard in range(SHARDS):
        columns = slice(shard * width, (shard + 1) * width)
        sliced = {}
        for name, tensor in own.items():
            cut = name in {"w_b_up.gate", "w_b_up.up", "w_a_up.down"}
            sliced[name] = tensor[..., columns] if cut else tensor
        # c = z does not depend on the shard: one device adds down's term. With a key, every device adds that of its part of p.
        parts.append(run(sliced, columns, rule != "self_key" or shard == 0))
    for name, whole in truth.items():
        pieces = [part[name] for part in parts]
        if name in {"w_b_up.gate", "w_b_up.up", "w_a_up.down"}:
            joined = torch.cat(pieces, dim=-1)
        elif name == "w_b_up.down" and rule == "self_key":
            joined = pieces[0]
        else:
            joined = sum(pieces)
        torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    summed = {"self_key": {"w_down"}, "rank1": {"w_down", "w_a_up.gate", "w_a_up.up", "w_b_up.down"}}
    model, adapter = sizes_of(LLAMA, config_of(model__rule=rule))
    if rule in summed:  # what the plan counts as summed once a step is what was summed here
        shapes = {"w_down": 64 * 8, "w_a_up.gate": 64 * 8, "w_a_up.up": 64 * 8, "w_b_up.down": 64 * 8}
        assert tensor_gradients(model, adapter) == sum(shapes[name] for name in summed[rule])


def test_numbers_per_token() -> None:
    model, adapter = sizes_of(LLAMA, config_of())
    assert tensor_per_token(model, adapter, "local") == {"forward": 3 * 64, "backward": 0}
    assert tensor_per_token(model, adapter, "end_to_end") == {"forward": 4 * 64, "backward": 2 * 64 + 8 + 1}


def test_bytes_of_every_way() -> None:
    config = config_of(training__mode="local", training__gradient_accumulation_steps=4, model__dtype="bfloat16")
    model, adapter = sizes_of(LLAMA, config)
    tokens, layer = 4 * 64 * 4, model.layer * 2

    def sizes(parallel: Parallel, phase: str = "local") -> list[int]:
        return [entry.bytes for entry in exchanges(model, adapter, config, parallel, phase)]

    assert sizes(Parallel()) == []
    assert sizes(Parallel(data=4)) == [round(2 * 3 / 4 * adapter.total * 4)]
    assert sizes(Parallel(data=4, shard=True))[0] == round(3 / 4 * 4 * 3 * layer)
    assert sizes(Parallel(data=4, shard=True), "end_to_end")[0] == round(3 / 4 * 4 * 9 * layer)
    assert sizes(Parallel(pipeline=3)) == [tokens * 64 * 2]
    assert sizes(Parallel(pipeline=3), "end_to_end") == [3 * tokens * 64 * 2]
    assert sizes(Parallel(tensor=2)) == [3 * tokens * 3 * 64 * 2, 3 * 64 * 8 * 4]
    config.optimization.micro_batches_per_layer = 4
    assert sizes(Parallel(data=4, shard=True))[0] == round(3 / 4 * 3 * layer)


def test_the_bubble_closes_in_local_training() -> None:
    assert pipeline_bubble(8, 8, 100, "end_to_end") == 7 / 15
    assert pipeline_bubble(8, 8, 100, "local") == 7 / 807
    assert pipeline_bubble(1, 8, 100, "local") == pipeline_bubble(1, 8, 100, "end_to_end") == 0
