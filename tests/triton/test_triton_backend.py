"""When the Triton backend runs, what it says when it does not, and that ``torch.compile`` sees one op."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

from npt_kernels import BackendUnavailableError, npt_linear
from npt_kernels.activations import ACTIVATIONS
from npt_kernels.kernels import triton as backend
from npt_kernels.kernels.triton import launch as runtime
from npt_kernels.kernels.triton import support
from npt_kernels.kernels.triton.launch import TileConfig, addressable, describe
from npt_kernels.ops.registry import BACKENDS, Call, explain, resolve_backend
from tests.support.helpers import randn
from tests.triton.test_triton_ops import mlp_functions, mlp_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_chosen_unasked_only_where_it_was_measured_faster(monkeypatch):
    norm, unasked = Call("matched_norm", CUDA, torch.bfloat16), BACKENDS["triton"].chosen_unasked
    monkeypatch.setattr(backend, "_capability", lambda index: (9, 0))
    assert unasked(norm)
    assert not any(
        unasked(norm._replace(**other)) for other in ({"op": "mlp"}, {"device": CPU}, {"dtype": torch.float32})
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not unasked(norm)
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_capability", lambda index: (8, 0))
    assert not unasked(norm)
    assert resolve_backend("linear", None, CPU, torch.float32) == "eager"


def test_every_activation_has_a_fused_kernel():
    assert {activation.name for activation in ACTIVATIONS.values()} == set(support.FUSED_ACTIVATIONS)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("linear", CPU, torch.float64), "not float64"),
        (Call("linear", torch.device("mps"), torch.float32), "'mps'"),
        (Call("linear", CPU, torch.float32), None),
        (Call("mlp", CPU, torch.float16, "gelu_new"), None),
    ],
)
def test_reasons(call, reason):
    found = BACKENDS["triton"].check(call)
    assert found is None if reason is None else found is not None and reason in found


def test_reasons_that_depend_on_the_machine(monkeypatch):
    check = BACKENDS["triton"].check
    monkeypatch.setattr(support, "FUSED_ACTIVATIONS", ("relu",))
    assert "act='gelu_tanh' has no fused kernel; fused are relu" in check(Call("mlp", CPU, torch.float32, "gelu_new"))
    monkeypatch.setattr(support, "_capability", lambda index: (7, 5))
    assert "compute capability 7.5, below 8.0" in check(Call("linear", CUDA, torch.float16))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in check(Call("linear", CPU, torch.float16))
    monkeypatch.setattr(support, "TRITON_INSTALLED", False)
    assert "pip install triton" in check(Call("linear", CPU, torch.float16))


def test_explicit_choice_raises_with_the_reason():
    x, w = randn(3, 4), randn(5, 4)
    with pytest.raises(BackendUnavailableError, match=r"cannot run linear: .*float64"):
        npt_linear(x, w, randn(3, 4), randn(3, 5), backend="triton")


def test_explain():
    by_itself = explain("npt_gated_mlp", randn(2, 2, dtype=torch.float16), act="silu")
    assert by_itself.chosen == "eager" and "unasked it runs only matched_norm" in by_itself.reasons["triton"]
    assert "mlp on cpu, float16: eager" in str(by_itself) and "not triton:" in str(by_itself)
    asked = explain("linear", dtype=torch.float16, backend="triton")
    assert asked.chosen == "triton" and asked.reasons["eager"] == "'triton' was asked for"
    refused = explain("linear", dtype=torch.float64, backend="triton")
    assert refused.chosen is None and "not float64" in refused.reasons["triton"]
    unknown = explain("linear", backend="rocket")
    assert unknown.chosen is None and "not part of this build" in unknown.reasons["rocket"]
    with pytest.raises(ValueError, match="op='conv'"):
        explain("conv")
    with pytest.raises(ValueError, match="act='swoosh'"):
        explain("mlp", act="swoosh")


def test_importing_the_package_imports_no_triton():
    code = "import sys, npt_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("gated", [True, False])
def test_compiles_to_one_graph_and_once_for_every_token_count(gated):
    """fullgraph, equal to eager mode, no recompilation for a new T."""
    targets = ("gate", "up", "down") if gated else ("up", "down")
    op, _ = mlp_functions("rank1", 1, "silu", gated)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: op("triton", **t), fullgraph=True, dynamic=True, backend=counter)
    for tokens in (18, 23, 70):
        tensors = mlp_tensors("rank1", tokens, 16, 24, 16, 6, targets, gated, True, True, torch.float32)
        results = []
        for function in (compiled, lambda **t: op("triton", **t)):
            leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}
            y = function(**leaves)
            y.square().sum().backward()
            results.append([y] + [leaf.grad for leaf in leaves.values() if leaf is not None])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_a_pitch_past_32_bits_is_copied():
    huge = torch.empty_strided((4, 3), (2**24, 1), dtype=torch.float16, device="meta")
    assert addressable(huge).stride() == (3, 1)
    near = torch.empty_strided((4, 3), (2**22 - 1, 1), dtype=torch.float16, device="meta")
    assert addressable(near) is near


def test_descriptors_only_where_the_hardware_can():
    block = (16, 16)
    good = torch.empty(32, 32, dtype=torch.float16)
    assert describe(good, block, True) is not good and describe(good, block, False) is good
    for bad in (good.t(), good[:, 1:], torch.empty(4, 9, dtype=torch.float16), good[:1].expand(8, 32), good[:0]):
        assert describe(bad, block, True) is bad


def test_tuned_values_override_the_default(monkeypatch):
    monkeypatch.setattr(runtime, "_device_facts", lambda index: ("Some GPU", (9, 0)))
    monkeypatch.setattr(
        runtime, "_lookup", lambda kernel, name, **shape: {"block_n": 64, "num_stages": 2, "source": "test"}
    )
    runtime._cached_config.cache_clear()
    config = runtime._cached_config("segmented_gemm", 0, torch.float16, 8192, (("out", 64),))
    assert isinstance(config, TileConfig) and (config.block_n, config.num_stages, config.block_t) == (64, 2, 128)
    runtime._cached_config.cache_clear()
