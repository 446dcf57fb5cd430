"""Coefficients of a target on Hopper: z = a @ w_down, p = u @ w_a_upᵀ and c = rule(z, p) from one reading of ``a`` and ``u``.

Per token that reads ``(d_a + d_u)·2`` bytes for ``2·(d_a + d_u)·R`` flops: R flops a byte, and the chip balances 788 TFLOP/s
against 4.3 TB/s at 183. So up to R = 128 one pass is all there is to gain. Above, the kernel would run in tiles of 128 ranks
that read ``a`` and ``u`` again through L2 (at R = 256, T = 8192, d = 4096: 512 MB, ~90 µs, against ~60 µs for two vendor GEMMs):
there z and p are the vendor's and :func:`.rules.rule_forward` makes c.
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
from .launch import DTYPES, multiprocessors, refusal, rows_ok, say_fallback, submit, weights_layout
from .rules import matrix, rule_forward, unit_rows
from .support import RULE_IDS

__all__ = ["Coefficients", "coefficients", "coefficients_plan"]

#: "fused" one kernel, "vendor" GEMMs and the rule, "auto" by the arithmetic above.
Method = Literal["auto", "fused", "vendor"]

#: Widest R that "auto" gives to the coefficient kernel; see above.
MAX_FUSED_RANK = 128
#: What meeting, adding and storing cost a block, in k-blocks of 64 (~300 clocks each at full bandwidth): prediction.
FINISH_BLOCKS = 6


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
class CoefficientsPlan:
    """Tile of ranks, and blocks that share a tile's K (a cluster)."""

    tile: int
    parts: int
    reason: str


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=4096)
def coefficients_plan(tokens: int, rank: int, k_blocks: int, sms: int = 132) -> CoefficientsPlan:
    """Tile and split for ``k_blocks`` blocks of 64 over both products: the fewest waves of k-blocks, finishing included."""
    tile = 64 if rank <= 64 else 128
    tiles = _div_up(tokens, 128) * _div_up(rank, tile)

    def cost(parts: int) -> float:
        # A cluster is placed as a whole, so a wave holds whole clusters.
        return _div_up(tiles, max(1, sms // parts)) * (k_blocks / parts + FINISH_BLOCKS)

    parts = min((1, 2, 4, 8), key=cost)
    return CoefficientsPlan(tile, parts, f"{tiles} tiles of 128 x {tile}, {parts} blocks a tile on {sms} SMs")


def launch_coefficients(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, width: int, scale: float, plan: CoefficientsPlan,
) -> None:  # fmt: skip
    """``z``, ``p``, ``c`` of a tile plan; z is computed if ``a`` is given, else read. ``key`` as stored (kinds 1 to 3)."""
    submit(
        "coefficients",
        coefficients_arguments(a, u, w_down, key, key_kind, key_scale, z, p, c, rule, width, scale, plan),
        z.device,
    )


def coefficients_arguments(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, width: int, scale: float, plan: CoefficientsPlan,
) -> Sequence[Any]:  # fmt: skip
    """The arguments of ``_cuda.coefficients`` but device and stream."""
    tokens, rank = z.shape
    key_pitch = (0, 0) if key is None else (key.data_ptr(), key.shape[0] if key.dim() == 1 else key.stride(0))
    return (
        DTYPES[z.dtype], RULE_IDS[rule], width, scale, matrix(a), matrix(u), matrix(w_down), key_pitch, key_kind,
        matrix(z), matrix(p), matrix(c), a is not None, 0 if key_scale is None else key_scale.data_ptr(), tokens,
        0 if a is None else a.shape[1], 0 if u is None else u.shape[1], rank, plan.tile, plan.parts,
    )  # fmt: skip


def _unfit(rank: int, rule: str, num_ranks: int, method: Method) -> str | None:
    """Why the coefficient kernel is not the way to a call that it could read, or ``None``."""
    if method == "vendor" or (method == "auto" and rank > MAX_FUSED_RANK):
        return f"R = {rank} is faster as two vendor GEMMs"
    width = get_rule(rule).term_widths(rank, num_ranks)[1]
    if get_rule(rule).separates_terms and rank > MAX_FUSED_RANK and MAX_FUSED_RANK % width:
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
    plan: CoefficientsPlan | None = None,
) -> Coefficients:
    """z (computed from ``a [T, d_a]`` and ``w_down [d_a, R]``, or given), p and c of one target.

    Args:
        u: The target's input ``[T, d_u]``; not read (may be ``None``) for ``self_key``.
        key: ``w_a_up``: ``[R, d_u]``, ``[d_u]`` (anchored) or ``None`` (self_key); any strides.
        key_scale: ``[T]`` or ``None``: multiplies z inside the rule; the z returned is not multiplied.
        method: ``"fused"`` one kernel, ``"vendor"`` GEMMs and the rule, ``"auto"`` by the module's arithmetic.
        plan: Tile and split instead of :func:`coefficients_plan`'s (tests).
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
    unreadable = refusal([("R", rank), *(("d", width) for width in widths)], [])
    if unreadable is not None and tokens and method != "vendor":
        say_fallback("coefficients", unreadable)
    if tokens == 0 or unreadable is not None or _unfit(rank, rule, num_ranks, method) is not None:
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
        z = unit_rows(z)
    u = None if u is None else rows_ok(u)
    product = torch.empty(tokens, 1 if kind == "vector" else rank, **new) if key is not None else None
    c = z if kind == "none" and key_scale is None else torch.empty(tokens, rank, **new)
    plan = plan or coefficients_plan(
        tokens, rank, sum(_div_up(t.shape[1], 64) for t in (a, u) if t is not None), multiprocessors(sample.device)
    )
    launch_coefficients(
        a, u, w_down, stored, key_kind, None if key_scale is None else key_scale.contiguous(), z, product,
        None if c is z else c, rule, get_rule(rule).term_widths(rank, num_ranks)[1], float(scale), plan,
    )  # fmt: skip
    return Coefficients(z, z.new_empty(0) if product is None else product, c, True)
