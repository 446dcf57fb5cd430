"""Streaming as a run asks for it: which way, whether the host has room, how the model is loaded, the context around the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import parse_rank
from ..configs.schema import ConfigError, RunConfig
from ..durable_files import private_folder
from ..model.linears import linear_shape
from ..model.select import find_layers
from ..model.shapes import LAYER_SHAPES
from .copy_speed import TransferPlan, flops_per_token, plan_transfer
from .streamer import LayerStreamer
from .weights import LayerWeights, layer_tensors

__all__ = [
    "StreamMode",
    "free_host_memory",
    "load_for_sharding",
    "load_for_streaming",
    "stream_mode",
    "streaming",
    "streaming_notes",
    "transfer_plan",
]

StreamMode = Literal["off", "host", "disk"]


def stream_mode(config: RunConfig, device: torch.device | str) -> StreamMode:
    """What ``stream_layers`` and ``use_cpu_offload`` mean on ``device``. ``use_cpu_offload`` is ``host``, and nothing on a CPU.

    Raises:
        ConfigError: Together with ``distributed: fsdp``, which moves the same weights.
    """
    o = config.optimization
    mode: StreamMode = o.stream_layers
    if mode == "off" and o.use_cpu_offload and torch.device(device).type != "cpu":
        mode = "host"
    if mode != "off" and o.distributed == "fsdp":
        raise ConfigError(
            f"optimization.stream_layers={mode} and optimization.distributed=fsdp both move the frozen layers; keep one of "
            "them (fsdp: every GPU holds a part; streaming with ddp: every process has the layers in host memory)"
        )
    return mode


def streaming_notes(config: RunConfig, device: torch.device | str) -> list[str]:
    """What the keys of streaming do on this device, where it may surprise. Nothing is loaded or measured."""
    device = torch.device(device)
    o, t = config.optimization, config.training
    mode = stream_mode(config, device)
    notes = []
    if o.use_cpu_offload and mode == "off":
        notes.append("optimization.use_cpu_offload: nothing to do, the model already lives in host memory")
    if mode == "host" and device.type == "cpu":
        notes.append(
            "optimization.stream_layers=host: on a CPU layers are copied from memory to memory, which only costs time"
        )
    if mode != "off" and device.type == "cuda":
        notes.append(f"optimization.stream_layers={mode}: streaming has not been verified on a GPU yet")
    if mode != "off" and t.mode in ("end_to_end", "local+polish"):
        phase = "training.mode=end_to_end" if t.mode == "end_to_end" else "the polish"
        notes.append(f"{phase} moves every layer three times per micro-batch; training.mode=local once per visit")
    if o.micro_batches_per_layer > 1 and t.mode == "end_to_end":
        notes.append("optimization.micro_batches_per_layer has no effect with training.mode=end_to_end")
    elif o.micro_batches_per_layer > t.gradient_accumulation_steps:
        notes.append(
            f"optimization.micro_batches_per_layer={o.micro_batches_per_layer} exceeds "
            f"training.gradient_accumulation_steps={t.gradient_accumulation_steps}: a step has no more micro-batches than that"
        )
    return notes


# ---- room on the host ------------------------------------------------------------------------------------------------


def free_host_memory() -> int:
    """Bytes of RAM that this process can still take: what the system has, or less where a container is limited."""
    import psutil

    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(0, limit - used))
    return available


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def host_need(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> int:
    """Bytes of RAM that a model (it may be on ``meta``) needs with its layers in host memory.

    All of it is loaded there; pinned memory comes in powers of two, a layer each (torch's allocator rounds up).
    """

    def size(tensors: Any) -> int:
        return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors)

    _, layers = find_layers(model)
    sizes = [size(layer_tensors(layer).values()) for layer in layers]
    rest = size(model.parameters()) - sum(size(layer.parameters()) for layer in layers)
    pinned = torch.device(device).type == "cuda"
    return rest + sum(_power_of_two(n) if pinned else n for n in sizes) + max(sizes)


def _settle_mode(config: RunConfig, mode: StreamMode, need: int) -> StreamMode:
    """``host``, or ``disk`` where there is no room and the user left the choice. Raises :class:`ConfigError`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    have = free_host_memory()
    if mode != "host" or need * processes <= have:
        return mode
    if config.optimization.stream_layers == "off":
        return "disk"
    each = f" ({processes} processes)" if processes > 1 else ""
    raise ConfigError(
        f"optimization.stream_layers=host needs {need * processes / 2**30:.1f} GiB of host memory{each} for "
        f"{config.model.base_model_name}, and {have / 2**30:.1f} GiB are free; set optimization.stream_layers=disk, which "
        "leaves the layers in mapped files"
    )


# ---- loading ---------------------------------------------------------------------------------------------------------


def _folder(config: RunConfig) -> Path:
    """For files of layers: the cache, since the system's temporary folder often is memory itself."""
    return private_folder(config.cache_dir / "streaming")


def load_for_streaming(
    config: RunConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    model_config: Any,
    load: Callable[[torch.dtype | str], nn.Module],
) -> nn.Module:
    """A model in host memory, to be streamed; it never touches ``device``, and not all of it memory where that is short.

    safetensors files are mapped, not read, as long as their dtype is the one asked for. With ``disk``, other dtypes are
    converted layer by layer into files of the cache folder, which vanish with the process. Decides whether
    ``use_cpu_offload`` means ``host`` or ``disk``, and writes it into ``config.optimization.stream_layers``.

    Args:
        config: The run.
        device: Where it will compute.
        dtype: Of the frozen base.
        model_config: transformers' configuration, for the size of the model before it is loaded.
        load: Loads the model on the CPU in a dtype, or in that of its files (``"auto"``).

    Raises:
        ConfigError: ``stream_layers: host`` and not enough host memory; names need, have and the mend.
    """
    mode = stream_mode(config, device)
    if mode == "host":
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(model_config)
        mode = _settle_mode(config, mode, host_need(skeleton, dtype, device))
        del skeleton
    if mode == "disk":
        config.optimization.stream_layers = "disk"
        model = load("auto")
        _convert_on_disk(model, dtype, _folder(config))
        model.config.dtype = dtype  # type: ignore[union-attr]
        return model
    if mode == "host":
        config.optimization.stream_layers = "host"
    return load(dtype)


def load_for_sharding(
    config: RunConfig, dtype: torch.dtype, model_config: Any, load: Callable[[torch.dtype | str], nn.Module]
) -> nn.Module:
    """A model whose layers are to be sharded (``model.shard_base``), in host memory with no more than one layer of it.

    As :func:`load_for_streaming` with ``disk``: mapped in the dtype of its files; where another is asked for, the layers are cast
    one at a time into mapped files of the cache folder, one copy per process, which vanish with the process.
    """
    if getattr(model_config, "quantization_config", None) is not None:
        return load(dtype)  # stored quantised: sharding refuses it by name
    model = load("auto")
    _convert_on_disk(model, dtype, _folder(config))
    model.config.dtype = dtype  # type: ignore[union-attr]
    return model


@torch.no_grad()
def _convert_on_disk(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Cast ``model`` to ``dtype``, its layers one at a time into mapped files. What has the dtype already is left alone."""
    _, layers = find_layers(model)
    done: set[int] = set()
    for index, layer in enumerate(layers):
        changed = [t for t in layer_tensors(layer).values() if t.is_floating_point() and t.dtype != dtype]
        done |= {id(t) for t in layer_tensors(layer).values()}
        if not changed:
            continue
        for tensor in changed:
            tensor.data = tensor.data.to(dtype)
        weights = LayerWeights(index, layer, set())
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
            # The mapping outlives the file's name: nothing is left behind, however the process ends.
            path = str(Path(place) / "layer.bin")
            weights.settle(torch.from_file(path, shared=True, size=weights.nbytes, dtype=torch.uint8))
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in done and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


# ---- the run ---------------------------------------------------------------------------------------------------------


def _mean_rank(config: RunConfig, hidden: int) -> int:
    kind, value = parse_rank(config.model.rank)
    if kind == "list":
        return round(sum(value) / len(value))
    return max(1, round(value * hidden)) if kind == "fraction" else int(value)


def transfer_plan(config: RunConfig, model: nn.Module, layer_bytes: list[int], *, where: str) -> TransferPlan:
    """The arithmetic of a run on a loaded model, with ``plan.RATES``."""
    _, layers = find_layers(model)
    layer = layers[0]
    shape = next(shape for shape in LAYER_SHAPES if shape.mismatch(layer) is None)
    sizes = {target: linear_shape(shape.linear(layer, target)) for target in shape.targets}
    hidden, intermediate = next(iter(sizes.values()))
    attention = (
        sum(p.numel() for p in shape.attention_module(layer).parameters() if p.dim() == 2 and p.is_floating_point())
        or 4 * hidden * hidden
    )  # quantised: stored in another shape
    total = _mean_rank(config, hidden) * config.model.num_ranks
    work = flops_per_token(
        hidden=hidden, intermediate=intermediate, attention_weights=attention, gated=len(sizes) == 3,
        np_parameters=total * (hidden + sum(out for _, out in sizes.values())), seq=config.data.max_length,
    )  # fmt: skip
    return plan_transfer(
        layer_bytes, work, config.training.batch_size * config.data.max_length, where=where,
        micro_batches=min(config.optimization.micro_batches_per_layer, config.training.gradient_accumulation_steps),
    )  # fmt: skip


@contextmanager
def streaming(
    config: RunConfig, model: nn.Module, device: torch.device | str, say: Callable[[str], None] | None = None
) -> Iterator[LayerStreamer | None]:
    """Around everything a run does with ``model``: streams its layers if the configuration says so, else does nothing.

    Inside, the model must not be moved (``model.to``): the parts that belong on ``device`` are there. ``say`` gets what is
    streamed (on a GPU with the arithmetic), one line at a time.
    """
    mode = stream_mode(config, device)
    if mode == "off":
        yield None
        return
    streamer = LayerStreamer(model, device, where=mode, folder=_folder(config) if mode == "disk" else None)
    with streamer:
        if say is not None:
            on_gpu = streamer.device.type == "cuda"
            where = "pageable" if mode == "host" and (streamer.notes or not on_gpu) else mode
            lines = transfer_plan(config, model, streamer.layer_bytes, where=where).lines()
            # The assumed rates are those of a GPU.
            for line in (*streamer.notes, *(lines if on_gpu else lines[:1])):
                say(line)
        yield streamer
