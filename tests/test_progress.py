"""Long work on a terminal, in a log, and quietly."""

from __future__ import annotations

import pytest

from npt_kernels import NPTConfig, apply_npt, progress
from npt_kernels.progress import progress_bar
from tests.support.helpers import tiny_model, token_ids
from tests.support.runs import start


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(), []
    monkeypatch.setattr(progress, "time", clock)
    with progress_bar("calibrating", 1000, "tokens", enabled=lines.append) as advance:
        for _ in range(100):
            clock.now += 1.0
            advance(10)
    assert len(lines) == 9, "every ten seconds, and not once more at the end"
    assert lines[0] == "calibrating: 100 of 1,000 tokens, about 1:30 left"
    assert lines[-1] == "calibrating: 900 of 1,000 tokens, about 0:10 left"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    for enabled in (lines.append, False):
        with progress_bar("work", 3, "steps", enabled=enabled) as advance:
            advance(3)
    assert not lines and capsys.readouterr() == ("", "")


def test_conversion_and_evaluation_of_a_run_are_heard_in_a_log(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    apply_npt(tiny_model("llama"), NPTConfig(layers="all", rank=8), token_ids(64, 32), progress=lines.append)
    assert any(line.startswith("calibrating: ") for line in lines)
    assert any(line.startswith("refitting on the converted stream: 1 of 4 layers") for line in lines)
    start(tmp_path, max_steps=1)
    assert "refitting on the converted stream: 1 of 3 layers" in start.output
