"""The training modes: who gets a gradient, what runs how often, and equality with the computation written out."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters
from npt_kernels.measure.live_bytes import LiveBytes
from npt_kernels.model.head import OutputHead
from npt_kernels.model.install import converted_layers
from npt_kernels.model.visits import walk_layers
from npt_kernels.training.losses import delta_variance, kl_divergence, layer_loss, vector_penalty
from npt_kernels.training.objectives import (
    KLObjective,
    LayerObjective,
    LocalObjective,
    delta_variances,
    enable_checkpointing,
)
from tests.support.helpers import randomise, tiny_model, token_ids

FAMILIES = ["llama", "gpt2"]


def converted(family, layers="all", **settings):
    model = tiny_model(family, layers=3)
    apply_npt(model, NPTConfig(layers=layers, **{"rank": 8, "init": "small", **settings}))
    randomise(model)
    return model


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in npt_parameters(model)]


def backward(loss):
    loss.backward()


def counted(model, modules):
    counts = [0] * len(modules)

    def hook(position):
        def count(*_):
            counts[position] += 1

        return count

    for position, module in enumerate(modules):
        module.register_forward_hook(hook(position))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["self_key", "rank1", "diagonal", "anchored"])
def test_local_equals_the_two_passes_written_out(family, rule):
    model = converted(family, rule=rule)
    ids = token_ids(2, 12)
    losses = LocalObjective(model, regularization_weight=0.01).accumulate(ids, 1.0, backward)
    actual = gradients(model)
    model.zero_grad(set_to_none=True)

    with torch.no_grad(), npt_disabled(model):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    layers = converted_layers(model)
    inputs = {}
    for index, layer in layers.items():  # the layer's own arguments (mask, positions), as the model passes them
        layer.register_forward_pre_hook(lambda m, a, k, i=index: inputs.__setitem__(i, k), with_kwargs=True)
    with torch.no_grad(), npt_disabled(model):
        model(input_ids=ids)
    total = 0.0
    for index, layer in layers.items():
        h = hidden[index]
        with torch.no_grad():
            a = layer.npt_attention(h, **inputs[index])
        y = layer.npt_teacher(h, a)
        error = layer_loss(layer.npt_student(h, a), y, h)
        total = total + (error + 0.01 * vector_penalty(layer, h, a)) / len(layers)
        torch.testing.assert_close(losses.layers[index], error, rtol=1e-4, atol=1e-6)
    total.backward()
    torch.testing.assert_close(losses.loss, total, rtol=1e-4, atol=1e-6)
    for got, expected in zip(actual, gradients(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_local_backward_stays_in_its_layer(family):
    model = converted(family)
    layers = converted_layers(model)
    seen = []

    def spy(loss):
        before = [
            [None if p.grad is None else p.grad.clone() for p in c.np_component.parameters()] for c in layers.values()
        ]
        loss.backward()
        changed = []
        for index, (layer, old) in enumerate(zip(layers.values(), before, strict=True)):
            new = [p.grad for p in layer.np_component.parameters()]
            if any(
                (a is None) != (b is None) or (a is not None and not torch.equal(a, b))
                for a, b in zip(new, old, strict=True)
            ):
                changed.append(index)
        seen.append(changed)

    LocalObjective(model).accumulate(token_ids(), 1.0, spy)
    assert seen == [[0], [1], [2]]
    own = {id(p) for p in npt_parameters(model)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_local_runs_attention_once_and_neither_head_nor_upper_layers(family):
    model = converted(family, layers=[0, 1])
    decoder = model.base_model
    blocks = list(decoder.layers if family == "llama" else decoder.h)
    attention = [block.self_attn if family == "llama" else block.attn for block in blocks]
    counts = counted(model, [*attention, model.lm_head])
    LocalObjective(model).accumulate(token_ids(), 1.0, backward)
    assert counts == [1, 1, 0, 0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in npt_parameters(model))


def test_local_keeps_the_activations_of_one_layer():
    """At every backward, only this layer's activations are saved: none of an earlier layer survives its own backward."""
    model = converted("llama")
    alive, at_backward = [0], []

    def pack(tensor):
        alive[0] += 1
        return tensor

    def run(loss):
        at_backward.append(alive[0])
        loss.backward()
        alive[0] = 0

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        LocalObjective(model).accumulate(token_ids(), 1.0, run)
    assert len(at_backward) == 3 and len(set(at_backward)) == 1


