"""The registry of ``npt bench train``: models by their numbers, and the settings in which they are trained."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configs.models import KNOWN_MODELS
from ..configs.schema import RunConfig
from ..ops.registry import default_backend
from .results import unknown_name

__all__ = [
    "MODELS",
    "SETTINGS",
    "UNASKED",
    "TrainRow",
    "TrainSetting",
    "TrainShape",
    "availability",
    "find_model",
    "run_config",
]

#: Small models of ``npt bench train``: every width divided by this, this many layers, this vocabulary.
SMALL_DIVISOR, SMALL_LAYERS, SMALL_VOCABULARY = 8, 6, 512

_WIDTHS = {
    "llama": ("hidden_size", "intermediate_size", "head_dim"),
    "gpt2": ("n_embd",),
}
_LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


@dataclass(frozen=True)
class TrainShape:
    """A model by its numbers, those of a config.json."""

    title: str
    numbers: Mapping[str, Any] = field(compare=False)

    @property
    def longest(self) -> int:
        """Longest sequence."""
        return int(self.numbers.get("max_position_embeddings") or self.numbers["n_positions"])

    def small(self) -> TrainShape:
        """The same proportions at an eighth of every width, few layers and a small vocabulary."""
        kind, numbers = self.numbers["model_type"], dict(self.numbers)
        numbers.setdefault("head_dim", numbers.get("hidden_size", 0) // numbers.get("num_attention_heads", 1))
        for width in _WIDTHS[kind]:
            numbers[width] //= SMALL_DIVISOR
        if kind == "gpt2":
            del numbers["head_dim"]
        numbers[_LAYERS[kind]] = min(SMALL_LAYERS, numbers[_LAYERS[kind]])
        numbers |= {"vocab_size": SMALL_VOCABULARY, "bos_token_id": None, "eos_token_id": None}
        return TrainShape(f"{self.title} ÷{SMALL_DIVISOR}", numbers)


MODELS: dict[str, TrainShape] = {
    shape.title: shape
    for shape in (
        TrainShape("GPT-2", KNOWN_MODELS["gpt2"]),
        TrainShape("SmolLM2-135M", KNOWN_MODELS["demo"]),
        TrainShape("Llama-3.2-1B", KNOWN_MODELS["meta-llama/Llama-3.2-1B"]),
        TrainShape("Llama-3.1-8B", KNOWN_MODELS["meta-llama/Llama-3.1-8B"]),
    )
}
#: Models that run unasked, per size.
UNASKED = {"full": tuple(MODELS), "cpu": ("SmolLM2-135M", "GPT-2"), "small": ("GPT-2", "Llama-3.1-8B")}
_ALIASES = {
    "gpt2": "GPT-2",
    "demo": "SmolLM2-135M",
    "smollm2": "SmolLM2-135M",
    "1b": "Llama-3.2-1B",
    "8b": "Llama-3.1-8B",
}


def find_model(name: str) -> TrainShape:
    """The model of that name, in any case. Raises :class:`BenchError` naming those that exist."""
    forms = {title.lower(): title for title in MODELS} | _ALIASES
    if name.lower() not in forms:
        raise unknown_name("--shape", name, MODELS, forms)
    return MODELS[forms[name.lower()]]


# ---- settings --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nothing(model: nn.Module) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _token_by_token(model: nn.Module) -> Iterator[None]:
    """Inside the block converted layers compute their MLP the published way: a weight matrix per token, one at a time."""
    from ..model.install import converted_layers

    layers = list(converted_layers(model).values())

    def student(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, a: _loop_student(layer, h, a)

    for layer in layers:
        layer.npt_student = student(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.npt_student


def _loop_student(layer: Any, h: Tensor, a: Tensor) -> Tensor:
    """``h + MLP_Δ(u; a)`` with every ``W + ΔW_t`` built (the explicit vectors of ``NPComponent.vectors``)."""
    from ..activations import get_activation
    from ..model.linears import linear_bias, linear_weight

    plan = layer.npt_plan
    u, key_scale = layer.npt_mlp_input(h, a)
    flat_a = a.reshape(-1, a.shape[-1])
    act = get_activation(plan.act).forward
    by_slot = {place.slot: target for target, place in plan.shape.targets.items()}

    def project(slot: str, inputs: Tensor) -> Tensor:
        linear = plan.shape.linear(layer, by_slot[slot])
        weight, bias = linear_weight(linear), linear_bias(linear)
        if by_slot[slot] not in layer.np_component.target_shapes:
            return F.linear(inputs, weight, bias)
        v_a, v_b = layer.np_component.vectors(flat_a, inputs, by_slot[slot])
        if key_scale is not None and slot != "down":
            v_b = v_b * key_scale.reshape(-1, 1, 1).to(v_b.dtype)
        rows = [F.linear(x, weight + b.t() @ k, bias) for x, k, b in zip(inputs, v_a, v_b, strict=True)]
        return torch.stack(rows)

    dtype = linear_weight(plan.shape.linear(layer, by_slot["up"])).dtype
    flat = u.reshape(-1, u.shape[-1]).to(dtype)
    flat_a = flat_a.to(dtype)
    inter = act(project("gate", flat)) * project("up", flat) if "gate" in by_slot else act(project("up", flat))
    return plan.shape.output(layer, h, project("down", inter).reshape(h.shape).to(h.dtype))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TrainSetting:
    """How a row trains beside its mode.

    Attributes:
        summary: One line for ``--help`` and the report.
        rule, targets: Of the conversion; ``()``: all targets.
        optimization: Keys of the run configuration's section.
        converted, modes: Which rows run unasked.
        batch, sequence, rank: Per size; ``batch`` is sequences per optimizer step, in micro-batches of one unless
            ``--micro-batch`` says otherwise. A setting without a batch for a size runs there only when asked for.
        applied: Context around the training of a converted model.
        randomised: Whether the NP parameters start from large random numbers and what ``applied`` puts in place of the layers'
            own MLP is compared with it.
        counts_flops: Whether the planner counts what the setting needs (it knows no per-layer loss end to end, nor the loop).
    """

    summary: str
    rule: str = "self_key"
    targets: tuple[str, ...] = ()
    optimization: Mapping[str, Any] = field(default_factory=dict)
    converted: tuple[str, ...] = ("all", "4")
    modes: tuple[str, ...] = ("local", "end_to_end")
    batch: Mapping[str, int] = field(default_factory=lambda: {"full": 8, "cpu": 2, "small": 2})
    sequence: Mapping[str, int] = field(default_factory=lambda: {"full": 2048, "cpu": 256, "small": 32})
    rank: Mapping[str, int] = field(default_factory=lambda: {"full": 64, "cpu": 128, "small": 8})
    applied: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = _nothing
    randomised: bool = False
    counts_flops: bool = True


#: The earlier training had 4 layers, rank 8, 256 tokens, batch 1; gate only, both vectors from attention.
_PUBLISHED: dict[str, Any] = {
    "rule": "rank1", "targets": ("gate",), "converted": ("4",), "modes": ("end_to_end",),
    "randomised": True, "counts_flops": False,
    "batch": {"full": 1, "cpu": 1, "small": 1}, "sequence": {"full": 256, "cpu": 64, "small": 16},
    "rank": {"full": 8, "cpu": 8, "small": 4},
}  # fmt: skip

SETTINGS: dict[str, TrainSetting] = {
    "resident": TrainSetting("the whole model on the device, in the base's dtype"),
    "streamed": TrainSetting(
        "frozen layers in host memory, brought in one ahead",
        optimization={"stream_layers": "host"}, converted=("all",), modes=("local",), batch={"full": 8, "small": 4},
    ),
    "8bit": TrainSetting(
        "frozen linears in 8 bits", optimization={"use_8bit": True}, converted=("all",), batch={"full": 8, "small": 2}
    ),
    "4bit": TrainSetting(
        "frozen linears in 4 bits", optimization={"use_4bit": True}, converted=("all",), batch={"full": 8, "small": 2}
    ),
    "published form": TrainSetting("the published form (rank1 on the gate, 4 layers) through our ops", **_PUBLISHED),
    "published loop": TrainSetting(
        "the published form the published way: a weight matrix per token, one at a time",
        **_PUBLISHED, applied=_token_by_token,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainRow:
    """One row of the suite.

    Attributes:
        model: Name and numbers of the model.
        converted: ``all`` or ``4``: the last four layers, as the earlier recipe had.
        mode: ``local`` or ``end_to_end``.
        setting: A key of ``training_shapes.SETTINGS``.
        rank, batch, sequence: R, sequences per step, tokens per sequence.
        dtype: Of the frozen base.
        micro_batch: Sequences that go through the model at once; divides ``batch``.
    """

    model: TrainShape
    converted: str
    mode: str
    setting: str
    rank: int
    batch: int
    sequence: int
    dtype: torch.dtype
    micro_batch: int = 1

    def __str__(self) -> str:
        layers = "all layers" if self.converted == "all" else f"{self.converted} layers"
        return f"{self.model.title} {layers} {self.mode} {self.setting} {self.batch}x{self.sequence}{self.at_once} r={self.rank}"

    @property
    def at_once(self) -> str:
        """`` by 4``: sequences that go through the model at once, where it is more than one."""
        return "" if self.micro_batch == 1 else f" by {self.micro_batch}"

    def row(self) -> dict[str, Any]:
        return {
            "model": self.model.title, "converted": self.converted, "mode": self.mode, "setting": self.setting,
            "rule": SETTINGS[self.setting].rule, "rank": self.rank, "batch": self.batch, "sequence": self.sequence,
            "dtype": str(self.dtype).removeprefix("torch."),
            # Without what is usual, as in the files from before there was a choice.
            **({} if self.micro_batch == 1 else {"micro_batch": self.micro_batch}),
            **({"backend": default_backend()} if default_backend() else {}),
        }  # fmt: skip


def availability(setting: str, mode: str, device: torch.device) -> str | None:
    """Why this version, with what is installed, cannot run a setting; ``None`` if it can."""
    if setting in ("8bit", "4bit") and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install bitsandbytes"
    return None


def run_config(row: TrainRow) -> RunConfig:
    """The row as a :class:`~npt_kernels.configs.schema.RunConfig`, the one place where training is configured."""
    setting, numbers = SETTINGS[row.setting], row.model.numbers
    total = int(numbers[_LAYERS[numbers["model_type"]]])
    layers = "all" if row.converted == "all" else list(range(max(0, total - int(row.converted)), total))
    gated = numbers["model_type"] != "gpt2"
    targets = list(setting.targets or (("gate", "up", "down") if gated else ("c_fc", "c_proj")))
    if not gated and setting.targets:
        targets = ["c_fc"]  # a plain MLP has no gate; its first projection stands where the gate does
    # A streamed layer comes in once for all micro-batches of a local step.
    once = "stream_layers" in setting.optimization and row.mode == "local"
    visits = {"micro_batches_per_layer": row.batch // row.micro_batch} if once else {}
    return RunConfig.from_mapping(
        {
            "model": {
                "npt_layers": layers, "rule": setting.rule, "rank": row.rank, "targets": targets,
                "init": "published" if setting.rule == "rank1" else "small",
            },
            "training": {
                "mode": row.mode, "batch_size": row.micro_batch,
                "gradient_accumulation_steps": row.batch // row.micro_batch,
                "learning_rate": 1e-4, "lr_scheduler": "constant",
                "objective": "layer" if setting.rule == "rank1" else "kl",
            },
            "data": {"max_length": max(2, row.sequence)},
            "optimization": {
                "mixed_precision": {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(row.dtype, "no"),
                "gradient_checkpointing": row.mode == "end_to_end", **setting.optimization, **visits,
            },
        },
        source="npt bench train",
    )  # fmt: skip
