"""Two products: ``dc = dy @ w_b_upᵀ  [T, R]`` and ``d w_b_up = cᵀ @ dy  [R, N]`` from one reading of ``dy [T, N]``.

Program (i, s) owns BN columns of dy and a range of tokens. It keeps its block of ``w_b_up`` and the accumulator of
``d w_b_up [R, BN]`` on chip, streams its tokens through in tiles of BT, and writes for each tile its share of dc (a sum over
its BN columns only) to an fp32 workspace; its share of ``d w_b_up`` (a sum over its tokens only) once at the end. A second
kernel adds the shares in a fixed order: no float atomics, two runs are bitwise equal.

What one reading saves, in bytes (e the item size, n = N/BN column blocks, s ranges of tokens; a share is written and read):

    one pass     T·N·e + 2·4·R·(n·T + s·N)               two GEMMs     2·T·N·e

The shares of dc alone are 8·R·T·N/BN bytes, so one pass can only pay for R < BN·e/8 = BN/4 (16 bits). BN is bounded by the
accumulator: ``R·BN`` fp32 numbers must fit the registers of 8 warps beside the rest (R·BN ≤ 32768), hence R² < 8192:
**one pass up to R = 64 (BN = 512), the vendor's two GEMMs above**. :func:`pair_bytes` is this arithmetic;
:func:`dc_and_value_grad` follows it. A single product reads dy once either way, so it goes to the vendor's GEMM unless asked
otherwise. All of this counts bytes; ``npt bench check`` times both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .aot import AotSpec
from .numerics import INTERPRET, device_guard, dot, dot_precision, multiprocessor_count, next_power_of_2, rounded

__all__ = ["aot_specs", "dc_and_value_grad", "low_rank_grad", "pair_bytes", "reduce_partials", "tunables"]

Method = Literal["auto", "fused", "vendor"]

#: fp32 numbers of the ``d w_b_up`` accumulator that a program of 8 warps holds in registers (128 a thread).
MAX_ACCUMULATOR = 32768


@triton.jit(do_not_specialize=["T", "per_t"])
def value_grads_kernel(
    dy_ptr, b_ptr, c_ptr, dc_ptr, db_ptr, T, N, R, per_t, stride_dy, stride_br, stride_bn, stride_ct, stride_cr,
    db_stride_r, db_stride_n, NEED_DC: tl.constexpr, NEED_DB: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Shares ``dc [n, T, R]`` and ``dB [s, R, N]`` (either may be the output itself when n or s is 1)."""
    block, part = tl.program_id(0), tl.program_id(1)
    column = block * BN + tl.arange(0, BN)
    rank = tl.arange(0, BR)
    local = tl.arange(0, BT)
    in_rank, in_column = rank < R, column < N
    dy_offset = local[:, None] * stride_dy + column[None, :]  # [BT, BN]
    c_offset = local[:, None] * stride_ct + rank[None, :] * stride_cr  # [BT, BR]
    if NEED_DC:
        b_offset = rank[:, None] * stride_br + column[None, :] * stride_bn
        b = tl.load(b_ptr + b_offset, mask=in_rank[:, None] & in_column[None, :], other=0.0)  # [BR, BN]
    db = tl.zeros((BR, BN), dtype=tl.float32)
    start = part * per_t
    for step in tl.range(0, tl.minimum(per_t, T - start), BT):
        far = start.to(tl.int64) + step  # 64 bits: T × N passes 2^31 elements
        inside = local < T - far
        dy = tl.load(dy_ptr + far * stride_dy + dy_offset, mask=inside[:, None] & in_column[None, :], other=0.0)
        if NEED_DB:
            c = tl.load(c_ptr + far * stride_ct + c_offset, mask=inside[:, None] & in_rank[None, :], other=0.0)
            db = dot(tl.trans(c), dy, db, PRECISION, INTERPRETED)
        if NEED_DC:
            # As dcᵀ = w_b_up dyᵀ both operands come from shared memory: no registers beside the small result.
            dc = dot(b, tl.trans(dy), tl.zeros((BR, BT), dtype=tl.float32), PRECISION, INTERPRETED)
            place = dc_ptr + (block.to(tl.int64) * T + far) * R + (local[None, :] * R + rank[:, None])
            tl.store(place, rounded(dc, dc_ptr.dtype.element_ty, INTERPRETED), mask=in_rank[:, None] & inside[None, :])
    if NEED_DB:
        place = db_ptr + part.to(tl.int64) * R * N + rank[:, None] * db_stride_r + column[None, :] * db_stride_n
        tl.store(place, rounded(db, db_ptr.dtype.element_ty, INTERPRETED), mask=in_rank[:, None] & in_column[None, :])


