"""A few of the faults, with a fixed seed; ``make faults`` tries all of them, many times."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .children import ROOT


def test_a_few_of_every_common_fault(tmp_path):
    """In a process of its own, which imports once and forks: a test runner's threads would not survive a fork."""
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--brief", "--seed", "3", "--json", str(record)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    outcomes = json.loads(record.read_text())["outcomes"]
    assert len(outcomes) >= 10
    for outcome in outcomes:
        assert not outcome["bad"], outcome
        # A checkpoint every second step: a kill costs those since the last one, a signal none.
        assert outcome["lost"] <= 2 or "disk" in outcome["fault"], outcome
        assert outcome["lost"] == 0 or not outcome["fault"].startswith("SIG"), outcome
    assert "same bits" in done.stdout
