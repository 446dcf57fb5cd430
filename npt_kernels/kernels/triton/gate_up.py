"""Gate and up in one GEMM: ``inter = act(x Wgᵀ + c_g B_g + b_g) ⊙ (x Wuᵀ + c_u B_u + b_u)``.

Two accumulators share every X tile, so the pair costs one pass over X and no pre-activation has to be written (they are,
once and rounded, when the backward will need them). The low-rank product may belong to gate, up or both.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .epilogues import activate, halves
from .launch import TileConfig, addressable, ceil_div, launch, num_programs, tile_config
from .numerics import INTERPRET, dot_precision, rounded
from .segmented_gemm import Segment, k_major, segment_arguments
from .tiles import accumulate, accumulate_gate_up, tile_position

__all__ = ["gate_up_forward"]


@triton.jit
def _finish_gate_up(
    gate, up, t0, n0, inter, gate_out, up_out, gate_bias, up_bias, tokens, out,
    ACT: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, KEEP: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    offs_t = tl.arange(0, BT)
    offs_n = tl.arange(0, BN)
    mask = (offs_t < tokens - t0)[:, None] & (offs_n < out - n0)[None, :]  # [BT, BN]
    tile = t0.to(tl.int64) * out + n0
    offs = offs_t[:, None] * out + offs_n[None, :]
    dtype = inter.dtype.element_ty
    if GATE_BIAS:
        gate += tl.load(gate_bias + n0 + offs_n, mask=offs_n < out - n0, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        up += tl.load(up_bias + n0 + offs_n, mask=offs_n < out - n0, other=0.0).to(tl.float32)[None, :]
    # This order of the stores: the others spill registers on sm_90, under Triton 3.6 or 3.9.
    if KEEP:
        tl.store(gate_out + tile + offs, rounded(gate, dtype, INTERPRETED), mask=mask)
    tl.store(inter + tile + offs, rounded(activate(gate, ACT) * up, dtype, INTERPRETED), mask=mask)
    if KEEP:
        tl.store(up_out + tile + offs, rounded(up, dtype, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def gate_up_kernel(
    inter, gate_out, up_out, gate_bias, up_bias, x, wg, wu, cg, bg, cu, bu,
    tokens, out, k, rank_g, rank_u,
    x_t, x_k, wg_n, wg_k, wu_n, wu_k, cg_t, cg_k, bg_n, bg_k, cu_t, cu_k, bu_n, bu_k,
    ACT: tl.constexpr, LOW_RANK_GATE: tl.constexpr, LOW_RANK_UP: tl.constexpr, JOINT: tl.constexpr, ONE_C: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, KEEP: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BRG: tl.constexpr, BRU: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, K_MAJOR: tl.constexpr, EVEN: tl.constexpr,
    TMA_CG: tl.constexpr, TMA_BG: tl.constexpr, K_MAJOR_G: tl.constexpr, EVEN_G: tl.constexpr,
    TMA_CU: tl.constexpr, TMA_BU: tl.constexpr, K_MAJOR_U: tl.constexpr, EVEN_U: tl.constexpr,
    GROUP: tl.constexpr, SUBTILES: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Persistent over tiles of ``inter [tokens, out]``."""
    tiles_t = tl.cdiv(tokens, BT)
    tiles_n = tl.cdiv(out, BN)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0)):
        tile_t, tile_n = tile_position(tile, tiles_t, tiles_n, GROUP)
        t0 = tile_t * BT
        n0 = tile_n * BN
        gate = tl.zeros((BT, BN), dtype=tl.float32)
        up = tl.zeros((BT, BN), dtype=tl.float32)
        gate, up = accumulate_gate_up(
            gate, up, x, x, wg, wu, t0, n0, tokens, out, k, x_t, x_k, x_t, x_k, wg_n, wg_k, wu_n, wu_k,
            True, BT, BN, BK, TMA_X, TMA_W, K_MAJOR, EVEN, PRECISION, INTERPRETED, None,
        )  # fmt: skip
        if JOINT:
            # One loop for both low-rank products: every loop costs a fill and a drain of the pipeline per tile.
            gate, up = accumulate_gate_up(
                gate, up, cg, cu, bg, bu, t0, n0, tokens, out, rank_g, cg_t, cg_k, cu_t, cu_k, bg_n, bg_k, bu_n, bu_k,
                ONE_C, BT, BN, BRG, TMA_CG, TMA_BG, K_MAJOR_G, EVEN_G, PRECISION, INTERPRETED, 2,
            )  # fmt: skip
        if LOW_RANK_GATE and not JOINT:
            gate = accumulate(
                gate, cg, bg, t0, n0, tokens, out, rank_g, 0, rank_g, cg_t, cg_k, bg_n, bg_k,
                BT, BN, BRG, TMA_CG, TMA_BG, K_MAJOR_G, EVEN_G, PRECISION, INTERPRETED,
            )  # fmt: skip
        if LOW_RANK_UP and not JOINT:
            up = accumulate(
                up, cu, bu, t0, n0, tokens, out, rank_u, 0, rank_u, cu_t, cu_k, bu_n, bu_k,
                BT, BN, BRU, TMA_CU, TMA_BU, K_MAJOR_U, EVEN_U, PRECISION, INTERPRETED,
            )  # fmt: skip
        if SUBTILES == 1:
            _finish_gate_up(
                gate, up, t0, n0, inter, gate_out, up_out, gate_bias, up_bias, tokens, out,
                ACT, GATE_BIAS, UP_BIAS, KEEP, BT, BN, INTERPRETED,
            )  # fmt: skip
        else:
            tl.static_assert(SUBTILES == 2, "the pair is finished whole or in halves")
            HALF: tl.constexpr = BN // 2
            gate_l, gate_r = halves(gate, BT, BN)
            up_l, up_r = halves(up, BT, BN)
            _finish_gate_up(
                gate_l, up_l, t0, n0, inter, gate_out, up_out, gate_bias, up_bias, tokens, out,
                ACT, GATE_BIAS, UP_BIAS, KEEP, BT, HALF, INTERPRETED,
            )  # fmt: skip
            _finish_gate_up(
                gate_r, up_r, t0, n0 + HALF, inter, gate_out, up_out, gate_bias, up_bias, tokens, out,
                ACT, GATE_BIAS, UP_BIAS, KEEP, BT, HALF, INTERPRETED,
            )  # fmt: skip


