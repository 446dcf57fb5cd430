"""A fixed part of ``make fuzz`` at every commit; each target in a process of its own: a crash is its failure alone."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import in_a_process, targets

#: Of a full run's cases.
SHARE = 0.006


@pytest.mark.parametrize("target", targets(SHARE), ids=lambda target: f"{target.name} {target.room}".replace(" ", "-"))
def test_every_case_is_right_or_refused_in_one_line(target):
    _, counts, finding, _ = in_a_process(target, seed=1)
    assert not finding, finding
    assert sum(counts.values()) >= max(1, target.cases), "cases are missing"
    # A target that refuses everything, or takes everything, tests one half.
    assert counts.get("refused", 0) > 0 and sum(counts.values()) > counts["refused"], counts
