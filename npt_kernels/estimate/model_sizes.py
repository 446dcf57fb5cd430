"""The numbers of a model that bytes and seconds are counted from, read off the model built on torch's ``meta`` device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..component import NPComponent
from ..config import NPTConfig, parse_rank
from ..configs.schema import ConfigError
from ..model.linears import linear_shape, unsupported_linear
from ..model.select import LayerChoice, find_layers, fixed_ranks, plan_layers
from ..model.shapes import LAYER_SHAPES

__all__ = ["Adapter", "ModelNumbers", "count_adapter", "meta_model", "read_numbers"]


@dataclass(frozen=True)
class ModelNumbers:
    """Sizes of a decoder; parameters are counts, not bytes.

    Attributes:
        family: Name of the layer shape.
        hidden_size, intermediate_size: d and f.
        num_layers, num_heads, num_kv_heads, head_dim, vocab_size, max_positions: As in ``config.json``.
        gated: Whether the MLP is act(gate) ⊙ up (three matrices) or a plain one (two).
        layer_norm: LayerNorm (GPT-2) instead of RMSNorm.
        fused_qkv: q, k and v come out of one matrix, and so share one tensor.
        eager_attention: Whether attention writes its scores out (``attn_implementation="eager"``) instead of SDPA.
        activation_copies: ``[T, f]`` tensors alive at once in the *original* MLP's activation, its result included.
        attention_linears: ``(in, out)`` of the linears of one layer's attention.
        mlp_linears: The same of its MLP, in op order.
        layer_other: Parameters of a layer that are no weight of a linear: norms and biases.
        embedding: Parameters of token and position embeddings.
        head: Parameters of the output head that are not the embedding's.
        other: The rest: the last norm.
        buffers: Bytes of buffers, such as rotary frequencies.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    gated: bool
    layer_norm: bool
    fused_qkv: bool
    eager_attention: bool
    activation_copies: int
    attention_linears: tuple[tuple[int, int], ...]
    mlp_linears: tuple[tuple[int, int], ...]
    layer_other: int
    embedding: int
    head: int
    other: int
    buffers: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        return self.attention_linears + self.mlp_linears

    @property
    def layer_linear(self) -> int:
        """Weights in the linears of one layer."""
        return sum(a * b for a, b in self.linears)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.layer_linear + self.layer_other

    @property
    def mlp(self) -> int:
        """Weights of one layer's MLP."""
        return sum(a * b for a, b in self.mlp_linears)

    @property
    def parameters(self) -> int:
        return self.num_layers * self.layer + self.embedding + self.head + self.other

    @property
    def heads_width(self) -> int:
        """Width of q and of what attention returns before its output projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of k, and of v."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Adapter:
    """The NP components of a run.

    Attributes:
        layers: Converted layers, ascending.
        ranks: R = k·r of each; under ``auto`` the mean for each.
        parameters: Trainable parameters of each.
        targets: Target → ``(in, out)``.
        slots: Target → place in the MLP (``gate``, ``up``, ``down``).
        skipped: Layer → why it was not converted although the selection names it.
        key: Of the rule: ``matrix``, ``vector`` or ``none``.
        tied: Whether gate's and up's key is ``w_down`` itself.
        norm_match: Whether the MLP's norm divides by the norm of h + a.
        fold: Whether the norm is matched to the change of the MLP's output.
        no_projection: Whether the attention's output projection is left out too (``model/fold.py``).
        norms_sum: Whether the MLP's norm reads h + a, which then exists beside h (``NPTConfig.attention_residual``).
    """

    layers: list[int]
    ranks: list[int]
    parameters: list[int]
    targets: dict[str, tuple[int, int]]
    slots: dict[str, str]
    key: str
    tied: bool = False
    norm_match: bool = True
    fold: bool = False
    no_projection: bool = False
    norms_sum: bool = False
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parameters)

    @property
    def largest(self) -> int:
        """Parameters of the largest component."""
        return max(self.parameters)

    @property
    def rank(self) -> int:
        """The largest R."""
        return max(self.ranks)


def meta_model(name: str, numbers: dict[str, Any]) -> nn.Module:
    """The model of a ``config.json`` without storage. Raises :class:`ConfigError` if transformers cannot build it."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"a plan needs {error.name}; pip install 'npt_kernels[train]'") from error
    values = {key: value for key, value in numbers.items() if key not in {"model_type", "quantization_config"}}
    try:
        config = AutoConfig.for_model(numbers["model_type"], **values)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(
            f"model.base_model_name={name!r}: its configuration builds no causal model: {lines[0]}"
        ) from error
    return model


