"""Going on with a run: the same bits as without a stop, whatever stopped it and whenever; what cannot work is named."""

from __future__ import annotations

import json
import math
import os
import re
import shutil

import pytest
import torch

from npt_kernels.configs.schema import ConfigError
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run.resume import find_resume
from tests.support.helpers import Words, tiny_model, token_ids
from tests.support.runs import FAR, PowerCut, blocks, records, start, stop_at


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Half of a tiny run's time, and nothing of what is tested here.
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


#: Everything happens now and then, and not always in the same step.
STEPS = {
    "max_steps": 7,
    "polish_steps": 5,
    "save_steps": 3,
    "eval_steps": 2,
    "prediction_logging_steps": 4,
    "logging_steps": 3,
}
MODES = {
    "local": {"mode": "local", **STEPS},
    "kl": {"mode": "end_to_end", **STEPS},
    "local+polish": {"mode": "local+polish", "regularization_weight": 1e-4, "warmup_steps": 2, **STEPS},
    "accumulation": {"mode": "end_to_end", "objective": "layer", "batch_size": 3, "gradient_accumulation_steps": 3, **STEPS},
}  # fmt: skip


def measured(path):
    """All that was measured, without times and places."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kinds = ("train", "eval", "fidelity", "samples")
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in lines if line["kind"] in kinds]


def found(summary):
    values = summary.to_dict()
    return {name: values[name] for name in values.keys() - {"seconds", "tokens_per_second", "peak_memory", "paths"}}


def assert_same_run(one, other):
    (path, summary, model), (other_path, other_summary, other_model) = one, other
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(other_model)[name]), name
    assert measured(path) == measured(other_path)
    assert found(summary) == found(other_summary)
    assert (path / "samples.md").read_text() == (other_path / "samples.md").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Mode → ``(path, summary, model)`` of a run without a stop; each is run once."""
    done = {}

    def run_of(mode):
        if mode not in done:
            path = tmp_path_factory.mktemp("uninterrupted")
            done[mode] = path, *start(path, sections={"model": FAR}, tokenizer=Words(), **MODES[mode])
        return done[mode]

    return run_of


@pytest.mark.parametrize(
    ("mode", "number", "how"),
    [
        ("local", 5, "crash"), ("kl", 4, "crash"), ("kl", 4, "ctrl-c"), ("accumulation", 6, "ctrl-c"),
        # in the first phase; in its last step; in the first of the second; later, after a checkpoint of the second
        ("local+polish", 5, "crash"), ("local+polish", 7, "ctrl-c"), ("local+polish", 8, "crash"),
        ("local+polish", 9, "ctrl-c"), ("local+polish", 11, "crash"),
    ],
)  # fmt: skip
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, mode, number, how):
    settings = {"sections": {"model": FAR}, "tokenizer": Words(), **MODES[mode]}
    with monkeypatch.context() as patch, pytest.raises(PowerCut if how == "crash" else KeyboardInterrupt):
        stop_at(patch, number, how)
        start(tmp_path, **settings)
    torch.manual_seed(number)  # another process has other random numbers
    summary, model = start(tmp_path, resume=tmp_path, **settings)
    assert "resumed from" in start.output and "note:" not in start.output
    assert_same_run((tmp_path, summary, model), uninterrupted(mode))


def test_a_resumed_run_may_write_elsewhere(tmp_path, uninterrupted):
    path, _, _ = uninterrupted("kl")
    here = tmp_path / "elsewhere"
    resume = path / "checkpoints" / "end_to_end-000006"
    summary, model = start(here, sections={"model": FAR}, tokenizer=Words(), resume=resume, **MODES["kl"])
    assert_same_run((here, summary, model), uninterrupted("kl"))
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["end_to_end-000006", "end_to_end-000007"]


