"""Schema, fake kernels and autograd of ``npt_kernels::matched_norm``. Maths: README.md in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from ..custom_op import define_op
from ..registry import get_steps


def _forward(
    h: Tensor, a: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], kind: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return get_steps(backend).matched_norm(h, a, weight, bias, kind, eps)


def _fake(
    h: Tensor, a: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[0])


def _raw_backward(
    du: Optional[Tensor],
    d_key_scale: Optional[Tensor],
    h: Tensor,
    a: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    kind: str,
    eps: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    return get_steps(backend).matched_norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)


def _fake_backward(
    du: Tensor | None,
    d_key_scale: Tensor | None,
    h: Tensor,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    tensors = (h, a, weight, bias)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, a, weight, bias, *ctx.constants = inputs
    ctx.save_for_backward(h, a, weight, bias)


def _backward(ctx: Any, grads: tuple[Tensor | None, Tensor | None], run: Callable[..., list[Tensor]]) -> list[Tensor]:
    return run(*grads, *ctx.saved_tensors, *ctx.constants, list(ctx.needs_input_grad[:4]))


#: ``matched_norm(h, a, weight, bias, kind, eps, backend) -> (u, key_scale)`` over flat ``[T, d]`` tensors.
matched_norm = define_op(
    "matched_norm",
    num_tensors=4,
    num_outputs=2,
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    raw_backward=_raw_backward,
    fake_backward=_fake_backward,
)

__all__ = ["matched_norm"]
