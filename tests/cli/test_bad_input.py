"""Bad input: one line that names the argument, the value it has and what would work; a model is never half converted."""

from __future__ import annotations

import re

import pytest
import torch

from npt_kernels import (
    AdapterTensors,
    NPTConfig,
    apply_npt,
    load_npt,
    npt_disabled,
    npt_factored_linear,
    npt_gated_mlp,
    npt_linear,
    npt_mlp,
    npt_parameters,
    remove_npt,
    save_npt,
)
from tests.support.helpers import (
    assert_unchanged,
    factored_problem,
    linear_problem,
    mlp_problem,
    snapshot,
    tiny_model,
    token_ids,
)

t = torch.randn


def refuses(call, *parts, error=(ValueError, TypeError)):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, f"more than one line: {message}"
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in: {message}"


# ------------------------------------------------------------------------------------------------------- ops

LINEAR = [
    ({"x": t(5, 8)}, "x has shape", r"\[5, 8\]", "in = 7"),
    ({"x": t(5, 6), "v_a": t(5, 2, 6)}, "x has shape", r"weight\.t\(\)"),
    ({"x": torch.ones(5, 7, dtype=torch.int64)}, "x must be floating", "int64"),
    ({"x": [1.0]}, "x must be a torch.Tensor", "list"),
    ({"x": torch.tensor(1.0)}, "x has shape", r"\[\]"),
    ({"weight": t(6)}, "weight has shape", r"\[6\]", r"\[out, in\]"),
    ({"weight": t(6, 7).double()}, "weight is torch.float64", "x is torch.float32", r"weight\.to"),
    ({"weight": t(6, 7).to("meta")}, "weight is on meta", "x is on cpu"),
    ({"weight": None}, "weight must be a torch.Tensor", "NoneType"),
    ({"v_a": t(5, 2, 8)}, "v_a ends in 8", r"v_a \[\.\.\., 7\]"),
    ({"v_b": t(5, 2, 8)}, "v_b in 8", r"v_b \[\.\.\., 6\]"),
    ({"v_a": t(5, 3, 7)}, "v_a has k = 3", "v_b has 2"),
    ({"v_a": t(5, 7)}, "v_a has shape", "v_b", r"both"),
    ({"v_a": t(4, 2, 7), "v_b": t(4, 2, 6)}, "v_a has shape", r"\[5\]"),
    ({"v_b": t(4, 2, 6)}, "v_b has shape", r"\[5\]"),
    ({"bias": t(7)}, "bias has shape", r"\[7\]", r"\[out\] = \[6\]"),
    ({"bias": torch.ones(6, dtype=torch.int32)}, "bias must be floating", "int32"),
    ({"bias": 3}, "bias must be a torch.Tensor", "int"),
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda c: f"{next(iter(c[0]))}-{c[1]}")
def test_linear(case):
    changed, *parts = case
    tensors = linear_problem(5, 7, 6, 2, dtype=torch.float32).tensors
    refuses(lambda: npt_linear(**(tensors | changed)), "^npt_linear: ", *parts)


FACTORED = [
    ({"z": t(5, 3)}, "num_ranks=2", "divides R = 3"),
    ({"z": t(5, 6)}, "w_b_up has shape", r"\[R, out\] = \[6, 6\]"),
    ({"z": t(4, 4)}, "z has shape", r"\[4, 4\]", r"\[5\]"),
    ({"z": torch.tensor(1.0)}, "z has shape", r"\[\]"),
    ({"z": "z"}, "z must be a torch.Tensor", "str"),
    ({"w_a_up": None}, "w_a_up is None", "rank1", r"\[4, 7\]"),
    ({"w_a_up": t(7)}, "w_a_up has shape", r"\[R, in\]", r"\[4, 7\]"),
    ({"w_a_up": [1]}, "w_a_up must be a torch.Tensor", "list"),
    ({"w_b_up": t(4, 5)}, "w_b_up has shape", r"\[4, 5\]", r"\[4, 6\]"),
    ({"w_b_up": None}, "w_b_up must be a torch.Tensor"),
    ({"w_b_up": t(4, 6).half()}, "w_b_up is torch.float16", "x is torch.float32"),
    ({"weight": t(7, 7), "bias": None}, r"w_b_up has shape \[4, 6\]", r"\[4, 7\]"),
    ({"bias": t(1)}, "bias has shape", r"\[out\] = \[6\]"),
    ({"rule": "rank2"}, "rule='rank2'", "choose one of rank1, diagonal, anchored, self_key"),
    ({"rule": None}, "rule=None", "choose one of"),
    ({"rule": "self_key"}, "w_a_up must be None", "self_key"),
    ({"rule": "anchored"}, "w_a_up has shape", r"\[in\]", r"= \[7\]", "anchored"),
    ({"num_ranks": 3}, "num_ranks=3", "divides R = 4"),
    ({"num_ranks": 0}, "num_ranks=0", "positive whole number"),
    ({"num_ranks": -2}, "num_ranks=-2", "positive whole number"),
    ({"num_ranks": 2.0}, r"num_ranks=2\.0", "whole number"),
    ({"num_ranks": True}, "num_ranks=True", "whole number"),
    ({"scale": "big"}, "scale='big'", "number"),
    ({"scale": None}, "scale=None", "number"),
]


