"""A converted model on the emulated kernels: values, gradients, two training steps (``NPT_EMULATE=1``; conftest.py).

Held to the 2x rule: against a float64 model, at most twice the error of the same model on ``eager`` in bfloat16 and one rounding.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.ops import registry
from tests.support.helpers import randomise, tiny_model, token_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "emulator"))
from control import Emulator

ROUNDING = 2.0**-8  # bfloat16
SIZES = {
    "llama": dict(hidden_size=128, intermediate_size=264, max_position_embeddings=128),
    "gpt2": dict(n_embd=128, n_positions=128),
}


def converted(name: str, rule: str) -> nn.Module:
    model = tiny_model(name, layers=3, **SIZES[name])
    targets = dict(targets=("gate",)) if rule == "diagonal" else {}  # its key is w_down itself
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=16, init="small", **targets))
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
