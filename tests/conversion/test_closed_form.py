"""The closed form: exact at full rank, better with more rank, fitted without touching the model; its statistics by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, remove_npt
from npt_kernels.conversion.attention_moments import collect_moments, second_moment
from npt_kernels.conversion.bases import Metric
from npt_kernels.conversion.refit import _descending, drift_map
from tests.support.helpers import VOCAB, assert_unchanged, randomise, snapshot, tiny_model, token_ids

CALIBRATION = token_ids(16, 32, seed=5)
HELD_OUT = token_ids(6, 32, seed=6)
models = pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
bases = pytest.mark.parametrize("basis", ["pca", "fisher"])


def sharpened(name, **kwargs):
    """A tiny model whose attention and logits matter: random ones barely attend and predict the uniform distribution."""
    model = tiny_model(name, **kwargs)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "mlp" not in parameter_name:
                parameter.mul_(6)
    return model


@torch.no_grad()
def log_probs(model):
    return model(input_ids=HELD_OUT, use_cache=False).logits.double().log_softmax(-1)


def kl(model, original):
    return float((original.exp() * (original - log_probs(model))).sum(-1).mean())


@models
@bases
def test_exact_at_full_rank(name, basis):
    """fp32 rounding only: logits within 1e-4 of their largest value, and KL below 1e-8 nats."""
    model = sharpened(name)
    original = model(input_ids=HELD_OUT).logits.detach()
    reference = log_probs(model)
    apply_npt(model, NPTConfig(layers="all", rank=1.0, basis=basis), calibration=CALIBRATION)
    got = model(input_ids=HELD_OUT).logits.detach()
    assert (got - original).abs().max() <= 1e-4 * original.abs().max()
    assert abs(kl(model, reference)) < 1e-8
    with torch.no_grad():
        for parameter in npt_parameters(model):
            parameter.zero_()
    assert kl(model, reference) > 1e-2, "without its components the converted model is another one"


@models
def test_exact_at_full_rank_in_float64(name):
    model = sharpened(name).double()
    original = model(input_ids=HELD_OUT).logits.detach()
    apply_npt(model, NPTConfig(layers="all", rank=32, basis="pca"), calibration=CALIBRATION)
    tolerance = 1e-5 if name != "gpt2" else 1e-12  # HF's RMSNorm computes in fp32 whatever it is given
    assert (model(input_ids=HELD_OUT).logits.detach() - original).abs().max() <= tolerance * original.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@bases
def test_kl_decreases_with_rank(name, basis):
    model = sharpened(name)
    original = log_probs(model)
    values = []
    for rank in (4, 8, 16, 24, 32):
        apply_npt(model, NPTConfig(layers="all", rank=rank, basis=basis), calibration=CALIBRATION)
        values.append(kl(model, original))
        remove_npt(model)
    assert all(later < earlier for earlier, later in itertools.pairwise(values)), values
    assert values[0] > 100 * abs(values[-1])


def test_a_single_layer_and_single_target_stay_close():
    """Only the listed targets change; those left out are the frozen linears on u."""
    model = sharpened("llama")
    report = apply_npt(model, NPTConfig(layers=[1], rank=32, targets=("down",)), calibration=CALIBRATION)
    assert report.converted[0].targets == ("down",)
    assert set(model.model.layers[1].np_component.w_b_up) == {"down"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@bases
@pytest.mark.parametrize("mean", [8, 12, 16, 24])
def test_automatic_ranks(name, basis, mean):
    model = sharpened(name)
    report = apply_npt(model, NPTConfig(layers="all", rank=f"auto:{mean}", basis=basis), calibration=CALIBRATION)
    ranks = [layer.rank for layer in report.converted]
    assert all(rank % 8 == 0 and 8 <= rank <= 32 for rank in ranks)
    assert mean - 8 < sum(ranks) / len(ranks) <= mean, "the mean is used up but never exceeded"


def test_automatic_ranks_go_where_they_are_worth_most():
    """A layer whose attention output is nearly nothing gets less than the others."""
    model = sharpened("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
    report = apply_npt(model, NPTConfig(layers="all", rank="auto:16"), calibration=CALIBRATION)
    ranks = [layer.rank for layer in report.converted]
    assert ranks[2] == min(ranks) < max(ranks)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@bases
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_only_read(name, basis, training):
    model = sharpened(name, **({"resid_pdrop": 0.5} if name == "gpt2" else {})).train(training)
    first = next(model.parameters()).requires_grad_(False)
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    layers[1].train(not training)  # a mixed state must come back as it was, not as the root's
    before, rng = snapshot(model), torch.get_rng_state()
    apply_npt(model, NPTConfig(layers="all", rank=8, basis=basis), calibration=CALIBRATION)
    assert torch.equal(torch.get_rng_state(), rng), "the global random state is not consumed"
    assert not first.requires_grad
    remove_npt(model)
    assert_unchanged(model, before)


def test_under_no_grad_and_twice_the_same_bits():
    results = []
    for context in (torch.no_grad(), torch.enable_grad()):
        model = sharpened("llama")
        with context:
            apply_npt(model, NPTConfig(layers="all", rank=8), calibration=CALIBRATION)
        results.append([p.detach().clone() for p in npt_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_disabled_is_the_original_and_report_notes():
    model = sharpened("llama")
    original = log_probs(model)
    report = apply_npt(model, NPTConfig(layers="all", rank=8), calibration=CALIBRATION)
    with npt_disabled(model):
        assert torch.equal(log_probs(model), original)
    assert report.calibration["tokens"] == CALIBRATION.numel()
    assert report.calibration["basis"] == "fisher"


def test_calibration_is_used_only_where_it_can_be():
    """init='small' and rules without a closed form start from ΔW = 0 whatever the calibration."""
    for kwargs in ({"rule": "rank1"}, {"init": "small"}):
        model = sharpened("llama")
        report = apply_npt(model, NPTConfig(layers="all", rank=8, **kwargs), calibration=CALIBRATION)
        assert "calibration was not used" in str(report)
        values = [p for n, p in model.named_parameters() if ".w_b_up." in n]
        assert len(values) == 12 and not any(v.any() for v in values)


# ---------------------------------------------------------------------------------------------- statistics


def attention_outputs(model, tokens):
    """``a`` of every layer for whole sequences, and the attention modules."""
    modules = [layer.self_attn for layer in model.model.layers]
    seen = {}
    handles = [
        m.register_forward_hook(lambda m, i, out, n=n: seen.__setitem__(n, out[0].detach()))
        for n, m in enumerate(modules)
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return modules, [seen[n] for n in range(len(modules))]


def test_covariance_is_the_direct_sum():
    model = sharpened("llama", layers=2)
    modules, outputs = attention_outputs(model, CALIBRATION)
    moments = collect_moments(model, modules, CALIBRATION, fisher=False, batch_tokens=100)
    for entry, a in zip(moments, outputs, strict=True):
        flat = a.flatten(0, 1).double()
        assert entry.tokens == CALIBRATION.numel() == len(flat)
        torch.testing.assert_close(
            entry.covariance, flat.t() @ flat, rtol=1e-4, atol=1e-5 * float((flat.t() @ flat).abs().max())
        )


class Bigram(torch.nn.Module):
    """logits = W a, a = E[token]: one 'attention' whose Fisher is known, E[Wᵀ (diag p − p pᵀ) W]."""

    def __init__(self, width=6):
        super().__init__()
        self.attention = torch.nn.Embedding(VOCAB, width)
        self.head = torch.nn.Linear(width, 5, bias=False)

    def forward(self, input_ids, use_cache=False):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(self.attention(input_ids)))


def test_fisher_is_the_analytic_one():
    model = Bigram()
    tokens = token_ids(200, 100)
    (moment,) = collect_moments(model, [model.attention], tokens, fisher=True, seed=3)
    a, weight = model.attention(tokens).detach().flatten(0, 1).double(), model.head.weight.detach().double()
    p = (a @ weight.t()).softmax(-1)
    fisher_of_logits = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = weight.t() @ fisher_of_logits.mean(0) @ weight
    got = moment.fisher / moment.tokens
    assert moment.tokens == 20000
    # 20,000 sampled labels: about 1 % of statistical error.
    assert (got - expected).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(got, got.t())


def test_fisher_of_a_transformer_is_positive_and_seeded():
    model = sharpened("llama", layers=2)
    modules, _ = attention_outputs(model, CALIBRATION)
    first, same, other = (collect_moments(model, modules, CALIBRATION, fisher=True, seed=s) for s in (0, 0, 1))
    for a, b, c in zip(first, same, other, strict=True):
        assert torch.equal(a.fisher, b.fisher)
        assert not torch.equal(a.fisher, c.fisher)
        assert torch.linalg.eigvalsh(a.fisher).min() > -1e-6 * a.fisher.trace()
        assert (a.fisher - c.fisher).norm() < a.fisher.norm(), "two samples of one matrix"


def test_moments_are_float32_under_autocast():
    """A bf16 product of bf16-sized error would drown small directions: exact up to float32, whatever autocast does."""
    torch.manual_seed(0)
    rows, other = torch.randn(300, 16), torch.randn(300, 16)
    truth = rows.double().t() @ other.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert (rows.t() @ other).dtype == torch.bfloat16  # what would happen without second_moment
        moment = second_moment(rows, other)
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, truth, rtol=1e-5, atol=1e-4)


def test_hooks_go_even_when_the_forward_fails():
    model = sharpened("llama")
    before = snapshot(model)
    broken = model.lm_head.forward
    model.lm_head.forward = lambda x: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_npt(model, NPTConfig(layers="all", rank=8), calibration=CALIBRATION)
    model.lm_head.forward = broken
    del model.lm_head.forward
    assert_unchanged(model, before)


def test_randomised_components_are_not_the_closed_form():
    """The yardstick: KL tells a fitted component from a random one."""
    model = sharpened("llama")
    original = log_probs(model)
    apply_npt(model, NPTConfig(layers="all", rank=16), calibration=CALIBRATION)
    fitted = kl(model, original)
    randomise(model)
    assert kl(model, original) > 2 * fitted


def test_a_model_that_works_between_its_layers_is_fitted_without_the_refit():
    """Running its layers one by one would not be its stream: the same components as ``refit=False``, and the report says so."""
    fitted = []
    for refit in (True, False):
        model = sharpened("llama")
        decoder = model.model

        def forward(input_ids, decoder=decoder, **_):
            h = decoder.embed_tokens(input_ids)
            positions = torch.arange(h.shape[1]).unsqueeze(0)
            rotary = decoder.rotary_emb(h, positions)
            for layer in decoder.layers:
                h = layer(h * 1.5, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            return BaseModelOutputWithPast(last_hidden_state=decoder.norm(h))

        decoder.forward = forward
        report = apply_npt(model, NPTConfig(layers="all", rank=8, refit=refit), calibration=CALIBRATION)
        assert report.calibration["refit"] is False
        assert ("works on the hidden states between its layers" in str(report)) == refit
        fitted.append(npt_parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(*fitted, strict=True))
    assert max(float(parameter.detach().abs().max()) for parameter in fitted[0]) > 0


# ---- the refit's regression ------------------------------------------------------------------------------------------


def _fold_sums(a, drift, folds=4):
    parts = [(x.t() @ x, x.t() @ y) for x, y in zip(a.chunk(folds), drift.chunk(folds), strict=True)]
    return torch.stack([gram for gram, _ in parts]), torch.stack([cross for _, cross in parts])


def _plain_metric(d):
    eye = torch.eye(d, dtype=torch.float64)
    return Metric(eye, eye, "energy")


def test_drift_that_is_noise_is_not_believed():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    grams, crosses = _fold_sums(a, noise)
    plain = torch.linalg.solve(grams.sum(0), crosses.sum(0)).t()
    shrunk = drift_map(grams, crosses, _plain_metric(24))
    assert plain.norm() > 1.0 and shrunk.norm() < 0.2 * plain.norm()


def test_drift_that_the_output_predicts_is_kept():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(24, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 24, generator=generator, dtype=torch.float64
    )
    a = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    noise = 2 * torch.randn(400, 24, generator=generator, dtype=torch.float64)
    grams, crosses = _fold_sums(a, a @ truth.t() + noise)
    plain = torch.linalg.solve(grams.sum(0), crosses.sum(0)).t()
    shrunk = drift_map(grams, crosses, _plain_metric(24))
    # Nearer the truth than least squares, and most of the truth is there.
    assert (shrunk - truth).norm() < 0.7 * (plain - truth).norm()
    assert (shrunk * truth).sum() > 0.85 * truth.square().sum()


def test_drift_map_of_one_fold_is_the_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    a, drift = (torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    grams, crosses = _fold_sums(a, drift, folds=1)
    ridge = 0.02 * grams[0].diagonal().mean() * torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(grams[0] + ridge, crosses[0]).t()
    torch.testing.assert_close(drift_map(grams, crosses, _plain_metric(8)), expected)


def test_shares_descend():
    values, weights = torch.tensor([0.5, 0.7, 0.1, 0.3]).double(), torch.tensor([1.0, 1.0, 3.0, 1.0]).double()
    torch.testing.assert_close(_descending(values, weights), torch.tensor([0.6, 0.6, 0.15, 0.15]).double())
