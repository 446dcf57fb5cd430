"""The rules in Triton: ``c`` from ``(z, p)``, the rule's tiny gradient, and the sum of dz over targets.

    rank1     c_j = z_j s_j, s_j = ⟨z_j, p_j⟩      dz_j = s_j dc_j + ⟨dc_j, z_j⟩ p_j          dp_j = ⟨dc_j, z_j⟩ z_j
    diagonal  c = m ⊙ p, m = scale·tanh z          dz = scale·(1 − tanh² z) ⊙ dc ⊙ p          dp = m ⊙ dc
    anchored  c = z p                              dz = dc p                                  dp = ⟨dc, z⟩
    self_key  c = z                                dz = dc                                    –

``z`` stands for z̃ = key_scale ⊙ z wherever a key scale is given. All are memory bound on ``[T, R]`` tensors; sums are fp32.
Used alone where R is too large for one tile of ``coefficients.py``, and by every backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rules import get_rule
from .aot import AotSpec
from .numerics import INTERPRET, device_guard, next_power_of_2, rounded, tanh
from .support import RULE_IDS

__all__ = ["aot_specs", "apply_rule", "merge_dz", "rule_backward", "rule_forward"]

#: ``support.RULE_IDS`` inside kernels.
RANK1, DIAGONAL, ANCHORED, SELF_KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

#: Widest block of one rank-1 term that a program holds in registers; wider ones take the plain torch rule.
MAX_WIDTH = 16384


@triton.jit
def apply_rule(z, p, column, scale, RULE: tl.constexpr, NUM_RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """``c [BM, BR]`` of a tile that holds all R columns; ``z`` (scaled) and ``p`` fp32, ``p [BM, 1]`` for a vector key.

    ``column [BR]`` numbers the columns; term j owns columns j·WIDTH … (j+1)·WIDTH − 1. Columns ≥ R hold zeros.
    """
    if RULE == RANK1:
        product = z * p
        if NUM_RANKS == 1:
            c = z * tl.sum(product, 1)[:, None]
        else:
            s = tl.zeros_like(z)
            for j in range(NUM_RANKS):
                inside = ((column >= j * WIDTH) & (column < (j + 1) * WIDTH))[None, :]
                s = tl.where(inside, tl.sum(tl.where(inside, product, 0.0), 1)[:, None], s)
            c = z * s
    elif RULE == DIAGONAL:
        c = scale * tanh(z) * p
    elif RULE == ANCHORED:
        c = z * p
    else:
        c = z
    return c


@triton.jit
def _tile(T, term, WIDTH: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (64-bit), columns of one term, and the mask of a tile."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    offset = tl.arange(0, BLOCK)
    mask = (row < T)[:, None] & (offset < WIDTH)[None, :]
    return row, term * WIDTH + offset, mask


@triton.jit(do_not_specialize=["T"])
def rule_forward_kernel(
    z_ptr, p_ptr, key_scale_ptr, c_ptr, T, stride_z, stride_p, stride_c, scale,
    RULE: tl.constexpr, WIDTH: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``c [T, R]``; program (i, j) does rows i·BM … of term j (rules other than rank1 have one term)."""
    row, column, mask = _tile(T, tl.program_id(1), WIDTH, BM, BLOCK)
    z = tl.load(z_ptr + row[:, None] * stride_z + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_KEY_SCALE:
        z = z * tl.load(key_scale_ptr + row, mask=row < T, other=0.0).to(tl.float32)[:, None]
    p = z
    if RULE == ANCHORED:
        p = tl.load(p_ptr + row * stride_p, mask=row < T, other=0.0).to(tl.float32)[:, None]
    elif RULE != SELF_KEY:
        p = tl.load(p_ptr + row[:, None] * stride_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
    c = apply_rule(z, p, column, scale, RULE, 1, WIDTH)
    tl.store(
        c_ptr + row[:, None] * stride_c + column[None, :], rounded(c, c_ptr.dtype.element_ty, INTERPRETED), mask=mask
    )


@triton.jit(do_not_specialize=["T"])
def rule_backward_kernel(
    dc_ptr, z_ptr, p_ptr, key_scale_ptr, dz_ptr, dp_ptr, T, stride_dc, stride_z, stride_p, stride_dz, stride_dp, scale,
    RULE: tl.constexpr, WIDTH: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, NEED_Z: tl.constexpr, NEED_P: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``dz [T, R]`` (of the scaled z) and ``dp``; tiles as in the forward."""
    row, column, mask = _tile(T, tl.program_id(1), WIDTH, BM, BLOCK)
    inside = row < T
    dc = tl.load(dc_ptr + row[:, None] * stride_dc + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row[:, None] * stride_z + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_KEY_SCALE:
        z = z * tl.load(key_scale_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if RULE == ANCHORED:
        if NEED_P:
            dp = rounded(tl.sum(dc * z, 1), dp_ptr.dtype.element_ty, INTERPRETED)
            tl.store(dp_ptr + row * stride_dp, dp, mask=inside)
        if NEED_Z:
            dz = dc * tl.load(p_ptr + row * stride_p, mask=inside, other=0.0).to(tl.float32)[:, None]
    else:
        p = z
        if NEED_Z:
            p = tl.load(p_ptr + row[:, None] * stride_p + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if RULE == RANK1:
            ds = tl.sum(dc * z, 1)[:, None]
            dz = tl.sum(z * p, 1)[:, None] * dc + ds * p
            dp = ds * z
        else:
            m = tanh(z)
            dz = scale * (1.0 - m * m) * dc * p
            dp = scale * m * dc
        if NEED_P:
            dp_out = rounded(dp, dp_ptr.dtype.element_ty, INTERPRETED)
            tl.store(dp_ptr + row[:, None] * stride_dp + column[None, :], dp_out, mask=mask)
    if NEED_Z:
        dz_out = rounded(dz, dz_ptr.dtype.element_ty, INTERPRETED)
        tl.store(dz_ptr + row[:, None] * stride_dz + column[None, :], dz_out, mask=mask)


@triton.jit(do_not_specialize=["T"])
def merge_dz_kernel(
    first_ptr, second_ptr, down_ptr, z_ptr, key_scale_ptr, dz_ptr, dks_ptr, T, stride_z,
    WIDTH: tl.constexpr, SHARES: tl.constexpr, HAS_DOWN: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
    NEED_KEY_SCALE: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``dz = key_scale·(first + second) + down`` and ``d key_scale = Σ_R (first + second) ⊙ z``; all but z contiguous."""
    row, column, mask = _tile(T, 0, WIDTH, BM, BLOCK)
    place = row[:, None] * WIDTH + column[None, :]
    total = tl.load(first_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if SHARES == 2:
        total += tl.load(second_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if NEED_KEY_SCALE:
        z = tl.load(z_ptr + row[:, None] * stride_z + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dks = rounded(tl.sum(total * z, 1), dks_ptr.dtype.element_ty, INTERPRETED)
        tl.store(dks_ptr + row, dks, mask=row < T)
    if HAS_KEY_SCALE:
        total *= tl.load(key_scale_ptr + row, mask=row < T, other=0.0).to(tl.float32)[:, None]
    if HAS_DOWN:
        total += tl.load(down_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(dz_ptr + place, rounded(total, dz_ptr.dtype.element_ty, INTERPRETED), mask=mask)


def _blocks(width: int) -> dict[str, Any]:
    """Rows per program and warps so that a program holds about 2048 numbers of a tensor."""
    block = next_power_of_2(width)
    return {"BM": max(1, 2048 // block), "BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rule_forward(
    z: Tensor, p: Tensor | None, key_scale: Tensor | None, rule: str, num_ranks: int = 1, scale: float = 1.0
) -> Tensor:
    """``c [T, R]`` from ``z [T, R]``, ``p`` (``[T, R]``, ``[T, 1]`` or unused) and ``key_scale [T]`` or ``None``.

    For ``self_key`` without key scale the result is ``z`` itself (same storage): treat it as read-only.
    """
    if rule == "self_key" and key_scale is None:
        return z
    tokens, total_rank = z.shape
    terms, width = get_rule(rule).term_widths(total_rank, num_ranks)
    if width > MAX_WIDTH:
        return get_rule(rule).coefficients(z if key_scale is None else z * key_scale.unsqueeze(1), p, num_ranks, scale)
    c = torch.empty(tokens, total_rank, dtype=z.dtype, device=z.device)
    if c.numel() == 0:
        return c
    z = _unit_stride(z)
    p = z if rule == "self_key" or p is None else _unit_stride(p)
    blocks = _blocks(width)
    with device_guard(z):
        rule_forward_kernel[(triton.cdiv(tokens, blocks["BM"]), terms)](
            z, p, z if key_scale is None else key_scale.contiguous(), c,
            tokens, z.stride(0), p.stride(0), c.stride(0), float(scale),
            RULE=RULE_IDS[rule], WIDTH=width, HAS_KEY_SCALE=key_scale is not None, INTERPRETED=INTERPRET, **blocks,
        )  # fmt: skip
    return c


def rule_backward(
    dc: Tensor,
    z: Tensor,
    p: Tensor | None,
    key_scale: Tensor | None,
    rule: str,
    num_ranks: int = 1,
    scale: float = 1.0,
    need_z: bool = True,
    need_p: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dz, dp)`` from ``dc [T, R]``; what is not needed is ``None``.

    ``dz`` is the gradient of the *scaled* z̃ = key_scale ⊙ z: targets that share z̃ add theirs before :func:`merge_dz`
    multiplies by the key scale once. For ``self_key`` it is ``dc`` itself.
    """
    if rule == "self_key":
        return dc if need_z else None, None
    if not (need_z or need_p):
        return None, None
    assert p is not None
    tokens, total_rank = z.shape
    terms, width = get_rule(rule).term_widths(total_rank, num_ranks)
    if width > MAX_WIDTH:
        z_in = z if key_scale is None else z * key_scale.unsqueeze(1)
        return get_rule(rule).backward(dc, z_in, p, num_ranks, scale, need_z, need_p)
    dz = torch.empty(tokens, total_rank, dtype=z.dtype, device=z.device) if need_z else None
    dp = torch.empty(tokens, p.shape[1], dtype=z.dtype, device=z.device) if need_p else None
    if z.numel() == 0:
        return dz, None if dp is None else dp.zero_()
    dc, z, p = _unit_stride(dc), _unit_stride(z), _unit_stride(p)
    blocks = _blocks(width)
    with device_guard(z):
        rule_backward_kernel[(triton.cdiv(tokens, blocks["BM"]), terms)](
            dc, z, p, z if key_scale is None else key_scale.contiguous(), z if dz is None else dz, z if dp is None else dp,
            tokens, dc.stride(0), z.stride(0), p.stride(0), total_rank, p.shape[1], float(scale),
            RULE=RULE_IDS[rule], WIDTH=width, HAS_KEY_SCALE=key_scale is not None, NEED_Z=need_z, NEED_P=need_p,
            INTERPRETED=INTERPRET, **blocks,
        )  # fmt: skip
    return dz, dp


def merge_dz(
    shares: list[Tensor], dz_down: Tensor | None, z: Tensor, key_scale: Tensor | None, need_key_scale: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``(dz, d key_scale)`` of a layer: ``dz = key_scale ⊙ Σ shares + dz_down``, ``d key_scale = Σ_R (Σ shares) ⊙ z``.

    ``shares`` are the dz of the targets that read z̃ (gate, up; at most two), ``dz_down`` that of the one that reads z.
    """
    tokens, total_rank = z.shape
    assert len(shares) <= 2
    if not shares or total_rank > MAX_WIDTH or z.numel() == 0:
        total = sum(shares[1:], start=shares[0]) if shares else torch.zeros_like(z)
        d_key_scale = torch.linalg.vecdot(total, z) if need_key_scale else None
        if shares and key_scale is not None:
            total = total * key_scale.unsqueeze(1)
        return total if dz_down is None else total + dz_down, d_key_scale
    if len(shares) == 1 and key_scale is None and dz_down is None and not need_key_scale:
        return shares[0], None
    dz = torch.empty(tokens, total_rank, dtype=z.dtype, device=z.device)
    d_key_scale = torch.empty(tokens, dtype=z.dtype, device=z.device) if need_key_scale else None
    shares, z, blocks = [t.contiguous() for t in shares], _unit_stride(z), _blocks(total_rank)
    with device_guard(z):
        merge_dz_kernel[(triton.cdiv(tokens, blocks["BM"]),)](
            shares[0], shares[-1], z if dz_down is None else dz_down.contiguous(), z,
            z if key_scale is None else key_scale.contiguous(), dz, z if d_key_scale is None else d_key_scale,
            tokens, z.stride(0),
            WIDTH=total_rank, SHARES=len(shares), HAS_DOWN=dz_down is not None, HAS_KEY_SCALE=key_scale is not None,
            NEED_KEY_SCALE=need_key_scale, INTERPRETED=INTERPRET, **blocks,
        )  # fmt: skip
    return dz, d_key_scale


def aot_specs(dtype: str = "bf16", device_name: str = "") -> list[AotSpec]:
    """The kernels of this file at real widths; their tiles follow from the width, on every GPU."""
    pointer, specs = f"*{dtype}", []
    for rule, width in (("rank1", 64), ("rank1", 4096), ("diagonal", 1024), ("anchored", 128)):
        blocks = _blocks(width)
        warps = blocks.pop("num_warps")
        shared = {"RULE": RULE_IDS[rule], "WIDTH": width, "HAS_KEY_SCALE": True, "INTERPRETED": False, **blocks}
        strides: tuple[str, ...] = ("stride_z", "stride_p", "stride_c")
        specs.append(
            AotSpec(
                f"rule_forward {rule} r={width}", rule_forward_kernel,
                dict.fromkeys(("z_ptr", "p_ptr", "key_scale_ptr", "c_ptr"), pointer)
                | {"T": "i32"} | dict.fromkeys(strides, "i32") | {"scale": "fp32"},
                shared, num_warps=warps, divisible_by_16=("z_ptr", "p_ptr", "key_scale_ptr", "c_ptr", *strides),
                tensor_core=False,
            )
        )  # fmt: skip
        strides = ("stride_dc", "stride_z", "stride_p", "stride_dz", "stride_dp")
        pointers = ("dc_ptr", "z_ptr", "p_ptr", "key_scale_ptr", "dz_ptr", "dp_ptr")
        specs.append(
            AotSpec(
                f"rule_backward {rule} r={width}", rule_backward_kernel,
                dict.fromkeys(pointers, pointer) | {"T": "i32"} | dict.fromkeys(strides, "i32") | {"scale": "fp32"},
                shared | {"NEED_Z": True, "NEED_P": True}, num_warps=warps, divisible_by_16=(*pointers, *strides),
                tensor_core=False,
            )
        )  # fmt: skip
    blocks = _blocks(1024)
    warps = blocks.pop("num_warps")
    merged = ("first_ptr", "second_ptr", "down_ptr", "z_ptr", "key_scale_ptr", "dz_ptr", "dks_ptr")
    specs.append(
        AotSpec(
            "merge_dz R=1024", merge_dz_kernel, dict.fromkeys(merged, pointer) | {"T": "i32", "stride_z": "i32"},
            {"WIDTH": 1024, "SHARES": 2, "HAS_DOWN": True, "HAS_KEY_SCALE": True, "NEED_KEY_SCALE": True,
             "INTERPRETED": False, **blocks},
            num_warps=warps, divisible_by_16=(*merged, "stride_z"), tensor_core=False,
        )
    )  # fmt: skip
    return specs
