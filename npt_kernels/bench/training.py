"""``npt bench train``: training steps of the package's own loop on random weights at a model's shape; nothing is downloaded.

A row is a model × how many layers are converted × a mode × a setting. Speed is taken from undisturbed steps; the time breakdown
and the peak memory from steps of their own, since measuring either slows what it measures.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..conversion.apply import apply_npt
from ..estimate.byte_count import count_bytes
from ..estimate.devices import local_gpu
from ..estimate.flops import needed_flops, step_time
from ..estimate.model_sizes import ModelNumbers, count_adapter, meta_model, read_numbers
from ..measure.allocations import memory_meter
from ..measure.live_bytes import storages_of
from ..measure.random_model_step import build_model, quantise
from ..measure.timing import clocks, cpu_ceilings, settle_power
from ..model.install import converted_layers
from ..offload import LayerStreamer, stream_mode, streaming
from ..ops.dense_on_use import release_scratch
from ..run.open import make_accelerator
from ..training.loop import Phase, PhaseLoop, StopRequest, make_objective
from ..training.objectives import delta_variances, enable_checkpointing
from ..training.precision import autocast
from .kernels import short_reason
from .peers import ROUNDED_WEIGHT
from .results import BenchError, ResultFile, unknown_name
from .training_shapes import SETTINGS, UNASKED, TrainRow, TrainShape, availability, find_model, run_config

__all__ = ["estimate_row", "measure_row", "plan_rows", "predict", "run_train"]

MODES = ("local", "end_to_end")
CONVERTED = ("all", "4")
#: Steps before and during the measurement.
WARMUP_STEPS, TIMED_STEPS, WATCHED_STEPS = 1, 5, 2


class WrongNumbersError(RuntimeError):
    """A setting whose layers return something else than they should."""


def plan_rows(
    size: str,
    dtype: torch.dtype,
    *,
    shapes: Sequence[str] = (),
    modes: Sequence[str] = (),
    settings: Sequence[str] = (),
    converted: Sequence[str] = (),
    tokens: Sequence[int] = (),
    ranks: Sequence[int] = (),
    micro_batch: int = 1,
) -> list[TrainRow]:
    """The rows of a run. Raises :class:`BenchError` for what does not exist."""
    for option, values, known in (
        ("--mode", [m.replace("-", "_") for m in modes], MODES),
        ("--setting", settings, tuple(SETTINGS)),
        ("--converted", converted, CONVERTED),
    ):
        for value in values:
            if value not in known:
                raise unknown_name(option, value, known)
    for option, numbers in (("--tokens", tokens), ("--rank", ranks)):
        for number in numbers:
            if number < 1:
                raise BenchError(f"{option} {number} must be at least 1")
    names = list(shapes) or list(UNASKED[size])
    models = [find_model(name) for name in names]
    models = [model.small() if size == "small" else model for model in dict.fromkeys(models)]
    rows = []
    for model in models:
        for name, setting in SETTINGS.items():
            if name not in settings if settings else size not in setting.batch:
                continue
            for layers in CONVERTED:
                for mode in MODES:
                    asked = (converted and layers in converted, modes and mode in [m.replace("-", "_") for m in modes])
                    usual = (layers in setting.converted, mode in setting.modes)
                    if not all(
                        a if filtered else u for a, u, filtered in zip(asked, usual, (converted, modes), strict=True)
                    ):
                        continue
                    batch = setting.batch.get(size, setting.batch["small"])
                    if micro_batch < 1 or batch % micro_batch:
                        raise BenchError(
                            f"--micro-batch {micro_batch} must divide the {batch} sequences of a step ({name})"
                        )
                    for sequence in tokens or [setting.sequence[size]]:
                        for rank in ranks or [setting.rank[size]]:
                            length = min(sequence, model.longest)
                            rows.append(TrainRow(model, layers, mode, name, rank, batch, length, dtype, micro_batch))
    if not rows:
        raise BenchError("nothing to run: no setting has that --mode and --converted; name them with --setting")
    return list(dict.fromkeys(rows))


def _sizes(model: TrainShape) -> tuple[nn.Module, ModelNumbers]:
    """The model without storage, and its numbers."""
    return _skeleton(model.title, json.dumps(dict(model.numbers)))


@functools.lru_cache(maxsize=8)
def _skeleton(title: str, numbers: str) -> tuple[nn.Module, ModelNumbers]:
    skeleton = meta_model(title, json.loads(numbers))
    return skeleton, read_numbers(skeleton)


def estimate_row(row: TrainRow, device: torch.device) -> float:
    """Seconds that a row will take, roughly: all its steps at 8 FLOPs a weight and token, building and measuring apart."""
    if availability(row.setting, row.mode, device) is not None:
        return 0.0
    weights = _sizes(row.model)[1].parameters
    rate = 200e12 if device.type == "cuda" else 0.05e12
    steps = WARMUP_STEPS + TIMED_STEPS + 1 + WATCHED_STEPS + 2
    loop = 10 if not SETTINGS[row.setting].counts_flops else 1
    return 1.5 + weights / 1e9 + loop * steps * 8 * weights * row.batch * row.sequence / rate


# ---- one row ---------------------------------------------------------------------------------------------------------


def measure_row(row: TrainRow, device: torch.device, ceilings: dict[str, Any]) -> dict[str, Any]:
    """The finished row: ``ok`` with figures, ``unavailable`` or ``failed`` with the reason."""
    reason = availability(row.setting, row.mode, device)
    known = {**row.row(), **predict(row, device)}  # stays beside a failure
    if reason is not None:
        return {**known, "status": "unavailable", "reason": f"not available: {reason}"}
    try:
        return {**known, "status": "ok", **_measure(row, device, ceilings)}
    except WrongNumbersError as error:
        return {**known, "status": "wrong", "reason": str(error)}
    except Exception as error:
        return {**known, "status": "failed", "reason": short_reason(error)}
    finally:
        gc.collect()  # what a failed row held would be the next one's memory
        if device.type == "cuda":
            torch.cuda.empty_cache()


def predict(row: TrainRow, device: torch.device) -> dict[str, Any]:
    """What ``npt plan`` says of the row: ``predicted_bytes`` at the peak and, for a known GPU, ``predicted_seconds`` a step.

    Nothing for settings that it does not count.
    """
    if not SETTINGS[row.setting].counts_flops:
        return {}
    config = run_config(row)
    skeleton, numbers = _sizes(row.model)
    adapter = count_adapter(skeleton, config.npt_config())
    phase = next(phase for phase in count_bytes(numbers, adapter, config, device) if phase.name == row.mode)
    predicted: dict[str, Any] = {"predicted_bytes": phase.device_bytes}
    gpu = local_gpu() if device.type == "cuda" else None
    if gpu is not None:
        predicted["predicted_seconds"] = round(step_time(numbers, adapter, config, gpu)[0].seconds, 4)
    return predicted


def _measure(row: TrainRow, device: torch.device, ceilings: dict[str, Any]) -> dict[str, Any]:
    config = run_config(row)
    with _converted_model(row, config, device) as (model, streamer):
        ids = _token_ids(row, model)
        seconds = _timed_steps(model, config, row, ids, device)
        breakdown = _breakdown(model, config, row, ids, device)
        peak = _peak(model, config, row, ids, device, streamer)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    tokens = row.batch * row.sequence
    rates = sorted(tokens / s for s in seconds)
    rate = tokens / statistics.median(seconds)
    result = {
        "tokens_per_s": round(rate, 2),
        "tokens_per_s_p10_p90": [round(rates[round((len(rates) - 1) * q)], 2) for q in (0.1, 0.9)],
        "steps": len(seconds),
        "peak_bytes": peak,
        "seconds_per_step": {name: round(value, 6) for name, value in breakdown.items()},
        "np_parameters": parameters,
        "frozen_parameters": frozen,
    }
    if streamer is not None:
        result["home_bytes"] = sum(streamer.layer_bytes)
    if SETTINGS[row.setting].counts_flops:
        skeleton, sizes = _sizes(row.model)
        adapter = count_adapter(skeleton, config.npt_config())
        flops = tokens * needed_flops(sizes, adapter, row.sequence, row.mode)
        achieved = flops / statistics.median(seconds)
        result |= {"flops_per_token": round(flops / tokens), "tflops": round(achieved / 1e12, 4)}
        if ceilings:
            result["mfu"] = round(achieved / 1e12 / ceilings["gemm_tflops"], 4)
    return result


@contextlib.contextmanager
def _converted_model(row: TrainRow, config: Any, device: torch.device) -> Iterator[tuple[nn.Module, Any]]:
    """``(converted model, its streamer or None)`` in the row's setting, put together as ``npt train`` does."""
    torch.manual_seed(0)
    streamed = stream_mode(config, device) != "off"
    model = _random_model(row, config, device, streamed)
    quantise(model, config)
    apply_npt(model, config.npt_config())
    if SETTINGS[row.setting].randomised:
        _randomise(model)
    expected = _student_outputs(model) if SETTINGS[row.setting].randomised else []
    with SETTINGS[row.setting].applied(model):
        _compare_students(_student_outputs(model) if expected else [], expected, row.dtype)
        enable_checkpointing(model, config.optimization.gradient_checkpointing)
        with streaming(config, model, device) as streamer:
            yield model, streamer