@triton.jit(do_not_specialize=["size", "parts"])
def reduce_kernel(source_ptr, out_ptr, size, parts, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """``out[i] = Σ_s source[s, i]``, s from first to last, fp32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    far = place
    for _ in range(parts):
        total += tl.load(source_ptr + far, mask=mask, other=0.0)
        far += size
    tl.store(out_ptr + place, rounded(total, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


def reduce_partials(partials: Tensor, out: Tensor) -> Tensor:
    """``out = partials.sum(0)`` in a fixed order; ``partials [s, *out.shape]`` fp32, both contiguous."""
    size = out.numel()
    block = 1024 if size >= 2**18 else 256
    with device_guard(out):
        reduce_kernel[(triton.cdiv(size, block),)](
            partials, out, size, partials.shape[0], BLOCK=block, INTERPRETED=INTERPRET, num_warps=4
        )
    return out


def pair_bytes(tokens: int, width: int, rank: int, itemsize: int, block: int, parts: int) -> tuple[int, int]:
    """DRAM bytes of (one pass, two GEMMs) as in the module's docstring; a sum that needs no second pass costs no shares."""
    blocks = triton.cdiv(width, block)
    shares = (blocks * tokens if blocks > 1 else 0) + (parts * width if parts > 1 else 0)
    return tokens * width * itemsize + 2 * 4 * rank * shares, 2 * tokens * width * itemsize


@lru_cache(maxsize=1024)
def _config(name: str, dtype: str, bucket: int, rank: int) -> dict[str, Any]:
    return dict(tables.lookup("value_grads", name, dtype=dtype, tokens=bucket, rank=rank))


def _tile(dy: Tensor, rank: int) -> dict[str, Any]:
    """BT, BN, num_warps, num_stages for these tensors."""
    if dy.device.type == "cpu":
        return {"BT": 16, "BN": 32, "num_warps": 4, "num_stages": 2, "BR": 16}
    bucket = min(next_power_of_2(dy.shape[0]), 8192)
    config = _config(tables.device_name(dy.device), str(dy.dtype).removeprefix("torch."), bucket, next_power_of_2(rank))
    return {key: config[key] for key in ("BT", "BN", "num_warps", "num_stages")} | {"BR": config.get("BR", 16)}


def _padded(rank: int, tile: dict[str, Any]) -> int:
    """Rows of the rank dimension: a power of two, at least the tile's BR (64 lets a small rank use ``wgmma``)."""
    return max(16, tile.get("BR", 16), next_power_of_2(rank))


def _parts(tokens: int, blocks: int, tile_rows: int, multiprocessors: int) -> int:
    """Ranges of tokens: as many as fill the multiprocessors once, each with at least 4 tiles to pipeline."""
    return max(1, min(multiprocessors // blocks, triton.cdiv(tokens, 4 * tile_rows)))


def dc_and_value_grad(
    dy: Tensor,
    w_b_up: Tensor | None,
    c: Tensor | None,
    need_dc: bool = True,
    need_db: bool = True,
    *,
    method: Method = "auto",
    config: dict[str, Any] | None = None,
    parts: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dc, dB)`` with ``dc = dy @ w_b_upᵀ  [T, R]`` and ``dB = cᵀ @ dy  [R, N]``; what is not needed is ``None``.

    Args:
        dy: ``[T, N]``.
        w_b_up: ``[R, N]``, any strides; only read for dc.
        c: ``[T, R]``, any strides; only read for dB.
        method: ``"fused"`` one pass, ``"vendor"`` one GEMM each, ``"auto"`` by :func:`pair_bytes`.
        config, parts: Tile and number of token ranges instead of the tuned ones (tuning and tests).
    """
    if not (need_dc or need_db):
        return None, None
    tokens, width = dy.shape
    rank = w_b_up.shape[0] if need_dc and w_b_up is not None else c.shape[1]  # type: ignore[union-attr]
    tile = config or _tile(dy, rank)
    br = _padded(rank, tile)
    blocks = triton.cdiv(width, tile["BN"])
    if parts is None:
        parts = _parts(tokens, blocks, tile["BT"], multiprocessor_count(dy.device))
    if method == "auto":
        one, two = pair_bytes(tokens, width, rank, dy.element_size(), tile["BN"], parts)
        method = "fused" if need_dc and need_db and one < two and br * tile["BN"] <= MAX_ACCUMULATOR else "vendor"
    if method == "vendor" or dy.numel() == 0 or rank == 0:
        dc = dy @ w_b_up.t() if need_dc and w_b_up is not None else None
        return dc, c.t() @ dy if need_db and c is not None else None
    return _fused(dy, w_b_up, c, need_dc, need_db, rank, tile, parts, transposed=False)


def low_rank_grad(
    c: Tensor, dy: Tensor, *, method: Method = "auto", transposed: bool = False, config: dict[str, Any] | None = None
) -> Tensor:
    """``cᵀ @ dy  [R, N]`` alone: ``d w_a_up = low_rank_grad(dp, u)``, ``d w_down = low_rank_grad(dz, a, transposed=True)``.

    Args:
        transposed: Return ``dyᵀ @ c  [N, R]`` instead, contiguous.
    """
    if method != "fused" or dy.numel() == 0 or c.shape[1] == 0:
        return dy.t() @ c if transposed else c.t() @ dy
    tile = config or _tile(dy, c.shape[1])
    parts = _parts(dy.shape[0], triton.cdiv(dy.shape[1], tile["BN"]), tile["BT"], multiprocessor_count(dy.device))
    grad = _fused(dy, None, c, False, True, c.shape[1], tile, parts, transposed)[1]
    assert grad is not None
    return grad


def _fused(
    dy: Tensor,
    w_b_up: Tensor | None,
    c: Tensor | None,
    need_dc: bool,
    need_db: bool,
    rank: int,
    tile: dict[str, Any],
    parts: int,
    transposed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    tokens, width = dy.shape
    if dy.stride(1) != 1 or dy.stride(0) >= 2**24:  # offsets within a tile are 32-bit
        dy = dy.contiguous()
    bt, bn, br = tile["BT"], tile["BN"], _padded(rank, tile)
    blocks = triton.cdiv(width, bn)
    per_t = triton.cdiv(triton.cdiv(tokens, bt), parts) * bt
    parts = triton.cdiv(tokens, per_t)  # no range without tokens, or its share would be undefined
    dc = torch.empty(tokens, rank, dtype=dy.dtype, device=dy.device) if need_dc else None
    db_shape = (width, rank) if transposed else (rank, width)
    db = torch.empty(db_shape, dtype=dy.dtype, device=dy.device) if need_db else None
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": dy.device}
    dc_parts = torch.empty(blocks, tokens, rank, **fp32) if need_dc and blocks > 1 else dc
    db_parts = torch.empty(parts, *db_shape, **fp32) if need_db and parts > 1 else db
    b_strides = w_b_up.stride() if need_dc and w_b_up is not None else (0, 0)
    c_strides = c.stride() if need_db and c is not None else (0, 0)
    with device_guard(dy):
        value_grads_kernel[(blocks, parts)](
            dy, w_b_up if need_dc else dy, c if need_db else dy,
            dy if dc_parts is None else dc_parts, dy if db_parts is None else db_parts,
            tokens, width, rank, per_t, dy.stride(0), *b_strides, *c_strides, *((1, rank) if transposed else (width, 1)),
            NEED_DC=need_dc, NEED_DB=need_db, PRECISION=dot_precision(dy.dtype), BT=bt, BN=bn, BR=br, INTERPRETED=INTERPRET,
            num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        )  # fmt: skip
    if dc is not None and dc_parts is not None and dc_parts is not dc:
        reduce_partials(dc_parts, dc)
    if db is not None and db_parts is not None and db_parts is not db:
        reduce_partials(db_parts, db)
    return dc, db


def aot_specs(dtype: str = "bf16", device_name: str = "") -> list[AotSpec]:
    """The pair at the tiles of a GPU's table (``""``: the default one), a single product, and the second pass."""
    long_name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    pointers = ("dy_ptr", "b_ptr", "c_ptr")
    strides = ("stride_dy", "stride_br", "stride_bn", "stride_ct", "stride_cr", "db_stride_r", "db_stride_n")
    numbers = ("T", "N", "R", "per_t", *strides)
    signature = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(("dc_ptr", "db_ptr"), "*fp32")
    signature |= dict.fromkeys(numbers, "i32")
    specs = []
    for rank, need_dc in ((16, True), (64, True), (64, False)):
        tile = tables.lookup("value_grads", device_name, dtype=long_name, tokens=8192, rank=rank)
        constants = {
            "NEED_DC": need_dc, "NEED_DB": True, "PRECISION": "ieee",
            "BT": tile["BT"], "BN": tile["BN"], "BR": _padded(rank, tile),
            "INTERPRETED": False,
        }  # fmt: skip
        specs.append(
            AotSpec(
                f"value_grads {'pair' if need_dc else 'grad'} R={rank}", value_grads_kernel, signature, constants,
                num_warps=tile["num_warps"], num_stages=tile["num_stages"],
                divisible_by_16=(
                    *pointers, "dc_ptr", "db_ptr", "N", "R", "stride_dy", "stride_br", "stride_ct", "db_stride_r",
                ),
                equal_to_1=("stride_bn", "stride_cr", "db_stride_n"), tensor_core=dtype != "fp32",
                wgmma=_padded(rank, tile) >= 64 and dtype != "fp32",
            )
        )  # fmt: skip
    specs.append(
        AotSpec(
            "reduce partials", reduce_kernel,
            {"source_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i32", "parts": "i32"},
            {"BLOCK": 1024, "INTERPRETED": False}, divisible_by_16=("source_ptr", "out_ptr"), tensor_core=False,
        )
    )  # fmt: skip
    return specs


def tunables() -> dict[str, Any]:
    """For ``tuning.tune``: shapes, candidate tiles and how to run one of them."""

    def prepare(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
        tokens, width, rank = shape["tokens"], shape["n"], shape["rank"]
        dy = torch.randn(tokens, width, dtype=dtype, device=device)
        b = torch.randn(rank, width, dtype=dtype, device=device) / width**0.5
        c = torch.randn(tokens, rank, dtype=dtype, device=device)
        return lambda config: dc_and_value_grad(dy, b, c, method="fused", config=config)

    shapes = [{"tokens": t, "n": 14336, "rank": r} for t in (2048, 8192) for r in (16, 64)]
    candidates = [
        {"BT": bt, "BN": bn, "num_warps": warps, "num_stages": stages}
        for bt in (16, 32, 64) for bn, warps in ((128, 4), (256, 4), (256, 8), (512, 8)) for stages in (2, 3, 4)
    ]  # fmt: skip
    return {"value_grads": {"shapes": shapes, "keys": ("tokens", "rank"), "candidates": candidates, "prepare": prepare}}
