"""Choosing a backend: by name, by environment, by itself; every refusal says why and what there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import factored_problem, linear_problem, mlp_problem

import npt_kernels.backends as backends
from npt_kernels import (
    BackendUnavailableError,
    NPComponent,
    available_backends,
    npt_factored_linear,
    npt_gated_mlp,
    npt_linear,
)

OPS = ("linear", "factored_linear", "mlp")


def test_registry():
    assert "eager" in available_backends()
    for backend in backends.BACKENDS.values():
        assert backend.summary and set(backend.modules) == set(OPS)
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

    def check(op, device, dtype):
        return "float64 is not supported" if dtype == torch.float64 else None

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
