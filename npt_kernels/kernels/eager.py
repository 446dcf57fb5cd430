"""The steps in plain PyTorch, on the vendor's GEMM: in-place ``addmm_`` for the delta, nothing wider than it must be.

Any device and dtype. Also what the fused backends fall back to, and the strongest baseline without a kernel of one's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import get_activation
from ..rules import Rule, get_rule
from . import native_activation, native_row
from .backend import Backend
from .cpu_layout import k_contiguous
from .steps import Bottleneck, Low, Projection, Spec, Steps

__all__ = ["BACKEND", "EagerSteps", "add_key_grad", "key_grad", "key_product"]


def key_product(u: Tensor, w_a_up: Tensor | None, rule: Rule) -> Tensor | None:
    """``p = u @ w_a_upᵀ``: ``[T, R]``, ``[T, 1]`` for a vector key, ``None`` without key."""
    if rule.key == "none":
        return None
    assert w_a_up is not None
    return F.linear(u, w_a_up if rule.key == "matrix" else w_a_up.unsqueeze(0))


def add_key_grad(du: Tensor, dp: Tensor | None, w_a_up: Tensor | None, rule: Rule) -> None:
    """``du += dp @ w_a_up`` in place."""
    if dp is not None:
        assert w_a_up is not None
        du.addmm_(dp, w_a_up if rule.key == "matrix" else w_a_up.unsqueeze(0))


def key_grad(dp: Tensor, u: Tensor, rule: Rule) -> Tensor:
    """``d w_a_up = dpᵀ @ u``: ``[R, in]`` or ``[in]``."""
    grad = dp.t() @ u
    return grad if rule.key == "matrix" else grad.squeeze(0)


class EagerSteps(Steps):
    """See :class:`.steps.Steps` for what each step is."""

    def mlp_row(self, operands: Any, spec: Spec) -> Tensor | None:
        # The backends that inherit these steps have kernels of their own, also where they are emulated on a CPU.
        return (
            native_row.mlp_row(operands, spec) if type(self) is EagerSteps and operands.x.device.type == "cpu" else None
        )

    # ---- targets --------------------------------------------------------------------------------------------------------

    def readable(self, u: Tensor) -> Tensor:
        return u

    def low(self, u: Tensor, target: Projection, source: Bottleneck, spec: Spec) -> Low:
        rule = get_rule(spec.rule)
        p = key_product(u, target.key, rule)
        return Low(p, rule.coefficients(source.scaled, p, spec.num_ranks, spec.scale))

    def project(self, u: Tensor, target: Projection, low: Low | None, spec: Spec, *, chained: bool) -> Tensor:
        y = F.linear(u, target.weight, target.bias)
        return y if low is None else y.addmm_(low.c, k_contiguous(target.value))

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
        u = EagerSteps.project(self, x, up, low_up, spec, chained=False)
        gated = gate.weight is not None
        g = EagerSteps.project(self, x, gate, low_gate, spec, chained=False) if gated else None
        return _activated(g, u, spec, over=not save), g if save else None, u if save else None

    def recompute(self, gate: Tensor | None, up: Tensor, spec: Spec) -> Tensor:
        return _activated(gate, up, spec, over=False)

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
        rule = get_rule(spec.rule)
        dz = dp = d_value = None
        if want_z or want_p:
            dz, dp = rule.backward(dy @ value.t(), source.scaled, p, spec.num_ranks, spec.scale, want_z, want_p)
        if want_value:
            d_value = rule.coefficients(source.scaled, p, spec.num_ranks, spec.scale).t() @ dy
        return dz, dp, d_value

    def key_grad(self, dp: Tensor, u: Tensor, spec: Spec) -> Tensor:
        return key_grad(dp, u, get_rule(spec.rule))

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
        act = get_activation(spec.act)
        dinter = dout @ down.weight
        add_key_grad(dinter, dp, down.key, get_rule(spec.rule))
        if gate is None:
            made = native_activation.gradients(spec.act, dinter, up, None, True, False)
            return None, act.backward(dinter, up) if made is None else made[0]
        made = native_activation.gradients(spec.act, dinter, gate, up, want_gate, want_up)
        if made is not None:
            return made
        dup = act.forward(gate).mul_(dinter) if want_up else None
        return act.backward(dinter.mul_(up), gate) if want_gate else None, dup

    def input_grad(self, terms: list[tuple[Tensor, Projection, Tensor | None]], spec: Spec) -> Tensor:
        rule = get_rule(spec.rule)
        dx: Tensor | None = None
        for dy, target, dp in terms:
            dx = dy @ target.weight if dx is None else dx.addmm_(dy, target.weight)
            add_key_grad(dx, dp, target.key, rule)
        assert dx is not None
        return dx

    def merge(
        self, shares: list[Tensor], dz_down: Tensor | None, source: Bottleneck, want_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        z, total = source.z, None
        for share in shares:
            total = share if total is None else total.add_(share)
        d_scale = None
        if want_scale:
            d_scale = z.new_zeros(z.shape[0]) if total is None else torch.linalg.vecdot(total, z)
        if total is not None:
            if source.key_scale is not None:
                total = total.mul_(source.key_scale.unsqueeze(1))
            return total if dz_down is None else dz_down.add_(total), d_scale
        return torch.zeros_like(z) if dz_down is None else dz_down, d_scale

    def bottleneck_grad(self, dz: Tensor, a: Tensor) -> Tensor:
        return a.t() @ dz

    # ---- the explicit form: nothing of size T·k·d ------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y = F.linear(x, weight, bias)
        s = torch.bmm(v_a, x.unsqueeze(2)).squeeze(2)
        y.unsqueeze(1).baddbmm_(s.unsqueeze(1), v_b)
        return y, s

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
            t = torch.bmm(v_b, dy.unsqueeze(2)).squeeze(2)
        if need_x:
            assert weight is not None and v_a is not None and t is not None
            dx = dy @ weight
            dx.unsqueeze(1).baddbmm_(t.unsqueeze(1), v_a)
            grads.append(dx)
        if need_weight:
            assert x is not None
            grads.append(dy.t() @ x)
        if need_v_a:
            assert x is not None and t is not None
            grads.append(t.unsqueeze(2) * x.unsqueeze(1))
        if need_v_b:
            assert s is not None
            grads.append(s.unsqueeze(2) * dy.unsqueeze(1))
        if need_bias:
            grads.append(dy.sum(0))
        return grads

    # ---- the norm before the MLP: statistics in float32 at least, over the rounded sum that the original layer norms ------

    def matched_norm(
        self, h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        compute = torch.promote_types(h.dtype, torch.float32)
        x, _, s = _norm_statistics(h, a, kind, eps)
        u = x * s
        if kind == "rms":  # as transformers' RMSNorm: rounded before the weight
            u = u.to(h.dtype)
            u = u if weight is None else weight * u
        else:
            u = u if weight is None else u * weight.to(compute)
        u = u if bias is None else u + bias.to(compute)
        return u.to(h.dtype).contiguous(), s.squeeze(-1).to(h.dtype).contiguous()

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
        need_h, need_a, need_weight, need_bias = needs
        x, total, s = _norm_statistics(h, a, kind, eps)
        du = torch.zeros_like(x) if du is None else du.to(x.dtype)
        grads: list[Tensor] = []
        if need_h or need_a:
            g = du if weight is None else du * weight.to(x.dtype)
            ds = (g * x).sum(-1, keepdim=True)  # pairwise; a BLAS dot loses digits over a long row
            if d_key_scale is not None:
                ds = ds + d_key_scale.to(x.dtype).unsqueeze(-1)
            dt = total * (ds * s.pow(3) / -h.shape[-1])
            if need_h:
                dx = g if kind == "rms" else g - g.mean(-1, keepdim=True)
                grads.append(torch.addcmul(dt, dx, s).to(h.dtype).contiguous())
            if need_a:
                grads.append(dt.to(a.dtype).contiguous())
        if need_weight:
            assert weight is not None
            grads.append((du * (x * s)).sum(0).to(weight.dtype))
        if need_bias:
            assert bias is not None
            grads.append(du.sum(0).to(bias.dtype))
        return grads


def _activated(gate: Tensor | None, up: Tensor, spec: Spec, over: bool) -> Tensor:
    """``act(gate) ⊙ up``, or ``act(up)``; ``over``: nobody reads the pre-activations again."""
    made = native_activation.activated(spec.act, up if gate is None else gate, None if gate is None else up, over)
    if made is not None:
        return made
    act = get_activation(spec.act).forward
    return act(up) if gate is None else act(gate).mul_(up)


def _norm_statistics(h: Tensor, a: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x [T, d], τ [T, d], s [T, 1])`` of ops/matched_norm/README.md in the compute dtype."""
    compute = torch.promote_types(h.dtype, torch.float32)
    total, x = (h + a).to(compute), h.to(compute)
    if kind == "rms":
        return x, total, torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    total, x = total - total.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    return x, total, torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)


BACKEND = Backend(
    name="eager",
    load=EagerSteps,
    summary="plain PyTorch: in-place addmm on the vendor's GEMM; any device and dtype",
    automatic=True,
)
