"""``data.isolate_documents`` reaches every part of a run, and is undone behind it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.evaluation.perplexity import evaluate, evaluate_base
from npt_kernels.model.documents import isolated_documents
from npt_kernels.model.forward import decoder_of
from npt_kernels.run.run import run_training
from tests.support.helpers import Words, tiny_model, token_ids

EOS = 5


class Separated(Words):
    eos_token_id = EOS


def run(path, isolate, tokenizer=None, mode="local"):
    def text(rows, seed):
        ids = token_ids(rows, 16, seed)
        ids[:, 6] = EOS
        ids[::2, 11] = EOS
        return ids

    blocks = SimpleNamespace(train=text(8, 1), calibration=text(8, 2), heldout=text(4, 3), sources=[])
    config = RunConfig.from_mapping({
        "model": {"rank": 8, "basis": "pca"},
        "training": {"mode": mode, "batch_size": 4, "max_steps": 2},
        "data": {"isolate_documents": isolate},
        "evaluation": {"tokens": 60, "prompts": ["1 2"], "max_new_tokens": 2},
        "paths": {"output_dir": str(path)},
    })  # fmt: skip
    model = tiny_model("llama", layers=2)
    summary = run_training(config, model, tokenizer or Separated(), blocks, console=Console(file=io.StringIO()))
    assert not decoder_of(model)._forward_pre_hooks
    return summary, model, blocks.heldout


@pytest.mark.parametrize("mode", ["local", "end_to_end"])
def test_a_run_measures_and_trains_within_documents(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    across, _, _ = run(tmp_path / "a", False, mode=mode)
    within, model, heldout = run(tmp_path / "b", True, mode=mode)
    with isolated_documents(model, EOS):
        base, _ = evaluate_base(model, heldout)
        trained = evaluate(model, heldout)
    assert within.base.base_nll == base.base_nll and within.trained.npt_nll == trained.npt_nll
    assert abs(across.base.base_nll - within.base.base_nll) > 1e-4
    assert across.converted.kl != within.converted.kl


def test_a_tokenizer_without_a_separator(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match=r"isolate_documents=true .* this tokenizer \(Words\) has none"):
        run(tmp_path, True, Words())