def gate_up_forward(
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
    """``(inter, gate, up)``, each ``[T, f]``; the last two are stored only if ``keep``.

    Args:
        x: ``[T, d]``. gate_weight, up_weight: ``[f, d]``, any strides.
        gate_low_rank, up_low_rank: ``(c [T, R], w_b_upᵀ [f, R])`` or ``None``.
        gate_bias, up_bias: ``[f]`` or ``None``.
        act: A name of ``support.FUSED_ACTIVATIONS``.
    """
    tokens, out = x.shape[0], gate_weight.shape[0]
    inter = x.new_empty(tokens, out)
    gate = x.new_empty(tokens, out) if keep else None
    up = x.new_empty(tokens, out) if keep else None
    x, gate_weight, up_weight = addressable(x), addressable(gate_weight), addressable(up_weight)
    low_rank = [None if s is None else (addressable(s[0]), addressable(s[1])) for s in (gate_low_rank, up_low_rank)]
    if config is None:
        rank = max((s[0].shape[1] for s in low_rank if s is not None), default=0)
        config = tile_config("gate_up_forward", x, tokens, out=out, inner=x.shape[1], rank=rank)
    along_k = k_major(gate_weight)
    if k_major(up_weight) != along_k:  # one loop reads both: it takes them along the gate's direction
        up_weight = up_weight.contiguous() if along_k else up_weight.t().contiguous().t()
    (x_source, gate_source), main_strides, block, (tma_x, tma_w, _, even) = segment_arguments(x, gate_weight, config)
    (_, up_source), up_strides, _, (_, tma_up, *_) = segment_arguments(x, up_weight, config)
    if tma_w != tma_up:
        gate_source, up_source, tma_w = gate_weight, up_weight, False
    sources: list[Any] = [x_source, gate_source, up_source]
    extents: list[int] = [x.shape[1]]
    strides = main_strides + up_strides[2:]
    blocks = [block]
    flags: list[Any] = [tma_x, tma_w, along_k, even]
    for segment in low_rank:
        if segment is None:
            sources += [inter, inter]
            extents.append(0)
            strides += [0, 0, 0, 0]
            blocks.append(16)
            flags += [False] * 4
        else:
            source, stride, step, flag = segment_arguments(*segment, config)
            sources += source
            extents.append(segment[0].shape[1])
            strides += stride
            blocks.append(step)
            flags += flag
    gate_segment, up_segment = low_rank
    joint = (
        gate_segment is not None
        and up_segment is not None
        and extents[1] == extents[2]
        and flags[4:8] == flags[8:12]  # descriptors, direction and evenness alike
    )
    # Without a key (self_key) gate and up have the same coefficients: one tile of c serves both.
    one_c = joint and gate_low_rank is not None and up_low_rank is not None and gate_low_rank[0] is up_low_rank[0]
    tiles = ceil_div(tokens, config.block_t) * ceil_div(out, config.block_n)
    launch(
        gate_up_kernel,
        (num_programs(config, x, tiles),),
        x,
        inter, inter if gate is None else gate, inter if up is None else up,
        inter if gate_bias is None else gate_bias.contiguous(), inter if up_bias is None else up_bias.contiguous(),
        *sources, tokens, out, *extents, *strides,
        act, low_rank[0] is not None, low_rank[1] is not None, joint, one_c, gate_bias is not None, up_bias is not None, keep,
        config.block_t, config.block_n, *blocks, *flags,
        config.group_t, config.subtiles, dot_precision(x.dtype), INTERPRET,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return inter, gate, up
