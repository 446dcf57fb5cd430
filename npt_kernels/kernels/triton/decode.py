"""Few tokens (T ≤ 64): the weights are streamed once, and enough of them must be in flight to fill the memory system.

A tile holds all tokens and few output columns; K is deep and many stages are in flight. Where the output is too narrow to
occupy the GPU (a down projection has d/32 tiles), K is split over programs: each writes an fp32 partial sum, and a second pass
adds them in the order of the splits, so the result does not depend on timing (no atomics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogues import finish
from .gate_up import gate_up_forward
from .launch import TileConfig, addressable, ceil_div, launch, tile_config
from .numerics import INTERPRET, dot_precision, multiprocessor_count, next_power_of_2
from .segmented_gemm import Segment, gemm_act, gemm_terms, segment_arguments, segmented_gemm
from .tiles import accumulate

__all__ = ["DECODE_TOKENS", "decode_act", "decode_gate_up", "decode_gemm", "decode_terms"]

#: Up to so many tokens a GEMM is bound by reading its weights.
DECODE_TOKENS = 64


@triton.jit(do_not_specialize=["tokens"])
def split_gemm_kernel(
    partial, x0, w0, x1, w1, tokens, out, k0, k1, k_per_split,
    x0_t, x0_k, w0_n, w0_k, x1_t, x1_k, w1_n, w1_k,
    SEGMENTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK0: tl.constexpr, BK1: tl.constexpr,
    TMA_X0: tl.constexpr, TMA_W0: tl.constexpr, K_MAJOR0: tl.constexpr, EVEN0: tl.constexpr,
    TMA_X1: tl.constexpr, TMA_W1: tl.constexpr, K_MAJOR1: tl.constexpr, EVEN1: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``partial[split] = X W_splitᵀ``, fp32 ``[splits, tokens, out]``; the last split adds the low-rank segment.

    ``k_per_split`` is a multiple of BK0, so splits never share a K block. Grid: (column tiles, splits).
    """
    n0 = tl.program_id(0) * BN
    split = tl.program_id(1)
    begin = split * k_per_split
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    t0 = tl.program_id(0) * 0  # all tokens are in the one row of tiles
    acc = accumulate(
        acc, x0, w0, t0, n0, tokens, out, k0, begin, tl.minimum(begin + k_per_split, k0), x0_t, x0_k, w0_n, w0_k,
        BT, BN, BK0, TMA_X0, TMA_W0, K_MAJOR0, EVEN0, PRECISION, INTERPRETED,
    )  # fmt: skip
    if SEGMENTS > 1:
        # An empty range for every split but the last: a branch would cost the loop its pipeline.
        end = tl.where(split == tl.num_programs(1) - 1, k1, 0)
        acc = accumulate(
            acc, x1, w1, t0, n0, tokens, out, k1, 0, end, x1_t, x1_k, w1_n, w1_k,
            BT, BN, BK1, TMA_X1, TMA_W1, K_MAJOR1, EVEN1, PRECISION, INTERPRETED,
        )  # fmt: skip
    offs_t = tl.arange(0, BT)
    offs_n = n0 + tl.arange(0, BN)
    tile = partial + split.to(tl.int64) * tokens * out
    tl.store(
        tile + offs_t[:, None] * out + offs_n[None, :], acc, mask=(offs_t < tokens)[:, None] & (offs_n < out)[None, :]
    )