GROUP = [(2, 12, 1), (2, 12, 2), (1, 12, 3), (2, 9, 4), (2, 12, 5)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_visit", [1, 2, 5, 8])
def test_visiting_a_layer_for_several_micro_batches_changes_no_bit(family, per_visit):
    model = converted(family, layers=[0, 2])
    batches = [token_ids(*shape) for shape in GROUP]
    shares = [0.3, 0.25, 0.15, 0.1, 0.2]
    plain = LocalObjective(model, regularization_weight=0.01)
    expected_losses = [plain.accumulate(ids, share, backward) for ids, share in zip(batches, shares, strict=True)]
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    grouped = LocalObjective(model, regularization_weight=0.01, micro_batches_per_layer=per_visit)
    losses = grouped.accumulate_group(batches, shares, backward)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
    assert len(losses) == len(expected_losses)
    for got, wanted in zip(losses, expected_losses, strict=True):
        assert torch.equal(got.loss, wanted.loss) and torch.equal(got.penalty, wanted.penalty)
        assert got.layers.keys() == wanted.layers.keys() == {0, 2}
        assert all(torch.equal(got.layers[index], wanted.layers[index]) for index in got.layers)


@pytest.mark.parametrize("per_visit", [1, 2, 3])
def test_order_of_the_visits(per_visit):
    """Layer after layer, all micro-batches of the visit at each; the last visit takes what is left."""
    model = converted("llama")
    order = []
    for index, layer in converted_layers(model).items():
        layer.register_forward_pre_hook(lambda m, args, i=index: order.append((i, args[0].shape[1])))
    objective = LocalObjective(model, micro_batches_per_layer=per_visit)
    objective.accumulate_group([token_ids(1, n) for n in (3, 4, 5)], [0.2, 0.3, 0.5], backward)
    groups = [(3, 4, 5)[i : i + per_visit] for i in range(0, 3, per_visit)]
    assert order == [(layer, length) for group in groups for layer in range(3) for length in group]


def test_other_objectives_take_a_group_one_by_one():
    model = converted("llama")
    batches, shares = [token_ids(), token_ids(1, 8, seed=4)], [0.7, 0.3]
    for objective in (KLObjective(model), LayerObjective(model)):
        losses = objective.accumulate_group(batches, shares, backward)
        grouped = gradients(model)
        model.zero_grad(set_to_none=True)
        single = [objective.accumulate(ids, share, backward) for ids, share in zip(batches, shares, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(grouped, gradients(model), strict=True))
        assert [float(x.loss) for x in losses] == [float(x.loss) for x in single]
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", [LocalObjective, KLObjective, LayerObjective])
def test_a_rank_without_rows_has_nothing_to_do(kind):
    model = converted("llama")
    assert kind(model).accumulate_group([], [], backward) == []
    assert all(grad is None for grad in gradients(model))
    with pytest.raises(ValueError):
        kind(model).accumulate_group([token_ids()], [], backward)


def _peak(layers, micro_batches, per_visit):
    """Bytes of tensors that the group's schedule makes, at the highest; gradients exist before."""
    model = tiny_model("llama", layers=layers)
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    for parameter in npt_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    objective = LocalObjective(model, micro_batches_per_layer=per_visit)
    batches = [token_ids(4, 40, seed=s) for s in range(micro_batches)]
    with LiveBytes() as live:
        objective.accumulate_group(batches, [1.0] * micro_batches, backward)
    return live.peak


def test_memory_grows_neither_with_layers_nor_with_micro_batches_beyond_their_hidden_states():
    hidden = 4 * 40 * 32 * 4
    slack = 8 * 6 * 4 * 4  # scalars of the losses, per layer and micro-batch
    base = _peak(2, 1, 1)
    assert base > 4 * hidden  # the meter sees the activations
    assert _peak(8, 1, 1) <= base + slack
    assert _peak(8, 6, 1) <= base + slack
    for count in (2, 6):
        assert _peak(8, count, count) <= base + count * hidden + slack
    assert _peak(8, 6, 6) >= base + 4 * hidden  # and the kept hidden states


def test_bad_visits_are_refused():
    with pytest.raises(ValueError, match="micro_batches_per_layer=0"):
        LocalObjective(converted("llama"), micro_batches_per_layer=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_meets_what_the_original_computes(family):
    model = converted(family, layers=[1, 2])
    ids = token_ids()
    met = {}
    walk_layers(model, ids, lambda layer, h, a, y: met.__setitem__(layer.npt_plan.index, (h, a, y)))
    assert all(not module._forward_hooks for module in model.modules())  # nothing stays behind
    with torch.no_grad(), npt_disabled(model):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert list(met) == [1, 2]
    assert torch.equal(met[1][0], hidden[1]) and torch.equal(met[1][2], hidden[2]) and torch.equal(met[2][0], hidden[2])
    layer = converted_layers(model)[1]
    torch.testing.assert_close(layer.npt_teacher(met[1][0], met[1][1]), met[1][2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [0.0, 0.02])
def test_kl_objective_equals_plain_autograd(family, penalty):
    model = converted(family)
    ids = token_ids(2, 10)
    losses = KLObjective(model, equivalence_weight=0.5, regularization_weight=penalty).accumulate(ids, 1.0, backward)
    actual = gradients(model)
    model.zero_grad(set_to_none=True)
    with torch.no_grad(), npt_disabled(model):
        teacher = model(input_ids=ids).logits
    student = model(input_ids=ids).logits
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1).flatten(0, 1),
        teacher.log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(losses.equivalence, expected, rtol=1e-4, atol=1e-6)
    if penalty:
        assert losses.penalty > 0
        torch.testing.assert_close(losses.loss, 0.5 * losses.equivalence + penalty * losses.penalty)
        return
    (0.5 * expected).backward()
    for got, wanted in zip(actual, gradients(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_objective_runs_on_the_converted_stream(family):
    model = converted(family)
    ids = token_ids()
    losses = LayerObjective(model).accumulate(ids, 1.0, backward)
    with torch.no_grad():
        student = model(input_ids=ids, output_hidden_states=True).hidden_states
        with npt_disabled(model):
            teacher = model(input_ids=ids, output_hidden_states=True).hidden_states
    for index in (0, 1):  # transformers norms the last hidden state
        variance = delta_variance(teacher[index + 1], teacher[index])
        error = layer_loss(student[index + 1], teacher[index + 1], teacher[index], variance=variance)
        torch.testing.assert_close(losses.layers[index], error, rtol=1e-4, atol=1e-6)
    # Unlike locally, the first layer feels the loss of the last one.
    with torch.no_grad():
        local = LocalObjective(model)
    model.zero_grad(set_to_none=True)
    LayerObjective(model).accumulate(ids, 1.0, backward)
    stream = gradients(model)
    model.zero_grad(set_to_none=True)
    local.accumulate(ids, 1.0, backward)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(stream, gradients(model), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", [KLObjective, LayerObjective])
def test_checkpointing_changes_memory_not_gradients(family, objective):
    model = converted(family)
    ids = token_ids()
    runner = objective(model, regularization_weight=0.01)
    plain = runner.accumulate(ids, 1.0, backward)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    enable_checkpointing(model)
    attention = counted(
        model, [layer.npt_plan.shape.attention_module(layer) for layer in converted_layers(model).values()]
    )
    recomputed = runner.accumulate(ids, 1.0, backward)
    assert max(attention) > 2  # teacher, student, recomputation: it is on
    enable_checkpointing(model, False)
    torch.testing.assert_close(recomputed.loss, plain.loss)
    for got, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    assert not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()(ids).requires_grad, "transformers leaves a hook that makes it so"


def test_accumulation_with_fixed_variances_equals_the_large_batch():
    model = converted("llama")
    ids = token_ids(4, 12)
    for objective in (LocalObjective(model, variances=delta_variances(model, ids)), KLObjective(model)):
        objective.accumulate(ids, 1.0, backward)
        expected = gradients(model)
        model.zero_grad(set_to_none=True)
        for part in (ids[:1], ids[1:]):
            objective.accumulate(part, len(part) / len(ids), backward)
        for got, wanted in zip(gradients(model), expected, strict=True):
            # The same sums in another order: a few roundings of the largest entry.
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        model.zero_grad(set_to_none=True)


def test_equal_models_have_zero_loss():
    model = tiny_model("llama", layers=3)
    apply_npt(model, NPTConfig(layers="all", rank=32, basis="pca"), calibration=token_ids(16, 24))
    assert LocalObjective(model).accumulate(token_ids(), 1.0, backward).equivalence < 1e-6
    assert KLObjective(model).accumulate(token_ids(), 1.0, backward).equivalence < 1e-6


def test_head_apart_gives_the_models_logits_and_odd_heads_are_found():
    model = tiny_model("llama", layers=2)
    ids = token_ids()
    head = OutputHead(model)
    assert head.weight is model.lm_head.weight
    with torch.no_grad():
        torch.testing.assert_close(head.logits(head.states(ids)), model(input_ids=ids).logits)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 0.5  # as models with scaled logits do
    odd = OutputHead(model)
    assert odd.weight is None
    with torch.no_grad():
        assert torch.equal(odd.logits(odd.states(ids)), model(input_ids=ids).logits)
    assert odd.vocabulary == head.vocabulary
    del model.lm_head.forward
    teacher, student = torch.randn(3, 4), torch.randn(3, 4)
    assert kl_divergence(student, teacher, odd.weight).isfinite()


def test_errors_name_the_mend():
    with pytest.raises(ValueError, match="apply_npt"):
        LocalObjective(tiny_model("llama", layers=2))
    with pytest.raises(ValueError, match="no language-model head"):
        OutputHead(tiny_model("llama", layers=2).model)
    with pytest.raises(ValueError, match="does not support it; set it to false"):
        enable_checkpointing(torch.nn.Linear(2, 2))
