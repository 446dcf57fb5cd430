"""Schema, fake kernels and autograd of ``npt_kernels::mlp``. Maths: README.md in this folder.

``*_key`` is a target's ``w_a_up``, ``*_value`` its ``w_b_up``: key and value of a rank-1 change of a linear memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from ...rules import get_rule
from ..custom_op import define_op
from ..dense_on_use import dense
from ..factored_linear.op import fake_key_product
from ..overwrite import mark_overwritten, may_overwrite
from ..registry import get_backend

_NUM_TENSORS = 16
#: Where gate and up stand among the saved tensors.
_WIDE = (17, 18)


def _forward(
    x: Tensor,
    a: Tensor,
    key_scale: Optional[Tensor],
    gate_weight: Optional[Tensor],
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional[Tensor],
    up_bias: Optional[Tensor],
    down_bias: Optional[Tensor],
    w_down: Tensor,
    gate_key: Optional[Tensor],
    gate_value: Optional[Tensor],
    up_key: Optional[Tensor],
    up_value: Optional[Tensor],
    down_key: Optional[Tensor],
    down_value: Optional[Tensor],
    act: str,
    rule: str,
    num_ranks: int,
    scale: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with dense(gate_weight, up_weight, down_weight) as (gate_weight, up_weight, down_weight):
        return get_backend(backend).module("mlp").forward(
            x, a, key_scale, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, w_down,
            gate_key, gate_value, up_key, up_value, down_key, down_value, act, rule, num_ranks, scale, save,
        )  # fmt: skip


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, _, _, gate_weight, up_weight, down_weight, _, _, _, w_down, *rest = args
    _, gate_value, _, up_value, _, down_value = rest[:6]
    _, rule, _, _, save, _ = rest[6:]
    tokens, empty = x.shape[0], x.new_empty

    def product(value: Tensor | None) -> Tensor:
        return empty(0) if value is None else fake_key_product(x, value, rule)

    return (
        empty(tokens, down_weight.shape[0]),
        empty(tokens, w_down.shape[1]),
        product(gate_value if gate_weight is not None else None),
        product(up_value),
        product(down_value),
        empty(tokens, up_weight.shape[0]) if save and gate_weight is not None else empty(0),
        empty(tokens, up_weight.shape[0]) if save else empty(0),
    )


def _raw_backward(
    dout: Tensor,
    x: Optional[Tensor],
    a: Optional[Tensor],
    key_scale: Optional[Tensor],
    gate_weight: Optional[Tensor],
    up_weight: Optional[Tensor],
    down_weight: Optional[Tensor],
    w_down: Optional[Tensor],
    gate_key: Optional[Tensor],
    gate_value: Optional[Tensor],
    up_key: Optional[Tensor],
    up_value: Optional[Tensor],
    down_key: Optional[Tensor],
    down_value: Optional[Tensor],
    z: Tensor,
    p_gate: Tensor,
    p_up: Tensor,
    p_down: Tensor,
    gate: Optional[Tensor],
    up: Optional[Tensor],
    sizes: list[int],
    gated: bool,
    act: str,
    rule: str,
    num_ranks: int,
    scale: float,
    backend: str,
    needs: list[bool],
    overwrite: bool = False,
) -> list[Tensor]:
    """``overwrite``: gate and up are the backend's to write over; only eager calls ever say so, custom ops may not mutate."""
    module = get_backend(backend).module("mlp")
    overwrite = overwrite and getattr(module, "OVERWRITES_SAVED", False)
    with dense(gate_weight, up_weight, down_weight) as (gate_weight, up_weight, down_weight):
        grads: list[Tensor] = module.backward(
            dout, x, a, key_scale, gate_weight, up_weight, down_weight, w_down,
            gate_key, gate_value, up_key, up_value, down_key, down_value, z, p_gate, p_up, p_down, gate, up,
            gated, act, rule, num_ranks, scale, needs, *((True,) if overwrite else ()),
        )  # fmt: skip
    if overwrite:
        mark_overwritten((gate, up))
    return grads


def _fake_backward(*args: Any) -> list[Tensor]:
    dout, z, sizes, rule, needs = args[0], args[14], args[20], args[23], args[27]
    tokens, total_rank = z.shape
    d, d_a, f = sizes
    d_out = dout.shape[1]
    matrix_key = get_rule(rule).key == "matrix"

    def key(width: int) -> tuple[int, ...]:
        return (total_rank, width) if matrix_key else (width,)

    shapes = (
        (tokens, d), (tokens, d_a), (tokens,), (f, d), (f, d), (d_out, f), (f,), (f,), (d_out,), (d_a, total_rank),
        key(d), (total_rank, f), key(d), (total_rank, f), key(f), (total_rank, d_out),
    )  # fmt: skip
    return [dout.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, a, key_scale, gate_weight, up_weight, down_weight, _, _, _, w_down,
     gate_key, gate_value, up_key, up_value, down_key, down_value,
     *constants, _, backend) = inputs  # fmt: skip
    (need_x, need_a, need_key_scale, need_gate_weight, need_up_weight, need_down_weight, need_gate_bias, need_up_bias, _,
     need_w_down, need_gate_key, need_gate_value, need_up_key, need_up_value, need_down_key,
     _) = ctx.needs_input_grad[:_NUM_TENSORS]  # fmt: skip
    ctx.constants, ctx.backend, ctx.gated = constants, backend, gate_weight is not None
    ctx.sizes = [x.shape[1], a.shape[1], up_weight.shape[0]]
    need_z = need_a or need_w_down or need_key_scale
    # Whether a gradient flows through the down projection into gate or up: only then is dout @ Wd formed.
    upstream = any((
        need_x, need_gate_weight, need_up_weight, need_gate_bias, need_up_bias,
        need_gate_key, need_gate_value, need_up_key, need_up_value,
        need_z and (gate_value is not None or up_value is not None),
    ))  # fmt: skip
    z, p_gate, p_up, p_down, gate, up = output[1:]
    wide = (gate, up) if upstream or need_down_weight or need_down_key else (None, None)
    ctx.save_for_backward(
        x if need_gate_weight or need_up_weight or need_gate_key or need_up_key else None,
        a if need_w_down else None,
        key_scale,
        gate_weight if need_x else None,
        up_weight if need_x else None,
        down_weight if upstream else None,
        w_down if need_a else None,
        gate_key if need_x else None,
        gate_value,
        up_key if need_x else None,
        up_value,
        down_key if upstream else None,
        down_value,
        z,
        p_gate,
        p_up,
        p_down,
        *wide,
    )


def _backward(ctx: Any, dout: Tensor, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    needs, saved = list(ctx.needs_input_grad[:_NUM_TENSORS]), ctx.saved_tensors
    options = (True,) if run is _raw_backward and may_overwrite(saved, _WIDE) else ()
    return run(dout, *saved, ctx.sizes, ctx.gated, *ctx.constants, ctx.backend, needs, *options)


#: ``mlp(*16 tensors, act, rule, num_ranks, scale, save, backend) -> (out, z, p_gate, p_up, p_down, gate, up)``.
mlp = define_op(
    "mlp",
    num_tensors=_NUM_TENSORS,
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    raw_backward=_raw_backward,
    fake_backward=_fake_backward,
)

__all__ = ["mlp"]
