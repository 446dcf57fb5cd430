"""Forward and backward of the MLP, written once over a backend's steps (``kernels/steps.py``). Maths: README.md here.

    gate, up = x (W + ΔW)ᵀ       inter = act(gate) ⊙ up       out = inter (Wd + ΔWd)ᵀ       ΔW u = c @ w_b_up

A plain MLP has no gate: ``inter = act(up)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.steps import Bottleneck, Low, Steps
from ...rules import get_rule
from .operands import Operands, Projection, Saved, Spec

__all__ = ["Wants", "backward", "forward", "keep"]


def forward(steps: Steps, o: Operands, spec: Spec, save: bool) -> tuple[Tensor, Saved]:
    """``out [T, d_out]`` and what was made on the way; ``None`` for what there is not: the pre-activations unless ``save``."""
    x = steps.readable(o.x)
    given = o.w_down is None
    source = Bottleneck(o.a if given else None, o.key_scale, a=o.a, w_down=o.w_down)
    gate = o.gate if o.gate.weight is not None else Projection()
    low_gate = steps.low(x, gate, source, spec) if gate.value is not None else None
    low_up: Low | None = None
    if o.up.value is not None:
        # Without a key, c depends on z̃ alone: gate and up have the same, and kernels read it once.
        shared = low_gate is not None and get_rule(spec.rule).key == "none"
        low_up = low_gate if shared else steps.low(x, o.up, source, spec)
    z = source.z
    inter, pre_gate, pre_up = steps.activate(x, gate, o.up, low_gate, low_up, spec, save)
    low_down = steps.low(inter, o.down, Bottleneck(z), spec) if o.down.value is not None else None
    out = steps.project(inter, o.down, low_down, spec, chained=True)
    p_gate, p_up, p_down = (None if low is None else low.p for low in (low_gate, low_up, low_down))
    return out, Saved(None if given else z, p_gate, p_up, p_down, pre_gate, pre_up)


class Wants(NamedTuple):
    """Which parts of the backward a set of wanted gradients takes. What is saved and what is computed both follow from it."""

    key: bool
    """the rule has a key, so there is a dp"""
    z: bool
    """d of z, for a or w_down"""
    scaled_z: bool
    """d of z̃ = key_scale ⊙ z"""
    gate: bool
    """d of the gate's output"""
    up: bool
    """d of up's output"""
    inter_again: bool
    """the intermediate, for d of the down projection's own weights"""
    row_scale: bool
    """d of a factor on gate's and up's outputs, biases apart"""

    @property
    def inter(self) -> bool:
        """Whether a gradient passes through the down projection: only then is ``dout @ Wd`` formed."""
        return self.gate or self.up

    @classmethod
    def of(cls, need: Operands, gated: bool, changes: tuple[bool, bool], spec: Spec) -> Wants:
        """``changes``: whether gate and up have a delta; a gradient of z̃ passes only through targets that have one."""
        z = need.a or need.w_down
        scaled_z = z or need.key_scale
        gate, up = (
            bool(need.x or need.row_scale or any(n) or (scaled_z and has))
            for n, has in zip((need.gate, need.up), changes, strict=True)
        )
        return cls(
            get_rule(spec.rule).key != "none", z, scaled_z, gated and gate, up, need.down.weight or need.down.key,
            bool(need.row_scale),
        )  # fmt: skip


def keep(need: Operands, o: Operands, made: Saved, spec: Spec) -> tuple[Operands, Saved]:
    """The operands and results that the backward will read; ``None`` in the place of every other one."""
    want = Wants.of(need, o.gate.weight is not None, (o.gate.value is not None, o.up.value is not None), spec)

    def kept(target: Projection, reads_weight: bool) -> Projection:
        weight, bias, key, value = target
        bias = bias if want.row_scale and target is not o.down else None
        return Projection(weight, bias, key, value) if reads_weight else Projection(None, bias, None, value)

    reads_x = need.gate.weight or need.up.weight or need.gate.key or need.up.key
    operands = Operands(
        o.x if reads_x else None, o.a if need.w_down else None, o.key_scale, o.w_down if need.a else None,
        kept(o.gate, need.x), kept(o.up, need.x), kept(o.down, want.inter),
    )  # fmt: skip
    z, p_gate, p_up, p_down, gate, up = made
    if not (want.inter or want.inter_again):
        gate = up = None
    return operands, Saved(o.a if o.w_down is None else z, p_gate, p_up, p_down, gate, up)