@pytest.mark.parametrize("case", FACTORED, ids=lambda c: f"{next(iter(c[0]))}-{c[1]}")
def test_factored_linear(case):
    changed, *parts = case
    arguments = factored_problem("rank1", 5, 7, 6, 2, 2, dtype=torch.float32).tensors | {
        "rule": "rank1",
        "num_ranks": 2,
    }
    refuses(lambda: npt_factored_linear(**(arguments | changed)), *parts)


def gated(**changed):
    p = mlp_problem("rank1", 5, 4, 6, 3, 2, 1, dtype=torch.float32).tensors
    adapter = {
        "w_down": p["w_down"], "w_a_up": {n: p[f"{n}_key"] for n in ("gate", "up", "down")},
        "w_b_up": {n: p[f"{n}_value"] for n in ("gate", "up", "down")}, "rule": "rank1",
    }  # fmt: skip
    arguments = {
        "x": p["x"], "a": p["a"], "gate_proj": p["gate_weight"], "up_proj": p["up_weight"], "down_proj": p["down_weight"],
        "adapter": adapter | changed.pop("adapter_changes", {}), "key_scale": p["key_scale"], "gate_bias": p["gate_bias"],
        "up_bias": p["up_bias"], "down_bias": p["down_bias"],
    }  # fmt: skip
    return npt_gated_mlp(**(arguments | changed))


def test_the_good_call_works():
    assert gated().shape == (5, 4)


MLP = [
    ({"x": t(5, 5)}, "x has shape", "in = 4"),
    ({"x": None}, "x must be a torch.Tensor"),
    ({"a": t(4, 3)}, "a has shape", r"\[4, 3\]", r"\[5\]"),
    ({"a": t(5, 2)}, "w_down has shape", r"\[2, R\]"),
    ({"a": torch.tensor(1.0)}, "a has shape", r"\[\]"),
    ({"a": t(5, 3).double()}, "a is torch.float64", "x is torch.float32"),
    ({"gate_proj": t(4, 6)}, "gate_proj has shape", r"\[f, d\] = \[6, 4\]"),
    ({"gate_proj": None}, "gate_proj must be a torch.Tensor"),
    ({"up_proj": t(6, 5)}, "x has shape", "up_proj"),
    ({"up_proj": t(5, 4)}, "up_bias has shape", r"\[5\]"),
    ({"down_proj": t(6, 4)}, "down_proj has shape", r"\[6, 4\]", "6"),
    ({"down_proj": torch.tensor(1.0)}, "down_proj has shape", r"\[\]"),
    ({"gate_bias": t(4)}, "gate_bias has shape", r"\[6\]"),
    ({"up_bias": t(4)}, "up_bias has shape", r"\[6\]"),
    ({"down_bias": t(6)}, "down_bias has shape", r"\[4\]"),
    ({"down_bias": 1.0}, "down_bias must be a torch.Tensor", "float"),
    ({"key_scale": t(4)}, "key_scale has shape", r"\[5\]"),
    ({"key_scale": 1.0}, "key_scale must be a torch.Tensor", "float"),
    ({"act": "swiglu"}, "act='swiglu'", "choose one of", "silu"),
    ({"act": None}, "act=None", "choose one of"),
    ({"adapter": None}, "adapter must be an NPComponent", "NoneType"),
    ({"adapter": {}}, "adapter has no w_down"),
    ({"adapter": {"w_down": t(3, 2), "w_up": 1}}, "adapter has a key", "w_up", "w_b_up"),
    ({"adapter": AdapterTensors(t(3, 2), {}, {"c_fc": t(2, 6)}, "self_key")}, "target 'c_fc'", "gate, up, down"),
    ({"adapter_changes": {"rule": "none"}}, "rule='none'", "choose one of"),
    ({"adapter_changes": {"num_ranks": 5}}, "num_ranks=5", "divides R = 2"),
    ({"adapter_changes": {"scale": "x"}}, "scale='x'", "number"),
    ({"adapter_changes": {"w_down": t(3)}}, "w_down has shape", r"\[d_a, R\]"),
    ({"adapter_changes": {"w_down": 5}}, "w_down", "Tensor", "int"),
    ({"adapter_changes": {"w_b_up": t(2, 6)}}, "w_b_up", "mapping", "Tensor"),
    ({"adapter_changes": {"w_a_up": [1]}}, "w_a_up", "mapping", "list"),
    (
        {"adapter_changes": {"w_b_up": {"gate": t(3, 6)}, "w_a_up": {"gate": t(2, 4)}}},
        r"w_b_up\[gate\] has shape",
        r"\[2, 6\]",
    ),
    ({"adapter_changes": {"w_b_up": {"gate": t(2, 6)}, "w_a_up": {}}}, r"w_a_up\[gate\] is None", r"\[2, 4\]"),
    ({"adapter_changes": {"w_b_up": {}}}, r"w_a_up\[gate\] is given without w_b_up\[gate\]"),
    ({"adapter_changes": {"w_b_up": {"gate": "v"}}}, r"w_b_up\[gate\] must be a torch.Tensor", "str"),
]


