"""The definition in plain PyTorch: three explicit linears with materialised ΔW_t. Small shapes only; run it in float64."""

from __future__ import annotations

from torch import Tensor

from ...activations import get_activation
from ..factored_linear.naive import factored_linear
from ..linear.naive import linear


def _target(
    u: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_a_up: Tensor | None,
    w_b_up: Tensor | None,
    rule: str,
    num_ranks: int,
    scale: float,
) -> Tensor:
    if w_b_up is None:
        empty_a, empty_b = u.new_zeros(u.shape[0], 0, u.shape[1]), u.new_zeros(u.shape[0], 0, weight.shape[0])
        return linear(u, weight, empty_a, empty_b, bias)
    return factored_linear(u, z, weight, w_a_up, w_b_up, bias, rule=rule, num_ranks=num_ranks, scale=scale)


def mlp(
    x: Tensor,
    a: Tensor,
    key_scale: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    w_down: Tensor | None,
    gate_key: Tensor | None,
    gate_value: Tensor | None,
    up_key: Tensor | None,
    up_value: Tensor | None,
    down_key: Tensor | None,
    down_value: Tensor | None,
    row_scale: Tensor | None = None,
    act: str = "silu",
    rule: str = "rank1",
    num_ranks: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """``out [T, d]``; arguments in the order of the op, shapes as in README.md (``*_key`` is w_a_up, ``*_value`` w_b_up)."""
    activation = get_activation(act).forward
    z = a if w_down is None else a @ w_down
    z_in = z if key_scale is None else z * key_scale.unsqueeze(1)
    if row_scale is not None:
        rows = row_scale.to(x.dtype).unsqueeze(1)
        x, z_in = x * rows, z_in * rows
    up = _target(x, z_in, up_weight, up_bias, up_key, up_value, rule, num_ranks, scale)
    if gate_weight is None:
        inter = activation(up)
    else:
        inter = activation(_target(x, z_in, gate_weight, gate_bias, gate_key, gate_value, rule, num_ranks, scale)) * up
    return _target(inter, z, down_weight, down_bias, down_key, down_value, rule, num_ranks, scale)
