"""``mlp`` on Hopper: gate, up, their deltas and the activation in one kernel; ``dout @ Wd`` with the activation's backward in
another; dx as one segmented-K product. Unverified on hardware.

z, key product and rule of a target are one kernel, and dc with ``d w_b_up`` another where one reading of dy pays
(``_cuda/skinny.py``). Plain GEMMs (other small gradients, a down projection without delta) are the vendor's. An activation or
shape without a fused kernel runs as in ``eager.py`` and says so once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import get_activation
from ...kernels.cuda.choose import Epilogue
from ...kernels.cuda.launch import (
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
from ...kernels.cuda.skinny import coefficients, value_grads
from ...rules import Rule, get_rule
from ..factored_linear.cuda import fused_sum
from ..factored_linear.eager import add_key_grad, key_grad
from . import eager

__all__ = ["OVERWRITES_SAVED", "backward", "forward"]

#: ``backward`` takes ``overwrite``.
OVERWRITES_SAVED = True


def _activate(
    x: Tensor,
    weights: tuple[Tensor | None, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    coefficients: tuple[Tensor | None, Tensor | None],
    values: tuple[Tensor | None, Tensor | None],
    act: str,
    save: bool,
    overlap: Overlap,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(inter, gate, up)``, the last two empty unless ``save``; pairs are (gate, up). ``None`` if it cannot be fused."""
    activation = fused_activation(act)
    gate_weight, up_weight = weights
    rows, width = x.shape[0], up_weight.shape[0]
    reason = refusal(
        [("f", width), ("d", x.shape[1]), *(("R", b.shape[0]) for b in values if b is not None)],
        [(name, w) for name, w in zip(("gate_proj", "up_proj"), weights, strict=True) if w is not None],
    )
    if activation is None:
        reason = f"act={act!r} has no fused epilogue (silu, quick_gelu and tanh-gelu have)"
    if reason is not None or rows == 0:
        if reason is not None:
            say_fallback("mlp", reason)
        return None
    assert activation is not None
    inter = x.new_empty(rows, width)
    up = x.new_empty(rows, width) if save else x.new_empty(0)
    c_gate, c_up = coefficients
    b_gate, b_up = values
    if gate_weight is None:
        segments = [Segment(MAIN, x, up_weight)]
        if b_up is not None:
            assert c_up is not None
            segments.append(low_rank(c_up, b_up))
        run(
            Epilogue.ACT, segments, [inter, up] if save else [inter],
            bias=biases[1], activation=activation, store_pre=save, overlap=overlap,
        )  # fmt: skip
        return inter, x.new_empty(0), up
    gate = x.new_empty(rows, width) if save else x.new_empty(0)
    segments = [Segment(MAIN, x, gate_weight, up_weight)]
    if b_gate is not None and b_up is not None and c_gate is c_up:
        assert c_gate is not None
        segments.append(low_rank(c_gate, b_gate, LOW, b_up))
    else:
        for c, b, kind in ((c_gate, b_gate, LOW_FIRST), (c_up, b_up, LOW_SECOND)):
            if b is not None:
                assert c is not None
                segments.append(low_rank(c, b, kind))
    if biases[0] is not None or biases[1] is not None:
        segments.append(bias_segment(x, biases[0], biases[1], width))
    run(
        Epilogue.GATE_UP, segments, [inter, gate, up] if save else [inter],
        activation=activation, store_pre=save, overlap=overlap,
    )  # fmt: skip
    return inter, gate, up


