"""The steps on Hopper: gate, up and the activation in one kernel; ``dout @ Wd`` with the activation's backward in another; a
projection or ``dx`` with its low-rank terms as one segmented-K product; coefficients, and dc with ``d w_b_up``, in one each.

Plain GEMMs (other small gradients, a projection without delta) are the vendor's. An activation or a shape without a fused
kernel (a width that is no multiple of 8, say) runs as in ``eager.py`` and says so once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import get_rule
from ..eager import EagerSteps
from ..steps import Bottleneck, Low, Projection, Spec
from .choose import Epilogue
from .coefficients import coefficients
from .launch import (
    LOW,
    LOW_FIRST,
    LOW_SECOND,
    MAIN,
    Overlap,
    Segment,
    bias_segment,
    fused_activation,
    low_rank,
    padded_vector,
    refusal,
    rows_ok,
    run,
    say_fallback,
)
from .norm import backward as norm_backward
from .norm import forward as norm_forward
from .value_grads import value_grads

__all__ = ["CudaSteps", "fused_sum"]


def fused_sum(
    what: str,
    terms: list[tuple[Tensor, Tensor]],
    low: list[tuple[Tensor, Tensor]],
    bias: Tensor | None = None,
    overlap: Overlap = None,
) -> Tensor | None:
    """``Σ x @ wᵀ + Σ c @ b + bias`` in one launch, ``w [N, K]`` of either layout and ``b [R, N]`` or ``[N]`` (then c is [T, 1]).

    ``None`` if it cannot be fused; the reason is said once. ``overlap``: see ``launch.run``; the ``x`` must be TMA-readable then.
    """
    rows, cols = terms[0][0].shape[0], terms[0][1].shape[0]
    low = [padded_vector(c, b) if b.dim() == 1 else (c, b) for c, b in low]
    reason = refusal(
        [("out", cols), *(("in", w.shape[1]) for _, w in terms), *(("R", b.shape[0]) for _, b in low)],
        [("weight", w) for _, w in terms],
    )
    if reason is not None or rows == 0:
        if reason is not None:
            say_fallback(what, reason)
        return None
    y = terms[0][0].new_empty(rows, cols)
    segments = [Segment(MAIN, rows_ok(x), w) for x, w in terms] + [low_rank(c, b) for c, b in low]
    run(Epilogue.STORE, segments, [y], bias=bias, overlap=overlap)
    return y


def _no_epilogue(act: str) -> str:
    return f"act={act!r} has no fused epilogue (silu, quick_gelu and tanh-gelu have)"


class CudaSteps(EagerSteps):
    """See :class:`..steps.Steps` for what each step is."""

    overwrites_saved = True

    def readable(self, u: Tensor) -> Tensor:
        # Before the coefficients: what a decode kernel reads early may not be written by the kernel before it.
        return rows_ok(u)

    def low(self, u: Tensor, target: Projection, source: Bottleneck, spec: Spec) -> Low:
        rest = (source.key_scale, spec.rule, spec.num_ranks, spec.scale)
        if source.made:
            made = coefficients(u, target.key, *rest, z=source.z)
        else:
            made = coefficients(u, target.key, *rest, a=source.a, w_down=source.w_down)
            source.z = made.z
        return Low(None if get_rule(spec.rule).key == "none" else made.p, made.c, made.own)

    def project(self, u: Tensor, target: Projection, low: Low | None, spec: Spec, *, chained: bool) -> Tensor:
        if low is None:
            return F.linear(u, target.weight, target.bias)
        before: Overlap = "low" if low.own else None
        if chained and not low.own and get_rule(spec.rule).key == "none":
            before = "all"  # c is z; the kernel before is the one that writes u
        out = fused_sum("projection", [(u, target.weight)], [(low.c, target.value)], target.bias, before)
        return F.linear(u, target.weight, target.bias).addmm_(low.c, target.value) if out is None else out

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
        gated, rows, width = gate.weight is not None, x.shape[0], up.weight.shape[0]
        activation = fused_activation(spec.act)
        values = [target.value for target, low in ((gate, low_gate), (up, low_up)) if low is not None]
        reason = refusal(
            [("f", width), ("d", x.shape[1]), *(("R", value.shape[0]) for value in values)],
            [("gate_proj", gate.weight), ("up_proj", up.weight)] if gated else [("up_proj", up.weight)],
        )
        if activation is None:
            reason = _no_epilogue(spec.act)
        if activation is None or reason is not None or rows == 0:
            if reason is not None:
                say_fallback("gate and up", reason)
            return super().activate(x, gate, up, low_gate, low_up, spec, save)
        last = low_up or low_gate
        overlap: Overlap = "low" if last is not None and last.own else None
        inter = x.new_empty(rows, width)
        pre_up = x.new_empty(rows, width) if save else None
        if not gated:
            segments = [Segment(MAIN, x, up.weight)]
            if low_up is not None:
                segments.append(low_rank(low_up.c, up.value))
            run(
                Epilogue.ACT, segments, [inter, pre_up] if save else [inter],
                bias=up.bias, activation=activation, store_pre=save, overlap=overlap,
            )  # fmt: skip
            return inter, None, pre_up
        pre_gate = x.new_empty(rows, width) if save else None
        segments = [Segment(MAIN, x, gate.weight, up.weight)]
        if low_gate is not None and low_gate is low_up:
            segments.append(low_rank(low_gate.c, gate.value, LOW, up.value))
        else:
            for low, target, kind in ((low_gate, gate, LOW_FIRST), (low_up, up, LOW_SECOND)):
                if low is not None:
                    segments.append(low_rank(low.c, target.value, kind))
        if gate.bias is not None or up.bias is not None:
            segments.append(bias_segment(x, gate.bias, up.bias, width))
        run(
            Epilogue.GATE_UP, segments, [inter, pre_gate, pre_up] if save else [inter],
            activation=activation, store_pre=save, overlap=overlap,
        )  # fmt: skip
        return inter, pre_gate, pre_up

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
        return value_grads(
            dy, value, source.z, p, source.key_scale, spec.rule, spec.num_ranks, spec.scale, want_z, want_p, want_value
        )

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
        """``overwrite``: a block has read a part of gate and up into shared memory before it stores the same part, and no other
        block reads it (csrc/gemm/segk_pingpong.cuh)."""
        activation = fused_activation(spec.act)
        low: tuple[Tensor, Tensor] | None = None
        if dp is not None:
            low = padded_vector(dp, down.key) if down.key.dim() == 1 else (dp, down.key)
        reason = refusal(
            [("f", up.shape[1]), ("d", dout.shape[1]), *([("R", low[1].shape[0])] if low else [])],
            [("down_proj", down.weight)],
        )
        if activation is None:
            reason = _no_epilogue(spec.act)
        if activation is None or reason is not None or dout.shape[0] == 0:
            if reason is not None:
                say_fallback("gate and up, backward", reason)
            return super().activate_backward(dout, down, dp, gate, up, spec, want_gate, want_up, overwrite)
        segments = [Segment(MAIN, rows_ok(dout), down.weight.t())]
        if low is not None:
            segments.append(low_rank(*low))
        up = rows_ok(up)
        if gate is None:
            dup = up if overwrite else torch.empty_like(up)
            run(Epilogue.ACT_BWD, segments, [dup], inputs=[up], activation=activation)
            return None, dup
        gate = rows_ok(gate)
        outs = [
            (saved if overwrite else torch.empty_like(saved)) if wanted else None
            for saved, wanted in ((gate, want_gate), (up, want_up))
        ]
        run(Epilogue.GATE_UP_BWD, segments, outs, inputs=[gate, up], activation=activation)
        return outs[0], outs[1]

    def input_grad(self, terms: list[tuple[Tensor, Projection, Tensor | None]], spec: Spec) -> Tensor:
        """One launch for two terms or more, else the vendor's GEMM."""
        low = [(dp, target.key) for _, target, dp in terms if dp is not None]
        if len(terms) + len(low) > 1:
            dx = fused_sum("input gradient", [(dy, target.weight.t()) for dy, target, _ in terms], low)
            if dx is not None:
                return dx
        return super().input_grad(terms, spec)

    def matched_norm(
        self, h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm_forward(h, a, weight, bias, kind, eps)

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
        return norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
