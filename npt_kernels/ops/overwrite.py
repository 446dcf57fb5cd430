"""May a backward write over a tensor that its forward saved? Only if it can be shown that nobody else can ever read it.

Three things must hold, each of which errs towards "no":

* The graph is not kept (``retain_graph``, ``create_graph``): the engine frees what was saved as soon as this backward returns.
  (What AOTAutograd asks before it donates a buffer, through the same function; without that function the answer is no.)
* No other Python reference to the tensor: the reference count is the one that a fresh, unshared saved tensor has.
* No other tensor on its storage (views, detached copies): likewise.

Both counts are compared with those of a probe, a tiny autograd function run once, so they follow the Python and torch at hand.
What remains are tensors that other C++ nodes saved; after overwriting, the caller bumps the version
(:func:`mark_overwritten`), so such a node raises torch's "modified by an inplace operation" instead of using wrong values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["mark_overwritten", "may_overwrite"]


def _counts(saved: tuple[Any, ...], index: int) -> tuple[int, int]:
    """(Python references, storage references) of ``saved[index]``, this function's own included."""
    return sys.getrefcount(saved[index]), torch._C._storage_Use_Count(saved[index].untyped_storage()._cdata)


@lru_cache(maxsize=1)
def _unshared() -> tuple[int, int] | None:
    """Counts of a saved output that nobody else holds; ``None`` if this torch does not tell."""
    found: list[tuple[int, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x * 1, x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(output[1])

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: Any = None) -> Tensor:  # type: ignore[override]
            found.append(_counts(ctx.saved_tensors, 0))
            return grad

    try:
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            torch.autograd.grad(Probe.apply(x)[0], x, torch.ones(1))
    except (AttributeError, TypeError):
        return None
    return found[0]


def may_overwrite(saved: tuple[Any, ...], indices: Iterable[int]) -> bool:
    """Whether a running backward may overwrite these entries of ``ctx.saved_tensors`` (the tuple itself, held only once)."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps_graph is None or keeps_graph():
        return False
    try:
        unshared = _unshared()
        # An empty tensor stands for one that this call has not: nothing to overwrite.
        counts = [_counts(saved, i) for i in indices if saved[i] is not None and saved[i].numel()]
    except NotImplementedError:  # torch.func's wrappers have no storage
        return False
    if unshared is None:
        return False
    return all(found <= own for pair in counts for found, own in zip(pair, unshared, strict=True))


def mark_overwritten(tensors: Iterable[Tensor | None]) -> None:
    """Tell autograd that kernels wrote over these: another node that saved one raises when it is used."""
    for tensor in tensors:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)
