"""Memory: how much was used, what an out-of-memory error should tell, and proof that the frozen base did not move."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..estimate.advice import advise
from ..model.install import converted_layers
from ..model.sharding import local_part
from ..quantised.foreign import stored_tensors

__all__ = ["base_fingerprint", "is_out_of_memory", "keep_freed_memory", "memory_advice", "peak_memory"]

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of handing them back to the kernel; nothing elsewhere.

    Training on a CPU frees and allocates the same tensors of some ten MB every step; by default each is mapped and
    page-faulted anew. Measured on two cores with SmolLM2-135M: about half the time of a step. For programs, not libraries: it
    holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # musl and others
        return


def peak_memory() -> dict[str, int]:
    """Bytes: ``rss``, the peak of the process since it started; ``cuda``, the peak that torch allocated, where it is used."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    memory = {"rss": int(peak)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda"] = int(torch.cuda.max_memory_allocated())
    return memory


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> dict[str, int]:
    """Name → sum of the bit patterns, for all that is stored and no NP component's (quantised weights too): equal if nothing
    moved. A sharded parameter has the sum of its shards, which is that of the whole; every process must call this then."""
    own = {id(p) for layer in converted_layers(model).values() for p in layer.np_component.parameters()}
    return {
        name: _bit_sum(t)
        for name, t in stored_tensors(model)
        if id(t) not in own and not t.is_meta and not t.is_complex()
    }


def _bit_sum(tensor: Tensor) -> int:
    part = local_part(tensor.detach())
    total = part.contiguous().view(_INTEGER[part.element_size()]).sum(dtype=torch.int64)
    if (mesh := getattr(tensor, "device_mesh", None)) is not None:
        torch.distributed.all_reduce(total, group=mesh.get_group())
    return int(total)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text.lower())


def memory_advice(config: RunConfig, error: BaseException) -> str:
    """What ran out, and what would need less: by the planner's count, or by rules of thumb where it does not know the model."""
    where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the host"
    first = (str(error) or type(error).__name__).splitlines()[0]
    try:
        found = advise(config, error)
    except ValueError:  # a model whose config.json is nowhere
        found = []
    if found:
        lines = "; or ".join(f"{entry.line} ({entry.cost})" for entry in found)
        return f"out of memory on {where} ({first}). By the plan's count these would fit: {lines}"
    return f"out of memory on {where} ({first}). Try: " + "; ".join(_rules_of_thumb(config))


def _rules_of_thumb(config: RunConfig) -> list[str]:
    """Keys of this configuration that would need less, most effective first."""
    t, o = config.training, config.optimization
    advice = []
    if t.batch_size > 1:
        half = t.batch_size // 2
        advice.append(
            f"training.batch_size={half} with gradient_accumulation_steps={t.gradient_accumulation_steps * t.batch_size // half} "
            f"(same step, now {t.batch_size} × {t.gradient_accumulation_steps})"
        )
    if t.mode in ("end_to_end", "local+polish") and not o.gradient_checkpointing:
        advice.append("optimization.gradient_checkpointing=true")
    if t.mode in ("end_to_end", "local+polish"):
        advice.append("training.mode=local (activations of one layer at a time)")
    if config.data.max_length > 128:
        advice.append(f"data.max_length={config.data.max_length // 2}")
    if config.model.dtype not in ("bfloat16", "float16"):
        advice.append("model.dtype=bfloat16")
    return advice
