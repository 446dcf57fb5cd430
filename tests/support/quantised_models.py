"""Quantised tiny models, and their dense twins, for the tests of several folders."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
import torchao.quantization as ao
from torch import nn

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.conversion.quantise import quantise_base
from npt_kernels.model.fold import NPTOutputProjection
from npt_kernels.model.swap import swap_class
from npt_kernels.ops.dense_on_use import scratch_buffers
from npt_kernels.quantised.linear import QuantisedLinear
from npt_kernels.quantised.names import FORMATS
from npt_kernels.training.objectives import KLObjective, LayerObjective, LocalObjective, enable_checkpointing
from tests.support.helpers import assert_within_twice, randomise, tiny_model, token_ids

__all__ = [
    "OBJECTIVES",
    "PAIRS",
    "ao",
    "assert_gradients_of_dense",
    "bnb",
    "convert",
    "dense_copy",
    "gradients",
    "linear",
    "quantised",
]

PAIRS = [(format, library) for format, libraries in FORMATS.items() for library in libraries]
OBJECTIVES = {"local": LocalObjective, "layer": LayerObjective, "kl": KLObjective}


def linear(d_in=48, d_out=80, bias=True, dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)
    made.weight.copy_(torch.randn(d_out, d_in) * torch.rand(d_out, 1))
    return made


def quantised(name="llama", format="int8", library="auto", *, dtype=torch.float32, layers=3, **overrides):
    model = tiny_model(name, layers=layers, **overrides).to(dtype)
    quantise_base(model, format, library)
    return model


@torch.no_grad()
def dense_copy(model, dtype=None):
    """The same model with plain linears that hold the dequantised weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, dtype=child.dtype)
                plain.weight.copy_(child.weight.to_dense())
                if child.bias is not None:
                    plain.bias.copy_(child.bias)
                setattr(parent, name, plain.requires_grad_(False))
                if isinstance(child, NPTOutputProjection):  # left out in the one, left out in the other
                    swap_class(plain, NPTOutputProjection)
    return model if dtype is None else model.to(dtype)


def convert(model, *, rule="self_key", rank=4, scale=0.1):
    targets = ("c_fc", "c_proj") if hasattr(model, "transformer") else ("gate", "up", "down")
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=rank, init="small", targets=targets))
    randomise(model, scale)
    return model


def poison(loss):
    """A backward that finds every scratch buffer overwritten."""
    buffers = list(scratch_buffers())
    assert buffers, "nothing was made dense"
    for buffer in buffers:
        buffer.fill_(torch.nan)
    loss.backward()


def gradients(model, objective, backward=poison, checkpointing=False):
    enable_checkpointing(model, checkpointing)
    for parameter in npt_parameters(model):
        parameter.grad = None
    loss = OBJECTIVES[objective](model).accumulate(token_ids(), 1.0, backward).loss
    enable_checkpointing(model, False)
    model.eval()
    return [loss, *(parameter.grad for parameter in npt_parameters(model))]


def assert_gradients_of_dense(model, objective, **settings):
    """2× rule; truth: the dense copy in float64."""
    reference = dense_copy(model)
    truth = copy.deepcopy(reference).double()
    expected = gradients(reference, objective, lambda loss: loss.backward(), **settings)
    true = gradients(truth, objective, lambda loss: loss.backward(), **settings)
    names = ["loss", *(name for name, p in model.named_parameters() if p.requires_grad)]
    for name, act, ref, tru in zip(names, gradients(model, objective, **settings), expected, true, strict=True):
        assert tru.abs().max() > 0, name
        assert_within_twice(act, ref, tru.double(), name)
