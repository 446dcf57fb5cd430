"""Result files: written in one step, read back, refused with a reason."""

from __future__ import annotations

import json
import os

import pytest
import torch

from npt_kernels.bench import results
from npt_kernels.bench.results import (
    BenchError,
    ResultFile,
    device_folder,
    environment,
    load_results,
    newest_rows,
    repository,
    write_json,
)

CPU = torch.device("cpu")


def file(tmp_path, date="2026-01-02T03:04:05Z", rows=(), **changes):
    facts = environment(CPU) | {"date": date}
    return ResultFile(**{"suite": "memory", "facts": facts, "command": [], "size": "small", "directory": tmp_path,
                         "rows": list(rows), **changes})  # fmt: skip


def row(provider="eager", status="ok", **more):
    return {"op": "mlp", "shape": "8B", "mode": "local", "tokens": 4, "rank": 8, "rule": "self_key",
            "dtype": "float32", "provider": provider, "status": status, **more}  # fmt: skip


def test_environment_names_everything():
    facts = environment(CPU)
    assert {"device", "date", "commit", "version", "torch", "python", "cores", "threads", "load_before"} <= set(facts)
    assert device_folder(facts) == f"cpu-{facts['cores']}-cores"
    assert device_folder({"device": "NVIDIA H200"}) == "nvidia-h200"
    assert repository() is not None and len(facts["commit"]) == 40


def test_no_commit_from_somebody_elses_repository(monkeypatch, tmp_path):
    """Installed as a wheel into a virtual environment inside another checkout, that checkout's commit is not ours."""
    repository.cache_clear()
    monkeypatch.setattr(results, "_output", lambda *command, at=None: "/somewhere/else")
    try:
        assert repository() is None
    finally:
        repository.cache_clear()


def test_a_file_is_named_after_device_suite_and_date(tmp_path):
    made = file(tmp_path, part=(2, 3))
    assert made.path.name == "memory-small-2of3-20260102T030405Z.json"
    assert made.path.parent.parent == tmp_path
    assert file(tmp_path, size="full").path.name == "memory-20260102T030405Z.json"
    made.save()
    assert json.loads(made.path.read_text())["part"] == "2/3"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json({"old": 1}, tmp_path / "x.json")
    with pytest.raises(TypeError):
        write_json({"new": object()}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BenchError, match="No space left"):
        write_json({"new": 1}, path)
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(BenchError, match=r"taken.* cannot be written"):
        file(tmp_path / "taken").save()


def test_reading(tmp_path):
    older = file(tmp_path, "2026-01-01T00:00:00Z", [row(us=1)]).save()
    newer = file(tmp_path, "2026-02-01T00:00:00Z", [row(us=2), row("peft", us=3)]).save()
    write_json({"some": "other JSON"}, tmp_path / "demo.json")
    (tmp_path / "broken.json").write_text("{")
    loaded = load_results(tmp_path)
    assert [entry["path"] for entry in loaded] == [older, newer]
    rows = newest_rows(loaded)
    assert [(r["provider"], r["us"]) for r in rows] == [("eager", 2), ("peft", 3)]
    assert rows[0]["source"]["path"] == newer and load_results(newer)[0]["path"] == newer


def test_a_later_skip_takes_no_measurement_away(tmp_path):
    file(tmp_path, "2026-01-01T00:00:00Z", [row(us=1)]).save()
    file(tmp_path, "2026-02-01T00:00:00Z", [row(status="skipped")]).save()
    assert newest_rows(load_results(tmp_path))[0]["us"] == 1
    file(tmp_path, "2026-03-01T00:00:00Z", [row(status="wrong")]).save()
    assert newest_rows(load_results(tmp_path))[0]["status"] == "wrong"


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(BenchError, match="does not exist"):
        load_results(tmp_path / "nothing")
    with pytest.raises(BenchError, match="holds no results"):
        load_results(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(BenchError, match="is not JSON"):
        load_results(tmp_path / "a.json")
    write_json({"suite": "demo"}, tmp_path / "b.json")
    with pytest.raises(BenchError, match="is no result of"):
        load_results(tmp_path / "b.json")
    path = file(tmp_path).save()
    write_json(json.loads(path.read_text()) | {"schema": 99}, path)
    with pytest.raises(BenchError, match="schema 99"):
        load_results(path)
