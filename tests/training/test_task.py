"""``objective: task``: its loss and gradient are the definition's, masks count, the residual may stay; a run learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, remove_npt, save_npt
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.masked_ids import plain_ids, unmask
from npt_kernels.model.install import converted_layers
from npt_kernels.training import task
from npt_kernels.training.task import TaskObjective
from tests.support.helpers import assert_unchanged, snapshot, tiny_model, token_ids
from tests.support.runs import Blocks, records, start

RULES = ["self_key", "rank1", "diagonal", "anchored"]


def extra(rule="self_key", family="llama", noise=0.0):
    model = tiny_model(family)
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=4, attention_residual=True, init="small"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in npt_parameters(model):
            parameter += noise * torch.randn_like(parameter)
    return model


def masked(ids, prompt=5):
    out = ids.clone()
    out[0, :prompt], out[1, : 2 * prompt] = ~out[0, :prompt], ~out[1, : 2 * prompt]
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", RULES)
def test_an_extra_change_starts_as_the_original_and_keeps_it(rule, family, tmp_path):
    model, ids = extra(rule, family), token_ids(2, 16)
    with torch.no_grad(), npt_disabled(model):
        original = model(ids).logits
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, original, atol=1e-5)
        for parameter in npt_parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
        changed = model(ids).logits
        with npt_disabled(model):
            assert torch.equal(model(ids).logits, original)
    assert (changed - original).abs().max() > 1e-3
    save_npt(model, tmp_path / "a")
    fresh = tiny_model(family)
    load_npt(fresh, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, changed)
    remove_npt(model)
    assert_unchanged(model, snapshot(tiny_model(family)))


@pytest.mark.parametrize("rule", RULES)
def test_the_layer_is_its_definition(rule):
    """``h + a + MLP(norm(h + a))`` with ``(W + ΔW_t)`` from the explicit vectors of every target."""
    model = extra(rule, noise=0.2).double()
    layer = converted_layers(model)[1]
    component, mlp = layer.np_component, layer.mlp
    h, a = torch.randn(6, 32, dtype=torch.float64), torch.randn(6, 32, dtype=torch.float64)

    def linear(name, x):
        v_a, v_b = component.vectors(a, x, name)
        return getattr(mlp, f"{name}_proj")(x) + torch.einsum("tni,ti,tno->to", v_a, x, v_b)

    u = layer.post_attention_layernorm(h + a)
    inter = F.silu(linear("gate", u)) * linear("up", u)
    assert torch.allclose(layer.npt_student(h, a), h + a + linear("down", inter), atol=1e-10)


@pytest.mark.parametrize("with_mask", [False, True])
def test_loss_and_gradient_are_the_definition(with_mask):
    model = extra("diagonal", noise=0.1)
    ids = masked(token_ids(2, 16)) if with_mask else token_ids(2, 16)
    plain, counted = unmask(ids)
    assert (counted is not None) == with_mask and torch.equal(plain, plain_ids(ids))
    logits = model(plain).logits[:, :-1].flatten(0, 1)
    keep = torch.ones(2, 15, dtype=torch.bool) if counted is None else counted[:, 1:]
    wanted = F.cross_entropy(logits[keep.flatten()], plain[:, 1:][keep])
    grads = torch.autograd.grad(wanted, npt_parameters(model))
    # In two micro-batches of different numbers of counted tokens: the same step.
    losses = TaskObjective(model).accumulate_group([ids[:1], ids[1:]], [0.5, 0.5], lambda loss: loss.backward())
    for parameter, expected in zip(npt_parameters(model), grads, strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-6)
    counts = keep.sum(1).tolist()
    mean = sum(float(entry.loss) * n for entry, n in zip(losses, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(wanted.item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["weight and bias", "logits"])
def test_cross_entropy_against_float64(dtype, head, monkeypatch):
    """At most twice the error of torch's own in the same dtype, in chunks that do not fit; no gradient that nobody asked for."""
    monkeypatch.setattr(task, "CHUNK_ELEMENTS", 7 * 50)
    states = torch.randn(23, 16 if head != "logits" else 50, dtype=torch.float64)
    weight, bias = (
        (torch.randn(50, 16, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
        if head != "logits"
        else (None, None)
    )
    labels = torch.randint(50, (23,))

    def run(function, kind):
        x = states.detach().clone().to(dtype).to(kind).requires_grad_()
        w, b = (None if t is None else t.to(dtype).to(kind) for t in (weight, bias))
        loss = function(x, w, b)
        return loss.detach(), torch.autograd.grad(2 * loss, x)[0]

    def plain(x, w, b):
        return F.cross_entropy(x if w is None else F.linear(x, w, b), labels)

    truth, own, theirs = (
        run(plain, torch.float64), run(lambda x, w, b: task.cross_entropy(x, labels, w, b), dtype), run(plain, dtype)
    )  # fmt: skip
    for exact, got, other in zip(truth, own, theirs, strict=True):
        error, allowed = (found.double().sub(exact).norm() for found in (got, other))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * exact.norm()
    assert not task.cross_entropy(states, labels, weight, bias).requires_grad
    empty = task.cross_entropy(states[:0].clone().requires_grad_(), labels[:0], weight, bias)
    assert empty.item() == 0
    empty.backward()


def test_masked_tokens_are_not_measured():
    model, ids = extra(noise=0.1), token_ids(4, 16)
    marked = masked(ids)
    found = evaluate(model, marked)
    with torch.no_grad():
        nll = -model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = marked[:, 1:] >= 0
    assert found.tokens == int(counted.sum()) == 4 * 15 - 4 - 9
    assert found.npt_nll == pytest.approx(float(nll[counted].mean()), rel=1e-5) and found.npt_nll_se > 0
    # Equal counts everywhere: the standard error is that of an unmasked text of the same tokens.
    half = ids.clone()
    half[:, :8] = ~half[:, :8]
    rows = nll[:, 7:].mean(1).double()
    assert evaluate(model, half).npt_nll_se == pytest.approx(float(rows.std() / 2), rel=1e-4)
    with pytest.raises(ValueError, match="every token of the text is masked"):
        evaluate(model, ~ids)


@pytest.mark.parametrize("residual", [True, False])
def test_a_run_learns_and_resumes(tmp_path, residual):
    repeated = token_ids(1, 16).repeat(24, 1)
    text = Blocks(repeated, token_ids(8, 16, 2), repeated[:6], ["one sequence"])
    sections = {"model": {"rank": 8, "attention_residual": residual, "basis": "pca"}}
    settings = {"objective": "task", "learning_rate": 1e-2, "save_steps": 5, "max_steps": 10}
    summary, model = start(tmp_path / "a", sections=sections, text=text, **settings)
    logged = records(tmp_path / "a", "train")
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3 and logged[0]["objective"] == "task"
    assert summary.trained.npt_nll < summary.base.base_nll - 0.3
    if residual:
        assert summary.converted.npt_nll == pytest.approx(summary.base.base_nll, abs=1e-5)
        (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*5")
        _, again = start(tmp_path / "b", sections=sections, text=text, resume=checkpoint, **settings)
        for one, two in zip(npt_parameters(model), npt_parameters(again), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    "sections, part",
    [
        ({"training": {"objective": "task", "mode": "local"}}, "set end_to_end"),
        ({"model": {"attention_residual": True}}, "training.objective=task"),
        (
            {"model": {"attention_residual": True, "rank": "auto:64"}, "training": {"objective": "task"}},
            "rank='auto:64'",
        ),
        ({"model": {"attention_residual": True, "norm_match": True}, "training": {"objective": "task"}}, "norm_match"),
        ({"model": {"attention_residual": True, "init": "closed_form"}, "training": {"objective": "task"}}, "init="),
        ({"data": {"prompt_field": "q"}}, "data.response_field is missing"),
        ({"data": {"prompt_field": "q", "response_field": "r"}}, "data.prompt_field is for training.objective=task"),
        (
            {"data": {"prompt_field": "q", "response_field": "r"}, "training": {"objective": "task"}},
            "data.prompt_field reads .jsonl files",
        ),
    ],
)
def test_settings_that_do_not_agree_are_one_line(sections, part):
    with pytest.raises(ConfigError, match=part) as caught:
        RunConfig.from_mapping(sections)
    assert "\n" not in str(caught.value)
