"""A converted model on the emulated kernels: values, gradients, two training steps (``NPT_EMULATE=1``; conftest.py).

Held to the 2x rule: against a float64 model, at most twice the error of the same model on ``eager`` in bfloat16 and one rounding.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.kernels.cuda.launch import say_fallback
from npt_kernels.ops import registry
from tests.support.helpers import randomise, tiny_model, token_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "emulator"))
from control import Emulator

ROUNDING = 2.0**-8  # bfloat16
SIZES = {
    "llama": dict(hidden_size=128, intermediate_size=264, max_position_embeddings=128),
    "gpt2": dict(n_embd=128, n_positions=128),
}


def converted(name: str, rule: str, rank: int = 16, **sizes: int) -> nn.Module:
    model = tiny_model(name, layers=3, **(SIZES[name] | sizes))
    targets = dict(targets=("gate",)) if rule == "diagonal" else {}  # its key is w_down itself
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=rank, init="small", **targets))
    randomise(model, scale=0.05)
    return model


def loss_and_grads(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad.detach().clone() for p in npt_parameters(model)]


@pytest.mark.parametrize(
    ("name", "rule"),
    [("llama", rule) for rule in ("self_key", "rank1", "diagonal", "anchored")]
    + [("gpt2", "self_key"), ("gpt2", "rank1")],
)
def test_gradients_and_two_steps(monkeypatch: pytest.MonkeyPatch, name: str, rule: str) -> None:
    launches = Emulator().stats
    tokens = token_ids(2, 40)  # 80 tokens: above decode
    start = converted(name, rule)
    truth = loss_and_grads(copy.deepcopy(start).double(), tokens)[1]
    first, losses, count = {}, {}, {}
    for backend in ("eager", "cuda"):
        monkeypatch.setattr(registry, "_DEFAULT_BACKEND", backend)
        model = copy.deepcopy(start).bfloat16()
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        before = launches()["launches"]
        optimizer = torch.optim.AdamW(npt_parameters(model), lr=3e-3)
        losses[backend] = []
        for _ in range(2):
            loss, grads = loss_and_grads(model, tokens)
            losses[backend].append(loss.item())
            first.setdefault(backend, grads)
            optimizer.step()
        losses[backend].append(model(input_ids=tokens, labels=tokens).loss.item())
        count[backend] = launches()["launches"] - before
        assert frozen and all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert count["eager"] == 0 and count["cuda"] >= 3 * 2 * 4, count
    for got in losses.values():
        assert got[2] < got[1] < got[0], losses
    for got, plain, exact in zip(first["cuda"], first["eager"], truth, strict=True):
        assert bool(got.isfinite().all())
        error, bound = (got.double() - exact).norm(), (plain.double() - exact).norm()
        assert error <= 2 * bound + ROUNDING * exact.norm()


def test_generation_runs_the_decode_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama", "rank1").bfloat16()
    tokens = token_ids(1, 5)
    outputs = {}
    for backend in ("eager", "cuda"):
        monkeypatch.setattr(registry, "_DEFAULT_BACKEND", backend)
        with torch.no_grad():
            outputs[backend] = model(input_ids=tokens).logits
    assert not outputs["cuda"].isnan().any()
    error = (outputs["cuda"].double() - outputs["eager"].double()).norm() / outputs["eager"].double().norm()
    assert error < 4 * ROUNDING, error


#: (rule, width of the MLP, rank) → the steps that run elsewhere and the size that the kernels cannot read.
ELSEWHERE = {
    ("rank1", 264, 16): {},
    ("self_key", 264, 16): {},
    ("rank1", 100, 16): {
        "coefficients": "d = 100", "projection": "in = 100", "gate and up": "f = 100", "gate and up, backward": "f = 100",
        "input gradient": "in = 100",
    },
    ("self_key", 100, 16): {
        "gate and up": "f = 100", "gate and up, backward": "f = 100", "input gradient": "in = 100",
    },
    ("rank1", 264, 6): {
        "coefficients": "R = 6", "projection": "R = 6", "gate and up": "R = 6", "gate and up, backward": "R = 6",
        "input gradient": "R = 6", "value gradients": "R = 6",
    },
    ("self_key", 264, 6): {"gate and up": "R = 6", "value gradients": "R = 6"},
}  # fmt: skip


@pytest.mark.parametrize(("rule", "width", "rank"), ELSEWHERE)
def test_refused_sizes_run_elsewhere_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, rule: str, width: int, rank: int
) -> None:
    """A size that the kernels cannot read: those steps run on the vendor's GEMM, each with one note for all layers."""
    launches, tokens = Emulator().stats, token_ids(2, 40)
    start = converted("llama", rule, rank, intermediate_size=width)
    results = {}
    say_fallback.cache_clear()
    for backend, dtype in (("exact", torch.float64), ("eager", torch.bfloat16), ("cuda", torch.bfloat16)):
        monkeypatch.setattr(registry, "_DEFAULT_BACKEND", "eager" if backend == "exact" else backend)
        model, before = copy.deepcopy(start).to(dtype), launches()["launches"]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _, grads = loss_and_grads(model, tokens)
            results[backend] = [model(input_ids=tokens).logits.detach(), *grads]
    notes = [str(w.message) for w in seen if "not fused" in str(w.message)]
    expected = ELSEWHERE[rule, width, rank]
    assert len(notes) == len(expected), notes
    for step, size in expected.items():
        assert any(f"npt_kernels {step}: not fused" in n and f"{size} is not a multiple of 8" in n for n in notes), step
        assert size != "R = 6" or all("choose a rank that is one" in n for n in notes)
    assert launches()["launches"] > before, "the steps that fit, or the rule alone, still run"
    for got, plain, exact in zip(results["cuda"], results["eager"], results["exact"], strict=True):
        assert bool(got.isfinite().all())
        error, bound = (got.double() - exact).norm(), (plain.double() - exact).norm()
        assert error <= 2 * bound + ROUNDING * exact.norm()