def test_a_finished_run_can_be_made_longer(tmp_path, uninterrupted):
    start(
        tmp_path,
        sections={"model": FAR},
        tokenizer=Words(),
        **(MODES["kl"] | {"max_steps": 4}),
        lr_scheduler="constant",
    )
    settings = {"sections": {"model": FAR}, "tokenizer": Words(), **MODES["kl"], "lr_scheduler": "constant"}
    _, model = start(tmp_path, resume=tmp_path, **settings)
    assert "note: changed since the checkpoint was written: training.max_steps 4 → 7" in start.output
    _, whole = start(tmp_path / "whole", **settings)
    assert all(torch.equal(t, adapter_state_dict(model)[name]) for name, t in adapter_state_dict(whole).items())
    rates = [r["learning_rate"] for r in records(tmp_path, "train")]
    assert set(rates) == {3e-3}


# ---- what a configuration may change --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output of a run that stopped after 4 of 7 steps."""
    path = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("ACCELERATE_USE_CPU", "true")
        stop_at(patch, 4, "ctrl-c")
        start(path, sections={"model": FAR}, max_steps=7)
    return path


@pytest.mark.parametrize(
    ("sections", "training", "message"),
    [
        ({"model": {**FAR, "rank": 8}}, {}, r"model.rank is 8, but .*end_to_end-000004 was trained with 16.*--resume .*adapter"),
        ({"model": {**FAR, "npt_layers": [0, 1]}}, {}, r"model.npt_layers is \[0, 1\], but .* with 'all'"),
        ({"model": {**FAR, "rule": "rank1"}}, {}, r"model.rule is 'rank1'"),
        ({"model": FAR}, {"seed": 1}, r"training.seed is 1, but .* with 0"),
        ({"model": FAR}, {"mode": "local"}, r"phase end_to_end \(objective kl\), which training.mode=local does not have"),
        ({"model": FAR}, {"objective": "layer"}, r"phase end_to_end \(objective kl\).*resume with"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_fixes_is_one_clear_line(tmp_path, stopped, sections, training, message):
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message) as caught:
        start(stopped, sections=sections, resume=stopped, **({"max_steps": 7} | training))
    assert "\n" not in str(caught.value)
    assert (stopped / "metrics.jsonl").read_bytes() == before, "nothing was touched"


@pytest.mark.parametrize(
    ("training", "text", "notes"),
    [
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, None, ["training.batch_size 4 → 2"]),
        ({"learning_rate": 1e-3, "save_steps": 3}, None, ["learning_rate 0.003 → 0.001"]),
        ({"max_steps": 3}, None, ["has 3 steps now, and 4 are done: it is over"]),
        ({}, token_ids(24, 16, 77), ["training text is not the one of the checkpoint"]),
        ({"logging_steps": 1, "eval_steps": 3, "save_total_limit": 5}, None, []),
    ],
)
def test_other_changes_are_noted(tmp_path, stopped, training, text, notes):
    changed = blocks()
    changed.train = changed.train if text is None else text
    summary, _ = start(
        tmp_path, sections={"model": FAR}, text=changed, resume=stopped / "checkpoints" / "end_to_end-000004",
        **({"max_steps": 7} | training),
    )  # fmt: skip
    for note in notes:
        assert note in start.output
    assert notes or "note:" not in start.output
    assert summary.steps == (4 if training.get("max_steps") == 3 else 7)
    rates = [r["learning_rate"] for r in records(tmp_path, "train")]
    if "learning_rate" in training:
        last = 1e-3 * (1 + math.cos(math.pi * 6 / 7)) / 2
        assert rates[0] == 3e-3 and rates[-1] == pytest.approx(last)


def test_another_number_of_sequences_is_refused(tmp_path, stopped):
    with pytest.raises(ConfigError, match=r"--resume .*end_to_end-000004: .*24 training sequences, there are now 20"):
        start(tmp_path, sections={"model": FAR}, text=blocks(20), max_steps=7, resume=stopped)


def test_another_base_model_is_noted(tmp_path, stopped):
    start(tmp_path, sections={"model": FAR}, max_steps=7, resume=stopped, model=tiny_model("llama", layers=3, seed=5))
    assert re.search(r"the original's perplexity is [\d.]+ here and was [\d.]+", start.output)


def test_a_plain_adapter_starts_anew_and_says_so(tmp_path, stopped):
    summary, _ = start(tmp_path, sections={"model": FAR}, max_steps=2, resume=stopped / "adapter")
    assert "is a plain adapter" in start.output and "start anew" in start.output
    assert summary.steps == 2


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "short", "flipped bit"])
@pytest.mark.parametrize(
    "file", ["npt_model.safetensors", "optimizer.bin", "state.pt", "metrics.jsonl", "checkpoint.json"]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path, uninterrupted, file, how):
    path = tmp_path / "run"
    shutil.copytree(uninterrupted("kl")[0], path)
    newest = path / "checkpoints" / "end_to_end-000007"
    if (file, how) == ("checkpoint.json", "flipped bit"):
        (newest / file).write_text((newest / file).read_text().replace('"serial"', '"serial '))
    else:
        damage(newest / file, how)
    point = find_resume(path)
    assert point.checkpoint is not None and point.checkpoint.step == 6
    assert len(point.notes) == 1 and str(newest / file) in point.notes[0] + str(newest / file) * (how == "missing")
    assert "passed over" in point.notes[0]
    if file != "checkpoint.json":
        with pytest.raises(ConfigError, match=re.escape(str(newest / file))):
            find_resume(newest)
        damage(path / "checkpoints" / "end_to_end-000006" / "optimizer.bin", "short")
        point = find_resume(path)
        assert point.checkpoint is None and point.adapter == path / "adapter" and len(point.notes) == 2
        shutil.rmtree(path / "adapter")
        with pytest.raises(ConfigError, match=r"no whole checkpoint and no adapter in .*passed over; .*passed over"):
            find_resume(path)


