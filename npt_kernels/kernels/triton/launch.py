"""What every GEMM-like launch shares: tile configuration, grid, device guard, tensor descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tables
from .numerics import device_guard, multiprocessor_count, next_power_of_2

__all__ = [
    "Launch",
    "TileConfig",
    "addressable",
    "candidate_config",
    "ceil_div",
    "default_config",
    "describe",
    "launch",
    "num_programs",
    "recording",
    "tile_config",
]

#: In-tile offsets are 32-bit (256 rows and columns at most), so a pitch must stay below this; offsets of tiles are 64-bit.
_MAX_PITCH = 2**31 // 512


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class TileConfig:
    """Tile and launch parameters of one kernel.

    Attributes:
        block_t, block_n, block_k: Tokens, output columns (per accumulator) and K of one tile.
        num_warps, num_stages: As Triton means them.
        group_t: Tiles along T that share a pass over N, so that a weight tile is read from L2 by several programs.
        subtiles: Column pieces (1, 2, 4; gate_up_forward: 1, 2) in which an epilogue handles the accumulator: fewer registers.
        split_k: Programs that share one output tile along K (decode only); partial sums are added in a fixed order.
        tma: Load operands through tensor-memory-accelerator descriptors where their strides allow it (sm_90 and later).
        persistent: One program per multiprocessor that loops over tiles, instead of a program per tile.
    """

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_t: int = 8
    subtiles: int = 1
    split_k: int = 1
    tma: bool = False
    persistent: bool = True


_FIELDS = frozenset(field.name for field in fields(TileConfig))

# kernel -> generation -> tile for 16-bit inputs and many tokens; "other" must fit 99 KiB of shared memory (consumer GPUs).
# Compiled without spills for sm_80, sm_90 and sm_100 (tools/check_triton.py); which is fastest is for `npt bench tune`.
_TILES: dict[str, dict[str, TileConfig]] = {
    "segmented_gemm": {
        "ampere": TileConfig(128, 128, 32, num_warps=8, num_stages=4),
        "hopper": TileConfig(128, 256, 64, num_warps=8, num_stages=3, subtiles=2, tma=True),
        "blackwell": TileConfig(128, 256, 64, num_warps=8, num_stages=3, subtiles=2, tma=True),
        "other": TileConfig(128, 128, 32, num_warps=8, num_stages=3),
    },
    "gate_up_forward": {
        "ampere": TileConfig(128, 64, 32, num_warps=8, num_stages=4),
        "hopper": TileConfig(128, 128, 64, num_warps=8, num_stages=3, tma=True),
        "blackwell": TileConfig(128, 128, 64, num_warps=8, num_stages=3, subtiles=2, tma=True),
        "other": TileConfig(128, 64, 32, num_warps=8, num_stages=3),
    },
    "gemm_act": {
        "ampere": TileConfig(128, 128, 32, num_warps=8, num_stages=4, subtiles=2),
        "hopper": TileConfig(128, 128, 64, num_warps=8, num_stages=4, subtiles=2, tma=True),
        "blackwell": TileConfig(128, 128, 64, num_warps=8, num_stages=4, subtiles=2, tma=True),
        "other": TileConfig(128, 128, 32, num_warps=8, num_stages=3, subtiles=2),
    },
    "gate_up_backward": {
        "ampere": TileConfig(128, 128, 32, num_warps=8, num_stages=4, subtiles=2),
        "hopper": TileConfig(128, 128, 64, num_warps=8, num_stages=4, subtiles=2, tma=True),
        "blackwell": TileConfig(128, 128, 64, num_warps=8, num_stages=4, subtiles=2, tma=True),
        "other": TileConfig(128, 128, 32, num_warps=8, num_stages=3, subtiles=2),
    },
    "decode": {
        "ampere": TileConfig(16, 32, 128, num_warps=4, num_stages=5, persistent=False),
        "hopper": TileConfig(16, 32, 128, num_warps=4, num_stages=6, persistent=False),
        "blackwell": TileConfig(16, 32, 128, num_warps=4, num_stages=6, persistent=False),
        "other": TileConfig(16, 32, 128, num_warps=4, num_stages=4, persistent=False),
    },
}
# fp32: IEEE products run on the FMA units and hold their operands in registers, so the tile is small everywhere.
_FP32_TILE = TileConfig(64, 64, 16, num_warps=8, num_stages=2)
_FP32_PAIR = TileConfig(64, 32, 16, num_warps=8, num_stages=2)
_FP32_DECODE = TileConfig(16, 32, 64, num_warps=4, num_stages=3, persistent=False)
# Interpreter: time goes with the number of Python-level operations; several tiles in every direction at test sizes.
_INTERPRETER_TILE = TileConfig(16, 32, 16, num_warps=4, num_stages=2, group_t=2, subtiles=2, tma=False)


def generation(capability: tuple[int, int]) -> str:
    """Family of GPUs that share a row of ``_TILES``."""
    return {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}.get(capability, "other")


def default_config(kernel: str, capability: tuple[int, int], itemsize: int, tokens: int) -> TileConfig:
    """The tile that is known to compile clean, for a GPU without a tuned table."""
    base = _TILES[kernel][generation(capability)]
    if itemsize == 4:
        base = {"decode": _FP32_DECODE, "gate_up_forward": _FP32_PAIR}.get(kernel, _FP32_TILE)
    if tokens < base.block_t or kernel == "decode":  # do not multiply rows that do not exist
        base = replace(base, block_t=max(16, next_power_of_2(tokens)))
    if base.block_t < 64 and kernel != "decode":
        base = replace(base, num_warps=4, block_n=min(base.block_n, 128))
    return base


@lru_cache(maxsize=None)
def _device_facts(index: int) -> tuple[str, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, (properties.major, properties.minor)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=4096)
def _cached_config(
    kernel: str, index: int, dtype: torch.dtype, tokens: int, shape: tuple[tuple[str, int], ...]
) -> TileConfig:
    name, capability = _device_facts(index)
    base = default_config(kernel, capability, dtype.itemsize, tokens)
    found = _lookup(kernel, name, dtype=str(dtype).removeprefix("torch."), tokens=tokens, **dict(shape))
    return replace(base, **{key: value for key, value in found.items() if key in _FIELDS})


def _lookup(kernel: str, device_name: str, **shape: Any) -> Mapping[str, Any]:
    return tables.lookup(kernel, device_name, **shape) or {}


def tile_config(kernel: str, like: Tensor, tokens: int, **shape: int) -> TileConfig:
    """Tile of ``kernel`` for this device and shape: the tuned table's, completed by the safe default.

    ``tokens`` enters rounded up to a power of two (at most 8192), so that a new T costs no new compilation as a rule.
    """
    if like.device.type == "meta":
        return default_config(kernel, _recording_for, like.dtype.itemsize, tokens)
    if like.device.type == "cpu":
        return replace(_INTERPRETER_TILE, block_t=16 if tokens <= 32 else 32)
    bucket = min(next_power_of_2(tokens), 8192)
    return _cached_config(kernel, _index(like.device), like.dtype, bucket, tuple(shape.items()))


def candidate_config(kernel: str, like: Tensor, tokens: int, fields: Mapping[str, Any]) -> TileConfig:
    """The tile that a table's entry with these fields would give: they complete the safe default, as in tile_config."""
    if like.device.type == "cuda":
        base = default_config(kernel, _device_facts(_index(like.device))[1], like.dtype.itemsize, tokens)
    else:
        base = tile_config(kernel, like, tokens)
    return replace(base, **fields)


