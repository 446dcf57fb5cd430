"""``matched_norm`` in Triton: one program per row, which it reads once into registers and norms in fp32, rounding once.

Memory bound: forward 3·T·d, backward (frozen norm) 5·T·d numbers at most. Longer rows than the registers
of a program hold (``MAX_WIDTH`` and its likes below) take the eager code, which says the same in more passes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eager import EagerSteps
from .aot import AotSpec
from .numerics import INTERPRET, device_guard, next_power_of_2, rounded
from .value_grads import reduce_partials

__all__ = ["aot_specs", "backward", "forward"]

_EAGER = EagerSteps()

#: Longest row that 16 warps hold in registers beside its like.
MAX_WIDTH = 16384
#: The same for the backward, which holds about three such rows (beyond, registers spill: tools/check_triton.py).
MAX_BACKWARD_WIDTH = 8192
#: The same for a backward that also sums d weight and d bias in registers over its rows.
MAX_TRAINED_WIDTH = 4096

#: Programs that share the sum over tokens of d weight and d bias: a fixed number, so that the order never depends on the GPU.
_PARTS = 256

_TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _statistics(h, a, mask, width, eps, LAYER: tl.constexpr, SUM_DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``(x, τ, s)`` (ops/matched_norm/README.md) of a row; ``h``, ``a``: fp32, values of their dtype, 0 outside ``mask``."""
    total = rounded(h + a, SUM_DTYPE, INTERPRETED).to(tl.float32)
    if LAYER:
        total = tl.where(mask, total - tl.sum(total, 0) / width, 0.0)
        h = tl.where(mask, h - tl.sum(h, 0) / width, 0.0)
    s = 1.0 / tl.sqrt(tl.sum(total * total, 0) / width + eps)
    return h, total, s