def _random_model(row: TrainRow, config: RunConfig, device: torch.device, streamed: bool) -> nn.Module:
    """On the device; streamed ones in host memory, where they will live.

    A GPU draws eight billion random numbers in a second, the host in minutes; so a streamed model is made on it too if it fits.
    """
    numbers = dict(row.model.numbers)
    if not streamed:
        return build_model(numbers, row.dtype, device)
    if device.type == "cuda":
        size = _sizes(row.model)[1].parameters * row.dtype.itemsize
        if size < 0.9 * torch.cuda.mem_get_info(device)[0]:
            model = build_model(numbers, row.dtype, device).to("cpu")
            torch.cuda.empty_cache()
            return model
    return build_model(numbers, row.dtype, "cpu")


def _randomise(model: nn.Module) -> None:
    """NP parameters so large that the weight change matters: a comparison of losses would otherwise compare the frozen base."""
    generator = torch.Generator().manual_seed(2)
    for layer in converted_layers(model).values():
        for name, parameter in layer.np_component.named_parameters():
            fan_in = parameter.shape[-1] if name.startswith("w_a_up") else parameter.shape[0]
            scale = fan_in**-1.0 if name.startswith("w_b_up") else fan_in**-0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(noise)


@torch.no_grad()
def _student_outputs(model: nn.Module) -> list[Tensor]:
    """What every converted layer adds to its input, for random inputs and attention outputs of unit size."""
    outputs = []
    for layer in converted_layers(model).values():
        weight = layer.np_component.w_down
        dtype = next(p.dtype for p in layer.parameters() if p is not weight and p.is_floating_point())
        generator = torch.Generator().manual_seed(3)
        h, a = (torch.randn(1, 4, weight.shape[0], generator=generator).to(weight.device, dtype) for _ in range(2))
        outputs.append((layer.npt_student(h, a) - h).double())
    return outputs


