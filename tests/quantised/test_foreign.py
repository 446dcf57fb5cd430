"""Models that bitsandbytes or torchao quantised: read as they are, or taken over without a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npt_kernels import NPTConfig, apply_npt, npt_disabled, remove_npt
from npt_kernels.conversion.quantise import adopt_quantised, quantise_linear
from npt_kernels.model.linears import linear_weight, unsupported_linear
from npt_kernels.quantised.linear import QuantisedLinear
from npt_kernels.run.fingerprint import base_fingerprint
from tests.support.helpers import tiny_model, token_ids
from tests.support.quantised_models import ao, assert_gradients_of_dense, bnb, convert, gradients, linear


def bnb_linear(plain: nn.Linear, kind: str, **settings) -> nn.Module:
    shape, bias, weight = (plain.in_features, plain.out_features), plain.bias is not None, plain.weight.detach().clone()
    if kind == "8bit":
        made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=weight.dtype, quant_type="nf4", **settings)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made, **settings)
    if bias:
        made.bias = plain.bias
    return made


def library_model(kind: str, **settings) -> nn.Module:
    """As BitsAndBytesConfig or TorchAoConfig would load it. Widths are multiples of 64, as the libraries want."""
    model = tiny_model("llama", layers=2, hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if not isinstance(child, nn.Linear):
                    continue
                if kind in ("8bit", "4bit"):
                    made = bnb_linear(child, kind, **settings).to("cpu").eval()
                    if kind == "4bit":
                        made.support_avx512bf16_for_cpu = False  # what bitsandbytes finds on most CPUs
                    setattr(parent, name, made)
                else:
                    config = ao.Int8WeightOnlyConfig() if kind == "int8" else ao.Float8WeightOnlyConfig()
                    ao.quantize_(child, config)
    return model


KINDS = {"8bit": "int8", "4bit": "nf4", "int8": "int8", "fp8": "fp8"}


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_a_library_quantised_convert_as_they_are(kind):
    model = library_model(kind, **({"compress_statistics": False} if kind == "4bit" else {}))
    ids = token_ids()
    with torch.no_grad():
        original = model(ids).logits
        fingerprint = base_fingerprint(model)
        assert len(fingerprint) > len(dict(model.named_parameters()))
        weight = linear_weight(model.model.layers[0].mlp.up_proj)
        made = quantise_linear(tiny_model("llama", layers=2, hidden_size=64, intermediate_size=128).model.layers[0].mlp.up_proj,
                               KINDS[kind], "bitsandbytes" if "bit" in kind else "torchao")  # fmt: skip
        assert torch.equal(weight + 0, made.weight.to_dense())
    apply_npt(model, NPTConfig(layers="all", rank=1.0, refit=False), token_ids(16, 16))
    with torch.no_grad():
        # The student's MLP is exact; Linear8bitLt rounds the activations of the teacher's.
        assert (model(ids).logits - original).abs().max() < (0.02 if kind == "8bit" else 2e-4) * original.abs().max()
        with npt_disabled(model):
            assert torch.equal(model(ids).logits, original)
    for objective in ("local", "kl"):
        found = gradients(model, objective)
        assert all(bool(g.isfinite().all()) for g in found)
    assert base_fingerprint(model) == fingerprint
    remove_npt(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original)


@pytest.mark.parametrize("kind", [*KINDS, "4bit nested"])
def test_adopted_linears_share_the_librarys_storage(kind):
    kind, _, nested = kind.partition(" ")
    model = library_model(kind, **({"compress_statistics": bool(nested)} if kind == "4bit" else {}))
    theirs = model.model.layers[0].mlp.down_proj
    values, bytes_of_codes = linear_weight(theirs) + 0, theirs.weight
    assert adopt_quantised(model) == 14
    made = model.model.layers[0].mlp.down_proj
    assert isinstance(made, QuantisedLinear) and made.format == KINDS[kind]
    assert torch.equal(made.weight.to_dense(), values)
    codes = bytes_of_codes.qdata if kind in ("int8", "fp8") else bytes_of_codes
    assert made.codes.data_ptr() == codes.data_ptr()
    assert adopt_quantised(model) == 0
    convert(model)
    assert_gradients_of_dense(model, "kl")


def test_linears_that_cannot_be_read_are_named():
    plain = linear(64, 64)
    fresh = bnb_linear(plain, "4bit")
    assert "not quantised yet; move it to its device first" in unsupported_linear(fresh)
    made = bnb_linear(plain, "4bit").to("cpu")
    made.support_avx512bf16_for_cpu = True
    assert "repacks in place on this CPU" in unsupported_linear(made)
    made.support_avx512bf16_for_cpu = False
    assert unsupported_linear(made) is None
    made.weight.quant_state.packing_format_for_cpu = True
    assert "has repacked for this CPU" in unsupported_linear(made)
    assert "weight is not int8 yet" in unsupported_linear(bnb_linear(plain, "8bit"))
    assert unsupported_linear(bnb_linear(plain, "8bit").to("cpu")) is None

    class AwqLinear(nn.Module):
        pass

    assert "AwqLinear, neither a plain Linear or Conv1D nor one quantised by NPT, bitsandbytes or torchao" in (
        unsupported_linear(AwqLinear()) or ""
    )
    model = tiny_model("llama", layers=2)
    model.model.layers[0].mlp.up_proj = AwqLinear()
    with pytest.raises(ValueError, match=r"layer 0 cannot be converted: .*mlp\.up_proj is a .*AwqLinear"):
        apply_npt(model, NPTConfig(layers=[0], rank=2))
