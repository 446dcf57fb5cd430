"""The explicit form ``y_t = W x_t + Σ_j v_b[t,j] ⟨v_a[t,j], x_t⟩``: row dots, row outer products and the GEMM with its epilogue.

Everything here but the GEMM streams ``[T, k, n]`` tensors once and is bound by memory. Maths: ``ops/linear/README.md``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch
from .numerics import INTERPRET, next_power_of_2, rounded

__all__ = ["row_dot", "row_outer"]


@triton.jit(do_not_specialize=["tokens"])
def row_dot_kernel(
    s, v, x, tokens, width, num_terms, v_t, v_j, v_n, x_t, x_n,
    BT: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``s[t, j] = ⟨v[t, j], x[t]⟩`` for BT tokens and one j. Programs of one token block are neighbours: x stays in L2."""
    j = tl.program_id(0) % num_terms
    offs_t = (tl.program_id(0) // num_terms).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    offs_n = tl.arange(0, BN).to(tl.int64)
    rows = offs_t < tokens
    v_rows = v + offs_t * v_t + tl.cast(j, tl.int64) * v_j
    x_rows = x + offs_t * x_t
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for n0 in tl.range(0, width, BN):
        mask = rows[:, None] & (offs_n < width - n0)[None, :]  # [BT, BN]
        v_tile = tl.load(v_rows[:, None] + ((n0 + offs_n) * v_n)[None, :], mask=mask, other=0.0).to(tl.float32)
        x_tile = tl.load(x_rows[:, None] + ((n0 + offs_n) * x_n)[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += v_tile * x_tile
    tl.store(s + offs_t * num_terms + j, rounded(tl.sum(acc, axis=1), s.dtype.element_ty, INTERPRETED), mask=rows)


@triton.jit(do_not_specialize=["tokens"])
def row_outer_kernel(
    result, s, x, tokens, width, num_terms, x_t, x_n,
    BT: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``result[t, j] = s[t, j] x[t]`` for BT tokens, BN columns and every j: x is read once."""
    offs_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    offs_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    rows = offs_t < tokens
    mask = rows[:, None] & (offs_n < width)[None, :]  # [BT, BN]
    x_tile = tl.load(x + (offs_t * x_t)[:, None] + (offs_n * x_n)[None, :], mask=mask, other=0.0).to(tl.float32)
    for j in range(num_terms):
        factor = tl.load(s + offs_t * num_terms + j, mask=rows, other=0.0).to(tl.float32)
        target = result + ((offs_t * num_terms + j) * width)[:, None] + offs_n[None, :]
        tl.store(target, rounded(factor[:, None] * x_tile, result.dtype.element_ty, INTERPRETED), mask=mask)


def _blocks(tokens: int, width: int) -> tuple[int, int]:
    """(tokens, columns) of a block: 4096 elements, 32 a thread, as wide as the row allows so that loads are long."""
    block_n = min(1024, max(16, next_power_of_2(width)))
    return max(1, min(4096 // block_n, 16, next_power_of_2(tokens))), block_n


def row_dot(v: Tensor, x: Tensor) -> Tensor:
    """``s [T, k]``, ``s[t, j] = ⟨v[t, j], x[t]⟩``, from ``v [T, k, n]`` and ``x [T, n]`` of any strides; fp32 sums."""
    tokens, num_terms, width = v.shape
    s = x.new_empty(tokens, num_terms)
    block_t, block_n = _blocks(tokens, width)
    launch(
        row_dot_kernel, (ceil_div(tokens, block_t) * num_terms,), x,
        s, v, x, tokens, width, num_terms, *v.stride(), *x.stride(), block_t, block_n, INTERPRET,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return s


def row_outer(s: Tensor, x: Tensor) -> Tensor:
    """``s[t, j] · x[t]  [T, k, n]`` from ``s [T, k]`` and ``x [T, n]``."""
    (tokens, num_terms), width = s.shape, x.shape[1]
    result = x.new_empty(tokens, num_terms, width)
    block_t, block_n = _blocks(tokens, width)
    if num_terms:
        launch(
            row_outer_kernel, (ceil_div(tokens, block_t), ceil_div(width, block_n)), x,
            result, s.contiguous(), x, tokens, width, num_terms, *x.stride(), block_t, block_n, INTERPRET,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return result
