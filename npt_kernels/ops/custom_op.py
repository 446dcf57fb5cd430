"""One definition, two callers: how every op reaches autograd and ``torch.compile``.

An op is four functions (forward, fake, setup_context, backward) over flat tensors. From them :func:`define_op` makes

* an ``autograd.Function`` for eager calls, because a ``torch.library`` op costs about 10 µs per eager call
  (pytorch #177109), and
* a pair of ``torch.library`` ops (forward and backward, opaque to the compiler, with fake kernels) for compiled code.

Both share ``setup_context`` and ``backward``, so they cannot drift apart. ``backward`` returns only the gradients that were
asked for, as a list, and the pair saves only what those need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Op", "define_op"]


@dataclass(frozen=True)
class Op:
    """A callable op: the differentiable outputs first, then what is saved for the backward."""

    name: str
    function: type[torch.autograd.Function]
    forward: Callable[..., tuple[Any, ...]]
    library_op: Any
    library_backward: Any
    #: ``function.apply`` below ``torch.func``'s layer, which looks at every argument twice: 45 of 300 us for the MLP's 22.
    apply: Callable[..., tuple[Any, ...]]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():
            return self.library_op(*args)
        if not torch.is_grad_enabled():
            return self.forward(*args)
        if _transforms_active():  # torch.func: only Function.apply knows what to do
            return self.function.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
        return self.apply(*args)


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def define_op(
    name: str,
    *,
    num_tensors: int,
    forward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
    backward: Callable[[Any, Any, Callable[..., list[Tensor]]], list[Tensor]],
    raw_backward: Callable[..., list[Tensor]],
    fake_backward: Callable[..., list[Tensor]],
    num_outputs: int = 1,
    schema: str | None = None,
    backward_schema: str | None = None,
    eager_forward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Op:
    """Build an :class:`Op`.

    Args:
        name: Op name below the namespace ``npt_kernels``.
        num_tensors: The first ``num_tensors`` arguments of ``forward`` are tensors or ``None``; the others are constants.
        forward: Function returning ``(*outputs, *saved)``; annotated, so that its schema can be inferred, if ``schema`` is not
            given.
        fake: Shapes of ``forward`` without computing.
        setup_context: Saves what ``ctx.needs_input_grad`` asks for; runs for both callers.
        backward: ``(ctx, grad_output, run) -> gradients asked for, in argument order``; calls ``run(...)`` once. With more
            than one output, ``grad_output`` is a tuple in which an output that nothing depends on has ``None``.
        raw_backward: What ``run`` is in eager mode; annotated likewise.
        fake_backward: Shapes of ``raw_backward``.
        num_outputs: How many leading outputs are differentiable; the rest is only saved.
        schema, backward_schema: torch.library's, without the name, instead of inferred ones.
        eager_forward: ``forward`` with ``None`` for what is not there to be saved, which torch.library does not allow.
    """
    eager = eager_forward or forward
    library_op = torch.library.custom_op(f"npt_kernels::{name}", forward, mutates_args=(), schema=schema)
    library_op.register_fake(fake)
    library_backward = torch.library.custom_op(
        f"npt_kernels::{name}_backward", raw_backward, mutates_args=(), schema=backward_schema
    )
    library_backward.register_fake(fake_backward)

    def shared_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[made for made in output[num_outputs:] if made is not None])
        setup_context(ctx, inputs, output)

    def run_backward(ctx: Any, grads: Sequence[Tensor | None], run: Callable[..., list[Tensor]]) -> Any:
        result: list[Tensor | None] = [None] * ctx.num_inputs
        if all(grad is None for grad in grads[:num_outputs]):
            return tuple(result)
        needed = [i for i in range(num_tensors) if ctx.needs_input_grad[i]]
        if needed:
            grad_output = grads[0] if num_outputs == 1 else tuple(grads[:num_outputs])
            for index, grad in zip(needed, backward(ctx, grad_output, run), strict=True):
                result[index] = grad
        return tuple(result)

    def eager_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return run_backward(ctx, grads, raw_backward)

    library_op.register_autograd(
        lambda ctx, *grads: run_backward(ctx, grads, library_backward), setup_context=shared_setup
    )
    function = type(
        f"Npt_{name}",
        (torch.autograd.Function,),
        {
            "__doc__": f"Eager autograd of ``npt_kernels::{name}``; see ops/custom_op.py.",
            # ``*args``: Function.apply binds the signature of what it finds here on every call, 0.3 ms for 22 named arguments.
            "forward": staticmethod(lambda *args: eager(*args)),
            "setup_context": staticmethod(shared_setup),
            "backward": staticmethod(torch.autograd.function.once_differentiable(eager_backward)),
        },
    )
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return Op(name, function, eager, library_op, library_backward, apply)
