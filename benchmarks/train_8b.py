"""Training steps at the shape of Llama-3.1-8B on random weights: tokens/s, MFU, peak memory, and what the planner predicted.

    python -m benchmarks.train_8b                          every row on this machine's GPU
    python -m benchmarks.train_8b --dry-run                rows with predicted bytes and seconds; runs nothing
    python -m benchmarks.train_8b --rows resident-local,streamed-local
    python -m benchmarks.train_8b --small                  the same code at a tiny size on a CPU, in seconds

Rows are {resident, streamed, 8bit, 4bit} × {local, end_to_end}: all layers converted, rule self_key, rank 64, sequences of
2048 tokens, 8 micro-batches of one sequence a step, bf16, gradient checkpointing end to end. The step is that of `npt train`
(objective, clipping, AdamW); the text is random token ids. A row that fails is reported with its reason and the next one runs.
The result file is written after every row, so Ctrl-C loses nothing.

MFU is *needed* operations ÷ (seconds × dense bf16 peak of the data sheet). Needed are, per token: local: attention and both
MLPs once, dout @ W_down, and the NP component's products; end_to_end: both models' forward and head, one backward. What
checkpointing recomputes is not needed. (`npt_kernels.estimate.flops.needed_flops`; a test counts the products that run.) Peak
memory is torch's `max_memory_allocated` over the timed steps on a GPU, live tensors on a CPU; building and quantising the model
is not in it. Rows with a goal (one H200) say whether it was met. **No GPU has run this yet: its GPU figures are unverified.**
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npt_kernels import apply_npt
from npt_kernels.bench.results import environment
from npt_kernels.configs.models import KNOWN_MODELS
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.estimate.devices import Gpu, find_gpu
from npt_kernels.estimate.flops import needed_flops, step_time
from npt_kernels.estimate.memory import Phase, count_bytes, reserve
from npt_kernels.estimate.model_sizes import Adapter, ModelNumbers, count_adapter, meta_model, read_numbers
from npt_kernels.estimate.printing import size_text
from npt_kernels.measure.live_bytes import LiveBytes
from npt_kernels.measure.random_model_step import build_model, quantise, training_steps
from npt_kernels.offload import streaming

ROOT = Path(__file__).resolve().parent
SHAPE = dict(KNOWN_MODELS["meta-llama/Llama-3.1-8B"])
SMALL = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0,
    },
}  # fmt: skip
STORAGE: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"stream_layers": "host"},
    "8bit": {"use_8bit": True},
    "4bit": {"use_4bit": True},
}
MODES = ("local", "end_to_end")
ROWS = [f"{storage}-{mode}" for mode in MODES for storage in STORAGE]
#: Row → (tokens/s at least, GiB at most) on one H200.
GOALS = {"resident-local": (18_000, 20.0), "streamed-local": (9_000, 8.0)}
WARMUP, GIB = 2, 2**30


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    numbers: dict[str, Any]
    device: torch.device
    rank: int
    sequence: int
    batch: int
    accumulation: int
    steps: int


def configuration(row: str, settings: Settings) -> RunConfig:
    """The run configuration of a row: what ``npt train`` would be given."""
    storage, _, mode = row.partition("-")
    optimization: dict[str, Any] = {
        "mixed_precision": "bf16", "gradient_checkpointing": mode == "end_to_end", **STORAGE[storage],
    }  # fmt: skip
    if row == "streamed-local":
        # A layer is fetched once for all micro-batches of the step.
        optimization["micro_batches_per_layer"] = settings.accumulation
    return RunConfig.from_mapping(
        {
            "model": {"base_model_name": "random", "rank": settings.rank, "init": "small", "dtype": "bfloat16"},
            "data": {"max_length": settings.sequence},
            "training": {
                "mode": mode,
                "batch_size": settings.batch,
                "gradient_accumulation_steps": settings.accumulation,
            },
            "optimization": optimization,
        }
    )


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a row."""

    model: ModelNumbers
    adapter: Adapter
    phase: Phase
    seconds: float | None

    def to_dict(self, device: torch.device) -> dict[str, Any]:
        counted = self.phase.device_bytes
        return {
            "moment": self.phase.moment,
            "tensors_bytes": counted,
            "with_reserve_bytes": counted + reserve(counted, device),
            "host_bytes": self.phase.host_bytes,
            "seconds_per_step": self.seconds,
        }


