"""``generate()`` of transformers, one model a shape of decoder layer: at full rank the text and the logits of the original."""

from __future__ import annotations

import warnings

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled
from npt_kernels.model.install import converted_layers
from tests.support.tiny_families import build

#: Shape of the layer → a type that has it.
TYPES = {
    "llama-like": "llama",
    "llama-like (pre_feedforward_layernorm)": "vaultgemma",
    "llama-like (feed_forward)": "llama4_text",
    "llama-like (pre_ff_layernorm)": "jamba",
    "linear attention": "qwen3_5_text",
    "short convolution": "lfm2",
    "fused gate and up": "phi3",
    "gpt2-like": "gpt2",
    "plain-mlp (up_proj)": "arcee",
    "plain-mlp (c_fc)": "starcoder2",
    "plain-mlp (fc1)": "nanochat",
    "plain-mlp (dense_h_to_4h)": "persimmon",
    "open mlp (fc1)": "opt",
    "parallel gated": "cohere",
    "parallel (fc1)": "phi",
    "parallel (dense_h_to_4h)": "gpt_neox",
}
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS = ("dynamic", "no cache", "static", "left padding", "sampling", "beam", "assisted", "prompt lookup")
#: What transformers has no way to do with the original either: a recurrent state cannot be taken back by some tokens.
REFUSED = {"jamba": ("assisted", "prompt lookup"), "qwen3_5_text": ("assisted", "prompt lookup")}


def ids(batch, length, seed=1):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def built(model_type, **overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing CUDA libraries of the recurrent layers
        return build(model_type, **overrides)


@torch.no_grad()
def generated(model, way, assistant=None):
    """Tokens ``[n, seq]`` and the logits of every step; with beams their scores."""
    prompt, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    extra = {"output_logits": True}
    if way == "no cache":
        extra["use_cache"] = False
    elif way == "static":
        extra["cache_implementation"] = "static"
    elif way == "left padding":
        prompt[0, :3], mask[0, :3] = 0, 0
    elif way == "sampling":
        extra |= {"do_sample": True, "temperature": 0.8, "top_k": 20}
        torch.manual_seed(5)
    elif way == "beam":
        extra |= {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    elif way in ("assisted", "prompt lookup"):
        # Both take one sequence. The repetition gives prompt lookup something to propose.
        prompt = ids(1, 4).repeat(1, 3)
        mask = torch.ones_like(prompt)
        extra |= {"assistant_model": assistant} if way == "assisted" else {"prompt_lookup_num_tokens": 3}
    out = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **(SETTINGS | extra))
    assert out.sequences.shape[1] == prompt.shape[1] + SETTINGS["max_new_tokens"]
    return out.sequences, out.sequences_scores if way == "beam" else torch.stack(out.logits)


def assert_same_text(got, want, what):
    assert torch.equal(got[0], want[0]), f"{what}: other tokens"
    assert (got[1] - want[1]).abs().max() <= 1e-5 * want[1].abs().max(), what


@pytest.mark.parametrize("shape", TYPES)
def test_every_way_to_write_gives_the_originals_text(shape):
    model_type = TYPES[shape]
    model, assistant = built(model_type), built(model_type)
    with torch.no_grad():  # an assistant that is sometimes wrong
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    # As a conversion does: of a weight that is frozen torch takes another product here (F.linear of a slice; 2e-7).
    model.requires_grad_(False)
    ways = [way for way in WAYS if way not in REFUSED.get(model_type, ())]
    want = {way: generated(model, way, assistant) for way in ways}
    report = apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=ids(8, 32, seed=2))
    assert report.converted[0].shape == shape
    for way in ways:
        assert_same_text(generated(model, way, assistant), want[way], way)
    with npt_disabled(model):
        assert torch.equal(generated(model, "dynamic")[1], want["dynamic"][1])
    for way in REFUSED.get(model_type, ()):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generated(model, way, assistant)
    # It was the change that wrote it: without, attention is not heard.
    with torch.no_grad():
        for layer in converted_layers(model).values():
            for value in layer.np_component.w_b_up.values():
                value.zero_()
    assert (generated(model, "dynamic")[1] - want["dynamic"][1]).abs().max() > 0.1 * want["dynamic"][1].abs().max()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi"])
def test_at_a_low_rank_every_way_to_write_gives_its_own_text(model_type):
    """Not the original's any more, but the same by every cache; and as the assistant of the original it costs no token."""
    model, original = built(model_type), built(model_type)
    apply_npt(model, NPTConfig(layers="all", rank=4), calibration=ids(8, 32, seed=2))
    want = generated(model, "no cache")
    assert (want[1] - generated(original, "no cache")[1]).abs().max() > 1e-3 * want[1].abs().max()
    for way in ("dynamic", "static"):
        assert_same_text(generated(model, way), want, way)
    alone = model.generate(ids(2, 7)[:1, 3:], **SETTINGS)
    assert torch.equal(generated(model, "left padding")[0][:1, 3:], alone)
    assert_same_text(
        generated(original, "assisted", model), generated(original, "assisted", original), "as an assistant"
    )
