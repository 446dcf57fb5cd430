"""A CUDA stream for CPU tensors: launches overlap as on a GPU, and freed memory is handed out again at once.

torch's caching allocator gives a freed tensor's memory to the next one although kernels that read it are still running; the
stream's order makes that right. :class:`Stream` does the same here, so a kernel that writes before an earlier one has ended is
seen. Inside it, allocations come from an arena that prefers what was freed last, and every other torch operation first waits for
all kernels, as an operation on the same stream would.
"""

from __future__ import annotations

import ctypes
import weakref
from types import TracebackType
from typing import Any

import torch
from control import Emulator
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Stream"]

_ARENA_BYTES, _ALIGNMENT = 1 << 24, 512
_EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip
#: Operations that touch no data.
_VIEWS = {
    torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default,
    torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.detach.default, torch.ops.aten.as_strided.default,
    torch.ops.aten.alias.default,
}  # fmt: skip


class Stream(TorchDispatchMode):
    """``with Stream(emulator, seed): ...``; everything has ended when the block has. Raises ``RuntimeError`` on a fault.

    Attributes:
        reused: Allocations that were given memory which an earlier tensor had.
        waits: Torch operations that had to wait for the kernels.
    """

    def __init__(self, emulator: Emulator, seed: int) -> None:
        super().__init__()
        self._overlap = emulator.overlapping(seed)
        self._emulator = emulator
        self._memory = (ctypes.c_uint8 * (_ARENA_BYTES + _ALIGNMENT))()
        ctypes.memset(self._memory, 0xFF, len(self._memory))  # NaN
        self._next = -ctypes.addressof(self._memory) % _ALIGNMENT
        self._free: list[tuple[int, int]] = []  # (offset, bytes), freed last at the end
        self.reused = self.waits = 0

    def __enter__(self) -> Stream:
        self._overlap.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind: Any, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)
        self._overlap.__exit__(kind, value, trace)

    def _take(self, size: int) -> int:
        """Offset of ``size`` bytes: the last freed piece that is large enough, else new ones."""
        for i in reversed(range(len(self._free))):
            offset, have = self._free[i]
            if have >= size:
                self._free[i : i + 1] = [(offset + size, have - size)] if have > size else []
                self.reused += 1
                return offset
        offset, self._next = self._next, self._next + size
        if self._next > _ARENA_BYTES:
            raise MemoryError(f"the arena of {_ARENA_BYTES} bytes is full")
        return offset

    def _allocate(self, sample: torch.Tensor) -> torch.Tensor:
        """A tensor like ``sample`` in the arena; its piece comes back when its storage dies."""
        count = (
            sum((n - 1) * s for n, s in zip(sample.shape, sample.stride(), strict=True)) + 1 if sample.numel() else 0
        )
        if count == 0:
            return torch.empty_like(sample, device="cpu")
        size = -(-count * sample.element_size() // _ALIGNMENT) * _ALIGNMENT
        offset = self._take(size)
        piece = type("Piece", (ctypes.c_uint8 * size,), {}).from_buffer(self._memory, offset)
        weakref.finalize(piece, self._free.append, (offset, size))
        flat = torch.frombuffer(piece, dtype=sample.dtype, count=count)
        return flat.as_strided(sample.shape, sample.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY:
            return self._allocate(func(*args, **{**kwargs, "device": "meta"}))
        if func not in _VIEWS:
            self.waits += 1
            self._emulator.wait()
        return func(*args, **kwargs)