def predict(config: RunConfig, settings: Settings, gpu: Gpu | None) -> Prediction:
    """Bytes and, for a known GPU, seconds; builds nothing."""
    skeleton = meta_model("random", settings.numbers)
    model, adapter = read_numbers(skeleton), count_adapter(skeleton, config.npt_config())
    mode = config.training.mode
    phase = next(p for p in count_bytes(model, adapter, config, settings.device) if p.name == mode)
    seconds = step_time(model, adapter, config, gpu)[0].seconds if gpu else None
    return Prediction(model, adapter, phase, seconds)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _build(config: RunConfig, settings: Settings) -> nn.Module:
    """Random weights, straight on the device; streamed ones in host memory, where they will live."""
    home = "cpu" if config.optimization.stream_layers != "off" else settings.device
    model = build_model(settings.numbers, torch.bfloat16, home)
    quantise(model, config)
    return model


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: RunConfig, settings: Settings, prediction: Prediction, gpu: Gpu | None) -> dict[str, Any]:
    """One row: build, convert, warm up, time, meter. Raises whatever goes wrong."""
    device, mode = settings.device, config.training.mode
    seconds: list[float] = []
    started = time.perf_counter()
    model = _build(config, settings)
    with streaming(config, model, device):
        apply_npt(model, config.npt_config())
        with training_steps(model, config, "local" if mode == "local" else "kl") as step:
            for _ in range(WARMUP):
                step()
            _synchronize(device)
            build_seconds = time.perf_counter() - started
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            tokens = 0
            for _ in range(settings.steps):
                before = time.perf_counter()
                tokens = step()
                _synchronize(device)
                seconds.append(time.perf_counter() - before)
    peak = {"allocated_bytes": 0}
    if device.type == "cuda":
        peak = {
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    else:
        del model
        peak["allocated_bytes"] = _live_peak(config, settings)
    median = statistics.median(seconds)
    flops = needed_flops(prediction.model, prediction.adapter, settings.sequence, mode)
    return {
        "tokens_per_step": tokens,
        "seconds": seconds,
        "seconds_median": median,
        "tokens_per_second": tokens / median,
        "needed_flops_per_token": flops,
        "mfu": None if gpu is None else flops * tokens / (median * gpu.tflops * 1e12),
        "peak": peak,
        "predicted_over_measured": prediction.phase.device_bytes / peak["allocated_bytes"],
        "build_seconds": build_seconds,
    }


def _live_peak(config: RunConfig, settings: Settings) -> int:
    """Peak of live tensors of training steps on the CPU: on steps of their own, since the meter slows every op down."""
    model = _build(config, settings)
    kind = "local" if config.training.mode == "local" else "kl"
    with LiveBytes(include=model) as live, streaming(config, model, settings.device):
        apply_npt(model, config.npt_config())
        with training_steps(model, config, kind) as step, live.phase("steps"):
            for _ in range(2):
                step()
    return live.peaks["steps"]


def _goal(row: str, entry: dict[str, Any], settings: Settings) -> dict[str, Any] | None:
    """The goal of a row and whether it was met; only at the full shape on a GPU."""
    if row not in GOALS or settings.numbers is not SHAPE or settings.device.type != "cuda":
        return None
    speed, size = GOALS[row]
    met = entry["tokens_per_second"] >= speed and entry["peak"]["allocated_bytes"] <= size * GIB
    return {"tokens_per_second": speed, "gib": size, "on": "one H200", "met": met}


def _reason(error: BaseException) -> str:
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("npt_kernels")
    return ("this build has not got it: " if missing else "") + f"{type(error).__name__}: {line}"


def run_rows(rows: list[str], settings: Settings, gpu: Gpu | None, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measured rows, one after the other; a failed one has a reason instead of numbers."""
    for row in rows:
        entry: dict[str, Any] = {"row": row, "status": "failed"}
        try:
            config = configuration(row, settings)
            entry["config"] = config.model_dump(mode="json")
            prediction = predict(config, settings, gpu)
            entry["predicted"] = prediction.to_dict(settings.device)
            entry |= measure(config, settings, prediction, gpu)
            entry["goal"] = _goal(row, entry, settings)
            entry["status"] = "measured"
        except Exception as error:
            entry["reason"] = _reason(error)
        # What a failed row held would be the next one's memory.
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        yield entry


# ---- reporting -------------------------------------------------------------------------------------------------------


def write(result: dict[str, Any], path: Path) -> None:
    """In one step: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    os.replace(temporary, path)


def describe(entry: dict[str, Any]) -> str:
    """One line for people."""
    predicted = entry.get("predicted", {}).get("tensors_bytes")
    beside = f"predicted {size_text(predicted)}" if predicted else ""
    if entry["status"] != "measured":
        return f"{entry['row']:22s} {entry['status'].upper()} {entry.get('reason', '')} {beside}".rstrip()
    mfu = "" if entry["mfu"] is None else f", MFU {entry['mfu']:.1%}"
    goal = entry["goal"]
    verdict = "" if goal is None else ", goal met" if goal["met"] else ", goal missed"
    return (
        f"{entry['row']:22s} {entry['tokens_per_second']:12,.0f} tokens/s{mfu}, peak "
        f"{size_text(entry['peak']['allocated_bytes'])}, {beside} ({entry['predicted_over_measured']:.3f} of measured){verdict}"
    )


def _rows(text: str | None) -> list[str]:
    if text is None:
        return ROWS
    rows = [row.strip() for row in text.split(",") if row.strip()]
    for row in rows:
        if row not in ROWS:
            close = difflib.get_close_matches(row, ROWS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"--rows: there is no row {row!r}{hint} Rows: {', '.join(ROWS)}")
    if not rows:
        raise ConfigError(f"--rows is empty; rows: {', '.join(ROWS)}")
    return rows


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_8b", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", metavar="A,B", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model of the same kind; on a CPU unless --device says else"
    )
    parser.add_argument("--device", help="default: the GPU; with --small the CPU")
    parser.add_argument("--rank", type=int, help="R (64; small: 8)")
    parser.add_argument("--sequence", type=int, help="tokens per sequence (2048; small: 32)")
    parser.add_argument("--batch", type=int, default=1, help="sequences per micro-batch")
    parser.add_argument("--accumulation", type=int, help="micro-batches per step (8; small: 2)")
    parser.add_argument("--steps", type=int, help="timed steps (5; small: 2)")
    parser.add_argument(
        "--out", type=Path, help="result file; default benchmarks/results/<device>/train_8b-<date>.json"
    )
    parser.add_argument("--dry-run", action="store_true", help="print predictions; run nothing")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace) -> Settings:
    small = options.small
    cuda = torch.cuda.is_available()
    name = options.device or ("cpu" if small or (options.dry_run and not cuda) else "cuda")
    device = torch.device(name)
    if device.type == "cuda" and not cuda and not options.dry_run:
        raise ConfigError(
            "the 8B shape needs a GPU and torch sees none; --small runs the same code at a tiny size on a CPU"
        )
    if options.dry_run and not small:
        device = torch.device(options.device or "cuda")
    values = {
        "rank": options.rank or (8 if small else 64),
        "sequence": options.sequence or (32 if small else 2048),
        "batch": options.batch,
        "accumulation": options.accumulation or (2 if small else 8),
        "steps": options.steps or (2 if small else 5),
    }
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"--{key} {value} must be at least 1")
    return Settings(SMALL if small else SHAPE, device, **values)


