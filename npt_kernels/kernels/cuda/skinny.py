"""The low-rank side of a layer on Hopper: coefficients of a rule, and the gradients through ``w_b_up``. Unverified on hardware.

Coefficients (csrc/low_rank/coefficients.cuh): z = a @ w_down, p = u @ w_a_upᵀ, c = rule(z, p) from one read of ``a`` and ``u``.
Per token that reads ``(d_a + d_u)·2`` bytes for ``2·(d_a + d_u)·R`` flops: R flops a byte, and the chip balances 788 TFLOP/s
against 4.3 TB/s at 183. So up to R = 128 one pass is all there is to gain. Above, the kernel would run in tiles of 128 ranks
that read ``a`` and ``u`` again through L2 (at R = 256, T = 8192, d = 4096: 512 MB, ~90 µs, against ~60 µs for two vendor GEMMs):
there z and p are the vendor's and :func:`rule_forward` makes c.

The pair (csrc/low_rank/value_grads.cuh): dc = dy @ w_b_upᵀ and d w_b_up = cᵀ @ dy from one reading of ``dy``;
:func:`pair_bytes` decides.
Its shares of dc are added by the kernel that applies the rule's gradient, so dc itself is not written.

No float atomics anywhere: sums of parts run from the first to the last, two runs are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import get_rule
from .launch import DTYPES, multiprocessors, rows_ok, submit, weights_layout

__all__ = [
    "Coefficients",
    "coefficients",
    "pair_bytes",
    "rule_backward",
    "rule_forward",
    "shrink_plan",
    "skinny_pair",
    "value_grads",
]

Method = Literal["auto", "fused", "vendor"]

#: Numbers of the rules inside kernels: npt::RuleId.
RULES = {"rank1": 0, "diagonal": 1, "anchored": 2, "self_key": 3}
#: Widest R that "auto" gives to the coefficient kernel; see above.
MAX_FUSED_RANK = 128
#: What meeting, adding and storing cost a block, in k-blocks of 64 (~300 clocks each at full bandwidth): prediction.
FINISH_BLOCKS = 6
#: Shape of the pair kernel: columns and ranks of a block, tokens of a tile.
PAIR_COLUMNS, PAIR_RANKS, PAIR_TOKENS = 512, 64, 64
#: Columns of a term whose shares the rule's gradient kernel can add by itself (npt::kHeld).
MAX_SHARED_WIDTH = 1024


class Coefficients(NamedTuple):
    """What a target needs: ``z [T, R]`` (not scaled), ``p`` (``[T, R]``, ``[T, 1]`` or empty), ``c [T, R]``.

    ``own``: whether the last kernel put on the stream was one of this package's, launched plainly; then the next kernel may
    overlap with it (csrc/decode/segk_swapab.cuh).
    """

    z: Tensor
    p: Tensor
    c: Tensor
    own: bool


@dataclass(frozen=True)
class ShrinkPlan:
    """Tile of ranks, and blocks that share a tile's K (a cluster)."""

    tile: int
    parts: int
    reason: str


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=4096)
def shrink_plan(tokens: int, rank: int, k_blocks: int, sms: int = 132) -> ShrinkPlan:
    """Tile and split for ``k_blocks`` blocks of 64 over both products: the fewest waves of k-blocks, finishing included."""
    tile = 64 if rank <= 64 else 128
    tiles = _div_up(tokens, 128) * _div_up(rank, tile)

    def cost(parts: int) -> float:
        # A cluster is placed as a whole, so a wave holds whole clusters.
        return _div_up(tiles, max(1, sms // parts)) * (k_blocks / parts + FINISH_BLOCKS)

    parts = min((1, 2, 4, 8), key=cost)
    return ShrinkPlan(tile, parts, f"{tiles} tiles of 128 x {tile}, {parts} blocks a tile on {sms} SMs")


def _matrix(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _terms(rule: str, rank: int, num_ranks: int) -> tuple[int, int]:
    """(terms, columns of a term): only rank1 separates its terms."""
    return (num_ranks, rank // num_ranks) if rule == "rank1" else (1, rank)


# ------------------------------------------------------------------------------------------------ launches
# One function for each kernel, tensors in and out, so that tests can put the definition in their place.


def launch_shrink(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, width: int, scale: float, plan: ShrinkPlan,
) -> None:  # fmt: skip
    """``z``, ``p``, ``c`` of a tile plan; z is computed if ``a`` is given, else read. ``key`` as stored (kinds 1 to 3)."""
    submit(
        "coefficients",
        shrink_arguments(a, u, w_down, key, key_kind, key_scale, z, p, c, rule, width, scale, plan),
        z.device,
    )


def shrink_arguments(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, width: int, scale: float, plan: ShrinkPlan,
) -> Sequence[Any]:  # fmt: skip
    """The arguments of ``_cuda.coefficients`` but device and stream."""
    tokens, rank = z.shape
    key_pitch = (0, 0) if key is None else (key.data_ptr(), key.shape[0] if key.dim() == 1 else key.stride(0))
    return (
        DTYPES[z.dtype], RULES[rule], width, scale, _matrix(a), _matrix(u), _matrix(w_down), key_pitch, key_kind,
        _matrix(z), _matrix(p), _matrix(c), a is not None, 0 if key_scale is None else key_scale.data_ptr(), tokens,
        0 if a is None else a.shape[1], 0 if u is None else u.shape[1], rank, plan.tile, plan.parts,
    )  # fmt: skip


def launch_pair(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int) -> None:
    """Shares ``dc [column blocks, T, R]`` and ``db [ranges, R, N]``, fp32."""
    submit("value_grads", pair_arguments(dy, c, w_b_up, dc, db, ranges), dy.device)


def pair_arguments(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int) -> Sequence[Any]:
    """The arguments of ``_cuda.value_grads`` but device and stream."""
    (tokens, width), rank = dy.shape, w_b_up.shape[0]
    return (
        DTYPES[dy.dtype], _matrix(dy), _matrix(c), _matrix(w_b_up), dc.data_ptr(), db.data_ptr(),
        tokens, width, rank, ranges,
    )  # fmt: skip


def launch_rule(
    backward: bool, z: Tensor, p: Tensor | None, c: Tensor | None, dc: Tensor | None, dz: Tensor | None, dp: Tensor | None,
    shares: Tensor | None, key_scale: Tensor | None, rule: str, num_ranks: int, scale: float,
) -> None:  # fmt: skip
    """``c``, or ``dz`` and ``dp`` where given, from ``dc`` or its fp32 ``shares [n, T, R]``."""
    arguments = rule_arguments(backward, z, p, c, dc, dz, dp, shares, key_scale, rule, num_ranks, scale)
    submit("rule", arguments, z.device)


def rule_arguments(
    backward: bool, z: Tensor, p: Tensor | None, c: Tensor | None, dc: Tensor | None, dz: Tensor | None, dp: Tensor | None,
    shares: Tensor | None, key_scale: Tensor | None, rule: str, num_ranks: int, scale: float,
) -> Sequence[Any]:  # fmt: skip
    """The arguments of ``_cuda.rule`` but device and stream."""
    tokens, rank = z.shape
    terms, width = _terms(rule, rank, num_ranks)
    rows = [t for t in (z, p, c, dc, dz, dp) if t is not None]
    even = width % 2 == 0 and all(
        t.data_ptr() % 4 == 0 and (t.shape[1] == 1 or t.stride(0) % 2 == 0) for t in rows
    )  # fmt: skip
    return (
        backward, DTYPES[z.dtype], RULES[rule], terms, width, scale, _matrix(z), _matrix(p), _matrix(c), _matrix(dc),
        _matrix(dz), _matrix(dp), 0 if shares is None else shares.data_ptr(), 0 if shares is None else shares.shape[0],
        0 if key_scale is None else key_scale.data_ptr(), tokens, rank, 2 if even else 1,
    )  # fmt: skip


def launch_reduce(shares: Tensor, out: Tensor) -> None:
    """``out = shares.sum(0)``, from the first to the last; ``shares [n, *out.shape]`` fp32, both contiguous."""
    submit("reduce", reduce_arguments(shares, out), out.device)


def reduce_arguments(shares: Tensor, out: Tensor) -> Sequence[Any]:
    """The arguments of ``_cuda.reduce`` but device and stream."""
    return DTYPES[out.dtype], shares.data_ptr(), out.data_ptr(), out.numel(), shares.shape[0]


# ------------------------------------------------------------------------------------------------ coefficients
def _unit_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def rule_forward(
    z: Tensor, p: Tensor | None, key_scale: Tensor | None, rule: str, num_ranks: int = 1, scale: float = 1.0
) -> Tensor:
    """``c [T, R]`` from ``z [T, R]``, ``p`` (``[T, R]``, ``[T, 1]`` or unused) and ``key_scale [T]`` or ``None``.

    For ``self_key`` without key scale the result is ``z`` itself (same storage): treat it as read-only.
    """
    if rule == "self_key" and key_scale is None:
        return z
    c = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if c.numel() == 0:
        return c
    p = None if rule == "self_key" or p is None else _unit_rows(p)
    scale_rows = None if key_scale is None else key_scale.contiguous()
    launch_rule(False, _unit_rows(z), p, c, None, None, None, None, scale_rows, rule, num_ranks, float(scale))
    return c


def _shrink_refusal(rank: int, widths: Sequence[int], rule: str, num_ranks: int, method: Method) -> str | None:
    """Why the coefficient kernel does not take a call, or ``None``."""
    for width in (rank, *widths):
        if width % 8 or width < 8:
            return f"a width of {width} is not a multiple of 8"
    if method == "vendor" or (method == "auto" and rank > MAX_FUSED_RANK):
        return f"R = {rank} is faster as two vendor GEMMs"
    width = _terms(rule, rank, num_ranks)[1]
    if rule == "rank1" and rank > MAX_FUSED_RANK and MAX_FUSED_RANK % width:
        return f"a term of {width} columns crosses tiles of {MAX_FUSED_RANK} ranks"
    return None


def coefficients(
    u: Tensor | None,
    key: Tensor | None,
    key_scale: Tensor | None,
    rule: str,
    num_ranks: int = 1,
    scale: float = 1.0,
    *,
    a: Tensor | None = None,
    w_down: Tensor | None = None,
    z: Tensor | None = None,
    method: Method = "auto",
    plan: ShrinkPlan | None = None,
) -> Coefficients:
    """z (computed from ``a [T, d_a]`` and ``w_down [d_a, R]``, or given), p and c of one target.

    Args:
        u: The target's input ``[T, d_u]``; not read (may be ``None``) for ``self_key``.
        key: ``w_a_up``: ``[R, d_u]``, ``[d_u]`` (anchored) or ``None`` (self_key); any strides.
        key_scale: ``[T]`` or ``None``: multiplies z inside the rule; the z returned is not multiplied.
        method: ``"fused"`` one kernel, ``"vendor"`` GEMMs and the rule, ``"auto"`` by the module's arithmetic.
        plan: Tile and split instead of :func:`shrink_plan`'s (tests).
    """
    kind = get_rule(rule).key
    if kind == "none":
        u = key = None
    sample = a if a is not None else z
    assert sample is not None
    tokens, rank = sample.shape[0], (w_down.shape[1] if w_down is not None else z.shape[1])  # type: ignore[union-attr]
    given = z is not None
    if given and kind == "none":
        assert z is not None
        c = rule_forward(z, None, key_scale, rule, num_ranks, scale)
        return Coefficients(z, z.new_empty(0), c, c is not z)
    widths = [t.shape[1] for t in (a, u) if t is not None]
    if tokens == 0 or _shrink_refusal(rank, widths, rule, num_ranks, method) is not None:
        if z is None:
            assert a is not None and w_down is not None
            z = a @ w_down
        p = z.new_empty(0)
        if key is not None:
            assert u is not None
            p = F.linear(u, key if kind == "matrix" else key.unsqueeze(0))
        c = rule_forward(z, p, key_scale, rule, num_ranks, scale)
        return Coefficients(z, p, c, c is not z and tokens > 0)
    new: dict[str, Any] = {"dtype": sample.dtype, "device": sample.device}
    key_kind, stored = 0, None
    if key is not None:
        if kind == "vector":
            key_kind, stored = 3, key.contiguous()
            stored = stored.clone() if stored.data_ptr() % 16 else stored
        elif weights_layout(key) == "mn":  # diagonal's key is w_downᵀ itself, a view
            key_kind, stored = 2, key.t()
        else:
            key_kind, stored = 1, rows_ok(key)
    if z is None:
        assert a is not None and w_down is not None
        a, w_down, z = rows_ok(a), rows_ok(w_down), torch.empty(tokens, rank, **new)
    else:
        a, w_down = None, None
        z = _unit_rows(z)
    u = None if u is None else rows_ok(u)
    product = torch.empty(tokens, 1 if kind == "vector" else rank, **new) if key is not None else None
    c = z if kind == "none" and key_scale is None else torch.empty(tokens, rank, **new)
    plan = plan or shrink_plan(
        tokens, rank, sum(_div_up(t.shape[1], 64) for t in (a, u) if t is not None), multiprocessors(sample.device)
    )
    launch_shrink(
        a, u, w_down, stored, key_kind, None if key_scale is None else key_scale.contiguous(), z, product,
        None if c is z else c, rule, _terms(rule, rank, num_ranks)[1], float(scale), plan,
    )  # fmt: skip
    return Coefficients(z, z.new_empty(0) if product is None else product, c, True)


# ------------------------------------------------------------------------------------------------ gradients
def rule_backward(
    dc: Tensor | None,
    shares: Tensor | None,
    z: Tensor,
    p: Tensor | None,
    key_scale: Tensor | None,
    rule: str,
    num_ranks: int = 1,
    scale: float = 1.0,
    need_z: bool = True,
    need_p: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dz, dp)`` from ``dc [T, R]`` or its fp32 ``shares [n, T, R]``; what is not needed is ``None``.

    ``dz`` is the gradient of the *scaled* z̃ = key_scale ⊙ z. For ``self_key`` it is dc itself.
    """
    if not (need_z or need_p):
        return None, None
    if rule == "self_key" and shares is None:
        return dc if need_z else None, None
    tokens, rank = z.shape
    new: dict[str, Any] = {"dtype": z.dtype, "device": z.device}
    width = _terms(rule, rank, num_ranks)[1]
    if shares is not None and (width > MAX_SHARED_WIDTH or rule == "self_key"):
        summed = _sum_shares(shares, torch.empty(tokens, rank, **new))
        return rule_backward(summed, None, z, p, key_scale, rule, num_ranks, scale, need_z, need_p)
    assert p is not None and (dc is None) != (shares is None)
    dz = torch.empty(tokens, rank, **new) if need_z else None
    dp = torch.empty(tokens, p.shape[1], **new) if need_p else None
    if z.numel() == 0:
        return dz, None if dp is None else dp.zero_()
    launch_rule(
        True, _unit_rows(z), _unit_rows(p), None, None if dc is None else _unit_rows(dc), dz, dp, shares,
        None if key_scale is None else key_scale.contiguous(), rule, num_ranks, float(scale),
    )  # fmt: skip
    return dz, dp


def _sum_shares(shares: Tensor, out: Tensor) -> Tensor:
    launch_reduce(shares, out)
    return out


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
    possible = tokens > 0 and width % 8 == 0 and rank % 8 == 0 and rank >= 8
    if method == "auto":
        ranges = pair_ranges(tokens, width, rank, multiprocessors(dy.device))
        one, two = pair_bytes(tokens, width, rank, ranges)
        method = "fused" if possible and c is not None and (need_z or need_p) and one < two else "vendor"
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
    return dz, dp, _sum_shares(db_shares, torch.empty(rank, width, dtype=dy.dtype, device=dy.device))


def _pair_shares(dy: Tensor, w_b_up: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 shares ``[column blocks, T, R]`` of dc and ``[ranges, R, N]`` of d w_b_up."""
    (tokens, width), rank = dy.shape, w_b_up.shape[0]
    ranges = pair_ranges(tokens, width, rank, multiprocessors(dy.device))
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
    dc = torch.empty(_div_up(width, PAIR_COLUMNS), tokens, rank, **fp32)
    db = torch.empty(ranges, rank, width, **fp32)
    launch_pair(rows_ok(dy), rows_ok(c), rows_ok(w_b_up), dc, db, ranges)
    return dc, db


def skinny_pair(dy: Tensor, w_b_up: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``(dc, d w_b_up) = (dy @ w_b_upᵀ [T, R], cᵀ @ dy [R, N])`` from one reading of ``dy [T, N]``; all sizes multiples of 8."""
    shares = _pair_shares(dy, w_b_up, c)
    new: dict[str, Any] = {"dtype": dy.dtype, "device": dy.device}
    dc, db = torch.empty(c.shape, **new), torch.empty(w_b_up.shape, **new)
    return _sum_shares(shares[0], dc), _sum_shares(shares[1], db)