@pytest.mark.parametrize("case", MLP, ids=lambda c: f"{next(iter(c[0]))}-{c[1]}")
def test_gated_mlp(case):
    changed, *parts = case
    refuses(lambda: gated(**changed), *parts)


def test_plain_mlp_uses_its_own_names():
    adapter = AdapterTensors(t(3, 2), {}, {"c_fc": t(2, 6)}, "self_key")
    x, a, c_fc, c_proj = t(5, 4), t(5, 3), t(6, 4), t(4, 6)
    assert npt_mlp(x, a, c_fc, c_proj, adapter).shape == (5, 4)
    refuses(lambda: npt_mlp(x, a, c_fc.t(), c_proj, adapter), "^npt_mlp: x has shape", "c_fc", r"weight\.t\(\)")
    refuses(lambda: npt_mlp(x, a, c_fc, c_proj.t(), adapter), "^npt_mlp: c_proj has shape")
    refuses(lambda: npt_mlp(x, a, c_fc, c_proj, adapter, c_fc_bias=t(4)), "c_fc_bias has shape", r"\[6\]")
    refuses(lambda: npt_mlp(x, a, c_fc, c_proj, adapter, c_proj_bias=t(6)), "c_proj_bias has shape", r"\[4\]")
    refuses(lambda: npt_mlp(x, a, None, c_proj, adapter), "c_fc must be a torch.Tensor")
    gate = AdapterTensors(t(3, 2), {}, {"gate": t(2, 6)}, "self_key")
    refuses(lambda: npt_mlp(x, a, c_fc, c_proj, gate), "target 'gate'", "c_fc, c_proj")


# ---------------------------------------------------------------------------------------------------- config

