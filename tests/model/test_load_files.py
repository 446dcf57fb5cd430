"""Adapters in the published formats, and files that are damaged or of another model: loaded exactly or refused in one line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from npt_kernels import NPTConfig, apply_npt, load_npt, save_npt
from npt_kernels.model.save import CONFIG_NAME, WEIGHTS_NAME
from tests.support.adapters import D, F, check_refused, converted, logits
from tests.support.helpers import assert_unchanged, snapshot, tiny_model

# ------------------------------------------------------------------------------------------ published formats


def low_rank(layers=(1, 3), r=5, scale=0.4, wrapped=True):
    torch.manual_seed(11)
    state = {}
    for i in layers:
        state[f"layer_{i}_A"], state[f"layer_{i}_B"] = torch.randn(D, r) * 0.2, torch.randn(r, F) * 0.2
    return {"state_dict": state, "config": {"modulation_scale": scale, "rank": r}} if wrapped else state


def rank_k(layers=(0, 2), r=3, k=1, prefix="layer_{}_np.", out=F):
    torch.manual_seed(12)
    state = {}
    for i in layers:
        for j in range(k):
            end = f".{j}" if k > 1 else ""
            state[f"{prefix.format(i)}W_down{end}"] = torch.randn(D, r) * 0.3
            state[f"{prefix.format(i)}W_a_up{end}"] = torch.randn(r, D) * 0.3
            state[f"{prefix.format(i)}W_b_up{end}"] = torch.randn(r, out) * 0.3
    return state


def gate_spy(model, index, name="llama"):
    """(input, attention) of layer ``index`` and the gate matrix, to compute the published formula by hand."""
    layer = (model.transformer.h if name == "gpt2" else model.model.layers)[index]
    seen = {}
    attention = layer.attn if name == "gpt2" else layer.self_attn
    layer.register_forward_hook(lambda m, args, out: seen.update(h=args[0], out=out))
    attention.register_forward_hook(lambda m, args, out: seen.update(a=out[0]))
    logits(model)
    return layer, {k: v.flatten(0, 1).double() for k, v in seen.items()}


def save(payload, tmp_path, name="adapter.pt"):
    torch.save(payload, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrapped", [True, False])
def test_low_rank_format(wrapped, tmp_path):
    payload = low_rank(wrapped=wrapped)
    model = tiny_model("llama")
    report = load_npt(model, save(payload, tmp_path))
    assert report.layers == (1, 3)
    assert {(c.rule, c.rank, c.targets) for c in report.converted} == {("diagonal", 5, ("gate",))}
    state, scale = (payload["state_dict"], 0.4) if wrapped else (payload, 1.0)
    layer, seen = gate_spy(model, 1)
    a_matrix, b_matrix = state["layer_1_A"].double(), state["layer_1_B"].double()
    x = layer.post_attention_layernorm.double()(seen["h"])
    mlp = layer.mlp.double()
    gate = mlp.gate_proj(x) + (scale * torch.tanh(seen["a"] @ a_matrix) * (x @ a_matrix)) @ b_matrix
    expected = seen["h"] + mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("prefix", ["layer_{}_np.", "model.layers.{}.np_component.", "layers.{}.np_component."])
def test_rank_k_format(k, prefix, tmp_path):
    state = rank_k(k=k, prefix=prefix)
    model = tiny_model("llama")
    report = load_npt(model, save(state, tmp_path))
    assert report.layers == (0, 2)
    assert {(c.rule, c.rank, c.targets) for c in report.converted} == {("rank1", 3, ("gate",))}
    assert model.model.layers[0].np_component.num_ranks == k
    layer, seen = gate_spy(model, 2)
    x, mlp = layer.post_attention_layernorm.double()(seen["h"]), layer.mlp.double()
    gate = mlp.gate_proj(x)
    for j in range(k):
        down, key, value = (
            state[f"{prefix.format(2)}{p}" + (f".{j}" if k > 1 else "")].double()
            for p in ("W_down", "W_a_up", "W_b_up")
        )
        z = seen["a"] @ down
        gate = gate + (z @ value) * ((z @ key) * x).sum(-1, keepdim=True)
    expected = seen["h"] + mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=1e-5)


def test_published_gate_is_gpt2s_first_matrix(tmp_path):
    model = tiny_model("gpt2")
    report = load_npt(model, save(rank_k(out=4 * D), tmp_path))
    assert report.converted[0].targets == ("c_fc",)
    _, seen = gate_spy(model, 0, "gpt2")
    assert seen["out"].isfinite().all()
    assert (logits(model) - logits(tiny_model("gpt2"))).abs().max() > 1e-2


def test_ranks_may_differ_between_layers_and_a_directory_is_searched(tmp_path):
    state = rank_k(layers=(0,), r=3) | rank_k(layers=(2,), r=6)
    save(state, tmp_path, "only.bin")
    report = load_npt(tiny_model("llama"), tmp_path)
    assert [(c.index, c.rank) for c in report.converted] == [(0, 3), (2, 6)]


def test_published_survives_our_own_round_trip(tmp_path):
    model = tiny_model("llama")
    load_npt(model, save(low_rank(), tmp_path))
    save_npt(model, tmp_path / "own")
    other = tiny_model("llama")
    load_npt(other, tmp_path / "own")
    assert torch.equal(logits(other), logits(model))


# ------------------------------------------------------------------------------------------------- bad files


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


PUBLISHED = [
    (without(rank_k(), "layer_0_np.W_a_up"), "layer 0", "W_a_up"),
    (without(rank_k(k=3), "layer_2_np.W_b_up.1"), "layer 2", "W_b_up", r"\[0, 2\]"),
    (without(low_rank(wrapped=False), "layer_3_B"), "layer_3_B is missing"),
    (rank_k() | {"layer_0_np.bias": torch.ones(3)}, "neither published format", "layer_0_np.bias"),
    (rank_k() | low_rank(wrapped=False), "neither published format"),
    ({"weight": torch.ones(3)}, "neither published format", "weight"),
    ({}, "neither published format", "no tensors"),
    ([torch.ones(3)], "holds a list", "mapping"),
    ({"state_dict": 3}, "state_dict is a int"),
    (rank_k() | {"layer_0_np.W_down": torch.ones(D)}, "layer_0_np.W_down.0 has shape", "matrix"),
    (rank_k() | {"layer_0_np.W_a_up": torch.ones(4, D)}, "layer 0 term 0", "rank 3"),
    (rank_k(layers=(0,)) | rank_k(layers=(2,), k=2), "different numbers of terms"),
    (low_rank(scale="big"), "modulation_scale is 'big'", "number"),
    (rank_k(layers=(9,)), "layers contains 9", "4 layers"),
    (rank_k(out=F + 1), "layers.0.w_b_up.gate has shape", r"\[3, 49\]", r"\[3, 48\]", "another base model"),
    (
        {k: v.to(torch.int64) for k, v in rank_k().items()},
        "w_a_up.gate is torch.int64|w_b_up.gate is torch.int64|w_down is torch.int64",
    ),
]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: c[1][:35])
def test_bad_published(case, tmp_path):
    payload, *parts = case
    check_refused(save(payload, tmp_path), *parts)


def test_missing_files(tmp_path):
    check_refused(tmp_path / "nowhere", "nowhere does not exist", CONFIG_NAME, error=FileNotFoundError)
    check_refused(tmp_path, f"no {CONFIG_NAME}", "found: none", error=FileNotFoundError)
    save_npt(converted(), tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    check_refused(tmp_path, WEIGHTS_NAME, "missing", error=FileNotFoundError)


def test_two_candidates(tmp_path):
    save(rank_k(), tmp_path, "a.pt")
    save(rank_k(), tmp_path, "b.pt")
    check_refused(tmp_path, "a.pt, b.pt", error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_weights(keep, tmp_path):
    save_npt(converted(), tmp_path)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    check_refused(tmp_path, WEIGHTS_NAME, "damaged")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": {}}', '{"config": {"rank": 0}, "layers": [0], "ranks": [4]}',
     '{"config": {"rnak": 4}, "layers": [0], "ranks": [4]}', '{"config": {}, "layers": ["a"], "ranks": [4]}',
     '{"config": 3, "layers": [0], "ranks": [4]}'],
)  # fmt: skip
def test_damaged_config(text, tmp_path):
    save_npt(converted(), tmp_path)
    (tmp_path / CONFIG_NAME).write_text(text)
    check_refused(tmp_path, CONFIG_NAME, "not a valid NPT configuration")


def test_format_of_the_future(tmp_path):
    save_npt(converted(), tmp_path)
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header | {"format_version": 99}))
    check_refused(tmp_path, "format_version 99", "upgrade")


def test_ranks_and_layers_that_do_not_match(tmp_path):
    save_npt(converted(), tmp_path)
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header | {"ranks": [4]}))
    check_refused(tmp_path, "1 ranks for 4 layers")


def test_not_a_torch_file(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    check_refused(tmp_path / "x.pt", "x.pt could not be read", "weights_only=True")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/npt_kernels_evil",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"layer_0_A": Evil()}, tmp_path / "x.pt")
    check_refused(tmp_path / "x.pt", "weights_only=True")
    assert not os.path.exists("/tmp/npt_kernels_evil")


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path):
    save_npt(converted(), tmp_path)
    path = tmp_path / WEIGHTS_NAME
    good = load_file(path)
    # As if it had come without a checksum, from an earlier version.
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    del header["weights_sha256"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header))
    save_file(without(good, "layers.2.w_down"), path)
    check_refused(tmp_path, "missing 1: layers.2.w_down")
    save_file(good | {"layers.7.w_down": torch.ones(1)}, path)
    check_refused(tmp_path, "unexpected 1: layers.7.w_down")
    save_file(good | {"layers.1.w_b_up.up": torch.ones(4, 5)}, path)
    check_refused(tmp_path, r"layers.1.w_b_up.up has shape \[4, 5\]", r"needs \[4, 48\]")


def test_wrong_model(tmp_path):
    save_npt(converted("gpt2"), tmp_path / "gpt2")
    check_refused(tmp_path / "gpt2", "shape of the layers .gpt2-like., this LlamaForCausalLM has .llama-like.")
    wide = tiny_model("llama", hidden_size=64)
    apply_npt(wide, NPTConfig(layers="all", rank=4))
    save_npt(wide, tmp_path / "wide")
    check_refused(tmp_path / "wide", "has shape", "another base model")
    deep = tiny_model("llama", layers=6)
    apply_npt(deep, NPTConfig(layers="all", rank=4))
    save_npt(deep, tmp_path / "deep")
    check_refused(tmp_path / "deep", "4 layers")


def test_a_refused_load_keeps_an_earlier_conversion(tmp_path):
    save_npt(converted("gpt2"), tmp_path)
    model = converted()
    before, want = snapshot(model), logits(model)
    with pytest.raises(ValueError):
        load_npt(model, tmp_path)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), want)


def test_a_matrix_that_is_not_in_the_file_is_refused(tmp_path):
    big = torch.ones(1, 1).expand(10**6, 10**6)
    for number, strange in enumerate((big, torch.ones(D, 4).to_sparse(), torch.ones(D, 4, device="meta"))):
        payload = low_rank(wrapped=False) | {"layer_0_A": strange}
        check_refused(save(payload, tmp_path, f"{number}.pt"), "layer_0_A of shape .* is not stored as a plain matrix")
