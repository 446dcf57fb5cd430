"""What the tests of the planner share: tiny models by their config.json, and configurations for them."""

from __future__ import annotations

from typing import Any

from npt_kernels.configs.schema import RunConfig
from npt_kernels.estimate.model_sizes import Adapter, ModelNumbers, count_adapter, meta_model, read_numbers

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {"llama": LLAMA, "gpt2": GPT2}


def config_of(name: str = "x", **keys: Any) -> RunConfig:
    """A configuration from ``section__key=value``."""
    data: dict[str, dict[str, Any]] = {
        "model": {"base_model_name": name, "rank": 8, "init": "small"},
        "data": {"max_length": 64, "calibration_tokens": 256},
        "optimization": {"mixed_precision": "no"},
        "evaluation": {"tokens": 128, "prompts": []},
    }
    for key, value in keys.items():
        section, _, entry = key.partition("__")
        data.setdefault(section, {})[entry] = value
    return RunConfig.from_mapping(data)


def sizes_of(numbers: dict[str, Any], config: RunConfig) -> tuple[ModelNumbers, Adapter]:
    model = meta_model("x", numbers)
    return read_numbers(model), count_adapter(model, config.npt_config())
