"""Counting the bytes of live tensors: what a piece of code holds at its worst moment, exactly and on any device.

Beside the allocator's own statistics (CUDA only, rounded to blocks) and the process's resident memory (everything, never
going down) this counts tensors: ``nbytes`` of every storage, once however many views it has, from the op that made it until
the last reference to it, autograd's included, is gone. The memory planner is checked against it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "LiveTensor", "storages_of"]

#: Ops that hand a tensor made outside the dispatcher (``torch.tensor([...])``) to it: their *input* is the new one.
_LIFTS = {"aten::lift_fresh", "aten::lift", "aten::lift_fresh_copy"}


@dataclass(frozen=True)
class LiveTensor:
    """One storage that was alive at the peak: ``bytes``, the op that made it (``given`` for ``include``) and its shape."""

    bytes: int
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    phase: str


@dataclass
class _Peak:
    total: int = 0
    devices: dict[str, int] = field(default_factory=dict)


def _plain(value: Any) -> Iterator[Tensor]:
    """The tensors with storage behind a tensor: itself, or the parts of a wrapper subclass (torchao, DTensor)."""
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def _attached(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Tensors in attributes of a parameter: bitsandbytes keeps scales and code books there (``quant_state``, ``SCB``)."""
    for entry in getattr(value, "__dict__", {}).values():
        if isinstance(entry, Tensor):
            yield from _plain(entry)
        elif depth < 2 and type(entry).__module__.startswith(("bitsandbytes", "torchao")):
            yield from _attached(entry, depth + 1)


def storages_of(what: nn.Module | Tensor | Iterable[Any]) -> dict[int, Tensor]:
    """Storage → a tensor on it, for a tensor, a module (parameters, their gradients, buffers, tensors that quantised
    parameters carry) or an iterable of such. Meta tensors have none. Raises ``TypeError`` for anything else.
    """
    if isinstance(what, nn.Module):
        own = [*what.parameters(), *what.buffers()]
        tensors: list[Any] = [*own, *(p.grad for p in what.parameters() if p.grad is not None)]
        tensors += [extra for tensor in own for extra in _attached(tensor)]
    elif isinstance(what, Tensor):
        tensors = [what]
    elif isinstance(what, str) or not isinstance(what, Iterable):
        raise TypeError(f"expected modules, tensors or iterables of them, got {type(what).__name__}")
    else:
        merged: dict[int, Tensor] = {}
        for entry in what:
            merged |= storages_of(entry)
        return merged
    plain = (part for tensor in tensors for part in _plain(tensor))
    return {t.untyped_storage()._cdata: t for t in plain if _has_storage(t)}


