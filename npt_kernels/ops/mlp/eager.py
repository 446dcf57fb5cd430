"""``mlp`` on the vendor's GEMM. Beyond inputs, outputs and what is saved, the forward holds one ``[T, f]`` at a time more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...activations import get_activation
from ...rules import Rule, get_rule
from ..factored_linear.eager import add_key_grad, key_grad, key_product


def _target(
    u: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_a_up: Tensor | None,
    w_b_up: Tensor | None,
    rule: Rule,
    num_ranks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(u @ Wᵀ + c @ w_b_up + bias, p)``."""
    y = F.linear(u, weight, bias)
    if w_b_up is None:
        return y, u.new_empty(0)
    p = key_product(u, w_a_up, rule)
    y.addmm_(rule.coefficients(z, p, num_ranks, scale), w_b_up)
    return y, p


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
    rule_, activation = get_rule(rule), get_activation(act)
    z = a @ w_down
    z_in = z if key_scale is None else z * key_scale.unsqueeze(1)
    up, p_up = _target(x, z_in, up_weight, up_bias, up_key, up_value, rule_, num_ranks, scale)
    if gate_weight is None:
        gate, p_gate = x.new_empty(0), x.new_empty(0)
        inter = activation.forward(up)
    else:
        gate, p_gate = _target(x, z_in, gate_weight, gate_bias, gate_key, gate_value, rule_, num_ranks, scale)
        inter = activation.forward(gate).mul_(up)
    if not save:
        gate, up = x.new_empty(0), x.new_empty(0)  # two: torch.library refuses outputs that share memory
    out, p_down = _target(inter, z, down_weight, down_bias, down_key, down_value, rule_, num_ranks, scale)
    return out, z, p_gate, p_up, p_down, gate, up


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
) -> list[Tensor]:
    """Gradients of the 16 tensor arguments of ``forward`` where ``needs`` is true, in that order."""
    (
        need_x, need_a, need_key_scale, need_gate_weight, need_up_weight, need_down_weight,
        need_gate_bias, need_up_bias, need_down_bias, need_w_down,
        need_gate_key, need_gate_value, need_up_key, need_up_value, need_down_key, need_down_value,
    ) = needs  # fmt: skip
    rule_, activation = get_rule(rule), get_activation(act)
    has_key = rule_.key != "none"
    need_z = need_a or need_w_down
    need_z_in = need_z or need_key_scale
    # A gradient of z̃ passes only through targets that have a delta.
    z_gate, z_up = need_z_in and gate_value is not None, need_z_in and up_value is not None
    gate_first = need_x or z_gate or need_gate_weight or need_gate_bias or need_gate_key or need_gate_value
    up_first = need_x or z_up or need_up_weight or need_up_bias or need_up_key or need_up_value
    need_inter = gate_first or up_first

    # The down projection: its delta, then dinter = dout @ Wd + dp_d @ A_d.
    dz = dp_down = down_coefficients = None
    if down_value is not None:
        need_p = has_key and (need_inter or need_down_key)
        if need_z or need_p:
            dz, dp_down = rule_.backward(dout @ down_value.t(), z, p_down, num_ranks, scale, need_z, need_p)
        if need_down_value:
            down_coefficients = rule_.coefficients(z, p_down, num_ranks, scale)
    d_down_value = None if down_coefficients is None else down_coefficients.t() @ dout
    d_down_weight = d_down_key = None
    if need_down_weight or need_down_key:
        assert up is not None
        inter = activation.forward(gate).mul_(up) if gated and gate is not None else activation.forward(up)
        d_down_weight = dout.t() @ inter if need_down_weight else None
        d_down_key = key_grad(dp_down, inter, rule_) if need_down_key else None
        del inter
    dgate = dup = None
    if need_inter:
        assert down_weight is not None and up is not None
        dinter = dout @ down_weight
        if down_value is not None:
            add_key_grad(dinter, dp_down, down_key, rule_)
        if not gated:
            dup = activation.backward(dinter, up)
        else:
            assert gate is not None
            dup = activation.forward(gate).mul_(dinter) if up_first else None
            dgate = activation.backward(dinter.mul_(up), gate) if gate_first else None
        del dinter

    # Gate and up share x and z̃.
    z_in = z if key_scale is None else z * key_scale.unsqueeze(1)
    dz_in: Tensor | None = None

    def through_value(
        dy: Tensor | None, p: Tensor, key: Tensor | None, value: Tensor | None, need_key: bool, need_value: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dp, d key, d value) of gate or up; adds its share to ``dz_in``."""
        nonlocal dz_in
        if dy is None or value is None:
            return None, None, None
        need_p = has_key and (need_x or need_key)
        dp = None
        if need_z_in or need_p:
            share, dp = rule_.backward(dy @ value.t(), z_in, p, num_ranks, scale, need_z_in, need_p)
            if share is not None:
                dz_in = share if dz_in is None else dz_in.add_(share)
        d_value = rule_.coefficients(z_in, p, num_ranks, scale).t() @ dy if need_value else None
        return dp, key_grad(dp, x, rule_) if need_key else None, d_value

    dp_gate, d_gate_key, d_gate_value = through_value(
        dgate, p_gate, gate_key, gate_value, need_gate_key, need_gate_value
    )
    dp_up, d_up_key, d_up_value = through_value(dup, p_up, up_key, up_value, need_up_key, need_up_value)

    dx = None
    if need_x:
        assert dup is not None and up_weight is not None
        dx = dup @ up_weight
        add_key_grad(dx, dp_up, up_key, rule_)
        if dgate is not None:
            assert gate_weight is not None
            dx.addmm_(dgate, gate_weight)
            add_key_grad(dx, dp_gate, gate_key, rule_)
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
