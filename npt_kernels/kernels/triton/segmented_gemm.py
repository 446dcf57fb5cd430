"""Segmented-K GEMM ``Y = epilogue(Σ_i X_i W_iᵀ)``: one to three products, one accumulator, one store.

Each segment has its own pointers, strides and K, so ``x Wᵀ + c w_b_up`` is one GEMM whose K loop runs over ``in`` and then over
R more columns taken from elsewhere. Any segment may be the low-rank one (R from 1 to d, no multiple of the tile needed); the
low-rank one should come last: a dot before the main loop costs its shared-memory ring a second time.
W_i may be contiguous along K (``F.linear``'s layout) or along N (``dy @ W``, ``c @ w_b_up``): no weight is copied.

Epilogues: ``epilogues.finish``. The two-accumulator SwiGLU forward is in ``gate_up.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .epilogues import finish_in_pieces
from .launch import TileConfig, addressable, ceil_div, describe, launch, num_programs, tile_config
from .numerics import INTERPRET, dot_precision, next_power_of_2
from .tiles import accumulate, tile_position

__all__ = ["Segment", "gate_up_backward", "gemm_act", "gemm_act_backward", "gemm_terms", "segmented_gemm"]

#: ``(X [T, K], W [N, K])``, any strides.
Segment = tuple[Tensor, Tensor]


@triton.jit(do_not_specialize=["tokens"])
def segmented_gemm_kernel(
    y, y2, bias, read0, read1, x0, w0, x1, w1, x2, w2,
    tokens, out, k0, k1, k2, num_terms,
    x0_t, x0_k, w0_n, w0_k, x1_t, x1_k, w1_n, w1_k, x2_t, x2_k, w2_n, w2_k, v_t, v_j, v_n,
    SEGMENTS: tl.constexpr, EPILOGUE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    WRITE_Y: tl.constexpr, WRITE_Y2: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK0: tl.constexpr, BK1: tl.constexpr, BK2: tl.constexpr,
    TMA_X0: tl.constexpr, TMA_W0: tl.constexpr, K_MAJOR0: tl.constexpr, EVEN0: tl.constexpr,
    TMA_X1: tl.constexpr, TMA_W1: tl.constexpr, K_MAJOR1: tl.constexpr, EVEN1: tl.constexpr,
    TMA_X2: tl.constexpr, TMA_W2: tl.constexpr, K_MAJOR2: tl.constexpr, EVEN2: tl.constexpr,
    GROUP: tl.constexpr, SUBTILES: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Persistent: program i computes tiles i, i + grid, ... of ``Y [tokens, out]``."""
    tiles_t = tl.cdiv(tokens, BT)
    tiles_n = tl.cdiv(out, BN)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0)):
        tile_t, tile_n = tile_position(tile, tiles_t, tiles_n, GROUP)
        t0 = tile_t * BT
        n0 = tile_n * BN
        acc = tl.zeros((BT, BN), dtype=tl.float32)
        acc = accumulate(
            acc, x0, w0, t0, n0, tokens, out, k0, 0, k0, x0_t, x0_k, w0_n, w0_k,
            BT, BN, BK0, TMA_X0, TMA_W0, K_MAJOR0, EVEN0, PRECISION, INTERPRETED,
        )  # fmt: skip
        if SEGMENTS > 1:
            acc = accumulate(
                acc, x1, w1, t0, n0, tokens, out, k1, 0, k1, x1_t, x1_k, w1_n, w1_k,
                BT, BN, BK1, TMA_X1, TMA_W1, K_MAJOR1, EVEN1, PRECISION, INTERPRETED,
            )  # fmt: skip
        if SEGMENTS > 2:
            acc = accumulate(
                acc, x2, w2, t0, n0, tokens, out, k2, 0, k2, x2_t, x2_k, w2_n, w2_k,
                BT, BN, BK2, TMA_X2, TMA_W2, K_MAJOR2, EVEN2, PRECISION, INTERPRETED,
            )  # fmt: skip
        finish_in_pieces(
            acc, t0, n0, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
            EPILOGUE, ACT, HAS_BIAS, WRITE_Y, WRITE_Y2, BT, BN, SUBTILES, INTERPRETED,
        )  # fmt: skip


def k_major(w: Tensor) -> bool:
    """Whether ``W [N, K]`` is read along K: it is contiguous there, or along neither."""
    return w.stride(1) == 1 or w.stride(0) != 1


def segment_block(k: int, block_k: int) -> int:
    """K of one step in a segment: the tile's, or less for a segment that ends before it (16 is the least for tl.dot)."""
    return min(block_k, max(16, next_power_of_2(k)))


def segment_arguments(x: Tensor, w: Tensor, config: TileConfig) -> tuple[list[Any], list[int], int, list[Any]]:
    """([X, W] as pointers or descriptors, their strides, the K step, [TMA of X, TMA of W, K_MAJOR, EVEN])."""
    k = x.shape[1]
    block = segment_block(k, config.block_k)
    along_k = k_major(w)
    x_source = describe(x, (config.block_t, block), config.tma)
    w_source = (
        describe(w, (config.block_n, block), config.tma)
        if along_k
        else describe(w.t(), (block, config.block_n), config.tma)
    )
    strides = [x.stride(0), x.stride(1), w.stride(0), w.stride(1)]
    return (
        [x_source, w_source],
        strides,
        block,
        [x_source is not x, not isinstance(w_source, Tensor), along_k, k % block == 0],
    )


