"""Every causal language model type of transformers: exact at full rank, or refused with its reason. Nothing in between."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from npt_kernels import NPTConfig, apply_npt, npt_parameters, remove_npt
from npt_kernels.training.objectives import enable_checkpointing
from tests.support.helpers import assert_unchanged, snapshot
from tests.support.tiny_families import build

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
    assert outcomes.count("exact") >= 65
    assert (ROOT / "docs" / "families.md").read_text() == list_families.page(RECORD)
    assert all("\n" not in entry["about"] for entry in RECORD["types"].values())


@pytest.mark.parametrize(
    "model_type",
    ["llama4_text", "jamba", "qwen3_5_text", "lfm2", "olmo", "nanochat", "vaultgemma", "opt", "xglm", "phi3"],
)
def test_shapes_write_the_originals_text_train_and_come_back(model_type):
    """One model a shape: with its cache the same tokens, gradients for every component, the original again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(model_type)
        ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
        calibration = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        before = snapshot(model)
        written = model.generate(ids, **settings)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        apply_npt(model, NPTConfig(layers="all", rank=1.0), calibration=calibration)
        assert torch.equal(model.generate(ids, **settings), written)
        assert torch.equal(model.generate(ids, use_cache=False, **settings), written)
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in npt_parameters(model))
        remove_npt(model)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
        assert_unchanged(model, before)


def test_an_mlp_of_the_layers_own_refuses_what_would_not_be_exact():
    with pytest.raises(ValueError, match=r"activation_dropout=0\.1.*set activation_dropout=0"):
        apply_npt(build("xglm", activation_dropout=0.1), NPTConfig(layers="all", rank=4, init="small"))
    model = build("opt", dropout=0.1)
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    with pytest.raises(ValueError, match=r"OPTDecoderLayer drops out \(dropout=0\.1\).*set dropout=0"):
        enable_checkpointing(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
