"""Filters, grids, parts and estimates of the plan."""

from __future__ import annotations

import pytest
import torch

from npt_kernels.bench.costs import minimum_bytes, minimum_flops, roofline_us
from npt_kernels.bench.grid import GRIDS, Filters, Setting, estimate, find_shape, plan_settings, settings_of_part
from npt_kernels.bench.results import BenchError
from npt_kernels.measure.shapes import MODELS, Case

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def plan(size="full", **filters):
    return plan_settings(Filters(**filters), size, BF16)


def test_everything_is_covered():
    settings = plan()
    assert {s.op for s in settings} == {"mlp", "linear", "norm"}
    assert {s.mode for s in settings} == {"forward", "local", "end_to_end", "decode"}
    assert {s.model.title for s in settings} == {"GPT-2", "Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B"}
    assert {s.tokens for s in settings} == {1, 16, 256, 2048, 8192, 32768}
    assert {s.rank for s in settings} == {8, 64, 256, 1024}
    assert {p.name for s in settings for p in s.providers} == {
        "frozen", "eager", "kconcat", "compile", "triton", "cuda", "triton-mainloop", "cuda-mainloop", "loop", "materialised",
        "peft", "liger",
    }  # fmt: skip
    assert len({str(s) for s in settings}) == len(settings)
    assert all(s.rank <= s.model.d for s in settings), "a rank beyond the hidden size has no use"


def test_filters():
    (one,) = plan(ops=["mlp"], shapes=["8b"], modes=["local"], tokens=[300], ranks=[24], providers=["triton"])
    assert (one.model, one.tokens, one.rank) == (MODELS["8B"], 300, 24)
    assert [p.name for p in one.providers] == ["frozen", "triton"], "the floor is always there"
    assert len(plan(ops=["mlp"], shapes=["8b"], modes=["forward"], tokens=[1, 2], ranks=[8, 16, 32])) == 6
    assert {s.tokens for s in plan(modes=["decode"], tokens=[4])} == {4}
    assert {s.mode for s in plan(modes=["end-to-end"])} == {"end_to_end"}
    assert {s.model.d for s in plan("small", shapes=["llama-3.1-70b"])} == {512}
    assert [s.mode for s in plan(ops=["norm"], shapes=["gpt2"], tokens=[4])] == ["forward", "end_to_end"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"ops": ["mpl"]}, r"--op 'mpl' is not known; did you mean 'mlp'\? \(there are: mlp, linear, norm\)"),
        ({"modes": ["forwards"]}, "--mode 'forwards' is not known; did you mean 'forward'"),
        ({"shapes": ["lama-3.1-8b"]}, "--shape 'lama-3.1-8b' is not known; did you mean 'Llama-3.1-8B'.*Llama-3.1-70B"),
        ({"providers": ["cublas"]}, "--provider 'cublas' is not known.*kconcat"),
        ({"rule": "self-key"}, "--rule 'self-key' is not known; did you mean 'self_key'"),
        ({"tokens": [0]}, "--tokens 0 must be at least 1"),
        ({"ranks": [-2]}, "--rank -2 must be at least 1"),
        ({"ops": ["norm"], "modes": ["local"]}, "nothing to run: --op norm has no mode local"),
    ],
)
def test_what_does_not_exist(filters, message):
    with pytest.raises(BenchError, match=message):
        plan(**filters)


def test_shape_names():
    for name in ("8B", "8b", "llama-3.1-8b", "Llama-3.1-8B", "LLAMA 3.1 8B"):
        assert find_shape(name) is MODELS["8B"]
    assert find_shape("gpt2") is find_shape("GPT-2") is MODELS["GPT-2"]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_parts_are_the_whole_and_balanced(count):
    settings = plan()
    seconds = [estimate(s, CPU, 3) for s in settings]
    parts = [settings_of_part(settings, (i + 1, count), seconds) for i in range(count)]
    assert [s for part in parts for s in part] == settings
    costs = dict(zip(map(str, settings), seconds, strict=True))
    loads = [sum(costs[str(s)] for s in part) for part in parts]
    assert max(loads) <= sum(seconds) / count + 2 * max(seconds)


def test_compilation_is_unasked_only_at_a_few_points():
    compiled = [s for s in plan() if any(p.name == "compile" for p in s.providers)]
    assert {s.tokens for s in compiled} == set(GRIDS["full"].compiled_tokens)
    assert all(any(p.name == "compile" for p in s.providers) for s in plan(providers=["compile"]))
    few = [s for s in plan("small") if any(p.name == "compile" for p in s.providers)]
    assert len(few) == 2, "a compilation takes seconds, and --small has two minutes"


def test_a_cpu_gets_the_real_sizes_of_small_models():
    settings = plan("cpu")
    assert {s.model for s in settings} == {MODELS["SmolLM2"], MODELS["GPT-2"]}
    assert {s.mode for s in settings} == {"forward", "local", "end_to_end"}
    assert {s.tokens for s in settings} == {1, 16, 256, 1024} and {s.rank for s in settings} == {64, 128, 256}
    mlps = [s for s in settings if s.op == "mlp" and s.rank == 128]
    assert len(mlps) == 2 * 3 * 4
    for setting in mlps:
        names = {provider.name for provider in setting.providers}
        assert {"frozen", "eager", "kconcat", "compile", "peft"} <= names, "the strongest peers in every row"
        assert ("loop" in names) == (setting.tokens <= 16), "a weight for each of 256 tokens takes half a minute"
    assert {s.model for s in plan("cpu", shapes=["8b"])} == {MODELS["8B"]}, "asked for, it runs"


def test_costs_of_an_mlp():
    case = Case("mlp", MODELS["8B"], 8192, BF16, rank=64)
    dense = 2 * 8192 * 4096 * 14336
    assert minimum_flops(case, "forward", "frozen") == 3 * dense
    low = 2 * 8192 * 64 * (14336 + 14336 + 4096 + 4096)
    assert minimum_flops(case, "forward", "npt") == 3 * dense + low
    assert minimum_flops(case, "local", "npt") == 4 * dense + 3 * low, "no dx"
    assert minimum_flops(case, "local", "frozen") == 6 * dense, "forward and dx"
    assert minimum_flops(case, "end_to_end", "npt") == 6 * dense + 3 * low
    weights = 3 * 4096 * 14336
    assert minimum_bytes(Case("mlp", MODELS["8B"], 1, BF16), "decode", "frozen") == 2 * (weights + 2 * 4096 + 2 * 14336)
    ceilings = {"gemm_tflops": 1000.0, "copy_tbs": 4.0}
    assert roofline_us(case, "forward", "frozen", ceilings) == pytest.approx(3 * dense / 1e9)
    few = Case("mlp", MODELS["8B"], 1, BF16)
    assert roofline_us(few, "decode", "frozen", ceilings) == pytest.approx(2 * weights / 4e6, rel=0.001)
    assert roofline_us(case, "forward", "frozen", {}) is None


def test_a_setting_names_itself():
    (one,) = plan(ops=["mlp"], shapes=["8b"], modes=["local"], tokens=[300], ranks=[24])
    assert isinstance(one, Setting) and str(one) == "mlp local Llama-3.1-8B T=300 r=24"
    row = one.row()
    assert (row["shape"], row["d"], row["f"], row["dtype"]) == ("Llama-3.1-8B", 4096, 14336, "bfloat16")
