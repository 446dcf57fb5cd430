"""``npt bench memory``: bytes that can be worked out by hand, formulas labelled as such."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from npt_kernels.bench import memory
from npt_kernels.bench.grid import Filters, Setting
from npt_kernels.bench.memory import headline, measure_memory, peak_of, plan_memory, run_memory
from npt_kernels.bench.providers import PROVIDERS
from npt_kernels.bench.results import ResultFile, environment
from npt_kernels.measure.shapes import MODELS, ModelShape

CPU = torch.device("cpu")
MODEL = ModelShape("tiny", 64, 96, title="Tiny")
T, D, F, R = 256, 64, 96, 8


def measured(*providers, op="linear", mode="forward", tokens=T):
    chosen = tuple(PROVIDERS[p] if isinstance(p, str) else p for p in providers)
    setting = Setting(op, MODEL, mode, tokens, R, "self_key", torch.float32, chosen)
    return {row["provider"]: row for row in measure_memory(setting, CPU)}


def test_peak_counts_what_is_alive_at_once():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return {"y": second.sum(), "z": torch.ones(250)}

    peak, results = peak_of(call, CPU)
    assert 8000 <= peak < 8100, "two vectors at once and a few scalars; the small vector comes when one is gone"
    assert results == 4 + 1000


def test_a_linear_by_hand():
    rows = measured("frozen", "eager", "materialised", "loop")
    assert rows["frozen"]["peak_bytes"] == rows["eager"]["peak_bytes"] == 4 * T * F, "the result and nothing else"
    assert rows["eager"]["peak_units"] == 1
    assert rows["materialised"]["peak_bytes"] >= 4 * T * D * F
    assert 4 * T * D * F > rows["loop"]["peak_bytes"] >= 4 * (T * F + D * F)
    assert rows["eager"]["result_bytes"] == 4 * T * F


def test_training_keeps_more_than_a_forward():
    forward, local, whole = (measured("eager", op="mlp", mode=m)["eager"] for m in ("forward", "local", "end_to_end"))
    assert forward["peak_bytes"] < local["peak_bytes"] <= whole["peak_bytes"]
    assert 2 < local["peak_units"] < 7, "gate and up are saved; a ΔW would be 64"


def test_what_happens_inside_custom_operators_is_seen():
    """LiveBytes cannot see it: counting with it, our MLP's forward would cost its output alone."""
    assert measured("eager", op="mlp")["eager"]["peak_units"] > 2


def test_what_does_not_fit_is_a_formula(monkeypatch):
    monkeypatch.setattr("npt_kernels.bench.peers.MATERIALISED_LIMIT", 1000)
    row = measured("materialised")["materialised"]
    assert row["status"] == "formula" and row["peak_bytes"] == 4 * T * D * F
    assert row["formula"] == "T·f·d·4 B = 256·96·64·4" and "method" not in row


def test_the_headline_is_448_gib():
    forward, local = headline()
    assert (forward.model, forward.tokens, forward.mode, local.mode) == (MODELS["8B"], 2048, "forward", "local")
    only = replace(forward, providers=(PROVIDERS["materialised"],))
    problem = memory.Problem  # the real tensors are not needed for a formula
    assert problem is not None
    row = memory._measured(only.providers[0], only, _Meta(only.case), {}, 1, 5.0)
    assert row["status"] == "formula" and row["peak_bytes"] == 448 * 2**30


class _Meta:
    def __init__(self, case):
        self.case, self.device = case, CPU


def test_a_wrong_provider_is_not_reported():
    right = PROVIDERS["eager"]

    def prepare(problem, mode):
        call = right.prepare(problem, mode)
        return lambda: {name: 0 * value for name, value in call().items()}

    row = measured(replace(right, prepare=prepare))["eager"]
    assert row["status"] == "wrong" and "peak_bytes" not in row


def test_plan():
    settings = plan_memory(Filters(), "small", torch.float32)
    assert settings[:2] == headline() and {s.op for s in settings} == {"mlp", "linear"}
    assert "decode" not in {s.mode for s in settings}
    assert all(s.model.d < 1024 for s in plan_memory(Filters(shapes=["8b"]), "small", torch.float32))


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_run(tmp_path, monkeypatch, interrupt):
    settings = [
        Setting("linear", MODEL, mode, 8, R, "self_key", torch.float32, (PROVIDERS["eager"],))
        for mode in ("forward", "local")
    ]
    if interrupt:
        original = memory.measure_memory

        def stops(setting, *args, **options):
            if setting.mode == "local":
                raise KeyboardInterrupt
            return original(setting, *args, **options)

        monkeypatch.setattr(memory, "measure_memory", stops)
    result = ResultFile("memory", environment(CPU), [], "small", tmp_path)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            run_memory(settings, CPU, result)
    else:
        run_memory(settings, CPU, result)
    data = json.loads(result.path.read_text())
    assert data["complete"] is not interrupt
    assert len(data["rows"]) == (1 if interrupt else 2)
    assert data["not_run"] == ([str(settings[1])] if interrupt else [])
