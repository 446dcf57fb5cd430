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
from typing import NamedTuple

import torch

from .activations import get_activation
from .ops import _cuda as cuda_support
from .ops._triton import support as triton_support

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Call",
    "Explanation",
    "available_backends",
    "explain",
    "get_backend",
    "resolve_backend",
]


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


class Call(NamedTuple):
    """What a backend may ask about a call. A further fact is a further field with a default."""

    op: str
    device: torch.device
    dtype: torch.dtype
    #: Activation that the op applies, any alias; ``None`` for ops without one.
    act: str | None = None


def _always(call: Call) -> str | None:
    return None


def _triton(call: Call) -> str | None:
    act = None if call.act is None else get_activation(call.act).name
    return triton_support.why_not(call.device, call.dtype, act)


def _cuda(call: Call) -> str | None:
    return cuda_support.unavailable(call.op, call.device, call.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: What users write in ``backend=``.
        modules: Op name → module with ``forward`` and ``backward``, imported at first use.
        automatic: Whether it may be chosen without being asked for. False until a run on such a device has verified it.
        check: ``(Call) -> reason it cannot run, or None``.
        summary: One line for ``npt env``.
    """

    name: str
    modules: dict[str, str]
    automatic: bool
    summary: str
    check: Callable[[Call], str | None] = field(default=_always)

    def module(self, op: str) -> ModuleType:
        """The implementation of ``op``."""
        return _load(self.modules[op])


@lru_cache(maxsize=None)
def _load(path: str) -> ModuleType:
    return importlib.import_module(path)


_OPS = ("linear", "factored_linear", "mlp", "matched_norm")

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
            name="triton",
            modules={op: f"npt_kernels.ops.{op}.triton" for op in _OPS},
            automatic=False,  # its kernels have been interpreted and compiled, but never run on a GPU
            summary="portable fused kernels: the delta and the activation inside the GEMM; CUDA devices, fp16, bf16, fp32",
            check=_triton,
        ),
        Backend(
            name="cuda",
            # The other ops have no kernel: `check` refuses them, their entries only complete the table.
            modules={op: f"npt_kernels.ops.{op}.{'cuda' if op in cuda_support.OPS else 'eager'}" for op in _OPS},
            automatic=False,  # it never ran on a GPU: only when asked for by name
            summary="hand-written Hopper kernels (sm_90a): fused segmented-K GEMMs; bf16, fp16; unverified on hardware",
            check=_cuda,
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
    except (KeyError, TypeError):
        raise BackendUnavailableError(
            f"backend={name!r} is not part of this build; available: {', '.join(BACKENDS)} (None chooses by itself)"
        ) from None


def resolve_backend(
    op: str, requested: str | None, device: torch.device, dtype: torch.dtype, *, act: str | None = None
) -> str:
    """Name of the backend that will run ``op``: the one asked for (or ``NPT_BACKEND``), else the first that can.

    Raises:
        BackendUnavailableError: The backend asked for cannot run the call (with its reason), or none can.
    """
    requested = requested or _DEFAULT_BACKEND
    call = Call(op, device, dtype, act)
    if requested is not None:
        reason = get_backend(requested).check(call)
        if reason is not None:
            raise BackendUnavailableError(f"backend={requested!r} cannot run {op}: {reason}")
        return requested
    for backend in BACKENDS.values():
        if backend.automatic and backend.check(call) is None:
            return backend.name
    raise BackendUnavailableError(f"no backend can run {op} on {device} with {dtype}")


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and for every other one why it does not. ``str()`` is a short text.

    Attributes:
        call: The call explained.
        chosen: Name of the backend, or ``None`` if none can run it (``reasons`` says why).
        reasons: Every other backend → why not.
    """

    call: Call
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        dtype = str(self.call.dtype).removeprefix("torch.")
        head = f"{self.call.op} on {self.call.device}, {dtype}: {self.chosen or 'no backend can run it'}"
        return "\n".join([head, *(f"  not {name}: {reason}" for name, reason in self.reasons.items())])


def explain(
    op: str,
    *tensors: torch.Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    act: str | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend would run ``op`` and why each other would not. Runs nothing and raises nothing about backends.

    Args:
        op: ``"linear"``, ``"factored_linear"``, ``"mlp"`` or ``"matched_norm"``; the public names (``npt_linear``, ...) too.
        tensors: Arguments of the call; device and dtype are those of the first.
        device, dtype: Instead of tensors; default to ``cpu`` and torch's default dtype.
        act: The activation, for ops that have one.
        backend: As it would be passed to the op; ``None`` is ``NPT_BACKEND`` or the automatic choice.

    Raises:
        ValueError: ``op`` is no op, or ``act`` no activation.
    """
    name = {"npt_gated_mlp": "mlp", "npt_mlp": "mlp"}.get(op, op.removeprefix("npt_"))
    if name not in _OPS:
        raise ValueError(f"op={op!r} is not known; choose one of {', '.join(_OPS)}")
    if act is not None:
        get_activation(act)
    call = Call(
        name,
        tensors[0].device if tensors and device is None else torch.device(device or "cpu"),
        dtype or (tensors[0].dtype if tensors else torch.get_default_dtype()),
        act,
    )
    requested = backend or _DEFAULT_BACKEND
    chosen: str | None = None
    reasons: dict[str, str] = {}
    if requested is not None and requested not in BACKENDS:
        reasons[requested] = f"it is not part of this build; available: {', '.join(BACKENDS)}"
    for candidate in BACKENDS.values():
        reason = candidate.check(call)
        if reason is None and requested is not None and candidate.name != requested:
            reason = f"{requested!r} was asked for"
        elif reason is None and requested is None and not candidate.automatic:
            reason = "it is used only when asked for by name: it was never verified on such hardware"
        elif reason is None and chosen is not None:
            reason = f"{chosen!r} comes first"
        if reason is None:
            chosen = candidate.name
        else:
            reasons[candidate.name] = reason
    return Explanation(call, chosen, reasons)