def _run(
    segments: Sequence[Segment],
    epilogue: str,
    y: Tensor | None,
    y2: Tensor | None = None,
    *,
    kernel: str = "segmented_gemm",
    bias: Tensor | None = None,
    act: str = "",
    read0: Tensor | None = None,
    read1: Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """Launch the kernel; outputs and per-output reads are contiguous ``[T, out]``."""
    like = y if y is not None else y2
    assert like is not None
    tokens, out = like.shape
    segments = [(addressable(x), addressable(w)) for x, w in segments]
    if config is None:
        inner = segments[0][0].shape[1]
        rank = sum(x.shape[1] for x, _ in segments[1:])
        config = tile_config(kernel, like, tokens, out=out, inner=inner, rank=rank)
    sources: list[Any] = []
    extents: list[int] = []
    strides: list[int] = []
    blocks: list[int] = []
    flags: list[Any] = []
    for x, w in segments:
        source, stride, block, flag = segment_arguments(x, w, config)
        sources += source
        extents.append(x.shape[1])
        strides += stride
        blocks.append(block)
        flags += flag
    missing = 3 - len(segments)
    sources += [like, like] * missing  # never read
    extents += [0] * missing
    strides += [0] * (4 * missing)
    blocks += [16] * missing
    flags += [False] * (4 * missing)
    is_terms = epilogue == "terms"
    tiles = ceil_div(tokens, config.block_t) * ceil_div(out, config.block_n)
    launch(
        segmented_gemm_kernel,
        (num_programs(config, like, tiles),),
        like,
        like if y is None else y, like if y2 is None else y2, like if bias is None else bias,
        like if read0 is None else read0, like if read1 is None else read1, *sources,
        tokens, out, *extents, read0.shape[1] if is_terms and read0 is not None else 0,
        *strides, *(read1.stride() if is_terms and read1 is not None else (0, 0, 0)),
        len(segments), epilogue, act, bias is not None, y is not None, y2 is not None,
        config.block_t, config.block_n, *blocks, *flags,
        config.group_t, config.subtiles, dot_precision(like.dtype), INTERPRET,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _output(segments: Sequence[Segment]) -> Tensor:
    x, w = segments[0]
    return x.new_empty(x.shape[0], w.shape[0])


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def segmented_gemm(
    segments: Sequence[Segment], bias: Tensor | None = None, *, config: TileConfig | None = None
) -> Tensor:
    """``Σ_i X_i W_iᵀ + bias  [T, N]`` from one to three segments ``(X_i [T, K_i], W_i [N, K_i])``."""
    y = _output(segments)
    _run(segments, "store", y, bias=_contiguous(bias), config=config)
    return y


def gemm_act(
    segments: Sequence[Segment], bias: Tensor | None, act: str, keep_pre: bool, *, config: TileConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(act(pre), pre)`` with ``pre = Σ_i X_i W_iᵀ + bias``; ``pre`` is stored only if ``keep_pre``."""
    y = _output(segments)
    pre = y.new_empty(y.shape) if keep_pre else None
    _run(segments, "act", y, pre, bias=_contiguous(bias), act=act, kernel="gemm_act", config=config)
    return y, pre


def gemm_act_backward(
    segments: Sequence[Segment], pre: Tensor, act: str, *, overwrite: bool = False, config: TileConfig | None = None
) -> Tensor:
    """``(Σ_i X_i W_iᵀ) ⊙ act'(pre)``; ``overwrite`` puts it where ``pre`` was."""
    y = pre if overwrite and pre.is_contiguous() else _output(segments)
    _run(segments, "act_backward", y, act=act, read0=pre.contiguous(), kernel="gate_up_backward", config=config)
    return y


def gate_up_backward(
    segments: Sequence[Segment],
    gate: Tensor,
    up: Tensor,
    act: str,
    need_gate: bool,
    need_up: bool,
    *,
    overwrite: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dgate, dup)`` of ``act(gate) ⊙ up`` with ``dinter = Σ_i X_i W_iᵀ``, which is never stored; only those asked for.

    ``overwrite`` puts dgate where **up** was and dup where **gate** was. That way round every element that is stored depends on
    the one that it replaces, so no thread can store before the load; dup over up would not (dup does not depend on up).
    """
    if not (need_gate or need_up):
        return None, None
    overwrite = overwrite and gate.is_contiguous() and up.is_contiguous()
    dgate = (up if overwrite else _output(segments)) if need_gate else None
    dup = (gate if overwrite else _output(segments)) if need_up else None
    _run(
        segments, "gate_up_backward", dgate, dup,
        act=act, read0=gate.contiguous(), read1=up.contiguous(), kernel="gate_up_backward", config=config,
    )  # fmt: skip
    return dgate, dup


def gemm_terms(
    x: Tensor, w: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None, *, config: TileConfig | None = None
) -> Tensor:
    """``x Wᵀ + Σ_j s[:, j] v[:, j, :] + bias``: the explicit form; v ``[T, k, out]`` is read once, of any strides."""
    segments = [(x, w)]
    y = _output(segments)
    _run(segments, "terms", y, bias=_contiguous(bias), read0=s.contiguous(), read1=v, config=config)
    return y
