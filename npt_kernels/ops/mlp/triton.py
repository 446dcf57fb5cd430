"""``mlp`` in Triton: gate and up in one GEMM with the activation, ``dgate`` and ``dup`` in the epilogue of ``dout @ Wd``.

Neither ``dinter`` nor an intermediate of the activation is written. The down projection is the vendor's GEMM when it has no
delta, ``dx`` always: nothing there fuses. Maths: README.md in this folder.
"""

from __future__ import annotations

from torch import Tensor

from ...activations import get_activation
from ...kernels.triton.coefficients import coefficients_forward
from ...kernels.triton.decode import DECODE_TOKENS, decode_act, decode_pair
from ...kernels.triton.gate_up import pair_forward
from ...kernels.triton.rules import merge_dz, rule_backward, rule_forward
from ...kernels.triton.segmented_gemm import Segment, gemm_act, gemm_act_backward, gemm_pair_backward
from ...kernels.triton.value_grads import skinny_grad, skinny_pair
from ...rules import get_rule
from ..factored_linear.eager import add_key_grad, key_product
from ..factored_linear.triton import key_matrix, linear_with_delta, skinny_key_grad

#: ``backward`` takes ``overwrite``.
OVERWRITES_SAVED = True


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
    rule_, act = get_rule(rule), get_activation(act).name
    gated, few = gate_weight is not None, x.shape[0] <= DECODE_TOKENS
    empty = x.new_empty
    z: Tensor | None = None
    c_first: Tensor | None = None

    def coefficients(key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Segment | None]:
        """(p, low-rank segment) of a target that reads x and z̃; the first of them makes z along with its own."""
        nonlocal z, c_first
        if value is None:
            return empty(0), None
        if z is None:
            u = None if rule_.key == "none" else x
            z, p, c_first = coefficients_forward(u, a, w_down, key, key_scale, rule, num_ranks, scale)
            return p, (c_first, value.t())
        p = key_product(x, key, rule_)
        # Without a key, c depends on z̃ alone: gate and up have the same.
        c = c_first if rule_.key == "none" else rule_forward(z, p, key_scale, rule, num_ranks, scale)
        assert c is not None
        return p, (c, value.t())

    p_gate, gate_segment = coefficients(gate_key, gate_value) if gated else (empty(0), None)
    p_up, up_segment = coefficients(up_key, up_value)
    if z is None:
        z = a @ w_down
    gate: Tensor | None = None
    up: Tensor | None
    if gate_weight is not None:
        pair = decode_pair if few else pair_forward
        inter, gate, up = pair(
            x, gate_weight, up_weight, gate_segment, up_segment, gate_bias, up_bias, act, save
        )  # fmt: skip
    else:
        segments = [(x, up_weight)] if up_segment is None else [(x, up_weight), up_segment]
        inter, up = (decode_act if few else gemm_act)(segments, up_bias, act, save)

    p_down, c_down = empty(0), None
    if down_value is not None:
        p_down = key_product(inter, down_key, rule_)
        c_down = rule_forward(z, p_down, None, rule, num_ranks, scale)
    out = linear_with_delta(inter, down_weight, c_down, down_value, down_bias)
    return out, z, p_gate, p_up, p_down, empty(0) if gate is None else gate, empty(0) if up is None else up


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
    gate: Tensor,
    up: Tensor,
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
    rule_, activation = get_rule(rule), get_activation(act)
    has_key = rule_.key != "none"
    need_z = need_a or need_w_down
    need_z_in = need_z or need_key_scale
    # A gradient of z̃ passes only through targets that have a delta.
    z_gate, z_up = need_z_in and gate_value is not None, need_z_in and up_value is not None
    gate_first = gated and (need_x or z_gate or need_gate_weight or need_gate_bias or need_gate_key or need_gate_value)
    up_first = need_x or z_up or need_up_weight or need_up_bias or need_up_key or need_up_value

    def low_rank(
        dy: Tensor, p: Tensor, value: Tensor, scale_of_z: Tensor | None, need_dz: bool, need_p: bool, need_value: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dz of the z that the target read, dp, d value) from the gradient ``dy`` of a target's output."""
        c = rule_forward(z, p, scale_of_z, rule, num_ranks, scale) if need_value else None
        dz = dp = None
        if not (need_dz or need_p or need_value):
            return None, None, None
        dc, d_value = skinny_pair(dy, value, c, need_dz or need_p, need_value)
        if dc is not None:
            dz, dp = rule_backward(dc, z, p, scale_of_z, rule, num_ranks, scale, need_dz, need_p)
        return dz, dp, d_value

    # The down projection: its delta, then dinter = dout @ Wd + dp_d @ A_d, which lives in registers only.
    dz_down = dp_down = d_down_value = None
    if down_value is not None:
        need_p = has_key and (gate_first or up_first or need_down_key)
        dz_down, dp_down, d_down_value = low_rank(dout, p_down, down_value, None, need_z, need_p, need_down_value)
    d_down_weight = d_down_key = None
    if need_down_weight or need_down_key:
        inter = activation.forward(gate).mul_(up) if gated else activation.forward(up)
        d_down_weight = dout.t() @ inter if need_down_weight else None
        d_down_key = skinny_key_grad(dp_down, inter, rule_) if need_down_key else None
        del inter
    dgate = dup = None
    if gate_first or up_first:
        assert down_weight is not None
        segments: list[Segment] = [(dout, down_weight.t())]
        if dp_down is not None and down_key is not None:
            segments.append((dp_down, key_matrix(down_key, rule_).t()))
        if gated:
            dgate, dup = gemm_pair_backward(
                segments, gate, up, activation.name, gate_first, up_first, overwrite=overwrite
            )  # fmt: skip
        else:
            dup = gemm_act_backward(segments, up, activation.name, overwrite=overwrite)

    # Gate and up share x and z̃.
    shares: list[Tensor] = []

    def through_value(
        dy: Tensor | None, p: Tensor, value: Tensor | None, need_key: bool, need_value: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dp, d key, d value) of gate or up; adds its share of dz̃."""
        if dy is None or value is None:
            return None, None, None
        need_p = has_key and (need_x or need_key)
        share, dp, d_value = low_rank(dy, p, value, key_scale, need_z_in, need_p, need_value)
        if share is not None:
            shares.append(share)
        return dp, skinny_key_grad(dp, x, rule_) if need_key else None, d_value

    dp_gate, d_gate_key, d_gate_value = through_value(dgate, p_gate, gate_value, need_gate_key, need_gate_value)
    dp_up, d_up_key, d_up_value = through_value(dup, p_up, up_value, need_up_key, need_up_value)

    dx = None
    if need_x:
        assert dup is not None and up_weight is not None
        dx = dup @ up_weight
        add_key_grad(dx, dp_up, up_key, rule_)
        if dgate is not None:
            assert gate_weight is not None
            dx.addmm_(dgate, gate_weight)
            add_key_grad(dx, dp_gate, gate_key, rule_)
    da = d_w_down = d_key_scale = None
    if need_z_in:
        dz, d_key_scale = merge_dz(shares, dz_down, z, key_scale, need_key_scale)
        if need_key_scale and d_key_scale is None:
            d_key_scale = z.new_zeros(z.shape[0])
        if need_a:
            assert w_down is not None
            da = dz @ w_down.t()
        if need_w_down:
            assert a is not None
            d_w_down = skinny_grad(dz, a, transposed=True)

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
    if not all(grad is not None for grad, need in zip(grads, needs, strict=True) if need):
        raise AssertionError("mlp backward lost a gradient that was asked for")
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]
