"""The pieces that every GEMM kernel here is made of: tile order, tile loads, the K loop of one segment."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import dot

__all__ = ["accumulate", "accumulate_gate_up", "load_tile", "tile_position"]


@triton.jit
def tile_position(tile, tiles_t, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile: GROUP row tiles sweep N together, so the weight tile just read is found in L2 again."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    height = tl.minimum(tiles_t - first, GROUP)
    return first + (tile % per_group) % height, (tile % per_group) // height


@triton.jit
def load_tile(
    source, r0, c0, rows, cols, stride_r, stride_c,
    BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """``source[r0 : r0 + BR, c0 : c0 + BC]``, zero outside the matrix. ``source`` is a descriptor when TMA, else a pointer.

    ``EVEN_*``: the extent is a multiple of the block, no mask needed. The tile's origin is a 64-bit scalar; offsets within
    the tile are 32-bit (``runtime.addressable`` sees to that), hence loop-invariant and cheap.
    """
    if TMA:
        return source.load([r0, c0])
    else:
        offs_r = tl.arange(0, BR)
        offs_c = tl.arange(0, BC)
        origin = source + tl.cast(r0, tl.int64) * stride_r + tl.cast(c0, tl.int64) * stride_c
        pointers = origin + (offs_r[:, None] * stride_r + offs_c[None, :] * stride_c)
        if EVEN_R and EVEN_C:
            return tl.load(pointers)
        elif EVEN_R:
            return tl.load(pointers, mask=offs_c[None, :] < cols - c0, other=0.0)
        elif EVEN_C:
            return tl.load(pointers, mask=offs_r[:, None] < rows - r0, other=0.0)
        else:
            return tl.load(pointers, mask=(offs_r[:, None] < rows - r0) & (offs_c[None, :] < cols - c0), other=0.0)


@triton.jit
def load_weight(
    w, n0, k0, out, k, w_n, w_k,
    BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Tile ``[BK, BN]`` of ``Wᵀ``, read along the direction in which W is contiguous."""
    if K_MAJOR:
        return load_tile(w, n0, k0, out, k, w_n, w_k, BN, BK, TMA, False, EVEN_K).T
    else:
        return load_tile(w, k0, n0, k, out, w_k, w_n, BK, BN, TMA, EVEN_K, False)


@triton.jit
def accumulate(
    acc, x, w, t0, n0, tokens, out, k, k_begin, k_end, x_t, x_k, w_n, w_k,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA_X: tl.constexpr, TMA_W: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``acc + X[t0:, :] @ W[n0:, :]ᵀ`` over K from ``k_begin`` to ``k_end`` of one segment (0 and ``k`` unless K is split)."""
    for k0 in tl.range(k_begin, k_end, BK):
        x_tile = load_tile(x, t0, k0, tokens, k, x_t, x_k, BT, BK, TMA_X, False, EVEN_K)  # [BT, BK]
        w_tile = load_weight(w, n0, k0, out, k, w_n, w_k, BN, BK, TMA_W, K_MAJOR, EVEN_K)  # [BK, BN]
        acc = dot(x_tile, w_tile, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def accumulate_gate_up(
    acc0, acc1, x0, x1, w0, w1, t0, n0, tokens, out, k, x0_t, x0_k, x1_t, x1_k, w0_n, w0_k, w1_n, w1_k,
    ONE_X: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA_X: tl.constexpr, TMA_W: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Two products in one loop: ``(acc0 + X0 W0ᵀ, acc1 + X1 W1ᵀ)``; with ONE_X both read the same X tile (x1 is ignored).

    STAGES: depth of the pipeline, ``None`` for the launch's.
    """
    for k0 in tl.range(0, k, BK, num_stages=STAGES):
        x0_tile = load_tile(x0, t0, k0, tokens, k, x0_t, x0_k, BT, BK, TMA_X, False, EVEN_K)  # [BT, BK]
        w0_tile = load_weight(w0, n0, k0, out, k, w0_n, w0_k, BN, BK, TMA_W, K_MAJOR, EVEN_K)  # [BK, BN]
        w1_tile = load_weight(w1, n0, k0, out, k, w1_n, w1_k, BN, BK, TMA_W, K_MAJOR, EVEN_K)
        acc0 = dot(x0_tile, w0_tile, acc0, PRECISION, INTERPRETED)
        if ONE_X:
            acc1 = dot(x0_tile, w1_tile, acc1, PRECISION, INTERPRETED)
        else:
            x1_tile = load_tile(x1, t0, k0, tokens, k, x1_t, x1_k, BT, BK, TMA_X, False, EVEN_K)
            acc1 = dot(x1_tile, w1_tile, acc1, PRECISION, INTERPRETED)
    return acc0, acc1
