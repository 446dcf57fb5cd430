"""Trackers through accelerate, beside metrics.jsonl."""

from __future__ import annotations

import json

import pytest

from npt_kernels.configs.schema import ConfigError
from npt_kernels.run.records import check_trackers, tracker_names
from npt_kernels.run.utilisation import Utilisation
from tests.support.helpers import Words
from tests.support.runs import FAR, PowerCut, make_config, records, start, stop_at


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


def scalars(path):
    """Tag → ``[(step, value)]`` of all event files, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_what_metrics_jsonl_gets(tmp_path):
    start(
        tmp_path, sections={"model": FAR}, tokenizer=Words(), mode="local+polish", max_steps=4, polish_steps=2,
        eval_steps=3, report_to=["tensorboard"],
    )  # fmt: skip
    found = scalars(tmp_path / "logs" / "npt")
    train = records(tmp_path, "train")
    for phase in ("local", "polish"):
        own = [(r["total_step"], r) for r in train if r["phase"] == phase]
        for name in ("loss", "learning_rate", "grad_norm"):
            assert found[f"{phase}/{name}"] == [(step, pytest.approx(r[name], rel=1e-6)) for step, r in own]
    mean = [1 - sum(r["layers"].values()) / 3 for r in train if r["phase"] == "local"]
    assert [value for _, value in found["local/explained_variance"]] == pytest.approx(mean, rel=1e-5)
    evaluations = records(tmp_path, "eval")
    assert [step for step, _ in found["eval/kl"]] == [0, 0, 3, 6]
    assert [value for _, value in found["eval/kl"]] == pytest.approx([r["kl"] for r in evaluations], rel=1e-5, abs=1e-9)
    assert "metrics go to tensorboard too" in start.output
    # The settings of the run are there as well.
    assert any("training.learning_rate" in file.read_text() for file in (tmp_path / "logs").rglob("hparams.yml"))


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path, monkeypatch):
    settings = {
        "sections": {"model": FAR},
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": ["tensorboard"],
    }
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        stop_at(patch, 5, "crash")
        start(tmp_path, **settings)
    start(tmp_path, resume=tmp_path, **settings)
    # Step 4 was logged before the crash and is done again; it counts once.
    assert [step for step, _ in scalars(tmp_path / "logs" / "npt")["end_to_end/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
    beyond = (tmp_path / "metrics.before-resume.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in beyond if '"train"' in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sections", "report_to", "message"),
    [
        ({}, ["tensorboard"], "training.report_to names tensorboard, but .* pip install tensorboard, or leave it out"),
        ({}, ["trackio"], "training.report_to names trackio, but .* pip install trackio"),
        ({"wandb": {"enabled": True}}, [], "wandb.enabled is true, but .* pip install wandb, or set it to false"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, sections, report_to, message):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "run", sections=sections, report_to=report_to)
    assert not (tmp_path / "run").exists()


def test_names_of_trackers(tmp_path):
    config = make_config(tmp_path, {"wandb": {"enabled": True}}, report_to=["tensorboard", "wandb"])
    assert tracker_names(config) == ["tensorboard", "wandb"]
    assert tracker_names(make_config(tmp_path, {"wandb": {"enabled": True}})) == ["wandb"]
    assert tracker_names(make_config(tmp_path)) == []
    check_trackers(make_config(tmp_path))


def test_mfu_is_in_metrics_jsonl_where_the_peak_is_known(tmp_path, monkeypatch):
    start(tmp_path / "unknown", sections={"model": FAR}, max_steps=2)
    assert not any("mfu" in record for record in records(tmp_path / "unknown", "train"))
    monkeypatch.setattr("npt_kernels.run.run.utilisation_of", lambda *args, **kwargs: Utilisation(1000, 1e9))
    start(tmp_path / "known", sections={"model": FAR}, max_steps=2)
    found = records(tmp_path / "known", "train")
    assert len(found) == 2
    for record in found:
        assert record["mfu"] == pytest.approx(1000 * record["tokens"] / (record["seconds"] * 1e9))
