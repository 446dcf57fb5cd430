"""Every provider computes what it claims, the plain forms are the definition, and what cannot run says why."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from npt_kernels.bench import peers
from npt_kernels.bench.kernels import check_provider
from npt_kernels.bench.providers import PROVIDERS, find_provider
from npt_kernels.bench.results import BenchError
from npt_kernels.measure.problems import Problem
from npt_kernels.measure.reference import MODES, lora_tensors, plain, reference_results, wanted_gradients
from npt_kernels.measure.shapes import Case, ModelShape
from npt_kernels.ops.factored_linear import naive as naive_linear
from npt_kernels.ops.matched_norm import naive as naive_norm
from npt_kernels.ops.mlp import naive as naive_mlp
from npt_kernels.rules import RULES

CPU = torch.device("cpu")
GATED = ModelShape("gated", 24, 40)
PLAIN = ModelShape("plain", 24, 40, gated=False, act="gelu_new", norm="layer")
ON_CPU = [name for name in PROVIDERS if not name.startswith(("triton", "cuda", "liger", "compile"))]


def problem(op="mlp", model=GATED, tokens=9, dtype=torch.float32, **changes):
    return Problem(Case(op, model, tokens, dtype, **{"rank": 4, **changes}), CPU)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", [GATED, PLAIN])
def test_the_plain_mlp_is_the_definition(rule, model):
    made = problem(model=model, dtype=torch.float64, rule=rule, num_ranks=2)
    t = made.tensors
    names = [f"{slot}_{part}" for slot in ("gate", "up", "down") for part in ("key", "value")]
    expected = naive_mlp.mlp(
        t["x"], t["a"], t["key_scale"], t.get("gate_weight"), t["up_weight"], t["down_weight"], None, None, None,
        t["w_down"], *(t.get(name) for name in names), act=model.act, rule=rule, num_ranks=2,
    )  # fmt: skip
    torch.testing.assert_close(plain(made, "npt", t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_the_plain_linear_is_the_definition(rule):
    made = problem("factored_linear", dtype=torch.float64, rule=rule, num_ranks=2)
    t = made.tensors
    expected = naive_linear.factored_linear(
        t["x"], t["z"], t["weight"], t.get("w_a_up"), t["w_b_up"], rule=rule, num_ranks=2
    )
    torch.testing.assert_close(plain(made, "npt", t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", [GATED, PLAIN])
def test_the_plain_norm_is_the_definition(model):
    made = problem("matched_norm", model, dtype=torch.float64)
    t = made.tensors
    expected, _ = naive_norm.matched_norm(t["h"], t["a"], t["weight_"], t.get("bias"), model.norm, 1e-5)
    torch.testing.assert_close(plain(made, "npt", t), expected)
    floor, _ = naive_norm.matched_norm(t["h"], 0 * t["a"], t["weight_"], t.get("bias"), model.norm, 1e-5)
    torch.testing.assert_close(plain(made, "frozen", t), floor)


def test_frozen_is_the_op_without_its_delta():
    made = problem(dtype=torch.float64)
    zeroed = {name: 0 * t if name.endswith("_value") else t for name, t in made.tensors.items()}
    torch.testing.assert_close(plain(made, "frozen", made.tensors), plain(made, "npt", zeroed))


def test_lora_changes_every_projection():
    made = problem(dtype=torch.float64)
    adapters = lora_tensors(made)
    assert sorted(adapters) == sorted(f"lora_{part}_{target}" for part in "ab" for target in ("gate", "up", "down"))
    full = plain(made, "lora", made.tensors | adapters)
    for name, tensor in adapters.items():
        without = plain(made, "lora", made.tensors | adapters | {name: 0 * tensor})
        assert not torch.allclose(full, without), name
    merged = dict(made.tensors)
    for target in ("gate", "up", "down"):
        change = adapters[f"lora_b_{target}"].t() @ adapters[f"lora_a_{target}"]
        merged[f"{target}_weight"] = merged[f"{target}_weight"] + change
    torch.testing.assert_close(full, plain(made, "frozen", merged))


def test_what_a_mode_differentiates():
    made = problem()
    trained = ["gate_value", "up_value", "down_value", "w_down"]
    assert wanted_gradients(made, "npt", "forward") == wanted_gradients(made, "npt", "decode") == []
    assert sorted(wanted_gradients(made, "npt", "local")) == sorted(trained)
    assert sorted(wanted_gradients(made, "npt", "end_to_end")) == sorted([*trained, "x", "a", "key_scale"])
    assert wanted_gradients(made, "frozen", "local") == ["x"]
    assert "x" not in wanted_gradients(made, "lora", "local") and "x" in wanted_gradients(made, "lora", "end_to_end")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "model"), [("mlp", GATED), ("mlp", PLAIN), ("factored_linear", GATED)])
@pytest.mark.parametrize("name", ON_CPU)
def test_providers_are_right(name, op, model, mode):
    if name == "peft":
        pytest.importorskip("peft")
    provider = PROVIDERS[name]
    for dtype, rule in ((torch.float32, "self_key"), (torch.bfloat16, "rank1")):
        made = problem(op, model, 37, dtype, rule=rule, num_ranks=2)
        assert provider.why_not(made.case, mode, CPU) is None
        ratios = check_provider(provider, made, mode, provider.prepare(made, mode), {})
        assert set(ratios) == set(reference_results(made, provider.function, mode, torch.arange(37), 16)[1])
        assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("name", ["frozen", "eager"])
@pytest.mark.parametrize("mode", ["forward", "end_to_end"])
def test_providers_of_the_norm(name, mode):
    made = problem("matched_norm", tokens=33)
    ratios = check_provider(PROVIDERS[name], made, mode, PROVIDERS[name].prepare(made, mode), {})
    assert max(ratios.values()) <= 1
    assert ("d h" in ratios) == (mode == "end_to_end")


def test_a_repeated_call_gives_the_same():
    """Buffers that calls share (kconcat) must not leak from one call into the next."""
    for name in ON_CPU:
        if name == "peft" and importlib.util.find_spec("peft") is None:
            continue
        made = problem(tokens=5)
        call = PROVIDERS[name].prepare(made, "end_to_end")
        first, second = call(), call()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_names():
    assert find_provider("KConcat").name == "kconcat"
    with pytest.raises(
        BenchError, match=r"--provider 'tritn' is not known; did you mean 'triton'\? \(there are: frozen, "
    ):
        find_provider("tritn")


def test_reasons(monkeypatch):
    case = problem().case
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # whatever is installed here
    assert "GPU" in PROVIDERS["liger"].why_not(case, "forward", CPU)
    assert "sm_90" in PROVIDERS["cuda"].why_not(case, "forward", CPU)
    big = replace(case, model=ModelShape("8B", 4096, 14336), tokens=2048)
    assert "224.0 GiB" in PROVIDERS["materialised"].why_not(replace(big, dtype=torch.bfloat16), "forward", CPU)
    assert "a weight per token, 448 GiB" in PROVIDERS["loop"].why_not(big, "local", CPU)
    assert PROVIDERS["loop"].why_not(big, "forward", CPU) is None
    assert peers.delta_bytes(big, 4) == 448 * 2**30
    for name in ("kconcat", "loop", "materialised", "peft", "liger"):
        assert PROVIDERS[name].why_not(replace(case, op="matched_norm"), "forward", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert PROVIDERS["peft"].why_not(case, "forward", CPU) == "not installed: pip install peft"
    assert PROVIDERS["liger"].why_not(case, "forward", CPU) == "not installed: pip install liger-kernel"
