"""Coefficients of a rule in one kernel: reads ``a`` and ``u`` once, writes ``z = a @ w_down``, ``p = u @ w_a_upᵀ`` and ``c``.

How far one kernel pays. Per token it reads ``(d_a + d_u)·e`` bytes (e the item size) and does ``2·(d_a + d_u)·R`` flops, that
is R flops per byte at e = 2. The chip balances 788 TFLOP/s against 4.3 TB/s = 183 flops per byte (an H200's ceilings), so up to
R = 128 the products hide behind the reads and one pass is all there is to gain; from R = 256 on they are ordinary GEMMs, and two
fp32 accumulators ``[64, R]`` would not fit a program's registers either. There ``z`` and ``p`` come from the vendor's GEMM and
``rules.rule_forward`` makes ``c``.

Few tokens give few tiles, so K is then split over programs: fp32 partial products go to a workspace and a second kernel adds
them in a fixed order and applies the rule. No atomics: two runs are bitwise equal.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...rules import get_rule
from . import tables
from .aot import AotSpec
from .numerics import INTERPRET, device_guard, dot, dot_precision, multiprocessor_count, next_power_of_2, rounded
from .rules import apply_rule, merge_dz, rule_backward, rule_forward
from .support import RULE_IDS

__all__ = ["aot_specs", "coefficients_forward", "merge_dz", "rule_backward", "rule_forward", "tunables"]

ANCHORED, SELF_KEY = tl.constexpr(2), tl.constexpr(3)

#: Largest R that the fused kernel takes; see above.
MAX_FUSED_RANK = 128


@triton.jit
def finish_tile(
    z, p, first, local, column, T, R, key_scale_ptr, z_ptr, p_ptr, c_ptr, scale,
    RULE: tl.constexpr, NUM_RANKS: tl.constexpr, WIDTH: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
    WRITE_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store z and p of a tile, apply the rule to the unrounded values, store c. Outputs are contiguous."""
    inside = local < T - first
    mask = inside[:, None] & (column < R)[None, :]
    origin = first * R  # 64-bit scalar; offsets within the tile are 32-bit
    place = local[:, None] * R + column[None, :]
    tl.store(z_ptr + origin + place, rounded(z, z_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    if RULE == ANCHORED:
        tl.store(p_ptr + first + local, rounded(p, p_ptr.dtype.element_ty, INTERPRETED), mask=inside)
        key_product = p[:, None]
    elif RULE == SELF_KEY:
        key_product = z
    else:
        tl.store(p_ptr + origin + place, rounded(p, p_ptr.dtype.element_ty, INTERPRETED), mask=mask)
        key_product = p
    if WRITE_C:
        if HAS_KEY_SCALE:
            z = z * tl.load(key_scale_ptr + first + local, mask=inside, other=0.0).to(tl.float32)[:, None]
        c = apply_rule(z, key_product, column, scale, RULE, NUM_RANKS, WIDTH)
        tl.store(c_ptr + origin + place, rounded(c, c_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["T", "per_a", "per_u"])
def coefficients_kernel(
    a_ptr, u_ptr, w_down_ptr, w_a_up_ptr, key_scale_ptr, z_ptr, p_ptr, c_ptr, workspace_ptr,
    T, D_A, D_U, R, per_a, per_u, stride_a, stride_u, stride_dk, stride_dr, stride_kr, stride_kk, scale,
    RULE: tl.constexpr, NUM_RANKS: tl.constexpr, WIDTH: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
    WRITE_C: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (i, s): rows i·BM …, columns s·per … (s + 1)·per of a and u. SPLIT: partial sums instead of the rule."""
    first = tl.program_id(0).to(tl.int64) * BM  # 64 bits: T × d passes 2^31 elements; offsets within a tile are 32-bit
    local = tl.arange(0, BM)
    column = tl.arange(0, BR)
    inner = tl.arange(0, BK)
    inside = (local < T - first)[:, None]
    in_rank = (column < R)[None, :]
    part = tl.program_id(1)

    a_base = a_ptr + first * stride_a
    a_offset = local[:, None] * stride_a + inner[None, :]  # [BM, BK]
    w_offset = inner[:, None] * stride_dk + column[None, :] * stride_dr  # [BK, BR]
    z = tl.zeros((BM, BR), dtype=tl.float32)
    start = part * per_a
    for k0 in tl.range(start, tl.minimum(start + per_a, D_A), BK):
        left = D_A - k0
        a = tl.load(a_base + k0 + a_offset, mask=inside & (inner < left)[None, :], other=0.0)
        w = tl.load(w_down_ptr + k0 * stride_dk + w_offset, mask=(inner < left)[:, None] & in_rank, other=0.0)
        z = dot(a, w, z, PRECISION, INTERPRETED)

    p = z
    start = part * per_u
    u_base = u_ptr + first * stride_u
    u_offset = local[:, None] * stride_u + inner[None, :]  # [BM, BK]
    if RULE == ANCHORED:
        wide = tl.zeros((BM, BK), dtype=tl.float32)  # summed across threads once, after the loop
        for k0 in tl.range(start, tl.minimum(start + per_u, D_U), BK):
            left = D_U - k0
            u = tl.load(u_base + k0 + u_offset, mask=inside & (inner < left)[None, :], other=0.0)
            w_row = tl.load(w_a_up_ptr + (k0 + inner) * stride_kk, mask=inner < left, other=0.0)
            wide += u.to(tl.float32) * w_row.to(tl.float32)[None, :]
        p = tl.sum(wide, 1)
    elif RULE != SELF_KEY:
        p = tl.zeros((BM, BR), dtype=tl.float32)
        w_offset = inner[:, None] * stride_kk + column[None, :] * stride_kr  # [BK, BR]
        for k0 in tl.range(start, tl.minimum(start + per_u, D_U), BK):
            left = D_U - k0
            u = tl.load(u_base + k0 + u_offset, mask=inside & (inner < left)[None, :], other=0.0)
            w = tl.load(w_a_up_ptr + k0 * stride_kk + w_offset, mask=(inner < left)[:, None] & in_rank, other=0.0)
            p = dot(u, w, p, PRECISION, INTERPRETED)

    if SPLIT:  # workspace [splits, T, R | P] fp32
        if RULE == SELF_KEY:
            pitch = R
        elif RULE == ANCHORED:
            pitch = R + 1
        else:
            pitch = 2 * R
        origin = workspace_ptr + (part * T + first) * pitch
        line = local * pitch
        mask = inside & in_rank
        tl.store(origin + line[:, None] + column[None, :], z, mask=mask)
        if RULE == ANCHORED:
            tl.store(origin + line + R, p, mask=local < T - first)
        elif RULE != SELF_KEY:
            tl.store(origin + line[:, None] + (R + column)[None, :], p, mask=mask)
    else:
        finish_tile(
            z, p, first, local, column, T, R, key_scale_ptr, z_ptr, p_ptr, c_ptr, scale,
            RULE, NUM_RANKS, WIDTH, HAS_KEY_SCALE, WRITE_C, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "splits"])
def coefficients_reduce_kernel(
    workspace_ptr, key_scale_ptr, z_ptr, p_ptr, c_ptr, T, R, splits, scale,
    RULE: tl.constexpr, NUM_RANKS: tl.constexpr, WIDTH: tl.constexpr, HAS_KEY_SCALE: tl.constexpr, WRITE_C: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Second pass of a split: partial sums added from the first to the last, then the rule."""
    first = tl.program_id(0).to(tl.int64) * BM
    local = tl.arange(0, BM)
    column = tl.arange(0, BR)
    mask = (local < T - first)[:, None] & (column < R)[None, :]
    if RULE == SELF_KEY:
        pitch = R
    elif RULE == ANCHORED:
        pitch = R + 1
    else:
        pitch = 2 * R
    z = tl.zeros((BM, BR), dtype=tl.float32)
    p = z
    if RULE == ANCHORED:
        p = tl.zeros((BM,), dtype=tl.float32)
    for part in range(splits):
        origin = workspace_ptr + (part * T + first) * pitch
        line = local * pitch
        z += tl.load(origin + line[:, None] + column[None, :], mask=mask, other=0.0)
        if RULE == ANCHORED:
            p += tl.load(origin + line + R, mask=local < T - first, other=0.0)
        elif RULE != SELF_KEY:
            p += tl.load(origin + line[:, None] + (R + column)[None, :], mask=mask, other=0.0)
    finish_tile(
        z, p, first, local, column, T, R, key_scale_ptr, z_ptr, p_ptr, c_ptr, scale,
        RULE, NUM_RANKS, WIDTH, HAS_KEY_SCALE, WRITE_C, INTERPRETED,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _config(name: str, dtype: str, bucket: int, rank: int) -> dict[str, Any]:
    return dict(tables.lookup("coefficients", name, dtype=dtype, tokens=bucket, rank=rank))


def _tile(a: Tensor, total_rank: int) -> dict[str, Any]:
    """BM, BK, num_warps, num_stages for these tensors; T enters as a power of two, so that a new T compiles nothing new."""
    if a.device.type == "cpu":
        return {"BM": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
    bucket = min(next_power_of_2(a.shape[0]), 8192)
    name = tables.device_name(a.device)
    config = _config(name, str(a.dtype).removeprefix("torch."), bucket, total_rank)
    return {key: config[key] for key in ("BM", "BK", "num_warps", "num_stages")}


def _last_contiguous(t: Tensor) -> Tensor:
    """Unit stride along the columns, and rows near enough for 32-bit offsets within a tile; else a copy."""
    return t if t.stride(1) == 1 and t.stride(0) < 2**24 else t.contiguous()


def coefficients_forward(
    u: Tensor | None,
    a: Tensor,
    w_down: Tensor,
    w_a_up: Tensor | None,
    key_scale: Tensor | None,
    rule: str,
    num_ranks: int = 1,
    scale: float = 1.0,
    *,
    config: dict[str, Any] | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(z [T, R], p, c [T, R])`` from ``a [T, d_a]`` and the target's input ``u [T, d_u]``.

    Args:
        u: Not read (may be ``None``) for ``self_key``.
        w_down: ``[d_a, R]``, any strides.
        w_a_up: ``[R, d_u]``, ``[d_u]`` (anchored) or ``None`` (self_key); any strides.
        key_scale: ``[T]`` or ``None``: multiplies z inside the rule. The returned z is *not* multiplied.
        config, splits: Tile and number of programs along K instead of the tuned ones (tuning and tests).

    Returns:
        ``z``; ``p`` ``[T, R]``, ``[T, 1]`` or empty without key; ``c`` (z itself for self_key without key scale: read-only).
    """
    tokens, d_a = a.shape
    total_rank = w_down.shape[1]
    key = get_rule(rule).key
    assert (u is None or w_a_up is None) == (key == "none")
    if total_rank > MAX_FUSED_RANK and config is None:
        z = a @ w_down
        p = z.new_empty(0)
        if u is not None and w_a_up is not None:
            p = F.linear(u, w_a_up if key == "matrix" else w_a_up.unsqueeze(0))
        return z, p, rule_forward(z, p, key_scale, rule, num_ranks, scale)

    z = torch.empty(tokens, total_rank, dtype=a.dtype, device=a.device)
    p_shape = {"none": (0,), "vector": (tokens, 1), "matrix": (tokens, total_rank)}[key]
    p = torch.empty(p_shape, dtype=a.dtype, device=a.device)
    write_c = key != "none" or key_scale is not None
    c = torch.empty_like(z) if write_c else z
    if tokens == 0 or total_rank == 0:
        return z, p, c
    a = _last_contiguous(a)
    if u is None or w_a_up is None:
        u, w_a_up, d_u = a, w_down, 0
    else:
        u, d_u = _last_contiguous(u), u.shape[1]
    stride_kr, stride_kk = w_a_up.stride() if w_a_up.dim() == 2 else (0, w_a_up.stride(0))
    tile = config or _tile(a, total_rank)
    bm, bk, br = tile["BM"], tile["BK"], max(16, next_power_of_2(total_rank))
    tiles = triton.cdiv(tokens, bm)
    steps = triton.cdiv(max(d_a, d_u), bk)
    if splits is None:
        splits = _splits(tiles, steps, multiprocessor_count(a.device))
    per_a, per_u = triton.cdiv(triton.cdiv(d_a, bk), splits) * bk, triton.cdiv(triton.cdiv(d_u, bk), splits) * bk
    workspace = z
    if splits > 1:
        pitch = total_rank + {"none": 0, "vector": 1, "matrix": total_rank}[key]
        workspace = torch.empty(splits, tokens, pitch, dtype=torch.float32, device=a.device)
    scale_tensor = z if key_scale is None else key_scale.contiguous()
    terms, width = get_rule(rule).term_widths(total_rank, num_ranks)
    constants = {
        "RULE": RULE_IDS[rule],
        "NUM_RANKS": terms,
        "WIDTH": width,
        "HAS_KEY_SCALE": key_scale is not None,
        "WRITE_C": write_c,
        "INTERPRETED": INTERPRET,
    }
    with device_guard(a):
        coefficients_kernel[(tiles, splits)](
            a, u, w_down, w_a_up, scale_tensor, z, p, c, workspace,
            tokens, d_a, d_u, total_rank, per_a, per_u, a.stride(0), u.stride(0), *w_down.stride(), stride_kr, stride_kk,
            float(scale), **constants, SPLIT=splits > 1, PRECISION=dot_precision(a.dtype), BM=bm, BK=bk, BR=br,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        )  # fmt: skip
        if splits > 1:
            rows = max(1, 1024 // br)
            coefficients_reduce_kernel[(triton.cdiv(tokens, rows),)](
                workspace, scale_tensor, z, p, c, tokens, total_rank, splits, float(scale), **constants, BM=rows, BR=br,
                num_warps=4,
            )  # fmt: skip
    return z, p, c


def _splits(tiles: int, steps: int, multiprocessors: int) -> int:
    """Programs along K: enough that all multiprocessors read, each with at least 4 steps to pipeline; 1 if tiles suffice."""
    if 2 * tiles > multiprocessors:
        return 1
    return max(1, min(multiprocessors // tiles, steps // 4))


def aot_specs(dtype: str = "bf16", device_name: str = "") -> list[AotSpec]:
    """The fused kernel at the tiles of a GPU's table (``""``: the default one), and its second pass."""
    specs = []
    pointers = ("a_ptr", "u_ptr", "w_down_ptr", "w_a_up_ptr", "key_scale_ptr", "z_ptr", "p_ptr", "c_ptr")
    sizes = (
        "T",
        "D_A",
        "D_U",
        "R",
        "per_a",
        "per_u",
        "stride_a",
        "stride_u",
        "stride_dk",
        "stride_dr",
        "stride_kr",
        "stride_kk",
    )
    signature = dict.fromkeys(pointers, f"*{dtype}") | {"workspace_ptr": "*fp32"} | dict.fromkeys(sizes, "i32")
    signature["scale"] = "fp32"
    long_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    divisible = (*pointers, "workspace_ptr", "D_A", "D_U", "R", "stride_a", "stride_u", "stride_dk", "stride_kr")
    for rule, rank, terms, tokens in (
        ("rank1", 64, 1, 8192), ("rank1", 128, 1, 8192), ("rank1", 96, 3, 8192), ("diagonal", 64, 1, 8192),
        ("anchored", 64, 1, 8192), ("self_key", 128, 1, 8192), ("rank1", 64, 1, 16),
    ):  # fmt: skip
        tile = tables.lookup("coefficients", device_name, dtype=long_name, tokens=tokens, rank=rank)
        br = max(16, next_power_of_2(rank))
        shared = {
            "RULE": RULE_IDS[rule], "NUM_RANKS": terms, "WIDTH": rank // terms, "HAS_KEY_SCALE": True, "WRITE_C": True,
            "INTERPRETED": False,
        }  # fmt: skip
        split = tokens < 1024
        name = f"coefficients {rule} R={rank} k={terms}" + (" split" if split else "")
        specs.append(
            AotSpec(
                name, coefficients_kernel, signature,
                shared | {"SPLIT": split, "PRECISION": "ieee", "BM": tile["BM"], "BK": tile["BK"], "BR": br},
                num_warps=tile["num_warps"], num_stages=tile["num_stages"], divisible_by_16=divisible,
                equal_to_1=("stride_dr", "stride_kk"), wgmma=tile["BM"] >= 64 and dtype != "fp32", tensor_core=dtype != "fp32",
            )
        )  # fmt: skip
        if split:
            outputs = ("key_scale_ptr", "z_ptr", "p_ptr", "c_ptr")
            specs.append(
                AotSpec(
                    f"coefficients_reduce {rule} R={rank}", coefficients_reduce_kernel,
                    {"workspace_ptr": "*fp32"} | dict.fromkeys(outputs, f"*{dtype}")
                    | dict.fromkeys(("T", "R", "splits"), "i32") | {"scale": "fp32"},
                    shared | {"BM": max(1, 1024 // br), "BR": br}, divisible_by_16=("workspace_ptr", *outputs, "R"),
                    tensor_core=False,
                )
            )  # fmt: skip
    return specs


def tunables() -> dict[str, Any]:
    """For ``tuning.tune``: shapes, candidate tiles and how to run one of them."""

    def prepare(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
        tokens, d, rank = shape["tokens"], shape["d"], shape["rank"]
        u, a = (torch.randn(tokens, d, dtype=dtype, device=device) for _ in range(2))
        w_down = torch.randn(d, rank, dtype=dtype, device=device) / d**0.5
        w_a_up = torch.randn(rank, d, dtype=dtype, device=device) / d**0.5
        return lambda config: coefficients_forward(u, a, w_down, w_a_up, None, "rank1", config=config)

    shapes = [{"tokens": t, "d": 4096, "rank": r} for t in (16, 512, 2048, 8192) for r in (16, 64, 128)]
    candidates = [
        {"BM": bm, "BK": bk, "num_warps": warps, "num_stages": stages}
        for bm in (16, 32, 64, 128) for bk in (64, 128) for warps in (4, 8) for stages in (3, 4, 5)
    ]  # fmt: skip
    return {
        "coefficients": {"shapes": shapes, "keys": ("tokens", "rank"), "candidates": candidates, "prepare": prepare}
    }
