"""Schema, fake kernels and autograd of ``npt_kernels::linear``. Maths: README.md in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from ..custom_op import define_op
from ..dense_on_use import dense
from ..registry import get_steps


def _forward(
    x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Optional[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    with dense(weight) as (weight,):
        return get_steps(backend).linear(x, weight, v_a, v_b, bias)


def _fake(
    x: Tensor, weight: Tensor, v_a: Tensor, v_b: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], v_a.shape[1])


def _raw_backward(
    dy: Tensor,
    x: Optional[Tensor],
    weight: Optional[Tensor],
    v_a: Optional[Tensor],
    v_b: Optional[Tensor],
    s: Optional[Tensor],
    sizes: list[int],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    with dense(weight) as (weight,):
        return get_steps(backend).linear_backward(dy, x, weight, v_a, v_b, s, needs)


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    v_a: Tensor | None,
    v_b: Tensor | None,
    s: Tensor | None,
    sizes: list[int],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    d_in, num_ranks = sizes
    tokens, out = dy.shape
    shapes = ((tokens, d_in), (out, d_in), (tokens, num_ranks, d_in), (tokens, num_ranks, out), (out,))
    return [dy.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, v_a, v_b, _, ctx.backend = inputs
    need_x, need_weight, need_v_a, need_v_b = ctx.needs_input_grad[:4]
    ctx.sizes = [x.shape[1], v_a.shape[1]]
    ctx.save_for_backward(
        x if need_weight or need_v_a else None,
        weight if need_x else None,
        v_a if need_x else None,
        v_b if need_x or need_v_a else None,
        output[1] if need_v_b else None,
    )


def _backward(ctx: Any, dy: Tensor, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    return run(dy, *ctx.saved_tensors, ctx.sizes, ctx.backend, list(ctx.needs_input_grad[:5]))


#: ``linear(x, weight, v_a, v_b, bias, backend) -> (y, s)`` over flat ``[T, ...]`` tensors.
linear = define_op(
    "linear",
    num_tensors=5,
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    raw_backward=_raw_backward,
    fake_backward=_fake_backward,
)

__all__ = ["linear"]