def _has_storage(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of tensor storages allocated inside it, now and at the peak.

    ::

        with LiveBytes(include=model) as live:       # the model's own tensors count from the start
            with live.phase("forward"):
                loss = model(ids).mean()
            with live.phase("backward"):
                loss.backward()
        print(live.peak, live.peaks["backward"], live.largest(5))

    Views count once, in-place ops nothing; a tensor that autograd saved counts until it is released. What an operator
    allocates and frees within itself (a GEMM's packing, the inside of a ``torch.library`` custom op) is not seen, its outputs
    are. Tensors that exist before and are not in ``include`` do not count, nor do their views. Backward passes are seen, since
    autograd takes the mode along to its threads.

    Args:
        include: Module, tensor or iterable of them whose storages count from the start.
        trace: Remember every allocation, so that :meth:`largest` can say what was alive at the peak.

    Attributes:
        current: Bytes alive now.
        peak: Highest ``current`` since the start.
        peaks: Phase → highest ``current`` inside it, what was alive at its start included. Phases may recur and be nested
            (the innermost counts).
        device_peaks: Device (``"cpu"``, ``"cuda:0"``) → highest sum on it.
    """

    def __init__(self, include: nn.Module | Tensor | Iterable[Any] | None = None, *, trace: bool = False) -> None:
        super().__init__()
        self.trace = trace
        self.current = 0
        self.peaks: dict[str, int] = {}
        self._lock = threading.RLock()  # finalizers run in whichever thread drops the last reference
        self._peak = _Peak()
        self._on_device: dict[str, int] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._phases: list[str] = [""]
        self._events: list[tuple[int, int]] = []
        self._made: dict[int, LiveTensor] = {}
        self._serial: dict[int, int] = {}
        self._count = 0
        self._peak_event = 0
        self._given = {} if include is None else storages_of(include)

    # ---- results -----------------------------------------------------------------------------------------------------

    @property
    def peak(self) -> int:
        return self._peak.total

    @property
    def device_peaks(self) -> dict[str, int]:
        return dict(self._peak.devices)

    def largest(self, count: int | None = None) -> list[LiveTensor]:
        """The storages that were alive at the peak, largest first. Raises ``RuntimeError`` without ``trace=True``."""
        if not self.trace:
            raise RuntimeError("LiveBytes(trace=True) remembers what was alive; this one was made without")
        sizes: dict[int, int] = {}
        for serial, size in self._events[: self._peak_event]:
            sizes[serial] = size
        alive = sorted(((size, serial) for serial, size in sizes.items() if size), reverse=True)
        return [LiveTensor(**{**vars(self._made[serial]), "bytes": size}) for size, serial in alive[:count]]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside the block are also kept under ``name`` in :attr:`peaks`."""
        with self._lock:
            self._phases.append(name)
            self.peaks[name] = max(self.peaks.get(name, 0), self.current)
        try:
            yield
        finally:
            with self._lock:
                self._phases.pop()

    def release(self, what: nn.Module | Tensor | Iterable[Any]) -> None:
        """Stop counting these storages although they live on, say because they stand for host memory."""
        for key in storages_of(what):
            self._forget(key)

    # ---- counting ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> LiveBytes:
        given, self._given = self._given, {}
        for tensor in given.values():
            self._add(tensor, "given")
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        with self._lock:
            # Without its references a finalizer never runs: tensors that live on must not change the result.
            self._alive.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a wrapper subclass takes itself apart first; its inner ops come back here
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and _has_storage(t)]
        before = {t.untyped_storage()._cdata for t in inputs}
        result = func(*args, **(kwargs or {}))
        name = func.name()
        fresh = name.partition(".")[0] in _LIFTS
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not _has_storage(tensor):
                continue
            key = tensor.untyped_storage()._cdata
            if fresh or key not in before or key in self._alive:
                self._add(tensor, name)
        return result

    def _add(self, tensor: Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key, size, device = storage._cdata, storage.nbytes(), str(tensor.device)
        with self._lock:
            known = self._alive.get(key)
            if known is not None and known[1] == size:
                return
            reference = weakref.ref(storage, partial(self._finalize, key)) if known is None else known[0]
            self._alive[key] = (reference, size, device)
            self._change(size - (known[1] if known else 0), device)
            if self.trace:
                if known is None:
                    self._count += 1
                    self._serial[key] = self._count
                    shape = tuple(tensor.shape)
                    self._made[self._count] = LiveTensor(size, op, shape, tensor.dtype, device, self._phases[-1])
                self._events.append((self._serial[key], size))
            if self.current > self._peak.total:
                self._peak.total, self._peak_event = self.current, len(self._events)

    def _finalize(self, key: int, reference: weakref.ref[Any]) -> None:
        with self._lock:
            entry = self._alive.get(key)
            # The same address may already belong to a new storage.
            if entry is not None and entry[0] is reference:
                self._forget(key)

    def _forget(self, key: int) -> None:
        with self._lock:
            entry = self._alive.pop(key, None)
            if entry is None:
                return
            self._change(-entry[1], entry[2])
            if self.trace:
                self._events.append((self._serial[key], 0))

    def _change(self, size: int, device: str) -> None:
        self.current += size
        self._on_device[device] = self._on_device.get(device, 0) + size
        self._peak.devices[device] = max(self._peak.devices.get(device, 0), self._on_device[device])
        phase = self._phases[-1]
        if phase:
            self.peaks[phase] = max(self.peaks.get(phase, 0), self.current)
