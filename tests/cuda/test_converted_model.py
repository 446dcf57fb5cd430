"""A converted model under ``NPT_BACKEND=cuda``, launches replaced by their definition."""

from __future__ import annotations

import warnings

import pytest
import torch

from npt_kernels import BackendUnavailableError, NPTConfig, apply_npt
from npt_kernels.kernels.cuda import support as _cuda
from npt_kernels.ops import registry as backends
from tests.support.fake_launch import LAUNCHES, OVERLAPS, install
from tests.support.helpers import tiny_model, token_ids


def converted(name: str, rule: str) -> torch.nn.Module:
    model = tiny_model(name, layers=2).double()
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=8, init="small"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("name", "rule"), [("llama", "self_key"), ("llama", "rank1"), ("gpt2", "self_key")])
def test_named_for_all_it_runs_what_it_has(monkeypatch: pytest.MonkeyPatch, name: str, rule: str) -> None:
    model, tokens = converted(name, rule), token_ids()
    expected = model(tokens).logits
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    install(monkeypatch)
    backends._say_elsewhere.cache_clear()
    monkeypatch.setattr(_cuda, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(backends, "_DEFAULT_BACKEND", "cuda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        logits = model(tokens).logits
    plans = [layer.npt_plan for layer in model.modules() if hasattr(layer, "npt_plan")]
    assert not [str(w.message) for w in seen if "npt_kernels" in str(w.message)], "every op of a layer has its kernel"
    assert LAUNCHES.count("norm") == (2 if plans[0].norm_match else 0)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    # Where the bottleneck is made of the heads' output, the rule alone is left of the coefficients' kernel.
    assert LAUNCHES.count("launch") >= 2 and ("rule" if rule == "self_key" else "coefficients") in LAUNCHES
    assert "low" in OVERLAPS, "24 tokens: the fused kernel may start under the coefficients' one"
    logits.square().mean().backward()
    for grad, want in zip((p.grad for p in model.parameters() if p.grad is not None), grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-8)  # fp32 shares in between


def test_refused_calls_still_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernels exist and cannot run: the model says so instead of computing elsewhere in silence."""
    monkeypatch.setattr(backends, "_DEFAULT_BACKEND", "cuda")
    model = converted("llama", "self_key")  # the conversion itself runs
    with pytest.raises(BackendUnavailableError, match=r"cuda.*matched_norm.*on cpu"):
        model(token_ids())