def read_numbers(model: nn.Module) -> ModelNumbers:
    """Sizes of a causal language model whose layers NPT knows, on any device. Raises ``ValueError`` for others."""
    _, layers = find_layers(model)
    layer, shape = next((entry, s) for entry in layers for s in LAYER_SHAPES if s.mismatch(entry) is None)
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    attention = _linears(shape.attention_module(layer))
    mlp = {t: linear_shape(shape.linear(layer, t)) for t in shape.targets}
    in_layers = sum(p.numel() for entry in layers for p in entry.parameters())
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embedding.weight
    head_size = 0 if head is None or tied else sum(p.numel() for p in head.parameters())
    total = sum(p.numel() for p in model.parameters())
    positions = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name.endswith((".wpe.weight",))
    )
    embeddings = embedding.weight.numel() + positions
    num_heads = config.num_attention_heads
    hidden_size = config.hidden_size
    gated = any(place.slot == "gate" for place in shape.targets.values())
    linears = [*attention, *mlp.values()]
    return ModelNumbers(
        family=shape.name,
        hidden_size=hidden_size,
        intermediate_size=next(size[1] for t, size in mlp.items() if shape.targets[t].slot == "up"),
        num_layers=len(layers),
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or hidden_size // num_heads,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or 0,
        gated=gated,
        layer_norm=isinstance(shape.norm(layer), nn.LayerNorm),
        fused_qkv=len(attention) == 2,
        eager_attention=getattr(config, "_attn_implementation", None) == "eager",
        activation_copies=_activation_copies(shape.activation(layer), gated),
        attention_linears=tuple(attention),
        mlp_linears=tuple(mlp.values()),
        layer_other=round(in_layers / len(layers)) - sum(a * b for a, b in linears),
        embedding=embeddings,
        head=head_size,
        other=total - in_layers - embeddings - head_size,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def _linears(module: nn.Module) -> list[tuple[int, int]]:
    return [linear_shape(child) for child in module.modules() if unsupported_linear(child) is None]


def _activation_copies(activation: Any, gated: bool) -> int:
    """Widest moment of the original MLP: act(gate), up and their product; or what a plain activation holds.

    GPT-2's ``gelu_new`` is written out in Python in transformers: x, x³ and two partial results.
    """
    if gated:
        return 3
    return 4 if type(activation).__name__ == "NewGELUActivation" else 2


# ---- NP components ---------------------------------------------------------------------------------------------------


def count_adapter(model: nn.Module, config: NPTConfig) -> Adapter:
    """What ``apply_npt(model, config)`` would install. Raises ``ValueError`` for a setting that cannot work."""
    choices, skipped, _ = plan_layers(model, config, weights=False)
    ranks = _ranks(config, choices)
    components = [
        NPComponent(
            choice.hidden_size, choice.targets, rank=rank, rule=config.rule, num_ranks=config.num_ranks, device="meta"
        )
        for choice, rank in zip(choices, ranks, strict=True)
    ]
    first = choices[0]
    return Adapter(
        layers=[choice.plan.index for choice in choices],
        ranks=[component.total_rank for component in components],
        parameters=[sum(p.numel() for p in component.parameters()) for component in components],
        targets=first.targets,
        slots={target: first.plan.shape.targets[target].slot for target in first.targets},
        key=components[0].rule.key,
        tied=components[0].rule.ties_key_to_w_down,
        norm_match=config.matches_norm,
        fold=first.plan.fold,
        no_projection=first.plan.projection is not None,
        norms_sum=config.attention_residual and not first.plan.shape.parallel,
        skipped=skipped,
    )


def _ranks(config: NPTConfig, choices: Sequence[LayerChoice]) -> list[int]:
    ranks = fixed_ranks(config, list(choices))
    if ranks is not None:
        return ranks
    mean, width = int(parse_rank(config.rank)[1]), choices[0].hidden_size
    if mean > width:
        raise ValueError(
            f"rank={config.rank!r} exceeds the hidden size {width}; set model.rank=auto:{max(1, width // 4)}, say"
        )
    if config.rule != "self_key":
        raise ValueError(
            f"rank={config.rank!r} is allotted by the closed form, which rule={config.rule!r} has not; name a rank"
        )
    return [mean] * len(choices)
