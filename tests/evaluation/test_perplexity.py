"""Evaluation against numbers computed the plain way."""

from __future__ import annotations

import math

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled
from npt_kernels.evaluation import perplexity as evaluation
from npt_kernels.evaluation.fidelity import delta_norms, layer_fidelity
from npt_kernels.evaluation.perplexity import evaluate, evaluate_base
from npt_kernels.evaluation.samples import generate_samples
from npt_kernels.model.install import converted_layers
from npt_kernels.model.visits import walk_layers
from npt_kernels.training.losses import layer_loss
from tests.support.helpers import Words, randomise, tiny_model, token_ids


def converted(family="llama", **settings):
    model = tiny_model(family, layers=3)
    apply_npt(model, NPTConfig(layers="all", **{"rank": 8, "init": "small", **settings}))
    randomise(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("chunk", [97 * 5, 2**23])
def test_numbers_equal_the_plain_computation(family, batch_tokens, chunk, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", chunk)
    model, tokens = converted(family), token_ids(5, 13)
    done = []
    result = evaluate(model, tokens, batch_tokens=batch_tokens, advance=done.append)
    with torch.no_grad():
        student = model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        with npt_disabled(model):
            teacher = model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
    labels = tokens[:, 1:, None]
    base, npt = -teacher.gather(2, labels).squeeze(2), -student.gather(2, labels).squeeze(2)
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    agreement = (teacher.argmax(-1) == student.argmax(-1)).double()
    assert result.tokens == 5 * 12 and sum(done) == tokens.numel()
    for name, value in (("base_nll", base), ("npt_nll", npt), ("kl", kl), ("top1_agreement", agreement)):
        assert getattr(result, name) == pytest.approx(float(value.mean()), rel=1e-5, abs=1e-6)
        error = float(value.mean(1).std() / math.sqrt(5))
        assert getattr(result, f"{name}_se") == pytest.approx(error, rel=1e-3, abs=1e-6)
    ratio = float((npt - base).mean().exp())
    assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert result.perplexity_ratio == pytest.approx(result.npt_perplexity / result.base_perplexity)
    assert result.perplexity_ratio_se == pytest.approx(
        ratio * float((npt - base).mean(1).std()) / math.sqrt(5), rel=1e-3
    )


def test_base_alone_equals_base_beside_the_student_and_spares_its_forward():
    model, tokens = tiny_model("llama", layers=3), token_ids(4, 10)
    base, teacher = evaluate_base(model, tokens)
    assert (base.perplexity_ratio, base.kl, base.top1_agreement) == (1.0, 0.0, 1.0)
    apply_npt(model, NPTConfig(layers="all", rank=8, init="small"))
    randomise(model)
    again, _ = evaluate_base(model, tokens)
    assert again == base
    fresh = evaluate(model, tokens)
    calls = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    cached = evaluate(model, tokens, teacher=teacher)
    assert cached == fresh and cached.base_nll == base.base_nll
    assert len(calls) == 3  # two of the check that the head is a plain linear, one of the student, none of the original
    with pytest.raises(ValueError, match="teacher belongs to other tokens"):
        evaluate(model, token_ids(4, 10, seed=9), teacher=teacher)


def test_evaluation_leaves_modes_and_components_alone():
    model = converted()
    model.train()
    evaluate(model, token_ids())
    assert all(module.training for module in model.modules())
    assert all(layer.np_component.enabled for layer in converted_layers(model).values())


def test_one_sequence_takes_its_errors_over_tokens():
    result = evaluate(converted(), token_ids(1, 20))
    assert result.kl_se > 0 and result.base_nll_se > 0


def test_bad_tokens_are_named():
    model = converted()
    with pytest.raises(TypeError, match=r"tokens must be token ids \[n, seq\], got torch.float32"):
        evaluate(model, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one sequence of two tokens"):
        evaluate(model, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="apply_npt or load_npt"):
        evaluate(tiny_model("llama", layers=2), token_ids())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_explained_variance_is_one_minus_the_relative_loss(family):
    model, tokens = converted(family), token_ids(4, 12)
    entries = layer_fidelity(model, tokens, batch_tokens=24)
    expected = {}

    def visit(layer, h, a, y):
        expected[layer.npt_plan.index] = 1 - float(layer_loss(layer.npt_student(h, a), y, h))

    walk_layers(model, tokens, visit)
    assert [entry.index for entry in entries] == [0, 1, 2]
    for entry in entries:
        assert entry.explained_variance == pytest.approx(expected[entry.index], abs=1e-4)
        assert entry.rank == 8 and entry.variance > 0


def test_exact_conversion_explains_everything():
    model = tiny_model("llama", layers=3)
    apply_npt(model, NPTConfig(layers="all", rank=32, basis="pca"), calibration=token_ids(16, 24))
    result = evaluate(model, token_ids(4, 20))
    assert result.perplexity_ratio == pytest.approx(1.0, abs=1e-3) and result.kl < 1e-6
    assert all(entry.explained_variance > 1 - 1e-5 for entry in layer_fidelity(model, token_ids()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["self_key", "rank1", "diagonal", "anchored"])
@pytest.mark.parametrize("norm_match", [True, False])
def test_delta_norms_equal_those_of_built_matrices(family, rule, norm_match):
    model = converted(family, rule=rule, rank=3, num_ranks=2, norm_match=norm_match)
    layer = converted_layers(model)[1]
    component, shape = layer.np_component, layer.npt_plan.shape
    h, a = torch.randn(20, 32), torch.randn(20, 32)
    norms = delta_norms(layer, h, a)
    assert list(norms) == list(component.target_shapes)
    u, key_scale = layer.npt_mlp_input(h, a)
    plain = shape.norm(layer)(h)
    first = "gate" if family == "llama" else "c_fc"
    weight = shape.linear(layer, first).weight
    weight = weight if family == "llama" else weight.t()
    z = component(a) if key_scale is None else component(a) * key_scale[:, None]
    adapter = component.tensors()
    source = plain if rule == "self_key" else u
    v_a, v_b = component.rule.vectors(z, source, adapter.w_a_up.get(first), adapter.w_b_up[first], 2, 1.0)
    delta = torch.einsum("tno,tni->toi", v_b, v_a)
    if norm_match:
        change, key = (u - plain) @ weight.t(), plain / plain.square().sum(-1, keepdim=True)
        delta = delta + change[:, :, None] * key[:, None, :]
        if rule == "self_key":  # then the built matrices reproduce what the layer computes from the unmatched input
            expected = u @ weight.t() + z @ adapter.w_b_up[first]
            torch.testing.assert_close(
                torch.einsum("toi,ti->to", weight + delta, plain), expected, rtol=1e-3, atol=1e-3
            )
    torch.testing.assert_close(norms[first], delta.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4)
    assert all(norm.shape == (20,) and norm.isfinite().all() for norm in norms.values())


def test_samples_are_greedy_and_side_by_side():
    model = converted()
    prompts = ["1 2 3", "4 5"]
    samples = generate_samples(model, Words(), prompts, 6)
    assert [sample.prompt for sample in samples] == prompts
    for sample in samples:
        ids = [int(word) for word in sample.prompt.split()]
        for disabled, text in ((True, sample.base), (False, sample.npt)):
            words = list(ids)
            for _ in range(6):
                with torch.no_grad():
                    if disabled:
                        with npt_disabled(model):
                            logits = model(input_ids=torch.tensor([words])).logits
                    else:
                        logits = model(input_ids=torch.tensor([words])).logits
                words.append(int(logits[0, -1].argmax()))
            assert text == " ".join(map(str, words[len(ids) :]))
    assert generate_samples(model, Words(), prompts, 6, base=["x", "y"])[1].base == "y"
