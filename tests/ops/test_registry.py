"""Choosing a backend: by name, by environment, by itself; every refusal says why and what there is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch

import npt_kernels.ops.registry as backends
from npt_kernels import (
    BackendUnavailableError,
    NPComponent,
    available_backends,
    npt_factored_linear,
    npt_gated_mlp,
    npt_linear,
)
from tests.support.helpers import factored_problem, linear_problem, mlp_problem

OPS = ("linear", "factored_linear", "mlp", "matched_norm")


def test_registry():
    assert "eager" in available_backends()
    for backend in backends.BACKENDS.values():
        assert backend.summary and backend.modules and not set(backend.modules) & set(backend.absent)
        assert set(backend.modules) | set(backend.absent) == set(OPS), "every op: implemented, or with a reason"
    for op in OPS:
        module = backends.get_backend("eager").module(op)
        assert callable(module.forward) and callable(module.backward)


@pytest.mark.parametrize("name", ["cudaa", "Eager", "auto", 5, ["eager"]])
def test_unknown_name_raises_and_names_those_there_are(name):
    with pytest.raises(BackendUnavailableError) as error:
        npt_linear(**linear_problem().tensors, backend=name)
    assert f"backend={name!r}" in str(error.value)
    assert all(known in str(error.value) for known in available_backends())
    assert "\n" not in str(error.value)


def test_every_op_honours_the_name():
    calls = [
        lambda b: npt_linear(**linear_problem().tensors, backend=b),
        lambda b: npt_factored_linear(**factored_problem("rank1").tensors, backend=b),
        lambda b: npt_gated_mlp(
            *(mlp_problem("rank1").tensors[n] for n in ("x", "a", "gate_weight", "up_weight", "down_weight")),
            NPComponent(3, {"gate": (4, 6)}, rank=2, dtype=torch.float64), backend=b,
        ),
    ]  # fmt: skip
    for call in calls:
        assert call("eager").isfinite().all()
        with pytest.raises(BackendUnavailableError, match="nonsense"):
            call("nonsense")


@pytest.fixture
def picky(monkeypatch):
    """A second backend, preferred, that cannot run float64."""

    def check(call):
        return "float64 is not supported" if call.dtype == torch.float64 else None

    eager = backends.BACKENDS["eager"]
    entry = backends.Backend("picky", eager.modules, True, "for this test", check)
    monkeypatch.setattr(backends, "BACKENDS", {"picky": entry, **backends.BACKENDS})
    return entry


def test_automatic_choice_takes_the_first_that_can(picky):
    cpu = torch.device("cpu")
    assert backends.resolve_backend("linear", None, cpu, torch.float32) == "picky"
    assert backends.resolve_backend("linear", None, cpu, torch.float64) == "eager"
    assert backends.resolve_backend("linear", "eager", cpu, torch.float32) == "eager"


def test_explicit_choice_that_cannot_run_raises_with_the_reason(picky):
    with pytest.raises(BackendUnavailableError, match=r"picky.*linear.*float64 is not supported"):
        npt_linear(**linear_problem().tensors, backend="picky")


def test_unverified_backend_is_never_taken_silently(monkeypatch):
    eager = backends.BACKENDS["eager"]
    fresh = backends.Backend("fresh", eager.modules, False, "unverified")
    monkeypatch.setattr(backends, "BACKENDS", {"fresh": fresh, **backends.BACKENDS})
    cpu = torch.device("cpu")
    assert backends.resolve_backend("mlp", None, cpu, torch.float32) == "eager"
    assert backends.resolve_backend("mlp", "fresh", cpu, torch.float32) == "fresh"


def test_no_backend_at_all(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {})
    with pytest.raises(BackendUnavailableError, match="mlp"):
        backends.resolve_backend("mlp", None, torch.device("cpu"), torch.float32)


@pytest.fixture
def partial(monkeypatch):
    """A backend that implements only mlp, and that not in float64."""
    module = {"mlp": "npt_kernels.ops.mlp.eager"}
    entry = backends.Backend(
        "partial", module, False, "for this test",
        lambda call: "float64 is not supported" if call.dtype == torch.float64 else None,
        absent={"matched_norm": "it has no norm kernel"},
    )  # fmt: skip
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "partial": entry})
    backends._say_elsewhere.cache_clear()
    return entry


@pytest.mark.parametrize("how", ["environment", "layer"])
def test_a_backend_named_for_everything_leaves_ops_that_it_lacks_to_the_automatic_choice(partial, monkeypatch, how):
    cpu, name = torch.device("cpu"), "partial"
    if how == "environment":
        monkeypatch.setattr(backends, "_DEFAULT_BACKEND", name)
        name = None
    resolve = functools.partial(backends.resolve_backend, part_of_layer=how == "layer")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert resolve("matched_norm", name, cpu, torch.float32) == "eager"
        assert resolve("mlp", name, cpu, torch.float32) == "partial"
    assert [str(w.message) for w in seen] == [
        "npt_kernels: matched_norm runs on 'eager', not on 'partial': it has no norm kernel"
    ], "one note, and none for what it does run"
    # It implements mlp and refuses this call: that is an error, whoever named it.
    with pytest.raises(BackendUnavailableError, match=r"partial.*mlp.*float64 is not supported"):
        resolve("mlp", name, cpu, torch.float64)
    # An op without a listed reason still has one.
    with pytest.warns(UserWarning, match="it has no implementation of linear"):
        assert resolve("linear", name, cpu, torch.float32) == "eager"
    explained = backends.explain("matched_norm", backend=name)
    assert explained.chosen == "eager" and "no norm kernel" in explained.reasons["partial"]
    assert "automatic choice" in str(explained)


def test_a_backend_named_for_one_call_is_that_one_or_an_error(partial):
    with pytest.raises(BackendUnavailableError, match=r"partial.*linear: it has no implementation of linear"):
        npt_linear(**linear_problem().tensors, backend="partial")
    explained = backends.explain("linear", backend="partial")
    assert explained.chosen is None and "no implementation" in explained.reasons["partial"]


def test_nothing_automatic_for_an_op_that_the_named_backend_lacks(partial, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {"partial": partial})
    with pytest.raises(BackendUnavailableError, match="no backend can run matched_norm"):
        backends.resolve_backend("matched_norm", "partial", torch.device("cpu"), torch.float32, part_of_layer=True)


def run_with(value):
    code = (
        "import torch, npt_kernels as n\n"
        "t = torch.ones\n"
        "try: print(n.npt_linear(t(2, 3), t(4, 3), t(2, 3), t(2, 4)).sum().item())\n"
        "except n.BackendUnavailableError as e: print('refused:', e)"
    )
    env = os.environ | {"NPT_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=120
    ).stdout.strip()


def test_environment_variable():
    assert run_with("eager") == "48.0"
    refused = run_with("warp")
    assert refused.startswith("refused: ") and "'warp'" in refused and "eager" in refused
    assert run_with("") == "48.0"


def test_cuda_for_everything_runs_what_it_lacks_elsewhere():
    """The explicit linear has no kernel on cuda: the note is one line, the result the automatic choice's."""
    assert run_with("cuda") == "48.0"


def test_the_question_whether_the_cuda_kernels_run_is_not_traced():
    """Seen on an H200: a compiled call that names the backend ended at the import of the compiled module."""

    def called(x):
        reason = backends.BACKENDS["cuda"].reason(backends.Call("mlp", x.device, torch.bfloat16))
        return x + 1 if reason else x

    assert torch.compile(called, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
