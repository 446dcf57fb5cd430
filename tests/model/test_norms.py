"""The norm match: identities of the closed form, agreement with the modules of real models, recognition by numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npt_kernels.model.norms import identify_norm, matched_norm, norm_eps
from tests.support.helpers import randn

D = 16


def rms_norm(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(D, eps=1e-5).to(dtype)
    norm.weight.data.add_(torch.randn(D).to(dtype) * 0.2)
    return norm


def layer_norm(dtype):
    norm = nn.LayerNorm(D, eps=1e-5).to(dtype)
    norm.weight.data.add_(torch.randn(D).to(dtype) * 0.2)
    norm.bias.data.add_(torch.randn(D).to(dtype) * 0.2)
    return norm


NORMS = {"rms": rms_norm, "layer": layer_norm}
kinds = pytest.mark.parametrize("kind", ["rms", "layer"])


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_attention_it_is_the_norm_itself(kind, dtype):
    norm = NORMS[kind](dtype)
    h = randn(7, 3, D, dtype=dtype) * 2 + 0.3
    u, key_scale = matched_norm(norm, kind, h, torch.zeros_like(h))
    expected = norm(h)
    assert u.dtype == dtype and u.shape == h.shape and key_scale.shape == (7, 3)
    if kind == "rms" and dtype != torch.float64:
        assert torch.equal(u, expected), "the same roundings in the same order as Llama's module"
        return
    wide_eps = torch.finfo(
        torch.float32 if dtype == torch.float64 and kind == "rms" else dtype
    ).eps  # HF's RMSNorm is fp32
    assert (u - expected).abs().max() <= 2 * wide_eps * expected.abs().max()


@kinds
def test_identity_of_the_closed_form(kind):
    """norm(h + a) − u is linear in a: γ ⊙ (a − mean a)·key_scale, with the mean only for LayerNorm."""
    h, a = randn(50, D) * 3, randn(50, D)
    norm = NORMS[kind](torch.float64)
    u, key_scale = matched_norm(norm, kind, h, a)
    total = h + a
    if kind == "rms":
        full = norm.weight * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        part = a
    else:
        full = norm(total)
        part = a - a.mean(-1, keepdim=True)
    torch.testing.assert_close(full, u + norm.weight * part * key_scale.unsqueeze(-1), rtol=1e-12, atol=1e-12)
    assert (full - u).abs().max() > 0.1, "attention matters in this test"


@kinds
def test_is_differentiable(kind):
    norm = NORMS[kind](torch.float64).requires_grad_(False)
    h, a = randn(2, D).requires_grad_(), randn(2, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, a: matched_norm(norm, kind, h, a), (h, a))


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_identify(kind, dtype):
    assert identify_norm(NORMS[kind](dtype), D) == kind


def test_identify_knows_torchs_own_rms_norm():
    assert identify_norm(nn.RMSNorm(D, eps=1e-6), D) == "rms"


def test_identify_refuses_what_is_neither():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    gemma = GemmaRMSNorm(D)
    gemma.weight.data.add_(torch.randn(D) * 0.2)  # scales by 1 + weight
    assert identify_norm(gemma, D) == "rms1"
    assert identify_norm(nn.Identity(), D) == "none"
    assert identify_norm(nn.LayerNorm(D + 1), D) is None, "another width"
    assert identify_norm(nn.RMSNorm(D, device="meta"), D) is None

    class Scaled(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.01

    assert identify_norm(Scaled(D), D) is None


def test_eps():
    assert norm_eps(nn.LayerNorm(4, eps=0.25)) == 0.25
    assert norm_eps(rms_norm(torch.float32)) == 1e-5
    assert norm_eps(nn.Identity()) == 0.0
    assert norm_eps(nn.RMSNorm(4)) >= 0.0
