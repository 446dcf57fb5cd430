"""Which instance runs a shape, and why. Numbers are predictions except where a measurement is named (benchmarks/notes.md).

``NPT_PRINT_CONFIG=1`` prints each choice once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

__all__ = ["Config", "Epilogue", "Family", "choose"]


class Family(IntEnum):
    """Kernel families, numbered as ``npt::Family`` in csrc/dispatch.h."""

    COOP = 0
    PINGPONG = 1
    DECODE = 2
    SPLIT = 3


class Epilogue(IntEnum):
    """Epilogues, numbered as ``npt::Epilogue`` in csrc/gemm/segk_params.h."""

    STORE = 0
    ACT = 1
    GATE_UP = 2
    ACT_BWD = 3
    GATE_UP_BWD = 4


#: Decode pads the tokens to one of these; above 64 a 128-row tile wastes less than half of the tensor core.
DECODE_TOKENS = (8, 16, 32, 64)
#: k-blocks of 64 that each block of a split keeps: fewer, and filling the ring (~700 ns) costs more than the idle SMs.
MIN_SPLIT_BLOCKS = 4
#: K up to which the epilogue of a cooperative tile (not overlapped, ~3000 clocks predicted) costs more than 10 % of its K loop
#: (256 clocks a k16 step of 128 x 256): there two warpgroups taking turns win.
PINGPONG_MAX_DEPTH = 2048
#: k-blocks of 64 that each part of a split 128 x 256 tile keeps, and what finishing it costs: 128 KB of sums to shared memory, a
#: meeting, 128 KB read across the cluster; in k-blocks of such a tile (1024 clocks).
MIN_SPLIT_TILE_BLOCKS, SPLIT_FINISH_BLOCKS = 8, 8
#: A k-block of a 128 x 128 tile against one of 128 x 256: half of the products, but its 32 KB arrive at ~48 bytes a clock and SM
#: (H200, 2026-11-26: 8192 x 3072 x 768 in 56 µs).
NARROW_BLOCK_COST = 0.65
#: Share of the SMs that clusters of 4 and 8 blocks can count on at once, for a cluster must fit one GPC: H200, 2026-11-26, down
#: projection 8B: 16 clusters of 4 take 47 us (128 x 128 tiles: 73), 32 of them 93, 16 of 8 take 69; in two parts 78.
PLACED_SHARE = 0.75
#: A split must promise this much.
MIN_SPLIT_GAIN = 1.1
#: A cluster of 2 halves the traffic for weights (48 → 32 bytes per clock and SM), but its row tiles come in pairs.
MAX_PAIR_WASTE = 0.05
#: Row tiles of a raster group: 16 x 128 token rows stay in L2 while the weights' columns pass.
GROUP_ROWS = 16


@dataclass(frozen=True)
class Config:
    """One instance: the arguments of ``_cuda.launch`` that are not data."""

    family: Family
    epilogue: Epilogue
    cluster: int
    block_m: int
    block_n: int
    group_m: int
    reason: str
    #: Decode and split: parts of one tile's K, each a block of a cluster (split: `cluster` of them).
    split: int = 1

    def __str__(self) -> str:
        return (
            f"{self.family.name.lower()} {self.epilogue.name.lower()} {self.block_m}x{self.block_n} cluster {self.cluster} "
            f"group {self.group_m}{f' split {self.split}' if self.split > 1 else ''}: {self.reason}"
        )


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


def _wave_efficiency(rows: int, cols: int, block_m: int, block_n: int, slots: int) -> float:
    """Share of the last wave's slots and of the tiles' area that does work."""
    tiles = _div_up(rows, block_m) * _div_up(cols, block_n)
    return rows * cols / (_div_up(tiles, slots) * slots * block_m * block_n)


def _split(rows: int, cols: int, k_blocks: int, sms: int) -> tuple[float, int, int] | None:
    """Best split of K with which all tiles run at once: (cost in k-blocks of a 128 x 256 tile, cluster, split), or ``None``."""
    found = []
    for cluster in (2, 1):
        row_tiles = _div_up(rows, 128)
        if cluster == 2 and row_tiles % 2 > MAX_PAIR_WASTE * (row_tiles + 1):
            continue
        tiles = _div_up(row_tiles, cluster) * _div_up(cols, 256)
        for split in (8, 4):
            blocks = cluster * split  # of one cluster
            if blocks <= 8 and tiles <= PLACED_SHARE * sms // blocks and k_blocks >= split * MIN_SPLIT_TILE_BLOCKS:
                found.append((_div_up(k_blocks, split) + SPLIT_FINISH_BLOCKS, cluster, split))
    return min(found, key=lambda way: way[0], default=None)


def choose(epilogue: Epilogue, rows: int, cols: int, depth: int, sms: int = 132, mn_major: bool = False) -> Config:
    """The instance for outputs ``[rows, cols]``, a K of ``depth`` over all segments, weights K-major or MN-major."""
    config = _choose(epilogue, rows, cols, depth, sms, mn_major)
    if os.environ.get("NPT_PRINT_CONFIG") == "1":
        _print_once(rows, cols, depth, config)
    return config


@lru_cache(maxsize=4096)
def _choose(epilogue: Epilogue, rows: int, cols: int, depth: int, sms: int, mn_major: bool) -> Config:
    backward = epilogue in (Epilogue.ACT_BWD, Epilogue.GATE_UP_BWD)
    if rows <= DECODE_TOKENS[-1] and not backward:
        tokens = next(n for n in DECODE_TOKENS if rows <= n)
        tiles, k_blocks = _div_up(cols, 64), _div_up(depth, 64)
        split = next(n for n in (8, 4, 2, 1) if n == 1 or (tiles * n <= sms and k_blocks >= n * MIN_SPLIT_BLOCKS))
        why = f"{rows} tokens: bound by weight bandwidth, operands swapped"
        if split > 1:
            why += f"; {tiles} tiles would leave {sms - tiles} of {sms} SMs idle"
        return Config(Family.DECODE, epilogue, 1, tokens, 64, 1, why, split)

    short_gate_up = epilogue == Epilogue.GATE_UP and depth <= PINGPONG_MAX_DEPTH and not mn_major
    block_m = 64 if short_gate_up else 128
    row_tiles = _div_up(rows, block_m)
    waste = (row_tiles % 2) / (row_tiles + row_tiles % 2)
    cluster = 2 if waste <= MAX_PAIR_WASTE else 1
    paired = (
        f"cluster of 2 shares the weights' loads ({row_tiles} row tiles)"
        if cluster == 2
        else f"no cluster: {row_tiles} row tiles would leave {waste:.0%} of the pairs empty"
    )
    group = max(1, GROUP_ROWS * 128 // (block_m * cluster))

    def config(family: Family, block_n: int, why: str) -> Config:
        return Config(family, epilogue, cluster, block_m, block_n, group, f"{why}; {paired}")

    if backward:
        return config(Family.PINGPONG, 192, "its epilogue moves T·f elements, which the other warpgroup's K loop hides")
    if short_gate_up:
        return config(Family.PINGPONG, 256, f"K = {depth} is short, so the epilogue must overlap")
    if epilogue == Epilogue.GATE_UP:
        return config(Family.COOP, 256, "gate and up share one stage of 128 + 128 weight rows")
    k_blocks = _div_up(depth, 64)
    way = _split(rows, cols, k_blocks, sms) if epilogue == Epilogue.STORE else None
    if way is not None:
        cost, split_cluster, parts = way
        tiles = row_tiles * _div_up(cols, 256)
        wide_cost = _div_up(tiles, sms) * k_blocks
        narrow_cost = _div_up(row_tiles * _div_up(cols, 128), sms) * k_blocks * NARROW_BLOCK_COST
        if cost * MIN_SPLIT_GAIN <= min(wide_cost, narrow_cost):
            why = f"{tiles} tiles of 128 x 256 would leave {sms - tiles} of {sms} SMs idle; {parts} parts of K, {k_blocks} blocks"
            return Config(Family.SPLIT, epilogue, split_cluster, 128, 256, group, why, parts)
    if depth <= PINGPONG_MAX_DEPTH and epilogue == Epilogue.STORE:
        # H200, 2026-11-26, 8192 x 3072 x 768: 56.4 µs alone, 59.4 in pairs (cuBLAS 60.2). Not measured for the other epilogues.
        why = f"K = {depth} is short, so the epilogue must overlap; no cluster: pairs wait for each other's epilogues"
        return Config(Family.PINGPONG, epilogue, 1, 128, 128, GROUP_ROWS, why)
    if depth <= PINGPONG_MAX_DEPTH:
        return config(Family.PINGPONG, 128, f"K = {depth} is short, so the epilogue must overlap")
    wide = _wave_efficiency(rows, cols, 128, 256, sms)
    narrow = _wave_efficiency(rows, cols, 128, 128, sms)
    if narrow > 1.1 * wide:
        return config(
            Family.PINGPONG, 128, f"128 x 256 tiles would fill {wide:.0%} of the SMs, 128 x 128 fill {narrow:.0%}"
        )
    return config(Family.COOP, 256, "the widest tile reads the fewest bytes per flop")


@lru_cache(maxsize=4096)
def _print_once(rows: int, cols: int, depth: int, config: Config) -> None:
    print(f"npt_kernels cuda: [{rows}, {cols}] K {depth}: {config}", file=sys.stderr)
