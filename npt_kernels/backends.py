"""The backend registry: which implementations exist, what each can run, which one is chosen and why.

Dispatch, tests and benchmarks share this one table. A backend names, for every op, the module that implements it
(``forward`` and ``backward`` over flat tensors) and a ``check`` that says why it cannot run a call. An explicit choice
(``backend="..."`` or the environment variable ``NPT_BACKEND``) that cannot run raises with that reason; the automatic choice
takes the first that can, and only ever a backend that was verified on such hardware.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

import torch

from .ops._cuda import unavailable as _cuda_unavailable

__all__ = ["Backend", "BackendUnavailableError", "available_backends", "get_backend", "resolve_backend"]


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


def _always(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: What users write in ``backend=``.
        modules: Op name → module with ``forward`` and ``backward``, imported at first use.
        automatic: Whether it may be chosen without being asked for. False until a run on such a device has verified it.
        check: ``(op, device, dtype) -> reason it cannot run, or None``.
        summary: One line for ``npt env``.
    """

    name: str
    modules: dict[str, str]
    automatic: bool
    summary: str
    check: Callable[[str, torch.device, torch.dtype], str | None] = field(default=_always)

    def module(self, op: str) -> ModuleType:
        """The implementation of ``op``."""
        return _load(self.modules[op])


@lru_cache(maxsize=None)
def _load(path: str) -> ModuleType:
    return importlib.import_module(path)


_OPS = ("linear", "factored_linear", "mlp")

#: In order of preference for the automatic choice.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="eager",
            modules={op: f"npt_kernels.ops.{op}.eager" for op in _OPS},
            automatic=True,
            summary="plain PyTorch: in-place addmm on the vendor's GEMM; any device and dtype",
        ),
        Backend(
            name="cuda",
            modules={op: f"npt_kernels.ops.{op}.cuda" for op in ("factored_linear", "mlp")},
            automatic=False,  # it never ran on a GPU: only when asked for by name
            summary="hand-written Hopper kernels (sm_90a): fused segmented-K GEMMs; bf16, fp16; unverified on hardware",
            check=_cuda_unavailable,
        ),
    )
}

_DEFAULT_BACKEND: str | None = os.environ.get("NPT_BACKEND") or None


def available_backends() -> tuple[str, ...]:
    """Names of the backends of this build, in order of preference."""
    return tuple(BACKENDS)


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises ``BackendUnavailableError`` naming those that exist."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise BackendUnavailableError(
            f"backend={name!r} is not part of this build; available: {', '.join(BACKENDS)} (None chooses by itself)"
        ) from None


def resolve_backend(op: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that will run ``op``: the one asked for (or ``NPT_BACKEND``), else the first that can."""
    requested = requested or _DEFAULT_BACKEND
    if requested is not None:
        reason = get_backend(requested).check(op, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"backend={requested!r} cannot run {op}: {reason}")
        return requested
    for backend in BACKENDS.values():
        if backend.automatic and backend.check(op, device, dtype) is None:
            return backend.name
    raise BackendUnavailableError(f"no backend can run {op} on {device} with {dtype}")
