"""What a piece of code allocates on a CPU, read from torch's allocator itself.

``LiveBytes`` counts tensors that pass the dispatcher and so cannot see inside a custom operator, which every op of this package
is: its temporaries would be free of charge beside those of plain PyTorch. The profiler's memory events miss nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MemoryTrace", "memory_meter"]


@dataclass(frozen=True)
class MemoryTrace:
    """Every allocation of the C++ CPU allocator inside the block, and the highest sum alive, in bytes."""

    allocations: list[int]
    peak: int


@contextlib.contextmanager
def memory_meter() -> Iterator[list[MemoryTrace]]:
    """Yields a list that holds one :class:`MemoryTrace` after the block. Scratch memory inside operators counts too."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes two lines on standard error for every block
    result: list[MemoryTrace] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield result
    events, stack = [], list(prof.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = peak = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        alive += size
        peak = max(peak, alive)
    result.append(MemoryTrace([size for _, size in events if size > 0], peak))
