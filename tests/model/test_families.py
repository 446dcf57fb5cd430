"""Every causal language model type of transformers: exact at full rank, or refused with its reason. Nothing in between."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((Path(__file__).with_name("families.json")).read_text())
#: One type a reason is enough for the others: building a hundred models that are refused takes a minute.
TRIED = [name for name, entry in RECORD["types"].items() if entry["outcome"] == "exact"]
REASONS: dict[str, str] = {}

sys.path.insert(0, str(ROOT / "tools"))
import list_families  # noqa: E402

for _name, _entry in RECORD["types"].items():
    if _entry["outcome"] == "refused":
        REASONS.setdefault(list_families.reason_of(_entry["about"]), _name)


@pytest.mark.parametrize("model_type", [*TRIED, *REASONS.values()])
def test_as_recorded(model_type):
    if RECORD["transformers"] != transformers.__version__:
        pytest.skip(f"the record is of transformers {RECORD['transformers']}; renew it with tools/list_families.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, about = list_families.outcome(model_type)
    assert (found, about) == (RECORD["types"][model_type]["outcome"], RECORD["types"][model_type]["about"])


def test_the_record_has_no_wrong_conversion_and_the_page_shows_it():
    outcomes = [entry["outcome"] for entry in RECORD["types"].values()]
    assert set(outcomes) <= {"exact", "refused", "not built"}
    assert outcomes.count("exact") >= 39
    assert (ROOT / "docs" / "families.md").read_text() == list_families.page(RECORD)
    assert all("\n" not in entry["about"] for entry in RECORD["types"].values())