@triton.jit
def forward_kernel(
    h_ptr, a_ptr, weight_ptr, bias_ptr, u_ptr, key_scale_ptr, width, stride_h, stride_a, eps,
    LAYER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Row i: ``u[i]``, ``key_scale[i]``."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: T × d passes 2^31 elements
    column = tl.arange(0, BLOCK)
    mask = column < width
    h = tl.load(h_ptr + row * stride_h + column, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
    x, _, s = _statistics(h, a, mask, width, eps, LAYER, SUM_DTYPE, INTERPRETED)
    u = x * s
    if HAS_WEIGHT:
        u *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(u_ptr + row * width + column, rounded(u, u_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    tl.store(key_scale_ptr + row, rounded(s, key_scale_ptr.dtype.element_ty, INTERPRETED))


@triton.jit
def _gradient_of_row(
    row, column, mask, weight_ptr, du_ptr, dks_ptr, h_ptr, a_ptr, dh_ptr, da_ptr,
    width, stride_du, stride_h, stride_a, eps,
    LAYER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DU: tl.constexpr, HAS_DKS: tl.constexpr,
    NEED_H: tl.constexpr, NEED_A: tl.constexpr, SUM_DTYPE: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Stores dh and da of one row; returns its ``(du, x·s)`` for d weight and d bias, fp32."""
    h = tl.load(h_ptr + row * stride_h + column, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
    du = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_DU:
        du = tl.load(du_ptr + row * stride_du + column, mask=mask, other=0.0).to(tl.float32)
    x, total, s = _statistics(h, a, mask, width, eps, LAYER, SUM_DTYPE, INTERPRETED)
    if NEED_H or NEED_A:
        g = du
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        ds = tl.sum(g * x, 0)
        if HAS_DKS:
            ds += tl.load(dks_ptr + row).to(tl.float32)
        dt = total * (-ds * s * s * s / width)
        if NEED_A:
            da = rounded(dt, da_ptr.dtype.element_ty, INTERPRETED)
            tl.store(da_ptr + row * width + column, da, mask=mask)
        if NEED_H:
            if LAYER:
                g = g - tl.sum(g, 0) / width
            dh = rounded(g * s + dt, dh_ptr.dtype.element_ty, INTERPRETED)
            tl.store(dh_ptr + row * width + column, dh, mask=mask)
    return du, x * s


@triton.jit(do_not_specialize=["T", "rows_per_program"])
def backward_kernel(
    du_ptr, dks_ptr, h_ptr, a_ptr, weight_ptr, dh_ptr, da_ptr, dw_ptr, db_ptr,
    T, width, rows_per_program, stride_du, stride_h, stride_a, eps,
    LAYER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DU: tl.constexpr, HAS_DKS: tl.constexpr,
    NEED_H: tl.constexpr, NEED_A: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr, SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program i: rows i·rows_per_program …; d weight and d bias of those rows to row i of ``[programs, d]`` fp32."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    if NEED_W or NEED_B:
        dw = tl.zeros((BLOCK,), dtype=tl.float32)
        db = tl.zeros((BLOCK,), dtype=tl.float32)
        first = part * rows_per_program
        for step in range(0, tl.minimum(rows_per_program, T - first)):
            du, xs = _gradient_of_row(
                first + step, column, mask, weight_ptr, du_ptr, dks_ptr, h_ptr, a_ptr, dh_ptr, da_ptr,
                width, stride_du, stride_h, stride_a, eps,
                LAYER, HAS_WEIGHT, HAS_DU, HAS_DKS, NEED_H, NEED_A, SUM_DTYPE, BLOCK, INTERPRETED,
            )  # fmt: skip
            if NEED_W:
                dw += du * xs
            if NEED_B:
                db += du
        if NEED_W:
            tl.store(dw_ptr + part * width + column, dw, mask=mask)
        if NEED_B:
            tl.store(db_ptr + part * width + column, db, mask=mask)
    else:
        # A program per row, without the loop: around it the layout conversions alone spilled rows of 8192.
        _gradient_of_row(
            part, column, mask, weight_ptr, du_ptr, dks_ptr, h_ptr, a_ptr, dh_ptr, da_ptr,
            width, stride_du, stride_h, stride_a, eps,
            LAYER, HAS_WEIGHT, HAS_DU, HAS_DKS, NEED_H, NEED_A, SUM_DTYPE, BLOCK, INTERPRETED,
        )  # fmt: skip


def _blocks(width: int) -> dict[str, Any]:
    """A row's block and enough warps for at most 32 numbers of it per thread."""
    block = max(32, next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _unsupported(*tensors: Tensor | None) -> bool:
    """Whether a tensor is of a dtype that the kernels do not compute in (float64 weights, say), or a row too long."""
    present = [t for t in tensors if t is not None]
    return present[0].shape[-1] > MAX_WIDTH or any(t.dtype not in _TL_DTYPES for t in present)


def forward(
    h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """``(u [T, d], key_scale [T])``."""
    if _unsupported(h, a, weight, bias):
        return _EAGER.matched_norm(h, a, weight, bias, kind, eps)
    tokens, width = h.shape
    u = torch.empty(tokens, width, dtype=h.dtype, device=h.device)
    key_scale = torch.empty(tokens, dtype=h.dtype, device=h.device)
    if u.numel() == 0:
        return _EAGER.matched_norm(h, a, weight, bias, kind, eps)
    h, a = _rows(h), _rows(a)
    with device_guard(h):
        forward_kernel[(tokens,)](
            h, a, h if weight is None else weight.contiguous(), h if bias is None else bias.contiguous(), u, key_scale,
            width, h.stride(0), a.stride(0), float(eps),
            LAYER=kind == "layer", HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            SUM_DTYPE=_TL_DTYPES[torch.promote_types(h.dtype, a.dtype)], INTERPRETED=INTERPRET, **_blocks(width),
        )  # fmt: skip
    return u, key_scale


def backward(
    du: Tensor | None,
    d_key_scale: Tensor | None,
    h: Tensor,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (h, a, weight, bias) where ``needs`` is true, in that order."""
    if _unsupported(h, a, weight, bias, du, d_key_scale) or h.numel() == 0:
        return _EAGER.matched_norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
    need_h, need_a, need_weight, need_bias = needs
    tokens, width = h.shape
    if width > (MAX_TRAINED_WIDTH if need_weight or need_bias else MAX_BACKWARD_WIDTH):
        return _EAGER.matched_norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
    h, a, du = _rows(h), _rows(a), None if du is None else _rows(du)
    per_program = triton.cdiv(tokens, _PARTS) if need_weight or need_bias else 1
    programs = triton.cdiv(tokens, per_program)
    dh = torch.empty(tokens, width, dtype=h.dtype, device=h.device) if need_h else None
    da = torch.empty(tokens, width, dtype=a.dtype, device=a.device) if need_a else None
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": h.device}
    dw = torch.empty(programs, width, **fp32) if need_weight else None
    db = torch.empty(programs, width, **fp32) if need_bias else None
    with device_guard(h):
        backward_kernel[(programs,)](
            h if du is None else du, h if d_key_scale is None else d_key_scale.contiguous(), h, a,
            h if weight is None else weight.contiguous(), h if dh is None else dh, h if da is None else da,
            h if dw is None else dw, h if db is None else db,
            tokens, width, per_program, 0 if du is None else du.stride(0), h.stride(0), a.stride(0), float(eps),
            LAYER=kind == "layer", HAS_WEIGHT=weight is not None, HAS_DU=du is not None, HAS_DKS=d_key_scale is not None,
            NEED_H=need_h, NEED_A=need_a, NEED_W=need_weight, NEED_B=need_bias,
            SUM_DTYPE=_TL_DTYPES[torch.promote_types(h.dtype, a.dtype)], INTERPRETED=INTERPRET, **_blocks(width),
        )  # fmt: skip
    grads = [grad for grad in (dh, da) if grad is not None]
    for partial, parameter in ((dw, weight), (db, bias)):
        if partial is not None and parameter is not None:
            grads.append(reduce_partials(partial, torch.empty(width, dtype=parameter.dtype, device=h.device)))
    return grads


def aot_specs(dtype: str = "bf16", device_name: str = "") -> list[AotSpec]:
    """Forward and backward (frozen and trained norm) at widths of GPT-2, 8B, 70B and 405B, as far as the kernels go."""
    sums = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    specs = []
    for width, layer in ((768, True), (4096, False), (8192, False), (16384, False)):
        blocks = _blocks(width)
        warps = blocks.pop("num_warps")
        shared = {"LAYER": layer, "HAS_WEIGHT": True, "SUM_DTYPE": sums[dtype], "INTERPRETED": False, **blocks}
        kind = "layer" if layer else "rms"
        inputs = ("h_ptr", "a_ptr", "weight_ptr", "bias_ptr", "u_ptr", "key_scale_ptr")
        strides = ("width", "stride_h", "stride_a")
        specs.append(
            AotSpec(
                f"matched_norm {kind} d={width}", forward_kernel,
                dict.fromkeys(inputs, f"*{dtype}") | dict.fromkeys(strides, "i32") | {"eps": "fp32"},
                shared | {"HAS_BIAS": layer}, num_warps=warps, divisible_by_16=(*inputs, *strides), tensor_core=False,
            )
        )  # fmt: skip
        gradients = ("du_ptr", "dks_ptr", "h_ptr", "a_ptr", "weight_ptr", "dh_ptr", "da_ptr")
        numbers = ("width", "stride_du", "stride_h", "stride_a")
        limits = {False: MAX_BACKWARD_WIDTH, True: MAX_TRAINED_WIDTH}
        for trained in (trained for trained, limit in limits.items() if width <= limit):
            specs.append(
                AotSpec(
                    f"matched_norm {kind} d={width} backward" + (" +dγ" if trained else ""), backward_kernel,
                    dict.fromkeys(gradients, f"*{dtype}") | {"dw_ptr": "*fp32", "db_ptr": "*fp32"}
                    | dict.fromkeys(("T", "rows_per_program", *numbers), "i32") | {"eps": "fp32"},
                    shared | {"HAS_DU": True, "HAS_DKS": True, "NEED_H": True, "NEED_A": True, "NEED_W": trained,
                              "NEED_B": trained and layer},
                    num_warps=warps, divisible_by_16=(*gradients, "dw_ptr", "db_ptr", *numbers), tensor_core=False,
                )
            )  # fmt: skip
    return specs
