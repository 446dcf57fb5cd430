"""``linear`` in Triton: a row dot, then one GEMM whose epilogue adds ``Σ_j s_j v_b_j``; v_b is read once, only y is written.

Backward: ``t`` by a row dot, ``dx`` by the same GEMM with v_a, the vectors' gradients by streaming kernels. ``d weight`` and
``d bias`` fuse with nothing and go to the vendor's library.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.triton.decode import DECODE_TOKENS, decode_terms
from ...kernels.triton.explicit import row_dot, row_outer
from ...kernels.triton.segmented_gemm import gemm_terms


def forward(x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(y [T, out], s [T, k])``."""
    s = row_dot(v_a, x)
    gemm = decode_terms if x.shape[0] <= DECODE_TOKENS else gemm_terms
    return gemm(x, weight, s, v_b, bias), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    v_a: Tensor | None,
    v_b: Tensor | None,
    s: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, weight, v_a, v_b, bias) where ``needs`` is true, in that order."""
    need_x, need_weight, need_v_a, need_v_b, need_bias = needs
    grads: list[Tensor] = []
    t = None
    if need_x or need_v_a:
        assert v_b is not None
        t = row_dot(v_b, dy)
    if need_x:
        assert weight is not None and v_a is not None and t is not None
        gemm = decode_terms if dy.shape[0] <= DECODE_TOKENS else gemm_terms
        grads.append(gemm(dy, weight.t(), t, v_a, None))
    if need_weight:
        assert x is not None
        grads.append(dy.t() @ x)
    if need_v_a:
        assert x is not None and t is not None
        grads.append(row_outer(t, x))
    if need_v_b:
        assert s is not None
        grads.append(row_outer(s, dy))
    if need_bias:
        grads.append(dy.sum(0))
    return grads