def num_programs(config: TileConfig, like: Tensor, tiles: int) -> int:
    """Grid size: every tile a program, or as many programs as multiprocessors when persistent."""
    if not config.persistent:
        return tiles
    # 3 in the interpreter, so that tests see programs that own several tiles.
    return min(tiles, 3 if like.device.type == "cpu" else multiprocessor_count(like.device))


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what a compiler needs to know of a call."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
_recording_for: tuple[int, int] = (9, 0)


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, with the tiles of such a GPU. Call the ops on ``meta`` tensors inside.

    So ahead-of-time checks compile exactly what a real call would: its argument types, alignments and constants.
    """
    global _recorded, _recording_for
    before = _recorded, _recording_for
    _recorded, _recording_for = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _recording_for = before


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Run a kernel on the device and current stream of ``like``. An empty grid launches nothing."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, meta))
        return
    with device_guard(like):
        kernel[grid](*args, **meta)


def addressable(tensor: Tensor) -> Tensor:
    """The tensor itself unless a pitch is so large that offsets within one tile would not fit 32 bits; then a copy."""
    return tensor if all(abs(stride) < _MAX_PITCH for stride in tensor.stride()) else tensor.contiguous()


def describe(matrix: Tensor, block: Sequence[int], allowed: bool) -> Tensor | TensorDescriptor:
    """A TMA descriptor of ``matrix [rows, cols]`` if its layout permits one, else the matrix.

    The hardware wants unit-stride columns, rows a multiple of 16 bytes apart and a base aligned to 16 bytes.
    """
    if not allowed or matrix.stride(1) != 1 or 0 in matrix.shape:
        return matrix
    pitch = matrix.stride(0)
    if pitch < matrix.shape[1] or pitch * matrix.element_size() % 16 or matrix.data_ptr() % 16:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), [pitch, 1], list(block))