@triton.jit(do_not_specialize=["tokens", "splits"])
def reduce_splits_kernel(
    y, partial, bias, read0, read1, tokens, out, splits, num_terms, v_t, v_j, v_n,
    EPILOGUE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``y = epilogue(Σ_split partial[split])``, added in the order of the splits. Grid: (column tiles, row tiles)."""
    n0 = tl.program_id(0) * BN
    t0 = tl.program_id(1) * BT
    offs_t = t0 + tl.arange(0, BT)
    offs_n = n0 + tl.arange(0, BN)
    mask = (offs_t < tokens)[:, None] & (offs_n < out)[None, :]  # [BT, BN]
    offs = offs_t[:, None] * out + offs_n[None, :]
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * tokens * out + offs, mask=mask, other=0.0)
    finish(
        acc, t0, n0, y, y, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
        EPILOGUE, ACT, HAS_BIAS, True, False, BT, BN, INTERPRETED,
    )  # fmt: skip


def num_splits(config: TileConfig, out: int, inner: int, like: Tensor) -> int:
    """Programs per output tile: enough for two programs a multiprocessor, but at least four K blocks each.

    A configuration with ``split_k > 1`` decides by itself; the interpreter splits whatever can be split.
    """
    blocks = ceil_div(inner, config.block_k)
    if like.device.type == "cpu":
        wanted = 3
    elif config.split_k > 1:
        wanted = config.split_k
    else:
        wanted = min(ceil_div(2 * multiprocessor_count(like.device), ceil_div(out, config.block_n)), blocks // 4, 16)
    return max(1, min(wanted, blocks))


def _decode_config(like: Tensor, tokens: int, out: int, inner: int, rank: int) -> TileConfig:
    return tile_config("decode", like, tokens, out=out, inner=inner, rank=rank)


def _split_gemm(
    segments: Sequence[Segment],
    bias: Tensor | None,
    config: TileConfig,
    splits: int,
    epilogue: str = "store",
    act: str = "",
    s: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """One or two segments, K of the first split; then the ordered sum with the epilogue."""
    segments = [(addressable(x), addressable(w)) for x, w in segments]
    (x, w), tokens, out = segments[0], segments[0][0].shape[0], segments[0][1].shape[0]
    y = x.new_empty(tokens, out)
    block_t = max(config.block_t, next_power_of_2(tokens))  # the kernel has one row of tiles
    config = TileConfig(**{**config.__dict__, "block_t": block_t})
    partial = x.new_empty(splits, tokens, out, dtype=torch.float32)
    sources, strides, block, flags = segment_arguments(x, w, config)
    low_sources: list[Any] = [y, y]
    low_strides, low_block, low_flags, low_k = [0, 0, 0, 0], 16, [False] * 4, 0
    if len(segments) > 1:
        low_k = segments[1][0].shape[1]
        low_sources, low_strides, low_block, low_flags = segment_arguments(*segments[1], config)
    k_per_split = ceil_div(ceil_div(x.shape[1], block), splits) * block
    launch(
        split_gemm_kernel, (ceil_div(out, config.block_n), splits), x,
        partial, *sources, *low_sources, tokens, out, x.shape[1], low_k, k_per_split, *strides, *low_strides,
        len(segments), block_t, config.block_n, block, low_block, *flags, *low_flags, dot_precision(x.dtype), INTERPRET,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    reduce_t, reduce_n = min(block_t, 4), 128
    launch(
        reduce_splits_kernel, (ceil_div(out, reduce_n), ceil_div(tokens, reduce_t)), x,
        y, partial, y if bias is None else bias.contiguous(), y if s is None else s.contiguous(), y if v is None else v,
        tokens, out, splits, 0 if s is None else s.shape[1], *((0, 0, 0) if v is None else v.stride()),
        epilogue, act, bias is not None, reduce_t, reduce_n, INTERPRET,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


def _plan(segments: Sequence[Segment], config: TileConfig | None = None) -> tuple[TileConfig, int]:
    (x, w), rank = segments[0], sum(s[0].shape[1] for s in segments[1:])
    config = config or _decode_config(x, x.shape[0], w.shape[0], w.shape[1], rank)
    return config, num_splits(config, w.shape[0], w.shape[1], x)


def decode_gemm(segments: Sequence[Segment], bias: Tensor | None, *, config: TileConfig | None = None) -> Tensor:
    """``Σ_i X_i W_iᵀ + bias`` for few tokens; at most two segments."""
    config, splits = _plan(segments, config)
    return segmented_gemm(segments, bias, config=config) if splits == 1 else _split_gemm(segments, bias, config, splits)


def decode_act(
    segments: Sequence[Segment], bias: Tensor | None, act: str, keep_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """``(act(pre), pre)`` with ``pre = Σ_i X_i W_iᵀ + bias`` for few tokens, as ``gemm_act``."""
    config, splits = _plan(segments)
    if splits == 1 or keep_pre:  # the second pass has one output; a call that keeps pre is training, not decoding
        return gemm_act(segments, bias, act, keep_pre, config=config)
    return _split_gemm(segments, bias, config, splits, "act", act), None


def decode_terms(x: Tensor, w: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + Σ_j s_j v_j + bias`` (explicit form) for few tokens."""
    config, splits = _plan([(x, w)])
    if splits == 1:
        return gemm_terms(x, w, s, v, bias, config=config)
    return _split_gemm([(x, w)], bias, config, splits, "terms", s=s, v=v)


def decode_gate_up(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_low_rank: Segment | None,
    up_low_rank: Segment | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    keep: bool,
    *,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(act(gate) ⊙ up, gate, up)`` for few tokens, as ``gate_up_forward``.

    f/32 tiles that read two weights each fill the GPU without splitting K.
    """
    rank = max((s[0].shape[1] for s in (gate_low_rank, up_low_rank) if s is not None), default=0)
    config = config or _decode_config(x, x.shape[0], gate_weight.shape[0], x.shape[1], rank)
    return gate_up_forward(
        x, gate_weight, up_weight, gate_low_rank, up_low_rank, gate_bias, up_bias, act, keep, config=config
    )
