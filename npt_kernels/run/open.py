"""Opens a run, for training and evaluation alike: device, threads, precision, base model, text, streamed layers."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..base_model.loading import HostLoader, load_model, quantization_notes, resolve_dtype
from ..base_model.mixed_precision import settle_mixed_precision
from ..configs.schema import RunConfig
from ..model.documents import isolated_documents
from ..offload import load_for_sharding, load_for_streaming, stream_mode, streaming, streaming_notes
from ..text.blocks import TokenBlocks, check_sources, document_separator, load_token_blocks
from ..training.distributed import World, choose_device
from ..training.loop import TrainingError
from ..training.precision import scale_losses
from .records import check_trackers, tracker_names

__all__ = ["OpenRun", "computing", "keep_freed_memory", "make_accelerator", "open_run", "threads"]

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class OpenRun:
    """What :func:`open_run` loaded.

    Attributes:
        world: The processes, and the device of this one.
        model: The base model; on the device, or on the host where its layers are streamed or will be sharded.
        tokenizer: Its tokenizer.
        blocks: Its text.
    """

    world: World
    model: nn.Module
    tokenizer: Any
    blocks: TokenBlocks


@contextmanager
def open_run(
    config: RunConfig, *, training: bool, console: Console | None = None, world: World | None = None
) -> Iterator[OpenRun]:
    """Base model and text of a configuration; inside, torch has the threads of ``optimization.num_threads``.

    What can be known to be wrong is known before anything slow.

    Args:
        config: The run. ``model.dtype``, ``optimization.mixed_precision`` and ``optimization.stream_layers`` are settled in
            it where they depend on the machine.
        training: ``config.yaml`` is written, and the log says what the memory keys do.
        console: Where to print; default standard output.
        world: The processes; default: this one alone.

    Raises:
        ConfigError: As ``check_sources``, ``check_trackers``, ``load_model`` and ``load_token_blocks``.
        AssetError: The demo's files could not be fetched.
    """
    console = console or Console()
    world = world or World(device=choose_device())
    device = world.device
    check_sources(config)
    precision = settle_mixed_precision(config, device)
    if training:
        if precision is not None:
            console.print(precision, markup=False, highlight=False, soft_wrap=True)
        check_trackers(config)
        world.on_main(config.save)
        for note in (*streaming_notes(config, device), *quantization_notes(config, device)):
            console.print(note, style="yellow", markup=False)
    with threads(config):
        if world.sharded:
            # On the host until it is converted; then every process keeps its part, in the dtype that its device takes.
            config.model.dtype = str(resolve_dtype(config, device)).removeprefix("torch.")  # type: ignore[assignment]
        where = f"{world.size} processes ({'fsdp' if world.sharded else 'ddp'}, {device.type})"
        name = config.model.base_model_name
        console.print(f"loading {name} on {device if world.size == 1 else where}", markup=False)
        streamed = stream_mode(config, device) != "off"
        to_host: HostLoader | None = functools.partial(load_for_streaming, config, device) if streamed else None
        if world.sharded:
            to_host = functools.partial(load_for_sharding, config)
        # The first one downloads and fills caches.
        with world.main_first():
            model, tokenizer = load_model(config, "cpu" if world.sharded else device, to_host=to_host)
            blocks = load_token_blocks(config, tokenizer)
        for line in blocks.sources:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        yield OpenRun(world, model, tokenizer, blocks)


@contextmanager
def computing(
    config: RunConfig, model: nn.Module, tokenizer: Any, device: torch.device, say: Callable[[str], None]
) -> Iterator[None]:
    """Around all that computes with the model: its layers come and go, documents are kept apart, as the configuration says."""
    with streaming(config, model, device, say), isolated_documents(model, document_separator(config, tokenizer)):
        yield


@contextmanager
def threads(config: RunConfig) -> Iterator[None]:
    """``optimization.num_threads`` inside."""
    before = torch.get_num_threads()
    if config.optimization.num_threads:
        torch.set_num_threads(config.optimization.num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's, for device, precision and trackers. Raises :class:`TrainingError` for a precision that cannot be had here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    # accelerate keeps one precision per process and refuses another; a second run in one process may want one.
    if getattr(AcceleratorState, "_shared_state", None):
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.optimization.mixed_precision,
            log_with=tracker_names(config) or None,
            project_config=ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
        )
    except ValueError as error:
        raise TrainingError(f"optimization.mixed_precision={config.optimization.mixed_precision!r}: {error}") from None
    scale_losses(accelerator, config)
    return accelerator


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of handing them back to the kernel; nothing elsewhere.

    Training on a CPU frees and allocates the same tensors of some ten MB every step; by default each is mapped and
    page-faulted anew. Measured on two cores with SmolLM2-135M: about half the time of a step. For programs, not libraries: it
    holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # musl and others
        return
