"""Argument checks of the public ops: one line that names the argument, the value it has and what would work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "check_shape", "check_tensors", "differ", "flatten_tokens"]


def check_tensors(op: str, tensors: Sequence[tuple[str, object]], reference: Tensor) -> None:
    """All present tensors are floating, on one device, of one dtype (that of ``x``)."""
    device, dtype = reference.device, reference.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: x must be floating point, got {dtype}")
    for name, tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            if not tensor.is_floating_point():
                raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; use {name}.to({dtype})")
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} but x is {dtype}; cast one of them ({name}.to({dtype})) "
                "or call under torch.autocast"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {device}; use {name}.to('{device}')")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | torch.SymInt, ...], meaning: str) -> None:
    """The exact shape; ``meaning`` says it in letters, such as ``[R, out]``."""
    if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {meaning} = {list(expected)}")


def flatten_tokens(op: str, name: str, tensor: Tensor, leading: torch.Size, keep: int, meaning: str) -> Tensor:
    """``[*leading, ...] -> [T, ...]`` keeping the last ``keep`` dimensions; leading dimensions must match those of x."""
    if tensor.dim() != len(leading) + keep or differ(tensor.shape[: len(leading)], leading):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {meaning} with ... = {list(leading)}")
    return tensor if len(leading) == 1 else tensor.reshape(-1, *tensor.shape[len(leading) :])


def differ(sizes: torch.Size, expected: torch.Size) -> bool:
    """Whether two lists of sizes differ. While tracing, sizes that are not known are assumed equal and checked
    when the graph runs, so that several ``mark_unbacked`` inputs do not end the trace.
    """
    if not torch.compiler.is_compiling():
        return sizes != expected
    if len(sizes) != len(expected):
        return True
    # Imported here: it brings sympy, 0.4 s that eager use does not pay. torch 2.6 has no guard_or_false.
    from torch.fx.experimental import symbolic_shapes

    surely = getattr(symbolic_shapes, "guard_or_false", symbolic_shapes.statically_known_true)
    for a, b in zip(sizes, expected, strict=True):
        if surely(a != b):
            return True
        torch._check(a == b)
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to compute in when autocast is on for x's device, else ``None``. float64 is never cast down."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