def _compare_students(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """A setting that computes the MLP its own way must compute the same one. Raises :class:`WrongNumbersError`."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = float((a - e).abs().max() / e.abs().max())
        # Both round; W + ΔW_t is rounded as a whole (peers.ROUNDED_WEIGHT), through three projections.
        allowed = 3 * ROUNDED_WEIGHT * torch.finfo(dtype).eps
        if not error <= allowed:
            raise WrongNumbersError(f"converted layer {index} is off by {error:.3g} of its largest output; not timed")


def _token_ids(row: TrainRow, model: nn.Module) -> Tensor:
    """Rows for every step, on the host as the loop takes them; random, since no loss is reported as a result."""
    generator = torch.Generator().manual_seed(1)
    steps = WARMUP_STEPS + TIMED_STEPS
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return torch.randint(vocabulary, (row.batch * steps, row.sequence), generator=generator)


def _timed_steps(model: nn.Module, config: Any, row: TrainRow, ids: Tensor, device: torch.device) -> list[float]:
    """Seconds of each timed step."""
    moments: list[float] = []

    def after(report: Any) -> None:
        _synchronise(device)
        moments.append(time.perf_counter())

    _run_steps(model, config, row, ids, WARMUP_STEPS + TIMED_STEPS, make_accelerator(config), after)
    return [b - a for a, b in zip(moments[WARMUP_STEPS - 1 :], moments[WARMUP_STEPS:], strict=False)]


def _breakdown(model: nn.Module, config: Any, row: TrainRow, ids: Tensor, device: torch.device) -> dict[str, float]:
    """Seconds per step in forward, backward, optimizer and the rest, with the device idle at every boundary."""
    watch = _Watch(make_accelerator(config), device)
    start = end = 0.0

    def after(report: Any) -> None:
        nonlocal start, end
        _synchronise(device)
        end = time.perf_counter()
        if report.step == 1:
            start = end
            watch.seconds.clear()

    _run_steps(model, config, row, ids, 1 + WATCHED_STEPS, watch, after)
    parts = {name: watch.seconds.get(name, 0.0) / WATCHED_STEPS for name in ("backward", "optimizer")}
    total = (end - start) / WATCHED_STEPS
    return {"forward": max(0.0, total - sum(parts.values())), **parts, "total": total}


class _Watch:
    """accelerate's object with a stopwatch at ``backward``, clipping and the optimizer; everything else is its own."""

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self._accelerator, self._device = accelerator, device
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        _synchronise(self._device)
        start = time.perf_counter()
        yield
        _synchronise(self._device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def backward(self, loss: Tensor, **options: Any) -> None:
        with self._timed("backward"):
            self._accelerator.backward(loss, **options)

    def clip_grad_norm_(self, *args: Any, **options: Any) -> Any:
        with self._timed("optimizer"):
            return self._accelerator.clip_grad_norm_(*args, **options)

    def prepare(self, *things: Any) -> Any:
        prepared = self._accelerator.prepare(*things)
        for thing in prepared if isinstance(prepared, tuple) else (prepared,):
            if isinstance(thing, torch.optim.Optimizer):
                self._watch_step(thing)
        return prepared

    def _watch_step(self, optimizer: Any) -> None:
        step = optimizer.step

        def timed(*args: Any, **options: Any) -> Any:
            with self._timed("optimizer"):
                return step(*args, **options)

        optimizer.step = timed


def _peak(
    model: nn.Module, config: Any, row: TrainRow, ids: Tensor, device: torch.device, streamer: LayerStreamer | None
) -> int:
    """Bytes at the worst moment of two steps: weights, NP parameters, gradients, optimizer, activations.

    Of streamed layers the two buffers count, not their home in host memory.
    """

    def steps() -> None:
        _run_steps(model, config, row, ids, 2, make_accelerator(config), lambda report: None)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    release_scratch()  # the buffers of dense weights outlive the steps before: they are part of the peak
    held = sum(tensor.untyped_storage().nbytes() for tensor in storages_of(model).values())
    if streamer is not None:
        held += streamer.device_bytes - sum(streamer.layer_bytes)
    with memory_meter() as trace:
        steps()
    return held + trace[0].peak


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _objective(row: TrainRow, config: Any) -> str:
    return "local" if row.mode == "local" else str(config.training.objective)


def _run_steps(
    model: nn.Module,
    config: Any,
    row: TrainRow,
    ids: Tensor,
    steps: int,
    accelerator: Any,
    after: Callable[[Any], None],
) -> None:
    """Optimizer steps of the package's own loop."""
    kind = _objective(row, config)
    with autocast(accelerator, model):
        variances = delta_variances(model, ids[:1].to(accelerator.device)) if kind != "kl" else {}
    objective = make_objective(kind, model, config, variances)
    phase = Phase("bench", kind, steps, config.training.learning_rate, 0)
    loop = PhaseLoop(phase, model, objective, ids, config, accelerator)
    try:
        for report in loop.steps(StopRequest()):
            after(report)
    finally:
        loop.close()


# ---- the suite -------------------------------------------------------------------------------------------------------


def run_train(
    rows: Sequence[TrainRow],
    device: torch.device,
    result: ResultFile,
    *,
    done: Callable[[TrainRow, dict[str, Any]], None] = lambda row, measured: None,
) -> ResultFile:
    """Measure ``rows`` in order; saving, interruption and ``done`` as in ``kernels.run_kernels``."""
    dtype = rows[0].dtype
    ceilings = settle_power(device, 2.5, dtype) if device.type == "cuda" else cpu_ceilings(dtype)
    result.extra |= {"ceilings": ceilings, "clocks": {"before": clocks()}}
    result.not_run = [str(row) for row in rows]
    result.save()
    for row in rows:
        measured = measure_row(row, device, ceilings)
        result.rows.append(measured)
        result.not_run.pop(0)
        if measured.get("mfu", 0) > 1.1:
            result.extra["note"] = "MFU above 100 %: the GEMM rate was measured while the machine was busy"
        result.save()
        done(row, measured)
    result.extra["clocks"]["after"] = clocks()
    result.complete = True
    result.save()
    return result
