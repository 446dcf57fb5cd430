"""Whole runs on streamed text: they learn, resume with the same bits, and save what they have when the text is broken."""

from __future__ import annotations

import io
import json
import threading

import pytest
from rich.console import Console

from npt_kernels.configs.schema import RunConfig
from npt_kernels.run.run import TrainingError, run_training
from npt_kernels.text.blocks import load_token_blocks
from tests.support.helpers import VOCAB, tiny_model


class Numbers:
    """A tokenizer of numbers with an end-of-text token."""

    eos_token_id, bos_token_id = 5, None

    def __call__(self, text, **settings):
        texts = [text] if isinstance(text, str) else text
        ids = [[int(word) if word.isdigit() else 0 for word in entry.split()] for entry in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def write(path, documents, last=None):
    lines = [
        json.dumps({"text": " ".join(str((i * 7 + j * j) % VOCAB) for j in range(4 + i % 9))}) for i in range(documents)
    ]
    path.write_text("\n".join([*lines, *([last] if last else [])]))
    return path


def run(path, files, steps, resume=None, mode="local"):
    sources = [{"files": [str(file)], "weight": 1 + number} for number, file in enumerate(files)]
    config = RunConfig.from_mapping({
        "model": {"rank": 8, "init": "small"},
        "training": {
            "mode": mode, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "save_steps": 3,
            "max_steps": steps, "lr_scheduler": "constant",
        },
        "data": {
            "sources": sources, "streaming": True, "shuffle_buffer": 5, "max_length": 16, "calibration_tokens": 32,
            "isolate_documents": True,
        },
        "evaluation": {"tokens": 60, "prompts": []},
        "paths": {"output_dir": str(path)},
    })  # fmt: skip
    blocks = load_token_blocks(config, Numbers())
    summary = run_training(
        config, tiny_model("llama", layers=2), Numbers(), blocks, resume=resume, console=Console(file=io.StringIO())
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "npt-text"]
    return summary, (path / "adapter" / "npt_model.safetensors").read_bytes()


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path):
    files = [write(tmp_path / "a.jsonl", 60), write(tmp_path / "b.jsonl", 45)]
    summary, whole = run(tmp_path / "whole", files, 12)
    assert summary.steps == 12
    layers = [entry.explained_variance for entry in summary.fidelity_converted]
    assert all(
        after.explained_variance > before for after, before in zip(summary.fidelity_trained, layers, strict=True)
    )
    run(tmp_path / "parts", files, 6)
    resumed, bits = run(tmp_path / "parts", files, 12, resume=tmp_path / "parts")
    assert resumed.steps == 12 and bits == whole


def test_text_that_breaks_later_saves_what_was_learned(tmp_path):
    broken = write(tmp_path / "a.jsonl", 400, last='{"text": 7}')
    with pytest.raises(TrainingError, match=r"a\.jsonl line 401: field 'text' is a int.*adapter of step \d+ saved in"):
        run(tmp_path / "out", [broken], 1000)
    assert (tmp_path / "out" / "adapter" / "npt_model.safetensors").is_file()
    assert not [thread for thread in threading.enumerate() if thread.name == "npt-text"]