CONFIG = [
    ({"layers": "top"}, "layers='top'", "'upper_half'", "16:20"),
    ({"layers": []}, "layers is an empty list", "'all'"),
    ({"layers": [1.5]}, r"layers contains 1\.5", "whole numbers"),
    ({"layers": [True]}, "layers contains True", "whole numbers"),
    ({"layers": 3}, "layers=3", r"\[3\]"),
    ({"layers": None}, "layers=None", "list"),
    ({"layers": "1:x"}, "layers='1:x'", "slice"),
    ({"rule": "rank-1"}, "rule='rank-1'", "did you mean 'rank1'"),
    ({"rule": None}, "rule=None", "choose one of"),
    ({"rank": 0}, "rank=0", "≥ 1"),
    ({"rank": -4}, "rank=-4", "≥ 1"),
    ({"rank": 1.5}, r"rank=1\.5", "fraction"),
    ({"rank": 0.0}, r"rank=0\.0", "fraction"),
    ({"rank": float("nan")}, "rank=nan", "fraction"),
    ({"rank": "auto"}, "rank='auto'", "auto:128"),
    ({"rank": "auto:0"}, "rank='auto:0'", "auto:128"),
    ({"rank": "many"}, "rank='many'", "auto:128"),
    ({"rank": True}, "rank=True", "whole number"),
    ({"rank": None}, "rank=None", "whole number"),
    ({"rank": []}, r"rank=\[\]", "list"),
    ({"rank": [8, 0]}, r"rank=\[8, 0\]", "list"),
    ({"rank": object()}, "rank=<object", "whole number"),
    ({"num_ranks": 0}, "num_ranks=0", "≥ 1"),
    ({"num_ranks": 1.0}, r"num_ranks=1\.0", "whole number"),
    ({"targets": ()}, "targets is empty", "gate, up, down"),
    ({"targets": ("up", "up")}, "targets=", "twice"),
    ({"targets": None}, "targets=None", "gate, up, down"),
    ({"targets": [3]}, "targets contains 3", "gate, up, down"),
    ({"init": "zeros"}, "init='zeros'", "closed_form, small, published"),
    ({"init": "closed-form"}, "did you mean 'closed_form'"),
    ({"init": "closed_form", "rule": "rank1"}, "init='closed_form'", "rank1", "small"),
    ({"basis": "svd"}, "basis='svd'", "fisher, pca"),
    ({"norm_match": "yes"}, "norm_match='yes'", "True, False or None"),
    ({"modulation_scale": "1"}, "modulation_scale='1'", "number"),
    ({"seed": 1.5}, r"seed=1\.5", "whole number"),
]


@pytest.mark.parametrize("case", CONFIG, ids=lambda c: f"{next(iter(c[0]))}-{c[1]}")
def test_config(case):
    changed, *parts = case
    refuses(lambda: NPTConfig(**changed), *parts)


def test_config_from_dict():
    config = NPTConfig(layers=[0, -1], rank=[8, 16], rule="rank1", targets="gate, down", num_ranks=2)
    assert NPTConfig.from_dict(config.to_dict()) == config
    assert config.targets == ("gate", "down")
    refuses(lambda: NPTConfig.from_dict({"ranks": 3}), "no key 'ranks'", "did you mean 'rank'")
    refuses(lambda: NPTConfig.from_dict({"zzz": 3}), "no key 'zzz'", "known keys: layers, rule")


# ---------------------------------------------------------------------------------------------- apply and load

IDS = token_ids(4, 16)


