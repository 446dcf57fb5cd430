"""What happens to a finished fp32 accumulator before it leaves the registers: bias, activations and their derivatives.

Activations carry the names of ``npt_kernels.activations`` (without aliases); ``support.FUSED_ACTIVATIONS`` lists them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import rounded

__all__ = ["activate", "activate_grad", "finish", "finish_in_pieces", "halves"]


@triton.jit
def activate(x, ACT: tl.constexpr):
    """``act(x)`` in fp32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # ½(1 + tanh u) = σ(2u), so that no tanh is needed; u = √(2/π) (x + 0.044715 x³).
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "relu":
        return tl.where(x > 0.0, x, x * 0.0)  # x·0 keeps a NaN
    elif ACT == "relu2":
        positive = tl.where(x > 0.0, x, x * 0.0)
        return positive * positive
    else:
        tl.static_assert(ACT == "quick_gelu", "activation without a fused kernel")
        return x * tl.sigmoid(1.702 * x)


@triton.jit
def activate_grad(x, ACT: tl.constexpr):
    """``act'(x)`` in fp32."""
    if ACT == "silu":
        sigmoid = tl.sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == "gelu_tanh":
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
    elif ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        return 2.0 * tl.where(x > 0.0, x, x * 0.0)
    else:
        tl.static_assert(ACT == "quick_gelu", "activation without a fused kernel")
        sigmoid = tl.sigmoid(1.702 * x)
        return sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))


@triton.jit
def finish(
    acc, t0, n0, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
    EPILOGUE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_Y2: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Turn ``acc [BT, BN]`` at (t0, n0) into outputs. ``y``, ``y2`` and what is read per output are contiguous ``[T, out]``.

    | EPILOGUE | y | y2 | reads |
    |---|---|---|---|
    | ``store`` | acc + bias | – | – |
    | ``act`` | act(acc + bias) | acc + bias | – |
    | ``act_backward`` | acc · act'(pre) | – | read0 = pre |
    | ``gate_up_backward`` | acc · up · act'(gate) | acc · act(gate) | read0 = gate, read1 = up |
    | ``terms`` | acc + bias + Σ_j s_j v_j | – | read0 = s ``[T, k]``, read1 = v ``[T, k, out]`` of any strides |
    """
    offs_t = tl.arange(0, BT)
    offs_n = tl.arange(0, BN)
    mask = (offs_t < tokens - t0)[:, None] & (offs_n < out - n0)[None, :]  # [BT, BN]
    tile = t0.to(tl.int64) * out + n0  # 64 bits: T × out passes 2^31 elements at T = 131072, f = 28672
    offs = offs_t[:, None] * out + offs_n[None, :]
    dtype = y.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias + n0 + offs_n, mask=offs_n < out - n0, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "store":
        tl.store(y + tile + offs, rounded(acc, dtype, INTERPRETED), mask=mask)
    elif EPILOGUE == "act":
        if WRITE_Y2:
            tl.store(y2 + tile + offs, rounded(acc, dtype, INTERPRETED), mask=mask)
        tl.store(y + tile + offs, rounded(activate(acc, ACT), dtype, INTERPRETED), mask=mask)
    elif EPILOGUE == "act_backward":
        pre = tl.load(read0 + tile + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + tile + offs, rounded(acc * activate_grad(pre, ACT), dtype, INTERPRETED), mask=mask)
    elif EPILOGUE == "gate_up_backward":
        gate = tl.load(read0 + tile + offs, mask=mask, other=0.0).to(tl.float32)
        if WRITE_Y2:
            tl.store(y2 + tile + offs, rounded(acc * activate(gate, ACT), dtype, INTERPRETED), mask=mask)
        if WRITE_Y:
            up = tl.load(read1 + tile + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + tile + offs, rounded(acc * up * activate_grad(gate, ACT), dtype, INTERPRETED), mask=mask)
    else:
        tl.static_assert(EPILOGUE == "terms", "unknown epilogue")
        v_tile = read1 + t0.to(tl.int64) * v_t + n0.to(tl.int64) * v_n
        v_offs = offs_t.to(tl.int64)[:, None] * v_t + offs_n[None, :] * v_n
        s_tile = read0 + t0.to(tl.int64) * num_terms + offs_t * num_terms
        for j in range(num_terms):
            s = tl.load(s_tile + j, mask=offs_t < tokens - t0, other=0.0).to(tl.float32)  # [BT]
            v = tl.load(v_tile + tl.cast(j, tl.int64) * v_j + v_offs, mask=mask, other=0.0).to(tl.float32)
            acc += s[:, None] * v
        tl.store(y + tile + offs, rounded(acc, dtype, INTERPRETED), mask=mask)


@triton.jit
def halves(acc, BT: tl.constexpr, BN: tl.constexpr):
    """Left and right half of the columns of ``acc [BT, BN]``."""
    return acc.reshape(BT, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def finish_in_pieces(
    acc, t0, n0, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
    EPILOGUE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_Y2: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, SUBTILES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """:func:`finish` on SUBTILES column pieces, one after the other: only one piece's reads and results are in registers."""
    HALF: tl.constexpr = BN // 2
    if SUBTILES == 1:
        finish(
            acc, t0, n0, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
            EPILOGUE, ACT, HAS_BIAS, WRITE_Y, WRITE_Y2, BT, BN, INTERPRETED,
        )  # fmt: skip
    else:
        left, right = halves(acc, BT, BN)
        finish_in_pieces(
            left, t0, n0, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
            EPILOGUE, ACT, HAS_BIAS, WRITE_Y, WRITE_Y2, BT, HALF, SUBTILES // 2, INTERPRETED,
        )  # fmt: skip
        finish_in_pieces(
            right, t0, n0 + HALF, y, y2, bias, read0, read1, tokens, out, num_terms, v_t, v_j, v_n,
            EPILOGUE, ACT, HAS_BIAS, WRITE_Y, WRITE_Y2, BT, HALF, SUBTILES // 2, INTERPRETED,
        )  # fmt: skip