def backward(
    steps: Steps, dout: Tensor, o: Operands, made: Saved, need: Operands, spec: Spec, gated: bool, overwrite: bool
) -> Operands:
    """The wanted gradients in the places of their operands. ``overwrite``: the saved gate and up are free to be written over."""
    want = Wants.of(need, gated, (o.gate.value is not None, o.up.value is not None), spec)
    source = Bottleneck(made.z, o.key_scale)
    pre_gate = made.gate if gated else None

    def through(
        target: Projection, n: Projection, dy: Tensor | None, u: Tensor | None, p: Tensor, z: Bottleneck,
        want_z: bool, want_u: bool,
    ) -> tuple[Tensor | None, Tensor | None, Projection]:  # fmt: skip
        """(dz̃, dp, gradients of the target) below the gradient ``dy`` of its output; ``u`` is its input."""
        if dy is None:
            return None, None, Projection()
        dz = dp = d_value = None
        if target.value is not None:
            want_p = want.key and (want_u or n.key)
            if want_z or want_p or n.value:
                dz, dp, d_value = steps.value_grads(dy, target.value, z, p, spec, want_z, want_p, n.value)
        return (
            dz,
            dp,
            Projection(
                dy.t() @ u if n.weight else None,  # type: ignore[operator]
                dy.sum(0) if n.bias else None,
                steps.key_grad(dp, u, spec) if n.key else None,  # type: ignore[arg-type]
                d_value,
            ),
        )

    inter = steps.recompute(pre_gate, made.up, spec) if want.inter_again else None
    dz_down, dp_down, d_down = through(
        o.down, need.down, dout, inter, made.p_down, Bottleneck(made.z), want.z, want.inter
    )  # fmt: skip
    del inter
    dgate = dup = None
    if want.inter:
        dgate, dup = steps.activate_backward(
            dout, o.down, dp_down, pre_gate, made.up, spec, want.gate, want.up, overwrite and not want.row_scale
        )  # fmt: skip
    d_row_scale = None
    if want.row_scale:
        d_row_scale = row_scale_grad(((dgate, pre_gate, o.gate.bias), (dup, made.up, o.up.bias)))
    dz_gate, dp_gate, d_gate = through(o.gate, need.gate, dgate, o.x, made.p_gate, source, want.scaled_z, need.x)
    dz_up, dp_up, d_up = through(o.up, need.up, dup, o.x, made.p_up, source, want.scaled_z, need.x)
    dx = None
    if need.x:
        terms = [(dy, t, dp) for dy, t, dp in ((dup, o.up, dp_up), (dgate, o.gate, dp_gate)) if dy is not None]
        dx = steps.input_grad(terms, spec)
    da = d_w_down = d_key_scale = None
    if want.scaled_z:
        shares = [share for share in (dz_gate, dz_up) if share is not None]
        dz, d_key_scale = steps.merge(shares, dz_down, source, need.key_scale)
        if need.a:
            da = dz if o.w_down is None else dz @ o.w_down.t()
        d_w_down = steps.bottleneck_grad(dz, o.a) if need.w_down else None
    return Operands(dx, da, d_key_scale, d_w_down, d_gate, d_up, d_down, d_row_scale)


def row_scale_grad(terms: Iterable[tuple[Tensor | None, Tensor | None, Tensor | None]]) -> Tensor:
    """``d row_scale [T] = Σ ⟨dy, y − bias⟩`` over ``(dy, y, bias)`` of gate and up: ``y − bias`` is linear in the factor.

    Summed in float32 at least: over a wide MLP the sum leaves float16's range. An eighth of the tokens at a time, so that the
    products take an eighth of a ``[T, f]``.
    """
    total: Tensor | None = None
    for dy, y, bias in terms:
        if dy is None or y is None:
            continue
        wide = torch.promote_types(dy.dtype, torch.float32)
        if total is None:
            total = dy.new_zeros(dy.shape[0], dtype=wide)
        rows = max(1, -(-dy.shape[0] // 8))
        for start in range(0, dy.shape[0], rows):
            part = slice(start, start + rows)
            linear = y[part] if bias is None else y[part] - bias
            total[part] += (linear * dy[part]).sum(-1, dtype=wide)
    assert total is not None
    return total