class PeftLike(torch.nn.Module):
    """A wrapper as peft puts in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight = base, base.weight

    def forward(self, x):
        return self.base_layer(x)


APPLY = [
    (dict(config={"layers": "all"}), "config must be an NPTConfig", "dict", "NPTConfig"),
    (dict(config=NPTConfig(layers=[9], rank=8)), "layers contains 9", "4 layers", "0 … 3"),
    (dict(config=NPTConfig(layers=[-5], rank=8)), "layers contains -5", "4 layers"),
    (dict(config=NPTConfig(layers="7:9", rank=8)), "layers='7:9'", "selects no layer", "4"),
    (dict(config=NPTConfig(layers=[1, -3], rank=8)), r"layers=\[1, -3\]", "twice"),
    (dict(config=NPTConfig(rank=64)), "rank=64", "hidden size 32"),
    (dict(config=NPTConfig(rank=[8, 8, 8])), "rank lists 3", "2 layers"),
    (dict(config=NPTConfig(rank="auto:8")), "auto:8", "calibration"),
    (dict(config=NPTConfig(rank=8, init="closed_form")), "init='closed_form'", "calibration"),
    (dict(config=NPTConfig(rank=8, targets=("gate", "qkv"))), "targets contains 'qkv'", "llama-like"),
    (dict(config=NPTConfig(rank="auto:64"), calibration=IDS), "auto:64", "hidden size 32"),
    (dict(config=NPTConfig(rank=32, num_ranks=2), calibration=IDS), "num_ranks=2", "hidden size 32"),
    (dict(config=NPTConfig(rank=8), calibration=IDS.float()), "calibration must be", "token ids", "float32"),
    (dict(config=NPTConfig(rank=8), calibration=[[1, 2]]), "calibration must be", "list"),
    (dict(config=NPTConfig(rank=8), calibration="some text"), "calibration must be", "str"),
    (dict(config=NPTConfig(rank=8), calibration=IDS[0]), "calibration has shape", r"\[16\]", r"\[n, seq\]"),
    (dict(config=NPTConfig(rank=8), calibration=IDS[:0]), "calibration has shape", r"\[0, 16\]"),
    (dict(config=NPTConfig(rank=8), calibration=IDS + 97), "token id", "0 … 96"),
    (dict(config=NPTConfig(rank=8), calibration=IDS - 97), "token id -", "0 … 96"),
]


@pytest.mark.parametrize("case", APPLY, ids=lambda c: c[1][:40])
def test_apply_leaves_the_model_alone(case):
    arguments, *parts = case
    model = tiny_model("llama")
    before = snapshot(model)
    refuses(lambda: apply_npt(model, **arguments), *parts)
    assert_unchanged(model, before)
    assert not any(name.endswith("np_component") for name, _ in model.named_modules())


@pytest.mark.parametrize("bad", [None, 42, "gpt2", {}], ids=str)
def test_not_a_model(bad, tmp_path):
    for call in (
        lambda: apply_npt(bad, NPTConfig(rank=8)), lambda: remove_npt(bad), lambda: npt_parameters(bad),
        lambda: npt_disabled(bad).__enter__(), lambda: save_npt(bad, tmp_path), lambda: load_npt(bad, tmp_path),
    ):  # fmt: skip
        refuses(call, "model must be a torch.nn.Module", type(bad).__name__)


def test_not_converted(tmp_path):
    model = tiny_model("llama", layers=1)
    before = snapshot(model)
    for call in (
        lambda: remove_npt(model), lambda: npt_parameters(model), lambda: npt_disabled(model).__enter__(),
        lambda: save_npt(model, tmp_path / "new"),
    ):  # fmt: skip
        refuses(call, "no NPT layers")
    assert_unchanged(model, before)
    assert not (tmp_path / "new").exists(), "a refused save leaves no directory behind"


def test_twice():
    model = tiny_model("llama")
    apply_npt(model, NPTConfig(rank=8))
    before = snapshot(model)
    refuses(lambda: apply_npt(model, NPTConfig(rank=8)), "already converted", "remove_npt")
    assert_unchanged(model, before)


def test_half_of_nothing():
    model = tiny_model("llama", layers=1)
    before = snapshot(model)
    refuses(lambda: apply_npt(model, NPTConfig(layers="lower_half", rank=8)), "no layer", "lower_half")
    assert_unchanged(model, before)


def test_unknown_architecture():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ModuleList([torch.nn.Linear(4, 4)]))
    refuses(
        lambda: apply_npt(model, NPTConfig(rank=2)),
        "Sequential has no decoder layers",
        "llama-like",
        "gpt2-like",
        "missing",
    )
    refuses(lambda: apply_npt(torch.nn.Linear(2, 2), NPTConfig(rank=2)), "Linear has no decoder layers")


def test_wrapped_linear_is_refused_with_its_reason():
    model = tiny_model("llama")
    mlp = model.model.layers[3].mlp
    mlp.up_proj = PeftLike(mlp.up_proj)
    before = snapshot(model)
    refuses(
        lambda: apply_npt(model, NPTConfig(layers=[2, 3], rank=8)),
        "layer 3 cannot be converted",
        "mlp.up_proj",
        "PeftLike",
    )
    assert_unchanged(model, before)
    report = apply_npt(model, NPTConfig(layers="upper_half", rank=8))
    assert report.layers == (2,) and "PeftLike" in report.skipped[3] and "skipped layer 3" in str(report)


def test_meta_weights():
    with torch.device("meta"):
        model = tiny_model("llama", layers=1)
    refuses(lambda: apply_npt(model, NPTConfig(layers="all", rank=8, norm_match=False)), "meta", "load them")


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_failure_in_the_middle_of_a_calibration(failing, monkeypatch):
    """Whatever breaks half way (here: writing layer ``failing``), the model is as before."""
    import npt_kernels.conversion.calibrate as calibrate

    model = tiny_model("llama")
    before, calls = snapshot(model), []
    original = calibrate.fill_closed_form

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > failing:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(calibrate, "fill_closed_form", breaks)
    with pytest.raises(KeyboardInterrupt):
        apply_npt(model, NPTConfig(layers="all", rank=8), calibration=IDS)
    assert_unchanged(model, before)


def test_model_without_logits_cannot_give_a_fisher():
    model = tiny_model("llama").model
    before = snapshot(model)
    refuses(lambda: apply_npt(model, NPTConfig(rank=8), calibration=IDS), "returns no logits", "basis='pca'")
    assert_unchanged(model, before)
    assert apply_npt(model, NPTConfig(rank=8, basis="pca"), calibration=IDS).layers == (2, 3)
