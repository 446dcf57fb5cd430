"""Schema, fake kernels and autograd of ``npt_kernels::factored_linear``. Maths: README.md in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from ...kernels.steps import Bottleneck, Projection, Spec
from ...rules import get_rule
from ..custom_op import define_op
from ..dense_on_use import dense
from ..registry import get_steps

#: The steps take an activation's name; this op has none.
_NO_ACT = ""


def _forward(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    w_a_up: Optional[Tensor],
    w_b_up: Tensor,
    bias: Optional[Tensor],
    rule: str,
    num_ranks: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    steps, spec = get_steps(backend), Spec(_NO_ACT, rule, num_ranks, scale)
    with dense(weight) as (weight,):
        target, x = Projection(weight, bias, w_a_up, w_b_up), steps.readable(x)
        low = steps.low(x, target, Bottleneck(z), spec)
        y = steps.project(x, target, low, spec, chained=False)
    return y, x.new_empty(0) if low.p is None else low.p


def fake_key_product(u: Tensor, w_b_up: Tensor, rule: str) -> Tensor:
    """Shape of ``p`` under a rule."""
    key = get_rule(rule).key
    return u.new_empty(0) if key == "none" else u.new_empty(u.shape[0], w_b_up.shape[0] if key == "matrix" else 1)


def _fake(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    w_a_up: Tensor | None,
    w_b_up: Tensor,
    bias: Tensor | None,
    rule: str,
    num_ranks: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), fake_key_product(x, w_b_up, rule)


def _raw_backward(
    dy: Tensor,
    x: Optional[Tensor],
    z: Tensor,
    weight: Optional[Tensor],
    w_a_up: Optional[Tensor],
    w_b_up: Optional[Tensor],
    p: Tensor,
    d_in: int,
    rule: str,
    num_ranks: int,
    scale: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    steps, spec = get_steps(backend), Spec(_NO_ACT, rule, num_ranks, scale)
    need_x, need_z, need_weight, need_key, need_value, need_bias = needs
    want_p = get_rule(rule).key != "none" and (need_x or need_key)
    dz = dp = d_value = dx = d_key = None
    if need_z or want_p or need_value:
        dz, dp, d_value = steps.value_grads(dy, w_b_up, Bottleneck(z), p, spec, need_z, want_p, need_value)  # type: ignore[arg-type]
    if need_x:
        with dense(weight) as (weight,):
            dx = steps.input_grad([(dy, Projection(weight, None, w_a_up, w_b_up), dp)], spec)
    if need_key:
        assert dp is not None and x is not None
        d_key = steps.key_grad(dp, x, spec)
    d_weight = dy.t() @ x if need_weight and x is not None else None
    grads = (dx, dz, d_weight, d_key, d_value, dy.sum(0) if need_bias else None)
    wanted = [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]
    assert len(wanted) == sum(needs), "the backward of factored_linear lost a gradient that was asked for"
    return wanted


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    w_a_up: Tensor | None,
    w_b_up: Tensor | None,
    p: Tensor,
    d_in: int,
    rule: str,
    num_ranks: int,
    scale: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    (tokens, out), total_rank = dy.shape, z.shape[1]
    key_shape = (total_rank, d_in) if get_rule(rule).key == "matrix" else (d_in,)
    shapes = ((tokens, d_in), (tokens, total_rank), (out, d_in), key_shape, (total_rank, out), (out,))
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, weight, w_a_up, w_b_up, _, *ctx.constants = inputs
    need_x, need_z, need_weight, need_key, _, _ = ctx.needs_input_grad[:6]
    ctx.d_in = x.shape[1]
    ctx.save_for_backward(
        x if need_weight or need_key else None,
        z,
        weight if need_x else None,
        w_a_up if need_x else None,
        w_b_up if need_x or need_z or need_key else None,
        output[1],
    )


def _backward(ctx: Any, dy: Tensor, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    return run(dy, *ctx.saved_tensors, ctx.d_in, *ctx.constants, list(ctx.needs_input_grad[:6]))


#: ``factored_linear(x, z, weight, w_a_up, w_b_up, bias, rule, num_ranks, scale, backend) -> (y, p)``, flat tensors.
factored_linear = define_op(
    "factored_linear",
    num_tensors=6,
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    raw_backward=_raw_backward,
    fake_backward=_fake_backward,
)

__all__ = ["factored_linear", "fake_key_product"]
