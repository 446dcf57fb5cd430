"""Adapters on disk: our own format and the two published ones; what is damaged or foreign is named and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters, remove_npt, save_npt
from npt_kernels.model.save import CONFIG_NAME, WEIGHTS_NAME
from tests.support.helpers import assert_unchanged, randomise, snapshot, tiny_model, token_ids

IDS = token_ids()
D, F = 32, 48


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def converted(name="llama", **kwargs):
    model = tiny_model(name)
    apply_npt(model, NPTConfig(**({"layers": "all", "rank": 4} | kwargs)))
    randomise(model)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {}, {"rule": "rank1", "num_ranks": 3}, {"rule": "diagonal", "modulation_scale": 0.3, "targets": ("gate",)},
        {"rule": "anchored", "layers": [0, -1], "rank": [2, 6]}, {"norm_match": False, "targets": ("down",)},
    ],
    ids=str,
)  # fmt: skip
def test_round_trip_is_bitwise(name, kwargs, tmp_path):
    model = converted(name, **kwargs)
    want = logits(model)
    assert save_npt(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [CONFIG_NAME, WEIGHTS_NAME]
    other = tiny_model(name)
    report = load_npt(other, str(tmp_path / "a" / "b"))
    assert torch.equal(logits(other), want)
    for a, b in zip(npt_parameters(model), npt_parameters(other), strict=True):
        assert torch.equal(a, b) and b.requires_grad
    assert report.parameters == sum(p.numel() for p in npt_parameters(model))
    remove_npt(other)
    assert torch.equal(logits(other), logits(tiny_model(name)))


def test_ranks_allotted_by_a_calibration_are_kept(tmp_path):
    model = tiny_model("llama")
    report = apply_npt(model, NPTConfig(layers="all", rank="auto:12"), calibration=token_ids(8, 16))
    save_npt(model, tmp_path)
    other = tiny_model("llama")
    assert [c.rank for c in load_npt(other, tmp_path).converted] == [c.rank for c in report.converted]
    assert torch.equal(logits(other), logits(model))


def test_loading_replaces_an_earlier_conversion(tmp_path):
    save_npt(converted(rule="rank1"), tmp_path)
    model = converted(rank=8, layers=[0])
    load_npt(model, tmp_path)
    assert torch.equal(logits(model), logits(converted(rule="rank1")))
    remove_npt(model)
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert all(p.requires_grad for p in model.parameters())


def test_saving_again_replaces(tmp_path):
    save_npt(converted(rank=8), tmp_path)
    save_npt(converted(rank=4), tmp_path)
    other = tiny_model("llama")
    assert load_npt(other, tmp_path).converted[0].rank == 4


@pytest.mark.parametrize("moment", ["weights", "config", "disk full"])
def test_a_save_that_fails_leaves_the_old_adapter(moment, tmp_path, monkeypatch):
    old = converted(rank=8)
    save_npt(old, tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = converted(rank=4)

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        if moment == "weights":
            patch.setattr("safetensors.torch.save_file", fails)
        elif moment == "config":
            patch.setattr("pathlib.Path.write_text", fails)
        else:
            patch.setattr("os.fsync", fails)
        with pytest.raises(OSError, match="No space left"):
            save_npt(new, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files, "old files intact, no leftovers"
    model = tiny_model("llama")
    load_npt(model, tmp_path)
    assert torch.equal(logits(model), logits(old))


class PowerCut(BaseException):
    pass


def test_a_power_cut_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path, monkeypatch):
    old, new = converted(rank=8), converted(rank=4, rule="rank1")
    wants = [logits(old), logits(new)]
    kept = []
    for after in range(30):
        path = tmp_path / str(after)
        save_npt(old, path)
        count = []

        def cut(plain, count=count, after=after):
            def operation(*args, **kwargs):
                count.append(1)
                if len(count) > after:
                    raise PowerCut  # from here on nothing reaches the disk, and nobody cleans up
                return plain(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for module, name in (
                (os, "fsync"),
                (os, "replace"),
                (pathlib.Path, "unlink"),
                (pathlib.Path, "write_text"),
            ):
                patch.setattr(module, name, cut(getattr(module, name)))
            with contextlib.suppress(PowerCut):
                save_npt(new, path)
        model = tiny_model("llama")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_npt(model, path)
        kept.append([torch.equal(logits(model), want) for want in wants].index(True))
        if caught:
            assert "own configuration is used" in str(caught[0].message)
            kept[-1] = "mixed"
        if len(count) <= after:
            break
    assert kept == sorted(kept, key=[0, "mixed", 1].index) and set(kept) == {0, "mixed", 1}


def test_a_configuration_of_other_weights_is_noticed(tmp_path):
    one, other = converted(rank=8), converted(rule="rank1")
    save_npt(one, tmp_path / "one")
    save_npt(other, tmp_path / "other")
    (tmp_path / "one" / CONFIG_NAME).write_bytes((tmp_path / "other" / CONFIG_NAME).read_bytes())
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"npt_config.json was not written for the npt_model.safetensors beside it"):
        load_npt(model, tmp_path / "one")
    assert torch.equal(logits(model), logits(one))


def test_weights_that_another_tool_wrote_are_loaded_with_a_warning(tmp_path):
    model = converted()
    save_npt(model, tmp_path)
    save_file(
        {name: tensor.half() for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}, tmp_path / WEIGHTS_NAME
    )
    other = tiny_model("llama")
    with pytest.warns(UserWarning, match="used nevertheless, names and shapes of the tensors are checked"):
        load_npt(other, tmp_path)
    for a, b in zip(npt_parameters(model), npt_parameters(other), strict=True):
        assert torch.equal(a.half(), b.half())


def test_adapters_are_the_same_bytes_every_time(tmp_path):
    model = converted()
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        # Often, for safetensors writes the keys of its metadata in an order that changes from call to call.
        assert len({(save_npt(model, tmp_path) / file).read_bytes() for _ in range(8)}) == 1
    assert (tmp_path / CONFIG_NAME).stat().st_mode == (tmp_path / WEIGHTS_NAME).stat().st_mode


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


def check_refused(source, *parts, error=ValueError, name="llama"):

    model = tiny_model(name)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_npt(model, source)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} not in: {caught.value}"
    assert_unchanged(model, before)


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


# ---- adapters that do not belong ---------------------------------------------------------------------------------------


def saved_adapter(tmp_path, **kwargs):
    model = tiny_model("llama", **kwargs)
    apply_npt(model, NPTConfig(layers=[0, 1], rank=8))
    return save_npt(model, tmp_path / "a")


def test_more_layers_are_refused(tmp_path):
    path, other = saved_adapter(tmp_path), tiny_model("llama", layers=6)
    before = snapshot(other)
    with pytest.raises(ValueError, match="with decoder layers 4, this LlamaForCausalLM has 6"):
        load_npt(other, path)
    assert_unchanged(other, before)


def test_another_activation_is_refused(tmp_path):
    path, other = saved_adapter(tmp_path), tiny_model("llama", hidden_act="gelu")
    with pytest.raises(ValueError, match="with activation 'silu', this LlamaForCausalLM has 'gelu'"):
        load_npt(other, path)


def test_other_weights_are_said(tmp_path):
    path, other = saved_adapter(tmp_path), tiny_model("llama")
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape) * 0.05)
    with pytest.warns(UserWarning, match="made for a base model with other weights"):
        load_npt(other, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_weights_in_another_dtype_are_the_same_base(tmp_path, dtype):
    path, other = saved_adapter(tmp_path), tiny_model("llama").to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_npt(other, path)


def test_an_adapter_of_an_earlier_version_is_not_compared(tmp_path):
    path = saved_adapter(tmp_path)
    file = path / "npt_config.json"
    header = json.loads(file.read_text())
    del header["base"]
    file.write_text(json.dumps(header))
    load_npt(tiny_model("llama", layers=6), path)


# ---- found by tests/fuzz -------------------------------------------------------------------------------------------------


def rewritten(tmp_path, **changes):
    """A saved adapter, its configuration changed by hand; keys with a dot reach into it. Returns what it computes."""
    model = converted()
    save_npt(model, tmp_path)
    header = json.loads((tmp_path / CONFIG_NAME).read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = header
        for parent in parents:
            place = place[parent]
        place[last] = value
    (tmp_path / CONFIG_NAME).write_text(json.dumps(header))
    return logits(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": [4, 4, 4, 10**9]},
        {"config__num_ranks": 10**12},
        {"config__rule": "rank1"},
        {"config__norm_match": False},
        {"config__modulation_scale": 7.0},
        {"layers": [0, 1, 2, 99]},
        {"layers": [3, 2, 1, 0], "ranks": [4, 3, 2, 1]},
    ],
    ids=str,
)
def test_a_configuration_that_was_edited_does_not_change_the_adapter(changes, tmp_path):
    want = rewritten(tmp_path, **changes)
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=r"npt_config.json was changed and no longer says what is in"):
        load_npt(model, tmp_path)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": "1"},
        {"format_version": None},
        {"layers": [0, 1, 2, -1]},
        {"layers": [0, 1, 2, True]},
        {"layers": [0, 1, 2, 2]},
        {"layers": [0, 1, 2, float("inf")]},
        {"layers": {}},
        {"ranks": [4, 4, 4, 0]},
        {"ranks": [4, 4, 4, 10**30]},
        {"ranks": [4, 4, 4, "x" * 5000]},
        {"config__modulation_scale": float("nan")},
        {"config__modulation_scale": 10**400},
        {"config__seed": 10**30},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_configuration_that_cannot_be_is_one_line(changes, tmp_path):
    rewritten(tmp_path, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=CONFIG_NAME + " is not a valid NPT configuration") as caught:
            load_npt(tiny_model("llama"), tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "numbers", [None, 3, [1], {"0": 5}, {"0": ["a"] * 18}, {"0": [[]] * 18}, {"0": [float("nan")] * 18}], ids=str
)
def test_numbers_of_the_base_that_are_none_are_not_compared(numbers, tmp_path):
    want = rewritten(tmp_path, base__numbers=numbers)
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_npt(model, tmp_path)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_numbers_that_are_not_finite_are_refused(value, tmp_path):
    save_npt(converted(), tmp_path)
    path = tmp_path / WEIGHTS_NAME
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    tensors["layers.1.w_b_up.down"][2, 3] = value
    save_file(tensors, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_refused(tmp_path, r"layers.1.w_b_up.down holds NaN or infinite numbers")


def test_a_matrix_that_is_not_in_the_file_is_refused(tmp_path):
    big = torch.ones(1, 1).expand(10**6, 10**6)
    for number, strange in enumerate((big, torch.ones(D, 4).to_sparse(), torch.ones(D, 4, device="meta"))):
        payload = low_rank(wrapped=False) | {"layer_0_A": strange}
        check_refused(save(payload, tmp_path, f"{number}.pt"), "layer_0_A of shape .* is not stored as a plain matrix")


def test_saving_over_a_link_leaves_what_it_points_to(tmp_path):
    """As in a cache of downloads: the adapter's files are links to files that others share."""
    save_npt(converted(rank=8), tmp_path / "shared")
    (tmp_path / "mine").mkdir()
    files = {}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        files[name] = (tmp_path / "shared" / name).read_bytes()
        (tmp_path / "mine" / name).symlink_to(tmp_path / "shared" / name)
    load_npt(tiny_model("llama"), tmp_path / "mine")
    save_npt(converted(rank=4), tmp_path / "mine")
    for name, data in files.items():
        assert (tmp_path / "shared" / name).read_bytes() == data
        assert not (tmp_path / "mine" / name).is_symlink()
    assert load_npt(tiny_model("llama"), tmp_path / "mine").converted[0].rank == 4
