"""Adapters on disk: our own format and the two published ones; what is damaged or foreign is named and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters, remove_npt, save_npt
from npt_kernels.model.save import CONFIG_NAME, WEIGHTS_NAME
from tests.support.adapters import check_refused, converted, logits
from tests.support.helpers import assert_unchanged, snapshot, tiny_model, token_ids


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
