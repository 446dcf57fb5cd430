"""Choosing a backend: by name, by environment, by itself; every refusal says why and what there is."""

from __future__ import annotations

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
from npt_kernels.kernels.eager import EagerSteps
from npt_kernels.kernels.steps import Steps
from npt_kernels.rules import RULES
from tests.support.helpers import factored_problem, linear_problem, mlp_problem

OPS = ("linear", "factored_linear", "mlp", "matched_norm")


def test_registry():
    assert "eager" in available_backends()
    for backend in backends.BACKENDS.values():
        assert backend.summary and backend.ops and not set(backend.ops) & set(backend.absent)
        assert set(backend.ops) | set(backend.absent) == set(OPS), "every op: implemented, or with a reason"
    assert backends.BACKENDS["eager"].ops == OPS
    assert isinstance(backends.get_steps("eager"), Steps)
    assert backends.get_steps("eager") is backends.get_steps("eager")


@pytest.mark.parametrize("name", available_backends())
def test_every_rule_runs_on_every_backend_or_is_listed_as_missing(name):
    """A backend with kernels of its own for the rules has one entry for each (``RULE_IDS``): a new rule must be added there, or
    here with the reason why that backend goes without it."""
    without: dict[str, dict[str, str]] = {}
    known = backends.BACKENDS[name].rules
    missing = set() if known is None else set(RULES) - known - set(without.get(name, {}))
    assert not missing, (
        f"rules that {name} has no kernel for: give it one (RULE_IDS), or write the reason into this test"
    )
    assert known is None or known | set(without.get(name, {})) == set(RULES), "known or excused, and not a rule"


def test_a_rule_that_a_backend_lacks_is_a_reason(monkeypatch):
    """Not a KeyError in the middle of a launch: whoever adds a rule runs on eager, and reads why not elsewhere."""

    class Halved(RULES["self_key"].__class__):
        name = "halved"

        def coefficients(self, z, p, num_ranks, scale):
            return z * 0.5

        def backward(self, dc, z, p, num_ranks, scale, need_z, need_p):
            return dc * 0.5 if need_z else None, None

    monkeypatch.setitem(RULES, "halved", Halved())
    x, z, weight, value = torch.randn(3, 8), torch.randn(3, 4), torch.randn(5, 8), torch.randn(4, 5)
    y = npt_factored_linear(x, z, weight, None, value, rule="halved")
    torch.testing.assert_close(y, x @ weight.t() + 0.5 * z @ value)
    for name in ("triton", "cuda"):
        explained = backends.explain("factored_linear", rule="halved", dtype=torch.float32, backend=name)
        assert explained.chosen is None and "do not know rule 'halved'" in explained.reasons[name]
        with pytest.raises(BackendUnavailableError, match="do not know rule 'halved'; they know anchored, diagonal"):
            npt_factored_linear(x, z, weight, None, value, rule="halved", backend=name)


def test_a_backend_is_one_class_of_steps(monkeypatch):
    """Overriding one step is enough: the plans, gradients and everything else come from the others."""
    calls = []

    class Loud(EagerSteps):
        def low(self, u, target, source, spec):
            calls.append(spec.rule)
            return super().low(u, target, source, spec)

    entry = backends.Backend("loud", Loud, "for this test")
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "loud": entry})
    problem = mlp_problem("rank1")
    leaves = problem.leaves(("x", "w_down"))
    component = NPComponent(3, {"gate": (4, 6)}, rank=2, dtype=torch.float64)
    weights = [leaves[n] for n in ("gate_weight", "up_weight", "down_weight")]
    ys = [npt_gated_mlp(leaves["x"], leaves["a"], *weights, component, backend=name) for name in ("loud", "eager")]
    assert torch.equal(*ys) and calls == [component.rule.name]
    grads = [torch.autograd.grad(y.sum(), leaves["x"])[0] for y in ys]
    assert torch.equal(*grads)


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
    entry = backends.Backend("picky", eager.load, "for this test", True, check)
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
    fresh = backends.Backend("fresh", eager.load, "unverified")
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
    entry = backends.Backend(
        "partial", EagerSteps, "for this test", False,
        lambda call: "float64 is not supported" if call.dtype == torch.float64 else None,
        ops=("mlp",), absent={"matched_norm": "it has no norm kernel"},
    )  # fmt: skip
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "partial": entry})
    backends._say_elsewhere.cache_clear()
    return entry


def test_a_backend_named_for_everything_leaves_ops_that_it_lacks_to_the_automatic_choice(partial, monkeypatch):
    cpu, resolve = torch.device("cpu"), backends.resolve_backend
    monkeypatch.setattr(backends, "_DEFAULT_BACKEND", "partial")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert resolve("matched_norm", None, cpu, torch.float32) == "eager"
        assert resolve("mlp", None, cpu, torch.float32) == "partial"
    assert [str(w.message) for w in seen] == [
        "npt_kernels: matched_norm runs on 'eager', not on 'partial': it has no norm kernel"
    ], "one note, and none for what it does run"
    # It implements mlp and refuses this call: that is an error, whoever named it.
    with pytest.raises(BackendUnavailableError, match=r"partial.*mlp.*float64 is not supported"):
        resolve("mlp", None, cpu, torch.float64)
    # An op without a listed reason still has one.
    with pytest.warns(UserWarning, match="it has no implementation of linear"):
        assert resolve("linear", None, cpu, torch.float32) == "eager"
    explained = backends.explain("matched_norm")
    assert explained.chosen == "eager" and "no norm kernel" in explained.reasons["partial"]
    assert "automatic choice" in str(explained)


def test_a_backend_named_for_one_call_is_that_one_or_an_error(partial):
    with pytest.raises(BackendUnavailableError, match=r"partial.*linear: it has no implementation of linear"):
        npt_linear(**linear_problem().tensors, backend="partial")
    explained = backends.explain("linear", backend="partial")
    assert explained.chosen is None and "no implementation" in explained.reasons["partial"]


def test_the_norms_dtype_is_autocasts_choice(monkeypatch):
    """Under autocast the residual stream stays float32: a backend for everything that has no such norm leaves it to another."""
    half = backends.Backend(
        "half", EagerSteps, "for this test", False,
        lambda call: "float32 is not supported" if call.dtype == torch.float32 else None,
    )  # fmt: skip
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "half": half})
    monkeypatch.setattr(backends, "_DEFAULT_BACKEND", "half")
    backends._say_elsewhere.cache_clear()
    cpu, resolve = torch.device("cpu"), backends.resolve_backend
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="matched_norm runs on 'eager', not on 'half'"),
    ):
        assert resolve("matched_norm", None, cpu, torch.float32) == "eager"
    with torch.autocast("cpu", torch.bfloat16):
        assert resolve("matched_norm", None, cpu, torch.bfloat16) == "half"
        for refused in (
            lambda: resolve("mlp", None, cpu, torch.float32),
            lambda: resolve("matched_norm", "half", cpu, torch.float32),
        ):
            with pytest.raises(BackendUnavailableError, match="float32 is not supported"):
                refused()
    with pytest.raises(BackendUnavailableError, match="float32 is not supported"):
        resolve("matched_norm", None, cpu, torch.float32)


def test_nothing_automatic_for_an_op_that_the_named_backend_lacks(partial, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", {"partial": partial})
    monkeypatch.setattr(backends, "_DEFAULT_BACKEND", "partial")
    with pytest.raises(BackendUnavailableError, match="no backend can run matched_norm"):
        backends.resolve_backend("matched_norm", None, torch.device("cpu"), torch.float32)


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
