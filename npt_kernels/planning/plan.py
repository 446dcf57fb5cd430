"""``npt train --dry-run``: what a run will do and roughly what it needs, from ``config.json`` alone.

No weights, no network, no text is read: the model is built on torch's ``meta`` device, sizes come from its modules.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..activations import identify_activation
from ..config import NPTConfig, parse_rank, resolve_layers
from ..configs.schema import ConfigError, RunConfig
from ..inputs.loading import (
    check_length,
    choose_device,
    load_model_config,
    optimization_notes,
    resolve_cache_dir,
    resolve_dtype,
)
from ..models import LAYER_SHAPES
from ..models.base import LayerShape, linear_shape
from ..models.layer import LayerPlan
from ..models.patching import LayerChoice, find_layers, fixed_ranks
from ..models.walk import CHUNK_ELEMENTS
from ..nn import NPComponent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["MemoryTerm", "Plan", "make_plan", "print_plan"]

#: Tokens of the demo text's training part under SmolLM2's tokenizer, and characters per token of English for other texts.
_DEMO_TRAIN_TOKENS, _CHARACTERS_PER_TOKEN = 168_700, 4.3
#: Tokens per forward of the calibration (``collect_moments``).
_CALIBRATION_BATCH = 512


@dataclass(frozen=True)
class MemoryTerm:
    """One line of the estimate."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        config: The resolved configuration.
        device: Where it will run.
        dtype: Of the frozen base.
        family: Name of the layer shape.
        num_layers: Decoder layers of the model.
        hidden_size: d.
        layers: Indices that will be converted.
        skipped: Index → why not, for layers that the selection names.
        ranks: R = k·r per converted layer; under ``auto`` the mean for each.
        targets: Target → ``(in, out)``.
        np_parameters: Trainable parameters (under ``auto`` those of the mean rank, which the allotment does not exceed).
        frozen_parameters: Parameters of the base model.
        tokens_per_step: Per optimizer step.
        steps: Optimizer steps, ``None`` if the text's length is not known without reading it.
        steps_from: How ``steps`` is known.
        memory: Terms of the peak estimate; they add up to its upper end.
        notes: What deserves a line: keys without effect here, precision, limits.
    """

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    family: str
    num_layers: int
    hidden_size: int
    layers: list[int]
    skipped: dict[int, str]
    ranks: list[int]
    targets: dict[str, tuple[int, int]]
    np_parameters: int
    frozen_parameters: int
    tokens_per_step: int
    steps: int | None
    steps_from: str
    memory: list[MemoryTerm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        return sum(term.bytes for term in self.memory)


def make_plan(config: RunConfig, device: torch.device | str | None = None) -> Plan:
    """The plan of a run on ``device`` (``None``: a GPU if there is one). Reads ``config.json`` at most.

    Raises:
        ConfigError: The model is not known here, has no layers that can be converted, or a setting does not fit it.
    """
    device = torch.device(device) if device is not None else choose_device()
    name = config.model.base_model_name
    numbers = load_model_config(name, config.model.revision, resolve_cache_dir(config))
    check_length(config, numbers)
    model = _meta_model(name, numbers)
    npt_config = config.npt_config()
    try:
        choices, skipped, total = _choices(model, npt_config)
        ranks = _ranks(npt_config, choices)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    components = [
        NPComponent(
            choice.hidden_size, choice.targets, rank=rank, rule=npt_config.rule, num_ranks=npt_config.num_ranks, device="meta"
        )
        for choice, rank in zip(choices, ranks, strict=True)
    ]  # fmt: skip
    steps, steps_from = _steps(config)
    training = config.training
    accumulated = training.batch_size * training.gradient_accumulation_steps
    plan = Plan(
        config=config,
        device=device,
        dtype=resolve_dtype(config, device),
        family=choices[0].plan.shape.name,
        num_layers=total,
        hidden_size=choices[0].hidden_size,
        layers=[choice.plan.index for choice in choices],
        skipped=skipped,
        ranks=[component.total_rank for component in components],
        targets=choices[0].targets,
        np_parameters=sum(p.numel() for component in components for p in component.parameters()),
        frozen_parameters=sum(p.numel() for p in model.parameters()),
        tokens_per_step=0 if training.mode == "none" else accumulated * config.data.max_length,
        steps=steps,
        steps_from=steps_from,
        notes=[*optimization_notes(config, device), *_notes(config, npt_config, device)],
    )
    plan.memory.extend(_memory(plan, choices, numbers))
    return plan


def _meta_model(name: str, numbers: dict[str, Any]) -> nn.Module:
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


def _choices(model: nn.Module, config: NPTConfig) -> tuple[list[LayerChoice], dict[int, str], int]:
    """As ``plan_layers``, which runs the norm to recognise it and so needs weights."""
    _, layers = find_layers(model)
    choices: list[LayerChoice] = []
    skipped: dict[int, str] = {}
    for index in resolve_layers(config.layers, len(layers)):
        layer = layers[index]
        shape = next((shape for shape in LAYER_SHAPES if shape.mismatch(layer) is None), None)
        reason = "; ".join(filter(None, (s.mismatch(layer) for s in LAYER_SHAPES))) if shape is None else ""
        if shape is not None:
            choice = _choose(layer, shape, index, config)
            if isinstance(choice, LayerChoice):
                choices.append(choice)
                continue
            reason = choice
        if not isinstance(config.layers, str):
            raise ValueError(f"layer {index} cannot be converted: {reason}")
        skipped[index] = reason
    if not choices:
        raise ValueError(f"no layer of {type(model).__name__} can be converted: {next(iter(skipped.values()))}")
    return choices, skipped, len(layers)


def _choose(layer: nn.Module, shape: LayerShape, index: int, config: NPTConfig) -> LayerChoice | str:
    targets = {t: linear_shape(shape.linear(layer, t)) for t in shape.canonical_targets(tuple(config.targets))}
    activation = shape.activation(layer)
    act = identify_activation(activation)
    if act is None:
        return f"its activation {type(activation).__name__} is not one of the supported ones"
    hidden_size = linear_shape(shape.linear(layer, next(iter(shape.targets))))[0]
    return LayerChoice(layer, LayerPlan(index, shape, act, "rms", config.matches_norm), targets, hidden_size)


def _ranks(config: NPTConfig, choices: list[LayerChoice]) -> list[int]:
    ranks = fixed_ranks(config, choices)
    if ranks is not None:
        return ranks
    mean, width = int(parse_rank(config.rank)[1]), choices[0].hidden_size
    if mean > width:
        raise ValueError(f"rank={config.rank!r} exceeds the hidden size {width}")
    if config.rule != "self_key":
        raise ValueError(
            f"rank={config.rank!r} is allotted by the closed form, which rule={config.rule!r} has not; name a rank"
        )
    return [mean] * len(choices)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _steps(config: RunConfig) -> tuple[int | None, str]:
    """``(optimizer steps, how they are known)``."""
    training, data = config.training, config.data
    if training.mode == "none":
        return 0, "training.mode is none: conversion only"
    sequences, origin = data.num_train_samples, "data.num_train_samples"
    known = _training_tokens(config)
    if known is not None and (sequences is None or known[0] // data.max_length < sequences):
        sequences, origin = known[0] // data.max_length, known[1]
    polish = training.polish_steps if training.mode == "local+polish" else 0
    after = f", then {polish} of polish" if polish else ""
    if sequences is None:
        if training.max_steps is None:
            return None, f"{training.num_epochs} × the dataset, whose length is known once it is read{after}"
        return training.max_steps + polish, f"training.max_steps at most{after}"
    per_step = training.batch_size * training.gradient_accumulation_steps
    steps = training.num_epochs * max(1, -(-sequences // per_step))
    if training.max_steps is not None and training.max_steps <= steps:
        return training.max_steps + polish, f"training.max_steps{after}"
    return steps + polish, f"{training.num_epochs} × {sequences:,} sequences ({origin}){after}"


def _training_tokens(config: RunConfig) -> tuple[int, str] | None:
    """Tokens of the training text without reading it, and how they are known."""
    data = config.data
    if data.train_files:
        names = [
            name for pattern in data.train_files for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)
        ]
        share = 1.0 if data.eval_files else 1 - data.eval_fraction
        size = sum(Path(name).stat().st_size for name in names if Path(name).is_file())
        return round(size * share / _CHARACTERS_PER_TOKEN), "estimated from the size of the files"
    if data.dataset_name == "demo":
        return _DEMO_TRAIN_TOKENS, "about; length of the demo text"
    return None


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan, choices: list[LayerChoice], numbers: dict[str, Any]) -> list[MemoryTerm]:
    """Terms of the peak. Rough: activations count what the layers save for the backward pass, not allocator overhead."""
    config, training = plan.config, plan.config.training
    size = plan.dtype.itemsize
    compute = 2 if config.optimization.mixed_precision != "no" else size
    frozen_size = 1 if config.optimization.use_8bit else size
    dtype_name = "int8" if config.optimization.use_8bit else str(plan.dtype).removeprefix("torch.")
    terms = [
        MemoryTerm(
            "frozen weights", plan.frozen_parameters * frozen_size, f"{plan.frozen_parameters:,} × {dtype_name}"
        ),
        MemoryTerm("NP parameters", plan.np_parameters * 4, f"{plan.np_parameters:,} × float32 (master copies)"),
    ]
    vocabulary = int(numbers.get("vocab_size", 0))
    closed_form = config.model.rule == "self_key" and config.model.init in {"auto", "closed_form"}
    training_terms: list[MemoryTerm] = []
    if training.mode != "none":
        tokens = training.batch_size * config.data.max_length
        training_terms = [
            MemoryTerm("gradients", plan.np_parameters * 4, "NP parameters × float32"),
            MemoryTerm("Adam moments", plan.np_parameters * 8, "NP parameters × 2 × float32"),
            _activations(plan, tokens, compute),
        ]
        if _runs_end_to_end(config):
            elements = min(tokens * vocabulary, CHUNK_ELEMENTS)
            training_terms.append(
                MemoryTerm(
                    "logits", 4 * elements * 4, f"chunks of {elements // max(vocabulary, 1):,} tokens × {vocabulary:,}"
                )
            )
    calibration_terms = _calibration(plan, choices, vocabulary, size) if closed_form else []
    # Calibration is over before training begins: only the larger of the two counts.
    larger = max((training_terms, calibration_terms), key=lambda group: sum(term.bytes for term in group))
    return terms + larger


def _runs_end_to_end(config: RunConfig) -> bool:
    return config.training.mode in {"end_to_end", "local+polish"}


def _activations(plan: Plan, tokens: int, size: int) -> MemoryTerm:
    """Saved per token and layer: attention about 8 d, norms and residuals 4 d, gate, up and intermediate 3 f, z and c 2 R."""
    intermediate = max(max(shape) for shape in plan.targets.values())
    rank = max(plan.ranks)
    one_layer = tokens * (12 * plan.hidden_size + 3 * intermediate + 2 * rank) * size
    if not _runs_end_to_end(plan.config):
        return MemoryTerm(
            "activations", 2 * one_layer, f"one layer at a time, {tokens:,} tokens (original and converted)"
        )
    first = plan.layers[0] if plan.layers else 0
    alive = plan.num_layers - first
    if plan.config.optimization.gradient_checkpointing:
        kept = alive * tokens * plan.hidden_size * size
        return MemoryTerm("activations", kept + 2 * one_layer, f"{alive} layer inputs and one layer, {tokens:,} tokens")
    return MemoryTerm(
        "activations", alive * one_layer, f"{alive} layers, {tokens:,} tokens (gradient_checkpointing: far less)"
    )


def _calibration(plan: Plan, choices: list[LayerChoice], vocabulary: int, size: int) -> list[MemoryTerm]:
    moments = sum(choice.hidden_size**2 for choice in choices) * 8
    fisher = plan.config.model.basis == "fisher"
    batch = min(_CALIBRATION_BATCH, plan.config.data.calibration_tokens)
    intermediate = max(max(shape) for shape in plan.targets.values())
    per_layer = batch * (12 * plan.hidden_size + 3 * intermediate) * size
    # Without the Fisher there is no backward pass, so one layer is alive at a time; bases are a pair of d x d in float64.
    alive = plan.num_layers if fisher else 1
    passes = "forward and backward" if fisher else "forward"
    logits = batch * vocabulary * 4 * (3 if fisher else 1)
    return [
        MemoryTerm("calibration: moments, bases", moments * (4 if fisher else 3), f"{len(choices)} × d × d × float64"),
        MemoryTerm("calibration: activations", alive * per_layer, f"{batch:,} tokens, {passes}"),
        MemoryTerm("calibration: logits", logits, f"{batch:,} × {vocabulary:,} × float32"),
    ]


def _notes(config: RunConfig, npt_config: NPTConfig, device: torch.device) -> list[str]:
    notes = []
    if config.optimization.mixed_precision == "fp16" and device.type == "cpu":
        notes.append("optimization.mixed_precision=fp16 is slow or missing on a CPU; bf16 or no is what works there")
    if config.optimization.mixed_precision == "bf16" and device.type == "cpu":
        notes.append(
            "optimization.mixed_precision=bf16 on a CPU is faster only where it has bf16 instructions (avx512_bf16, amx)"
        )
    if npt_config.rule == "self_key" and npt_config.init in {"auto", "closed_form"} and npt_config.num_ranks > 1:
        notes.append("model.num_ranks > 1 with self_key: the same form as one term of rank num_ranks × rank")
    if config.training.mode == "none" and not (
        npt_config.rule == "self_key" and npt_config.init in {"auto", "closed_form"}
    ):
        notes.append("training.mode=none without the closed form: the converted model will be far from the original")
    return notes


# ---- printing --------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Console) -> None:
    """The resolved configuration and the plan, as tables."""
    import yaml
    from rich.markup import escape
    from rich.table import Table

    console.print("# configuration: resolved; a file of these lines works with --config", style="bold", soft_wrap=True)
    # Block style and no wrapping: what is printed can be copied.
    text = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10_000)
    console.print(text, soft_wrap=True, highlight=False, markup=False)

    table = Table(title="plan", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for key, value in _rows(plan):
        table.add_row(key, escape(value))
    console.print(table)

    memory = Table(
        title="\nmemory at the peak, roughly", title_justify="left", title_style="bold", box=None, padding=(0, 2)
    )
    memory.add_column("term")
    memory.add_column("size", justify="right")
    memory.add_column("from")
    for term in plan.memory:
        memory.add_row(term.name, _size(term.bytes), escape(term.why))
    memory.add_row("[bold]sum[/bold]", f"[bold]{_size(plan.memory_bytes)}[/bold]", "beside Python and torch themselves")
    console.print(memory)
    for note in plan.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    config = plan.config
    ranks = sorted(set(plan.ranks))
    auto = parse_rank(config.model.rank)[0] == "auto"
    bounds = dict.fromkeys((ranks[0], ranks[-1]))
    rank = f"mean {ranks[0]}, allotted by the calibration" if auto else " to ".join(map(str, bounds))
    rows = [
        (
            "model",
            f"{config.model.base_model_name}: {plan.num_layers} {plan.family} layers, hidden size {plan.hidden_size}",
        ),
        ("device", f"{plan.device}, frozen base in {str(plan.dtype).removeprefix('torch.')}"),
        ("converted", f"{len(plan.layers)} layers ({config.model.npt_layers}), rule {config.model.rule}, rank {rank}"),
    ]
    rows += [(f"  {name}", f"{shape[0]} → {shape[1]}") for name, shape in plan.targets.items()]
    rows += [("skipped", f"layer {index}: {reason}") for index, reason in plan.skipped.items()]
    share = plan.np_parameters / max(plan.frozen_parameters, 1)
    rows += [
        ("trainable", f"{plan.np_parameters:,} parameters ({share:.1%} of the frozen ones)"),
        ("frozen", f"{plan.frozen_parameters:,} parameters"),
        ("training", f"{config.training.mode}, {plan.tokens_per_step:,} tokens a step"),
        ("steps", f"{'?' if plan.steps is None else f'{plan.steps:,}'} ({plan.steps_from})"),
        ("evaluation", f"{config.evaluation.tokens:,} held-out tokens before and after"),
        ("output", str(config.output_dir)),
    ]
    return rows


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
