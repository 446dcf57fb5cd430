"""docs/scaling.md says what the planner computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "tools" / "scaling_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_planner_computes(tables: ModuleType) -> None:
    assert tables.problems(tables.DOCUMENT.read_text()) == []


def test_a_changed_number_is_found(tables: ModuleType) -> None:
    text = tables.DOCUMENT.read_text()
    wrong = text.replace("| 8-bit | 1", "| 8-bit | 2", 1)
    assert wrong != text
    assert tables.problems(wrong) == [
        "table one-gpu is not what the planner computes; run tools/scaling_tables.py --write"
    ]
    assert tables.rewritten(wrong) == text
    assert "no table times" in tables.problems(text.replace("<!-- table:times -->", ""))


def test_figures_in_the_text(tables: ModuleType) -> None:
    """Numbers that stand in sentences, not in tables."""
    from npt_kernels.estimate.communication import pipeline_bubble

    text = " ".join(tables.DOCUMENT.read_text().split())
    moments = []
    for name in (tables.EIGHT, tables.SEVENTY, tables.LARGEST):
        model, _, _ = tables.run(name)
        moments.append(2 * model.num_layers * model.hidden_size**2 * 8 / 2**30)
    eight, seventy, largest = (f"{value:.0f}" for value in moments)
    assert f"({eight} GiB at 8B, {seventy} GiB at 70B, {largest} GiB at 405B)" in text
    assert f"{pipeline_bubble(8, 8, 1, 'end_to_end'):.0%} at P = 8, m = 8".replace("%", " %") in text
    assert f"{pipeline_bubble(8, 8, 400, 'local'):.1%} over 400 steps".replace("%", " %") in text
    model, adapter, _ = tables.run(tables.EIGHT)
    layer = 2 * model.layer_linear
    share = f"{2 * model.hidden_size * adapter.rank / layer:.1%}".replace("%", " %")
    assert f"2·T·d·R operations, {share} of a layer of 8B at R = 64" in text
