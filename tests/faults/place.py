"""A tiny model, a text and a configuration on disk: what an ``npt train`` of two seconds reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npt_kernels.configs import parse_yaml

__all__ = ["Place", "make_place"]

#: Something happens every second step, so that a random moment meets it.
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"rank": 6, "basis": "fisher"},
    "training": {
        "mode": "local+polish", "max_steps": 12, "polish_steps": 8, "learning_rate": 3e-3, "polish_learning_rate": 1e-3,
        "num_epochs": 20, "warmup_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2,
        "save_steps": 2, "save_total_limit": 3, "eval_steps": 4, "prediction_logging_steps": 6, "regularization_weight": 1e-4,
    },
    "data": {"max_length": 24, "calibration_tokens": 480, "eval_fraction": 0.15},
    "evaluation": {"tokens": 96, "prompts": ["the cat"], "max_new_tokens": 4},
    "optimization": {"mixed_precision": "no", "num_threads": 1},
}  # fmt: skip
_WORDS = "the a cat dog house tree river sees finds likes under near old young green quick and but . , then never"


@dataclass(frozen=True)
class Place:
    """``folder`` with ``model/``, ``text.txt`` and ``config.yaml``."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def command(self, out: Path, *more: str) -> list[str]:
        """Arguments of ``npt``: a run that begins."""
        return ["train", "--config", str(self.config), "--output-dir", str(out), *more]

    def resume(self, out: Path, *more: str) -> list[str]:
        """Arguments of ``npt``: the run in ``out`` goes on."""
        return ["train", "--resume", str(out), *more]


def make_place(folder: Path) -> Place:
    """Written by libraries alone, the same in every process."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = _WORDS.split()
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(words) + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "model")
    for path in (folder / "model").iterdir():
        path.chmod(0o644)  # safetensors lets only the owner read, and some runs are somebody else's
    place = Place(folder)
    drawn = torch.randint(len(words), (2400,), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [" ".join(words[i] for i in drawn[start : start + 40]) for start in range(0, len(drawn), 40)]
    place.text.write_text("\n\n".join(lines) + "\n")
    settings = {name: dict(values) for name, values in SETTINGS.items()}
    settings["model"]["base_model_name"] = str(folder / "model")
    settings["data"]["train_files"] = [str(place.text)]
    place.config.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    assert parse_yaml(place.config.read_text(), "config.yaml")["training"]["save_steps"] == 2
    return place