def forward(
    x: Tensor,
    a: Tensor,
    key_scale: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    w_down: Tensor,
    gate_key: Tensor | None,
    gate_value: Tensor | None,
    up_key: Tensor | None,
    up_value: Tensor | None,
    down_key: Tensor | None,
    down_value: Tensor | None,
    act: str,
    rule: str,
    num_ranks: int,
    scale: float,
    save: bool,
) -> tuple[Tensor, ...]:
    """``(out, z, p_gate, p_up, p_down, gate, up)``; the last two are empty unless ``save``."""
    rule_ = get_rule(rule)
    if gate_weight is None:
        gate_key = gate_value = gate_bias = None
    x = rows_ok(
        x
    )  # before the coefficients: what a decode kernel reads early may not be written by the kernel before it
    z: Tensor | None = None
    c_first: Tensor | None = None
    own = False

    def target(key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``(p, c)`` of a target that reads x and z̃; the first of them makes z along with its own."""
        nonlocal z, c_first, own
        if value is None:
            return x.new_empty(0), None
        if z is not None and rule_.key == "none":  # c depends on z̃ alone: gate and up have the same, in one segment
            return x.new_empty(0), c_first
        if z is None:
            low = coefficients(x, key, key_scale, rule, num_ranks, scale, a=a, w_down=w_down)
        else:
            low = coefficients(x, key, key_scale, rule, num_ranks, scale, z=z)
        z, c_first, own = low.z, low.c, low.own
        return low.p, low.c

    p_gate, c_gate = target(gate_key, gate_value)
    p_up, c_up = target(up_key, up_value)
    if z is None:
        z = a @ w_down
    fused = _activate(
        x, (gate_weight, up_weight), (gate_bias, up_bias), (c_gate, c_up), (gate_value, up_value), act, save,
        "low" if own else None,
    )  # fmt: skip
    if fused is None:
        return eager.forward(
            x, a, key_scale, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, w_down,
            gate_key, gate_value, up_key, up_value, down_key, down_value, act, rule, num_ranks, scale, save,
        )  # fmt: skip
    inter, gate, up = fused
    if down_value is None:
        return F.linear(inter, down_weight, down_bias), z, p_gate, p_up, x.new_empty(0), gate, up
    low = coefficients(inter, down_key, None, rule, num_ranks, scale, z=z)
    # Without a key of its own c is z, and the kernel before is the one that writes inter.
    before: Overlap = "low" if low.own else "all" if rule_.key == "none" else None
    out = fused_sum("mlp down_proj", [(inter, down_weight)], [(low.c, down_value)], down_bias, before)
    if out is None:
        out = F.linear(inter, down_weight, down_bias).addmm_(low.c, down_value)
    return out, z, p_gate, p_up, low.p, gate, up


def _act_backward(
    dout: Tensor,
    down_weight: Tensor,
    dp_down: Tensor | None,
    down_key: Tensor | None,
    gate: Tensor,
    up: Tensor,
    gated: bool,
    act: str,
    rule: Rule,
    want_gate: bool,
    want_up: bool,
    overwrite: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dgate, dup)`` from ``dinter = dout @ Wd + dp_d @ A_d``, which is never stored where it can be fused.

    ``overwrite``: in the places of gate and up. A block has read a part of both into shared memory before it stores the same
    part, and no other block reads it (csrc/gemm/segk_pingpong.cuh).
    """
    activation = fused_activation(act)
    low: tuple[Tensor, Tensor] | None = None
    if dp_down is not None:
        assert down_key is not None
        low = padded_vector(dp_down, down_key) if down_key.dim() == 1 else (dp_down, down_key)
    reason = refusal(
        [("f", up.shape[1]), ("d", dout.shape[1]), *([("R", low[1].shape[0])] if low else [])],
        [("down_proj", down_weight)],
    )
    if activation is None:
        reason = f"act={act!r} has no fused epilogue (silu, quick_gelu and tanh-gelu have)"
    if reason is None and dout.shape[0]:
        assert activation is not None
        segments = [Segment(MAIN, rows_ok(dout), down_weight.t())]
        if low is not None:
            segments.append(low_rank(*low))
        up = rows_ok(up)
        dup = (up if overwrite else torch.empty_like(up)) if want_up else None
        if not gated:
            run(Epilogue.ACT_BWD, segments, [dup], inputs=[up], activation=activation)
            return None, dup
        gate = rows_ok(gate)
        dgate = (gate if overwrite else torch.empty_like(gate)) if want_gate else None
        run(Epilogue.GATE_UP_BWD, segments, [dgate, dup], inputs=[gate, up], activation=activation)
        return dgate, dup
    if reason is not None:
        say_fallback("mlp backward", reason)
    plain = get_activation(act)
    dinter = dout @ down_weight
    add_key_grad(dinter, dp_down, down_key, rule)
    if not gated:
        return None, plain.backward(dinter, up)
    dup = plain.forward(gate).mul_(dinter) if want_up else None
    return plain.backward(dinter.mul_(up), gate) if want_gate else None, dup


def backward(
    dout: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    key_scale: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    down_weight: Tensor | None,
    w_down: Tensor | None,
    gate_key: Tensor | None,
    gate_value: Tensor | None,
    up_key: Tensor | None,
    up_value: Tensor | None,
    down_key: Tensor | None,
    down_value: Tensor | None,
    z: Tensor,
    p_gate: Tensor,
    p_up: Tensor,
    p_down: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    gated: bool,
    act: str,
    rule: str,
    num_ranks: int,
    scale: float,
    needs: list[bool],
    overwrite: bool = False,
) -> list[Tensor]:
    """Gradients of the 16 tensor arguments of ``forward`` where ``needs`` is true, in that order.

    ``overwrite``: gate and up may be written over, which saves two ``[T, f]`` tensors.
    """
    (
        need_x, need_a, need_key_scale, need_gate_weight, need_up_weight, need_down_weight,
        need_gate_bias, need_up_bias, need_down_bias, need_w_down,
        need_gate_key, need_gate_value, need_up_key, need_up_value, need_down_key, need_down_value,
    ) = needs  # fmt: skip
    rule_ = get_rule(rule)
    has_key = rule_.key != "none"
    need_z = need_a or need_w_down
    need_z_in = need_z or need_key_scale
    # A gradient of z̃ passes only through targets that have a delta.
    z_gate, z_up = need_z_in and gate_value is not None, need_z_in and up_value is not None
    gate_first = need_x or z_gate or need_gate_weight or need_gate_bias or need_gate_key or need_gate_value
    up_first = need_x or z_up or need_up_weight or need_up_bias or need_up_key or need_up_value
    need_inter = gate_first or up_first

    dz = dp_down = d_down_value = None
    if down_value is not None:
        need_p = has_key and (need_inter or need_down_key)
        dz, dp_down, d_down_value = value_grads(
            dout, down_value, z, p_down, None, rule, num_ranks, scale, need_z, need_p, need_down_value
        )
    d_down_weight = d_down_key = None
    if need_down_weight or need_down_key:
        activation = get_activation(act)
        assert up is not None
        inter = activation.forward(gate).mul_(up) if gated and gate is not None else activation.forward(up)
        d_down_weight = dout.t() @ inter if need_down_weight else None
        d_down_key = key_grad(dp_down, inter, rule_) if need_down_key else None
        del inter
    dgate = dup = None
    if need_inter:
        assert down_weight is not None and gate is not None and up is not None
        dgate, dup = _act_backward(
            dout,
            down_weight,
            dp_down,
            down_key,
            gate,
            up,
            gated,
            act,
            rule_,
            gate_first,
            up_first or not gated,
            overwrite,
        )

    dz_in: Tensor | None = None

    def through_value(
        dy: Tensor | None, p: Tensor, key: Tensor | None, value: Tensor | None, need_key: bool, need_value: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dp, d key, d value) of gate or up; adds its share to ``dz_in``."""
        nonlocal dz_in
        if dy is None or value is None:
            return None, None, None
        need_p = has_key and (need_x or need_key)
        share, dp, d_value = value_grads(
            dy, value, z, p, key_scale, rule, num_ranks, scale, need_z_in, need_p, need_value
        )  # fmt: skip
        if share is not None:
            dz_in = share if dz_in is None else dz_in.add_(share)
        return dp, key_grad(dp, x, rule_) if need_key else None, d_value

    dp_gate, d_gate_key, d_gate_value = through_value(
        dgate, p_gate, gate_key, gate_value, need_gate_key, need_gate_value
    )
    dp_up, d_up_key, d_up_value = through_value(dup, p_up, up_key, up_value, need_up_key, need_up_value)

    dx = None
    if need_x:
        dx = _input_grad([(dgate, gate_weight, dp_gate, gate_key), (dup, up_weight, dp_up, up_key)], rule_)
    d_key_scale = None
    if need_key_scale:
        d_key_scale = z.new_zeros(z.shape[0]) if dz_in is None else torch.linalg.vecdot(dz_in, z)
    if need_z and dz_in is not None:
        share = dz_in if key_scale is None else dz_in.mul_(key_scale.unsqueeze(1))
        dz = share if dz is None else dz.add_(share)
    da = d_w_down = None
    if need_z:
        if dz is None:  # no target has a delta
            dz = torch.zeros_like(z)
        if need_a:
            assert w_down is not None
            da = dz @ w_down.t()
        if need_w_down:
            assert a is not None
            d_w_down = a.t() @ dz

    def weight_grad(dy: Tensor | None) -> Tensor:
        assert dy is not None and x is not None
        return dy.t() @ x

    grads = (
        dx, da, d_key_scale,
        weight_grad(dgate) if need_gate_weight else None,
        weight_grad(dup) if need_up_weight else None,
        d_down_weight,
        dgate.sum(0) if need_gate_bias and dgate is not None else None,
        dup.sum(0) if need_up_bias and dup is not None else None,
        dout.sum(0) if need_down_bias else None,
        d_w_down, d_gate_key, d_gate_value, d_up_key, d_up_value, d_down_key, d_down_value,
    )  # fmt: skip
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


def _input_grad(parts: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]], rule: Rule) -> Tensor:
    """``dx = Σ dy @ W + dp @ A`` over (gate, up): one launch for two terms or more, else the vendor's GEMM."""
    present = [(dy, w, dp, key) for dy, w, dp, key in parts if dy is not None and w is not None]
    low = [(dp, key) for _, _, dp, key in present if dp is not None and key is not None]
    if len(present) + len(low) > 1:
        dx = fused_sum("mlp dx", [(dy, w.t()) for dy, w, _, _ in present], low)
        if dx is not None:
            return dx
    dx = present[0][0] @ present[0][1]
    for dy, w, _, _ in present[1:]:
        dx.addmm_(dy, w)
    for dp, key in low:
        add_key_grad(dx, dp, key, rule)
    return dx
