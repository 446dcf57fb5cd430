"""Frozen weights that are stored in another form (quantised) and become dense only while an op runs.

A :class:`DeferredWeight` looks like the dense ``[out, in]`` weight (shape, dtype, device) and holds none of it. It may be cast,
transposed and saved for a backward pass at no cost; its values are made when an operation needs them, anew in the backward,
in a scratch buffer that all weights share. So dense copies never add up over layers, and nothing can read a scratch buffer
that another weight has overwritten since: no tensor that leaves an operation lies in one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..thread_locks import ThreadLock

__all__ = ["DeferredWeight", "WeightSource", "dense", "release_scratch", "scratch_buffers"]


class WeightSource(Protocol):
    """What can make a dense weight."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the values are made in; other dtypes are cast from it."""

    @property
    def weight_device(self) -> torch.device: ...

    def fill_weight(self, out: Tensor) -> None:
        """Write the values into ``out [out, in]``, contiguous, of ``weight_dtype``, on ``weight_device``."""


class DeferredWeight(torch.Tensor):
    """A dense weight on demand. Frozen: it never requires a gradient and cannot be written to."""

    source: WeightSource
    transposed: bool

    @staticmethod
    def __new__(
        cls, source: WeightSource, dtype: torch.dtype | None = None, *, transposed: bool = False
    ) -> DeferredWeight:
        rows, columns = source.weight_shape
        shape, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        self: DeferredWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=dtype or source.weight_dtype, device=source.weight_device
        )
        self.source, self.transposed = source, transposed
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredWeight({type(self.source).__name__}, shape={list(self.shape)}, dtype={self.dtype})"

    def to_dense(self, **_: Any) -> Tensor:  # type: ignore[override]
        """A dense copy of its own, for callers that keep it."""
        out = torch.empty(self.source.weight_shape, dtype=self.dtype, device=self.device)
        return self._write(out)

    @torch.no_grad()
    def _write(self, out: Tensor) -> Tensor:
        """The values in ``out [out, in]`` of this weight's dtype; a view of it in this weight's orientation."""
        if out.dtype == self.source.weight_dtype:
            self.source.fill_weight(out)
        else:
            # Rounded through the source's dtype, as casting the dense weight would.
            with _borrowed(self.source.weight_shape, self.source.weight_dtype, self.device) as values:
                self.source.fill_weight(values)
                out.copy_(values)
        return out.t() if self.transposed else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default, aten.lift_fresh.default):
            return DeferredWeight(args[0].source, args[0].dtype, transposed=args[0].transposed)
        if func in (aten.t.default, aten.transpose.int):
            return DeferredWeight(args[0].source, args[0].dtype, transposed=not args[0].transposed)
        if func is aten._to_copy.default and kwargs.get("device") in (None, args[0].device):
            return DeferredWeight(args[0].source, kwargs.get("dtype") or args[0].dtype, transposed=args[0].transposed)
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, DeferredWeight):
                raise TypeError(f"{func} would write to a quantised weight, which is frozen")
        if any(result.alias_info is not None for result in schema.returns):  # a view may outlive the scratch
            args, kwargs = tree_map_only(DeferredWeight, DeferredWeight.to_dense, (args, kwargs))
            return func(*args, **kwargs)
        found: list[DeferredWeight] = []
        tree_map_only(DeferredWeight, found.append, (args, kwargs))
        with dense(*found) as values:
            order = iter(values)
            args, kwargs = tree_map_only(DeferredWeight, lambda _: next(order), (args, kwargs))
            return func(*args, **kwargs)


# ---- scratch ---------------------------------------------------------------------------------------------------------

# Measured on a CPU (int8 -> float32, 14336 x 4096, 2 threads): 27 ms into a buffer that exists, 132 ms into fresh memory,
# whose pages the kernel has to map and clear first.
_buffers: dict[tuple[int, torch.dtype, torch.device, int], Tensor] = {}
_in_use: set[tuple[int, torch.dtype, torch.device, int]] = set()
# One op at a time has the buffers; the autograd engine's threads and a user's ask for them too.
_lock = ThreadLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # What another thread was writing into when this process was forked is of no use to it.
    os.register_at_fork(after_in_child=lambda: (_in_use.clear(), _buffers.clear()))  # type: ignore[func-returns-value]


class _borrowed:
    """A scratch tensor of that shape for the time of a ``with`` block; the lowest free slot, grown when it is too small."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def __enter__(self) -> Tensor:
        _lock.acquire()
        try:
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            slot = 0
            while (key := (slot, self.dtype, self.device, stream)) in _in_use:
                slot += 1
            numel = self.shape[0] * self.shape[1]
            buffer = _buffers.get(key)
            if buffer is None or buffer.numel() < numel:
                _buffers.pop(key, None)
                buffer = None  # the old one goes before the new one comes
                # An inference-mode tensor could not be written to outside of it.
                with torch.inference_mode(False):
                    buffer = torch.empty(numel, dtype=self.dtype, device=self.device)
                _buffers[key] = buffer
            _in_use.add(key)
            self.key = key
            with torch.inference_mode(False):
                return buffer[:numel].view(self.shape)
        except BaseException:
            _lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        _in_use.discard(self.key)
        _lock.release()


class dense:
    """``with dense(*weights) as values``: deferred weights made dense in scratch buffers, all others as they are.

    The values are good inside the block only. ``None`` stays ``None``.
    """

    __slots__ = ("borrowed", "weights")

    def __init__(self, *weights: Tensor | None) -> None:
        self.weights = weights
        self.borrowed: list[_borrowed] = []

    def __enter__(self) -> tuple[Any, ...]:
        if not any(isinstance(weight, DeferredWeight) for weight in self.weights):
            return self.weights
        values: list[Tensor | None] = []
        try:
            for weight in self.weights:
                if isinstance(weight, DeferredWeight):
                    loan = _borrowed(weight.source.weight_shape, weight.dtype, weight.device)
                    out = loan.__enter__()
                    self.borrowed.append(loan)
                    values.append(weight._write(out))
                else:
                    values.append(weight)
        except BaseException:
            self.__exit__()
            raise
        return tuple(values)

    def __exit__(self, *_: object) -> None:
        while self.borrowed:
            self.borrowed.pop().__exit__()


def scratch_buffers() -> Iterator[Tensor]:
    """The buffers there are now, for tests and memory accounts."""
    yield from _buffers.values()


def release_scratch() -> None:
    """Give the scratch memory back; the next use allocates it anew."""
    with _lock:
        for key in [key for key in _buffers if key not in _in_use]:
            del _buffers[key]
