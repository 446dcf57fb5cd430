"""The steps in Triton: the delta rides in the K loop, gate and up share one GEMM with the activation, ``dgate`` and ``dup`` come
out of the epilogue of ``dout @ Wd``, the low-rank gradients read dy once.

Neither ``dinter`` nor an intermediate of the activation is written. What fuses with nothing that would pay for a slower main
loop is the vendor's: a projection without delta, ``dx``, gradients of frozen-sized weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...activations import get_activation
from ...rules import get_rule
from ..eager import EagerSteps, key_product
from ..steps import Bottleneck, Low, Projection, Spec
from . import norm
from .coefficients import coefficients_forward
from .decode import DECODE_TOKENS, decode_act, decode_gate_up, decode_gemm, decode_terms
from .explicit import row_dot, row_outer
from .gate_up import gate_up_forward
from .rules import merge_dz, rule_backward, rule_forward
from .segmented_gemm import Segment, gate_up_backward, gemm_act, gemm_act_backward, gemm_terms, segmented_gemm
from .value_grads import dc_and_value_grad, low_rank_grad

__all__ = ["TritonSteps"]


def _segment(low: Low | None, target: Projection) -> Segment | None:
    return None if low is None else (low.c, target.value.t())


class TritonSteps(EagerSteps):
    """See :class:`..steps.Steps` for what each step is."""

    overwrites_saved = True

    def low(self, u: Tensor, target: Projection, source: Bottleneck, spec: Spec) -> Low:
        rule, rest = get_rule(spec.rule), (spec.rule, spec.num_ranks, spec.scale)
        if source.made:
            p = key_product(u, target.key, rule)
            return Low(p, rule_forward(source.z, p, source.key_scale, *rest))
        assert source.a is not None and source.w_down is not None
        key_input = None if rule.key == "none" else u
        z, p, c = coefficients_forward(key_input, source.a, source.w_down, target.key, source.key_scale, *rest)
        source.z = z
        return Low(None if rule.key == "none" else p, c)

    def project(self, u: Tensor, target: Projection, low: Low | None, spec: Spec, *, chained: bool) -> Tensor:
        segment = _segment(low, target)
        if segment is None:
            return F.linear(u, target.weight, target.bias)
        gemm = decode_gemm if u.shape[0] <= DECODE_TOKENS else segmented_gemm
        return gemm([(u, target.weight), segment], target.bias)

    def activate(
        self,
        x: Tensor,
        gate: Projection,
        up: Projection,
        low_gate: Low | None,
        low_up: Low | None,
        spec: Spec,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        act, few = get_activation(spec.act).name, x.shape[0] <= DECODE_TOKENS
        up_segment = _segment(low_up, up)
        if gate.weight is None:
            segments = [(x, up.weight)] if up_segment is None else [(x, up.weight), up_segment]
            inter, pre_up = (decode_act if few else gemm_act)(segments, up.bias, act, save)
            return inter, None, pre_up
        run = decode_gate_up if few else gate_up_forward
        return run(
            x, gate.weight, up.weight, _segment(low_gate, gate), up_segment, gate.bias, up.bias, act, save
        )  # fmt: skip

    def value_grads(
        self,
        dy: Tensor,
        value: Tensor,
        source: Bottleneck,
        p: Tensor | None,
        spec: Spec,
        want_z: bool,
        want_p: bool,
        want_value: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rest = (spec.rule, spec.num_ranks, spec.scale)
        c = rule_forward(source.z, p, source.key_scale, *rest) if want_value else None
        dc, d_value = dc_and_value_grad(dy, value, c, want_z or want_p, want_value)
        if dc is None:
            return None, None, d_value
        dz, dp = rule_backward(dc, source.z, p, source.key_scale, *rest, want_z, want_p)
        return dz, dp, d_value

    def key_grad(self, dp: Tensor, u: Tensor, spec: Spec) -> Tensor:
        grad = low_rank_grad(dp, u)
        return grad if get_rule(spec.rule).key == "matrix" else grad.squeeze(0)

    def activate_backward(
        self,
        dout: Tensor,
        down: Projection,
        dp: Tensor | None,
        gate: Tensor | None,
        up: Tensor,
        spec: Spec,
        want_gate: bool,
        want_up: bool,
        overwrite: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        act = get_activation(spec.act).name
        segments: list[Segment] = [(dout, down.weight.t())]
        if dp is not None:
            key = down.key if get_rule(spec.rule).key == "matrix" else down.key.unsqueeze(0)
            segments.append((dp, key.t()))
        if gate is None:
            return None, gemm_act_backward(segments, up, act, overwrite=overwrite)
        return gate_up_backward(segments, gate, up, act, want_gate, want_up, overwrite=overwrite)

    def merge(
        self, shares: list[Tensor], dz_down: Tensor | None, source: Bottleneck, want_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        dz, d_scale = merge_dz(shares, dz_down, source.z, source.key_scale, want_scale)
        if want_scale and d_scale is None:
            d_scale = source.z.new_zeros(source.z.shape[0])
        return dz, d_scale

    def bottleneck_grad(self, dz: Tensor, a: Tensor) -> Tensor:
        return low_rank_grad(dz, a, transposed=True)

    # ---- the explicit form: a row dot, then one GEMM whose epilogue adds Σ_j s_j v_b_j; v_b is read once, only y is written --

    def linear(self, x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        s = row_dot(v_a, x)
        gemm = decode_terms if x.shape[0] <= DECODE_TOKENS else gemm_terms
        return gemm(x, weight, s, v_b, bias), s

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        v_a: Tensor | None,
        v_b: Tensor | None,
        s: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor]:
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

    # ---- the norm before the MLP ----------------------------------------------------------------------------------------

    def matched_norm(
        self, h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm.forward(h, a, weight, bias, kind, eps)

    def matched_norm_backward(
        self,
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
        return norm.backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
