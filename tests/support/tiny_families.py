"""Every causal language model type of transformers that can be built tiny, from its configuration class alone."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn

#: Sizes by every name that configurations use for them; a class takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embed_dim": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "d_ff": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "n_head_kv": 2, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_sequence_length": 64, "max_seq_len": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "layer_types": None,
}  # fmt: skip


_FOUR = {"num_hidden_layers": 4}

#: Layers of the kinds that two layers of the generic sizes do not have: dense ones beside experts, attention beside others.
TYPE_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"first_k_dense_replace": 1}, "deepseek_v3": {"first_k_dense_replace": 1, "head_dim": 4},
    "axk1": {"head_dim": 4}, "youtu": {"head_dim": 4}, "glm4_moe_lite": {"head_dim": 4}, 
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "longcat_flash": {"head_dim": 4},
    "xglm": {"activation_dropout": 0.0}, "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
    "qwen2_moe": {"mlp_only_layers": [0]}, "qwen3_moe": {"mlp_only_layers": [0]}, "qwen3_next": _FOUR | {"mlp_only_layers": [3]},
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "qwen3_5_text": _FOUR, "qwen3_5_moe_text": _FOUR, "olmo_hybrid": _FOUR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
              "use_mamba_kernels": False},
}  # fmt: skip


def causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, **overrides: Any) -> nn.Module:
    """A tiny model of that type in evaluation mode, its vectors perturbed. Raises whatever its classes raise."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = config_class()
        sizes = {}
        for name, value in SIZES.items():
            if value is not None and hasattr(default, name):
                with contextlib.suppress(Exception):
                    sizes[name] = value
        config = config_class(**(sizes | TYPE_SIZES.get(model_type, {}) | overrides))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if parameters > 3_000_000:
            raise MemoryError(f"{model_type} has {parameters:,} parameters at the smallest sizes that are known here")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return model.eval()
