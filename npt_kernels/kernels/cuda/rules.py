"""The rules alone, and sums of shares: kernels of csrc/low_rank/rule_kernels.cuh.

One function for each launch, tensors in and out, so that tests can put the definition in its place. No float atomics: sums of
shares run from the first to the last, so two runs are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...rules import get_rule
from .launch import DTYPES, submit
from .support import RULE_IDS

__all__ = ["launch_reduce", "launch_rule", "matrix", "rule_backward", "rule_forward", "sum_shares", "unit_rows"]

#: Columns of a term whose shares the rule's gradient kernel can add by itself (npt::kHeld).
MAX_SHARED_WIDTH = 1024


def matrix(tensor: Tensor | None) -> tuple[int, int]:
    """(address, pitch) as the launchers take them."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def unit_rows(t: Tensor) -> Tensor:
    """``t`` with its last side contiguous and rows that lie apart, which those of an expanded tensor do not."""
    if t.stride(-1) == 1 and t.stride(0) >= t.shape[-1]:
        return t
    # contiguous() returns a single row as it is, whatever its pitch.
    return t.clone(memory_format=torch.contiguous_format)


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
    terms, width = get_rule(rule).term_widths(rank, num_ranks)
    rows = [t for t in (z, p, c, dc, dz, dp) if t is not None]
    even = width % 2 == 0 and all(
        t.data_ptr() % 4 == 0 and (t.shape[1] == 1 or t.stride(0) % 2 == 0) for t in rows
    )  # fmt: skip
    return (
        backward, DTYPES[z.dtype], RULE_IDS[rule], terms, width, scale, matrix(z), matrix(p), matrix(c), matrix(dc),
        matrix(dz), matrix(dp), 0 if shares is None else shares.data_ptr(), 0 if shares is None else shares.shape[0],
        0 if key_scale is None else key_scale.data_ptr(), tokens, rank, 2 if even else 1,
    )  # fmt: skip


def launch_reduce(shares: Tensor, out: Tensor) -> None:
    """``out = shares.sum(0)``, from the first to the last; ``shares [n, *out.shape]`` fp32, both contiguous."""
    submit("reduce", reduce_arguments(shares, out), out.device)


def reduce_arguments(shares: Tensor, out: Tensor) -> Sequence[Any]:
    """The arguments of ``_cuda.reduce`` but device and stream."""
    return DTYPES[out.dtype], shares.data_ptr(), out.data_ptr(), out.numel(), shares.shape[0]


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
    p = None if rule == "self_key" or p is None else unit_rows(p)
    scale_rows = None if key_scale is None else key_scale.contiguous()
    launch_rule(False, unit_rows(z), p, c, None, None, None, None, scale_rows, rule, num_ranks, float(scale))
    return c


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
    width = get_rule(rule).term_widths(rank, num_ranks)[1]
    if shares is not None and (width > MAX_SHARED_WIDTH or rule == "self_key"):
        summed = sum_shares(shares, torch.empty(tokens, rank, **new))
        return rule_backward(summed, None, z, p, key_scale, rule, num_ranks, scale, need_z, need_p)
    assert p is not None and (dc is None) != (shares is None)
    dz = torch.empty(tokens, rank, **new) if need_z else None
    dp = torch.empty(tokens, p.shape[1], **new) if need_p else None
    if z.numel() == 0:
        return dz, None if dp is None else dp.zero_()
    launch_rule(
        True, unit_rows(z), unit_rows(p), None, None if dc is None else unit_rows(dc), dz, dp, shares,
        None if key_scale is None else key_scale.contiguous(), rule, num_ranks, float(scale),
    )  # fmt: skip
    return dz, dp


def sum_shares(shares: Tensor, out: Tensor) -> Tensor:
    """``out``, filled with ``shares.sum(0)``."""
    launch_reduce(shares, out)
    return out
