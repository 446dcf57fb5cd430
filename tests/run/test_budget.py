"""``training.max_minutes``: what is chosen, that it is recorded, and that the record gives the same run without measuring."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.conversion.calibrate import conversion_forwards, refit_tokens
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run import budget
from npt_kernels.run.budget import Budget
from npt_kernels.run.resume import find_resume, resumed_config
from npt_kernels.training.loop import Phase
from tests.support.helpers import tiny_model, token_ids
from tests.support.runs import blocks, make_config, records, start


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    return now


def test_what_a_conversion_costs():
    plain = make_config("x").npt_config()  # pca with refit
    assert conversion_forwards(plain, 1000, 576) == pytest.approx(3300)
    assert conversion_forwards(plain, 100_000, 4096) == pytest.approx(100_000 + 2.3 * 21845)
    fisher = make_config("x", {"model": {"basis": "fisher", "refit": False}}).npt_config()
    assert conversion_forwards(fisher, 100_000, 576) == pytest.approx(100_000 + 3.8 * 24576)
    assert refit_tokens(4096) == 21845 and refit_tokens(576) > 81920


@pytest.mark.parametrize(("rate", "rows"), [(1e-9, 4000), (1.0, 512), (0.0005, 1022)])
def test_calibration_tokens_fit_their_share_of_the_time(clock, monkeypatch, rate, rows):
    config = make_config("x", {"data": {"max_length": 16}}, max_minutes=1.0)
    monkeypatch.setattr(budget, "forward_seconds", lambda model, ids: rate)
    tokens = token_ids(4000, 16, 1)
    chosen, line = Budget(config).calibration(tiny_model("llama"), tokens)
    assert len(chosen) == rows and torch.equal(chosen, tokens[:rows])
    assert config.data.calibration_tokens == rows * 16 and f"{rows * 16:,} of 64,000" in line
    if rows == 1022:  # the time decides: one more sequence would not have fitted, and the share is used
        cost = [rate * conversion_forwards(config.npt_config(), n * 16, 32) for n in (rows, rows + 1)]
        assert cost[0] <= 0.45 * 60 < cost[1]


def test_steps_fit_what_is_left(clock):
    config = make_config("x", mode="local+polish", max_minutes=1.0, warmup_steps=10)
    phases = [Phase("local", "local", 100, 1e-3, 10), Phase("polish", "kl", 20, 1e-3, 2)]
    limit = Budget(config)
    clock[0] += 20
    chosen, line = limit.training(phases, [0.5, 2.5], afterwards=10.0)
    share = 30 / 105
    assert [p.steps for p in chosen] == [math.floor(100 * share), math.floor(20 * share)]
    assert sum(p.steps * s for p, s in zip(chosen, [0.5, 2.5], strict=True)) <= 30
    limit.settle(chosen, 512)
    assert (config.training.max_steps, config.training.polish_steps) == (28, 5)
    assert config.training.max_minutes is None and config.data.calibration_tokens == 512
    assert "28 of 100 steps of local" in line and "5 of 20 steps of polish" in line


@pytest.mark.parametrize(("late", "steps"), [(0, 100), (10_000, 1)])
def test_never_more_than_configured_and_never_none(clock, late, steps):
    limit = Budget(make_config("x", max_minutes=30))
    clock[0] += late
    (phase,), _ = limit.training([Phase("end_to_end", "kl", 100, 1e-3, 7)], [0.1], afterwards=1.0)
    assert (phase.steps, phase.warmup_steps) == (steps, min(7, steps))


def test_the_choice_is_recorded_and_gives_the_same_run_again(tmp_path, monkeypatch):
    asked: list[int] = []

    def slow(objective, text, config, device, *, retry):
        assert retry
        asked.append(config.training.gradient_accumulation_steps)
        return 60.0  # so that a minute leaves one step

    monkeypatch.setattr("npt_kernels.run.run.step_seconds", slow)
    monkeypatch.setattr(budget, "_LEAST_TOKENS", 48)
    monkeypatch.setattr(budget, "forward_seconds", lambda model, ids: 1.0)
    data = {"max_length": 16, "calibration_tokens": 128}
    first, model = start(tmp_path / "a", sections={"data": data}, max_minutes=1.0, gradient_accumulation_steps=2)
    assert first.steps == 1 and asked == [2]
    assert "48 of 128 calibration tokens" in start.output and "1 of 6 steps of end_to_end" in start.output
    (chosen,) = records(tmp_path / "a", "budget")
    assert chosen["calibration_tokens"] == 48 and chosen["steps"] == {"end_to_end": 1}
    saved = RunConfig.from_mapping(yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()))
    assert saved.training.max_minutes is None and saved.training.max_steps == 1 and saved.data.calibration_tokens == 48

    # The text of a run holds as many tokens as its configuration says.
    text = blocks()
    text.calibration = text.calibration[:3]
    second, again = start(
        tmp_path / "b", sections={"data": data}, text=text, max_steps=1, gradient_accumulation_steps=2
    )
    assert second.trained == first.trained and len(asked) == 1
    one, two = adapter_state_dict(model), adapter_state_dict(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_keeps_what_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr("npt_kernels.run.run.step_seconds", lambda *args, **kwargs: 15.0)
    start(tmp_path / "a", max_minutes=1.0)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(make_config(tmp_path / "a", max_minutes=1.0).model_dump()))
    point = find_resume(tmp_path / "a")
    config = resumed_config(point, tmp_path / "a", file=tmp_path / "own.yaml")
    chosen = records(tmp_path / "a", "budget")[0]["steps"]["end_to_end"]
    assert 1 <= chosen < 6 and config.training.max_steps == chosen and config.training.max_minutes is None


def test_a_probe_that_runs_out_of_memory_takes_fewer_sequences(clock):
    class Hungry:
        model, sizes = torch.nn.Linear(2, 2), []

        def accumulate(self, ids, share, backward):
            self.sizes.append(len(ids))
            if len(ids) > 2:
                raise MemoryError
            clock[0] += 3.0
            backward(self.model(torch.ones(1, 2)).sum())

    config = make_config("x", batch_size=6, gradient_accumulation_steps=2)
    assert (
        budget.step_seconds(Hungry(), token_ids(8, 16, 1), config, torch.device("cpu"), retry=True) == 3.0 * 2 * 6 / 2
    )
    assert Hungry.sizes == [6, 3, 2, 2] and Hungry.model.weight.grad is None
    with pytest.raises(MemoryError):
        budget.step_seconds(Hungry(), token_ids(8, 16, 1), config, torch.device("cpu"), retry=False)


@pytest.mark.parametrize("minutes", [0, -1, math.inf])
def test_minutes_are_positive(minutes):
    with pytest.raises(ConfigError, match=r"training\.max_minutes"):
        RunConfig.from_mapping({"training": {"max_minutes": minutes}})