def test_size_alone_is_compared_when_there_is_no_time(tmp_path, uninterrupted):
    path = tmp_path / "run"
    shutil.copytree(uninterrupted("kl")[0], path)
    newest = path / "checkpoints" / "end_to_end-000007"
    damage(newest / "optimizer.bin", "flipped bit")
    assert find_resume(path, thorough=False).checkpoint.step == 7 and find_resume(path).checkpoint.step == 6
    damage(newest / "optimizer.bin", "short")
    assert find_resume(path, thorough=False).checkpoint.step == 6


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        find_resume(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds neither checkpoint nor adapter"):
        find_resume(tmp_path)


def test_a_checkpoint_of_the_future_is_named(tmp_path, uninterrupted):
    path = tmp_path / "run"
    shutil.copytree(uninterrupted("kl")[0] / "checkpoints" / "end_to_end-000007", path)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"format_version": 9}))
    with pytest.raises(ConfigError, match=r"format_version 9.*upgrade"):
        find_resume(path)


def test_a_new_run_beside_the_checkpoints_of_an_earlier_one_says_so(tmp_path):
    for _ in range(2):
        start(tmp_path, sections={"model": FAR}, max_steps=2, save_steps=1, save_total_limit=1)
    kept = tmp_path / "checkpoints" / "end_to_end-000002"
    assert (
        f"1 checkpoint(s) of an earlier run stay in {kept.parent}" in start.output
        and f"--resume {kept}" in start.output
    )
    assert sorted(os.listdir(kept.parent)) == ["end_to_end-000002", "end_to_end-000002.2"]


def test_a_folder_of_checkpoints_that_runs_share(tmp_path):
    """``paths.checkpoint_dir: ./checkpoints`` in users' files: each run finds its own there."""
    shared = {"model": FAR, "paths": {"checkpoint_dir": str(tmp_path / "shared")}}
    for name in ("one", "two"):
        start(
            tmp_path / name,
            sections={**shared, "paths": {**shared["paths"], "output_dir": str(tmp_path / name)}},
            max_steps=2,
        )
    assert find_resume(tmp_path / "one").checkpoint.path.name == "end_to_end-000002"
    assert find_resume(tmp_path / "two").checkpoint.path.name == "end_to_end-000002.2"
    assert find_resume(tmp_path / "shared").checkpoint.path.name == "end_to_end-000002.2"
