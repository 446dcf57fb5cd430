"""Gradients through ``w_b_up`` on Hopper: dc = dy @ w_b_upᵀ and d w_b_up = cᵀ @ dy from one reading of ``dy``.

:func:`pair_bytes` decides where that pays. The shares of dc are added by the kernel that applies the rule's gradient, so dc
itself is not written (csrc/low_rank/value_grads.cuh).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...rules import get_rule
from .coefficients import Method
from .launch import DTYPES, multiprocessors, refusal, rows_ok, say_fallback, submit
from .rules import matrix, rule_backward, rule_forward, sum_shares

__all__ = ["dc_and_value_grad", "pair_bytes", "value_grads"]

#: Shape of the kernel: columns and ranks of a block, tokens of a tile.
PAIR_COLUMNS, PAIR_RANKS, PAIR_TOKENS = 512, 64, 64


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


def launch_value_grads(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int) -> None:
    """Shares ``dc [column blocks, T, R]`` and ``db [ranges, R, N]``, fp32."""
    submit("value_grads", pair_arguments(dy, c, w_b_up, dc, db, ranges), dy.device)


def pair_arguments(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int) -> Sequence[Any]:
    """The arguments of ``_cuda.value_grads`` but device and stream."""
    (tokens, width), rank = dy.shape, w_b_up.shape[0]
    return (
        DTYPES[dy.dtype], matrix(dy), matrix(c), matrix(w_b_up), dc.data_ptr(), db.data_ptr(),
        tokens, width, rank, ranges,
    )  # fmt: skip


def pair_bytes(tokens: int, width: int, rank: int, ranges: int) -> tuple[int, int]:
    """DRAM bytes of (one pass with its shares written and read, two GEMMs), 16-bit ``dy [tokens, width]``.

    One pass reads dy for every 64 ranks. Its shares of dc are 8·R·T·N/512 bytes: with them it wins for R <= 64.
    """
    shares = _div_up(width, PAIR_COLUMNS) * tokens + ranges * width
    return _div_up(rank, PAIR_RANKS) * tokens * width * 2 + 2 * 4 * rank * shares, 2 * tokens * width * 2


def pair_ranges(tokens: int, width: int, rank: int, sms: int = 132) -> int:
    """Ranges of tokens: as many as fill the SMs once, each with at least 4 tiles to pipeline."""
    blocks = _div_up(width, PAIR_COLUMNS) * _div_up(rank, PAIR_RANKS)
    return max(1, min(sms // blocks, tokens // (4 * PAIR_TOKENS)))


def value_grads(
    dy: Tensor,
    w_b_up: Tensor | None,
    z: Tensor,
    p: Tensor | None,
    key_scale: Tensor | None,
    rule: str,
    num_ranks: int,
    scale: float,
    need_z: bool,
    need_p: bool,
    need_value: bool,
    *,
    method: Method = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dz̃, dp, d w_b_up)`` from the gradient ``dy [T, N]`` of a target's output; what is not needed is ``None``.

    ``w_b_up [R, N]`` may be ``None`` where only its own gradient is needed.
    """
    need_p = need_p and get_rule(rule).key != "none"
    if not (need_z or need_p or need_value):
        return None, None, None
    (tokens, width), rank = dy.shape, z.shape[1]
    c = rule_forward(z, p, key_scale, rule, num_ranks, scale) if need_value else None
    unreadable = refusal([("out", width), ("R", rank)], [])
    possible = tokens > 0 and unreadable is None
    if method == "auto":
        ranges = pair_ranges(tokens, width, rank, multiprocessors(dy.device))
        one, two = pair_bytes(tokens, width, rank, ranges)
        pays = tokens > 0 and c is not None and (need_z or need_p) and one < two
        if pays and unreadable is not None:
            say_fallback("value gradients", unreadable)
        method = "fused" if pays and possible else "vendor"
    if method == "fused" and not possible:
        raise ValueError(
            f"the pair kernel cannot take dy [{tokens}, {width}] with R = {rank}: multiples of 8 are needed"
        )
    if method == "vendor" or c is None or not (need_z or need_p):
        dz = dp = None
        if need_z or need_p:
            assert w_b_up is not None
            dz, dp = rule_backward(dy @ w_b_up.t(), None, z, p, key_scale, rule, num_ranks, scale, need_z, need_p)
        return dz, dp, None if c is None else c.t() @ dy
    assert w_b_up is not None
    dc_shares, db_shares = _pair_shares(dy, w_b_up, c)
    dz, dp = rule_backward(None, dc_shares, z, p, key_scale, rule, num_ranks, scale, need_z, need_p)
    del dc_shares
    return dz, dp, sum_shares(db_shares, torch.empty(rank, width, dtype=dy.dtype, device=dy.device))


def _pair_shares(dy: Tensor, w_b_up: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 shares ``[column blocks, T, R]`` of dc and ``[ranges, R, N]`` of d w_b_up."""
    (tokens, width), rank = dy.shape, w_b_up.shape[0]
    ranges = pair_ranges(tokens, width, rank, multiprocessors(dy.device))
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
    dc = torch.empty(_div_up(width, PAIR_COLUMNS), tokens, rank, **fp32)
    db = torch.empty(ranges, rank, width, **fp32)
    launch_value_grads(rows_ok(dy), rows_ok(c), rows_ok(w_b_up), dc, db, ranges)
    return dc, db


def dc_and_value_grad(dy: Tensor, w_b_up: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``(dc, d w_b_up) = (dy @ w_b_upᵀ [T, R], cᵀ @ dy [R, N])`` from one reading of ``dy [T, N]``; all sizes multiples of 8."""
    shares = _pair_shares(dy, w_b_up, c)
    new: dict[str, Any] = {"dtype": dy.dtype, "device": dy.device}
    dc, db = torch.empty(c.shape, **new), torch.empty(w_b_up.shape, **new)
    return sum_shares(shares[0], dc), sum_shares(shares[1], db)