def _gpu(device: torch.device, dry_run: bool) -> Gpu | None:
    if device.type != "cuda":
        return None
    try:
        return find_gpu(torch.cuda.get_device_name(device) if torch.cuda.is_available() else "H200")
    except ConfigError:
        return None  # no peak, no MFU


def main(arguments: list[str] | None = None) -> int:
    """0: every row was measured; 1: some failed; 2: bad arguments; 130: interrupted."""
    options = _arguments(arguments)
    try:
        rows, settings = _rows(options.rows), _settings(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = _gpu(settings.device, options.dry_run)
    if options.dry_run:
        assumed = f", seconds for one {gpu.name}" if gpu else ""
        print(f"predicted, not measured{assumed}:")
        for row in rows:
            prediction = predict(configuration(row, settings), settings, gpu)
            values = prediction.to_dict(settings.device)
            host = f", host {size_text(values['host_bytes'])}" if values["host_bytes"] else ""
            speed = f", {values['seconds_per_step']:.2f} s a step" if values["seconds_per_step"] else ""
            tensors, reserved = size_text(values["tensors_bytes"]), size_text(values["with_reserve_bytes"])
            print(f"{row:22s} tensors {tensors}, with reserve {reserved}{host}{speed}")
        return 0
    facts = environment(settings.device)
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    stamp = re.sub(r"[-:]", "", facts["date"])
    path = options.out or ROOT / "results" / device / f"train_8b-{stamp}.json"
    result: dict[str, Any] = {
        "what": "benchmarks/train_8b.py",
        "small": options.small,
        "environment": facts,
        "settings": {**vars(settings), "device": str(settings.device)},
        "mfu": "needed operations / (median seconds * dense bf16 peak); needed_flops_per_token counts no recomputation",
        "dense_tflops": gpu.tflops if gpu else None,
        "rows": [],
        "not_run": list(rows),
    }
    code = 0
    try:
        for entry in run_rows(rows, settings, gpu, facts):
            result["rows"].append(entry)
            result["not_run"] = rows[len(result["rows"]) :]
            write(result, path)
            print(describe(entry), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; not run: {', '.join(result['not_run'])}", file=sys.stderr)
        code = 130
    write(result, path)
    print(path)
    failed = any(entry["status"] != "measured" for entry in result["rows"])
    return code or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
