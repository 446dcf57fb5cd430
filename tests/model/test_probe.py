"""Layers that do more than their children's names say are refused before anything is changed, whatever hides it."""

from __future__ import annotations

import types

import pytest
import torch
import transformers as tf
from torch import nn

from npt_kernels import NPTConfig, apply_npt, load_npt, remove_npt, save_npt
from tests.support.helpers import MODELS, assert_unchanged, snapshot, tiny_model, token_ids
from tests.support.tiny_families import build

ALL = NPTConfig(layers="all", rank=8)
SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def refused(model, message, config=ALL):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        apply_npt(model, config)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_fits_is_left_bit_for_bit(name, mode):
    model = tiny_model(name).train(mode)
    before, random = snapshot(model), torch.get_rng_state()
    apply_npt(model, ALL)
    remove_npt(model)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random), "nothing was drawn from the user's random numbers"


def test_multipliers_on_the_residual():
    model = tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, residual_multiplier=0.22)).eval()
    refused(model, r"layer 0 cannot be converted: its forward is not h \+ a \+ MLP")
    # One that is 1 leaves a layer that is what it should be.
    assert apply_npt(tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES)).eval(), ALL).layers == (0, 1)


def test_a_norm_inside_the_mlp():
    refused(tf.BitNetForCausalLM(tf.BitNetConfig(**SIZES)).eval(), "ffn_sub_norm")
    model = tiny_model("llama")
    for layer in model.model.layers:
        kind = type(layer.mlp)
        layer.mlp.__class__ = type(
            "InnerNorm", (kind,), {"forward": lambda self, x, k=kind: k.forward(self, x / x.norm())}
        )
    refused(model, r"InnerNorm does more than a llama-like layer's")


def test_layers_that_return_tuples():
    # GPT-Neo's pairs are converted: tests/model/test_fused.py
    old = tf.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    refused(tf.OpenAIGPTLMHeadModel(old).eval(), "not hidden states")


def patched(change):
    """A tiny Llama all of whose layers have a class of their own with that forward."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = type("PatchedLayer", (type(layer),), {"forward": change})
    return model


def llama_forward(self, hidden_states, scale=1.0, drop=None, **kwargs):
    residual = hidden_states
    a, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = residual + (a if drop is None else drop(a))
    return hidden_states + scale * self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_forward_written_anew_is_accepted_if_it_is_the_same():
    apply_npt(patched(llama_forward), ALL)


@pytest.mark.parametrize("fresh", [1.0, 0.0])
def test_a_learned_scale_that_is_still_fresh(fresh):
    """A LayerScale of ones computes the plain layer now, and not after one training step; of zeros, nothing at all."""

    def forward(self, hidden_states, **kwargs):
        return llama_forward(self, hidden_states, scale=self.mlp.layer_scale, **kwargs)

    model = patched(forward)
    for layer in model.model.layers:
        layer.mlp.layer_scale = nn.Parameter(torch.full((32,), fresh))
    refused(model, r"its forward is not h \+ a \+ MLP")


def test_dropout_between_attention_and_residual():
    """Invisible in evaluation mode, where models are converted."""

    def forward(self, hidden_states, **kwargs):
        return llama_forward(self, hidden_states, drop=self.mlp.resid_dropout, **kwargs)

    model = patched(forward)
    for layer in model.model.layers:
        layer.mlp.resid_dropout = nn.Dropout(0.5)
    refused(model.eval(), "with dropout on is not")


def test_dropout_inside_the_attention_is_fine():
    model = tiny_model("gpt2")
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    apply_npt(model, ALL)


def test_one_layer_of_many():
    model = tiny_model("llama")
    layer = model.model.layers[2]
    layer.__class__ = type(
        "Scaled", (type(layer),), {"forward": lambda self, h, **kw: llama_forward(self, h, scale=2.0, **kw)}
    )
    refused(model, "layer 2 cannot be converted")
    assert apply_npt(model, NPTConfig(layers=[0, 1, 3], rank=8)).layers == (0, 1, 3)


def test_an_adapter_is_not_loaded_onto_other_layers(tmp_path):
    model = tiny_model("llama")
    apply_npt(model, ALL)
    save_npt(model, tmp_path)
    other = patched(lambda self, h, **kw: llama_forward(self, h, scale=0.5, **kw))
    before = snapshot(other)
    with pytest.raises(ValueError, match="layer 0 cannot be converted"):
        load_npt(other, tmp_path)
    assert_unchanged(other, before)


def test_no_closed_form_without_the_norm_match():
    model = tiny_model("llama")
    before = snapshot(model)
    for init in ("auto", "closed_form"):
        with pytest.raises(ValueError, match="norm_match=False has no closed form"):
            apply_npt(model, NPTConfig(layers="all", rank=8, norm_match=False, init=init), calibration=token_ids(4, 16))
    assert_unchanged(model, before)
    apply_npt(model, NPTConfig(layers="all", rank=8, norm_match=False, init="small"))


def test_a_bare_decoder_and_one_without_embeddings():
    apply_npt(tiny_model("llama").model, ALL)
    model = tiny_model("llama").model
    model.get_input_embeddings = types.MethodType(lambda self: None, model)
    apply_npt(model, ALL)


@pytest.mark.parametrize("model_type", ["gpt_neox", "cohere", "phi", "llama", "gpt2", "opt", "phi3"])
def test_autocast_refuses_nobody(model_type):
    """As `npt train` converts where there are bf16 instructions. GPT-NeoX adds its terms in another order than the probe."""
    model = build(model_type)
    with torch.autocast("cpu", torch.bfloat16):
        report = apply_npt(model, ALL)
    assert len(report.converted) == 2
