"""``npt_kernels::mlp``: the plan of this folder as an op, for autograd and for ``torch.compile``. Maths: README.md here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...rules import get_rule
from ..custom_op import define_op
from ..dense_on_use import dense
from ..factored_linear.op import fake_key_product
from ..overwrite import mark_overwritten, may_overwrite
from ..registry import get_steps
from .operands import BACKWARD_SCHEMA, FORWARD_SCHEMA, NUM_SAVED, NUM_TENSORS, Operands, Saved, Spec
from .passes import backward, forward, keep

__all__ = ["OP", "mlp"]

#: Arguments of the backward after its tensors, without ``overwrite``: sizes, needs, the spec, backend.
_CONSTANTS = 3 + len(Spec._fields)
#: Where gate and up stand among the saved tensors.
_WIDE = tuple(NUM_TENSORS + Saved._fields.index(name) for name in ("gate", "up"))


def _dense(o: Operands) -> dense:
    return dense(o.gate.weight, o.up.weight, o.down.weight)


def _with_weights(o: Operands, weights: tuple[Any, ...]) -> Operands:
    if weights[1] is o.up.weight and weights[2] is o.down.weight and weights[0] is o.gate.weight:
        return o
    gate, up, down = (t._replace(weight=weight) for t, weight in zip((o.gate, o.up, o.down), weights, strict=True))
    return o._replace(gate=gate, up=up, down=down)


def _run(o: Operands, spec: Spec, save: bool, backend: str) -> tuple[Tensor, Saved]:
    with _dense(o) as weights:
        return forward(get_steps(backend), _with_weights(o, weights), spec, save)


def _eager_forward(*args: Any) -> tuple[Tensor | None, ...]:
    act, rule, num_ranks, scale, save, backend = args[NUM_TENSORS:]
    out, made = _run(Operands.of(args[:NUM_TENSORS]), Spec(act, rule, num_ranks, scale), save, backend)
    return (out, *made)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    # An empty tensor of its own for each that is not there: torch.library refuses outputs that share memory, and None.
    return tuple(args[0].new_empty(0) if t is None else t for t in _eager_forward(*args))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    o, (*spec, save, _) = Operands.of(args[:NUM_TENSORS]), args[NUM_TENSORS:]
    rule = Spec(*spec).rule
    tokens, width, empty = o.x.shape[0], o.up.weight.shape[0], o.x.new_empty
    gated = o.gate.weight is not None

    def product(value: Tensor | None) -> Tensor:
        return empty(0) if value is None else fake_key_product(o.x, value, rule)

    return (
        empty(tokens, o.down.weight.shape[0]),
        *Saved(
            empty(0) if o.w_down is None else empty(tokens, o.w_down.shape[1]),
            product(o.gate.value if gated else None),
            product(o.up.value),
            product(o.down.value),
            empty(tokens, width) if save and gated else empty(0),
            empty(tokens, width) if save else empty(0),
        ),
    )


def _raw_backward(dout: Tensor, *args: Any) -> list[Tensor]:
    """``overwrite`` (last) is said by eager calls alone, custom ops may not mutate; torch.library leaves a default out."""
    o, made = Operands.of(args[:NUM_TENSORS]), Saved(*args[NUM_TENSORS : NUM_TENSORS + NUM_SAVED])
    sizes, needs, *spec, backend = args[NUM_TENSORS + NUM_SAVED :][:_CONSTANTS]
    overwrite = args[NUM_TENSORS + NUM_SAVED :][_CONSTANTS:] == (True,)
    steps, need = get_steps(backend), Operands.of(needs)
    overwrite = overwrite and steps.overwrites_saved
    with _dense(o) as weights:
        grads = backward(
            steps, dout, _with_weights(o, weights), made, need, Spec(*spec), bool(sizes[-1]), overwrite
        ).flat()  # fmt: skip
    if overwrite:
        mark_overwritten((made.gate, made.up))
    wanted = [grad for grad, needed in zip(grads, needs, strict=True) if needed]
    if any(grad is None for grad in wanted):
        raise AssertionError("the backward of mlp lost a gradient that was asked for")
    return wanted


def _fake_backward(dout: Tensor, *args: Any) -> list[Tensor]:
    made = Saved(*args[NUM_TENSORS : NUM_TENSORS + NUM_SAVED])
    sizes, needs, *spec = args[NUM_TENSORS + NUM_SAVED :][:6]
    d, d_a, f, _ = sizes
    (tokens, total_rank), d_out = made.z.shape, dout.shape[1]
    matrix_key = get_rule(Spec(*spec).rule).key == "matrix"

    def target(out: int, width: int) -> tuple[tuple[int, ...], ...]:
        return (out, width), (out,), (total_rank, width) if matrix_key else (width,), (total_rank, out)

    shapes = (
        (tokens, d), (tokens, d_a), (tokens,), (d_a, total_rank), *target(f, d), *target(f, d), *target(d_out, f), (tokens,),
    )  # fmt: skip
    empty = [dout.new_empty(shape) for shape in shapes[:-1]]
    empty.append(dout.new_empty(shapes[-1], dtype=torch.promote_types(dout.dtype, torch.float32)))
    return [grad for grad, need in zip(empty, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o, (*spec, _, ctx.backend) = Operands.of(inputs[:NUM_TENSORS]), inputs[NUM_TENSORS:]
    ctx.spec = Spec(*spec)
    ctx.sizes = [o.x.shape[1], o.a.shape[1], o.up.weight.shape[0], int(o.gate.weight is not None)]
    operands, made = keep(Operands.of(ctx.needs_input_grad[:NUM_TENSORS]), o, Saved(*output[1:]), ctx.spec)
    ctx.save_for_backward(*operands.flat(), *made)


def _backward(ctx: Any, dout: Tensor, run: Callable[..., list[Tensor]]) -> list[Tensor]:
    needs, saved = list(ctx.needs_input_grad[:NUM_TENSORS]), ctx.saved_tensors
    overwrite = run is _raw_backward and get_steps(ctx.backend).overwrites_saved and may_overwrite(saved, _WIDE)
    return run(dout, *saved, ctx.sizes, needs, *ctx.spec, ctx.backend, overwrite)


#: ``OP(*Operands.flat(), *Spec, save, backend) -> (out, *Saved)``.
OP = define_op(
    "mlp",
    num_tensors=NUM_TENSORS,
    forward=_forward,
    eager_forward=_eager_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    raw_backward=_raw_backward,
    fake_backward=_fake_backward,
    schema=FORWARD_SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
)


def mlp(operands: Operands, spec: Spec, save: bool, backend: str) -> Tensor:
    """``out [T, d_out]``. ``save``: whether a backward may follow."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Around the flat form and its empty outputs: 33 of 113 us at sizes where nothing else counts.
        row = get_steps(backend).mlp_row(operands, spec) if operands.x.shape[0] == 1 else None
        return _run(operands, spec, save, backend)[0] if row is None else row
    return OP(*operands.flat(), *spec, save, backend)[0]
