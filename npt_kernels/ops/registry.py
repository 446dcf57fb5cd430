"""The backend registry: which implementations exist, what each can run, which one is chosen and why.

Dispatch, tests and benchmarks share this one table. A backend names, for the ops that it implements, the module that does
(``forward`` and ``backward`` over flat tensors), says of every other op why it has none, and has a ``check`` that says why it
cannot run a call. Who names a backend gets it or an error, never something else in silence:

* **For one call** (``backend="..."`` of a public op): that backend, or ``BackendUnavailableError`` with the reason.
* **For everything** (``NPT_BACKEND``, or a converted layer, which is several ops): "this one wherever it exists". An
  op that the backend does not implement at all (``cuda`` has no norm kernel) runs on the automatic choice instead; a warning
  says so once, and :func:`explain` always. An op that it does implement but refuses here (a dtype, a device, a missing build)
  still raises: that is what the user wanted to know.
* **Nobody**: the first that can run the call, and only ever one that was verified on such hardware.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from ..activations import get_activation
from ..kernels import cuda as cuda_support
from ..kernels.triton import support as triton_support

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


def _cuda_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The answer is kept when compiling: torch.compile cannot trace the import of the compiled module (seen on an H200)."""
    return cuda_support.unavailable(device, dtype)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: 1.1 s for whoever imports an op.
_cuda_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda(call: Call) -> str | None:
    return _cuda_reason(call.device, call.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: What users write in ``backend=``.
        modules: Op name → module with ``forward`` and ``backward``, imported at first use. Ops that are not here have no
            implementation at all; ``absent`` says why.
        automatic: Whether it may be chosen without being asked for. False until a run on such a device has verified it.
        check: ``(Call) -> reason it cannot run, or None``; asked only about ops that it implements.
        summary: One line for ``npt env``.
        absent: Op name → why there is no implementation, for ops that are not in ``modules``.
    """

    name: str
    modules: dict[str, str]
    automatic: bool
    summary: str
    check: Callable[[Call], str | None] = field(default=_always)
    absent: dict[str, str] = field(default_factory=dict)

    def lacks(self, op: str) -> str | None:
        """Why it has no implementation of ``op`` at all, or ``None`` if it has one."""
        return None if op in self.modules else self.absent.get(op, f"it has no implementation of {op}")

    def reason(self, call: Call) -> str | None:
        """Why it cannot run the call, or ``None``."""
        return self.lacks(call.op) or self.check(call)

    def module(self, op: str) -> ModuleType:
        """The implementation of ``op``."""
        return _load(self.modules[op])


@lru_cache(maxsize=None)
def _load(path: str) -> ModuleType:
    return importlib.import_module(path)


_OPS = ("linear", "factored_linear", "mlp", "matched_norm")
#: Ops that only a layer runs: a backend named for them was named for the layer.
_LAYER_OPS = ("matched_norm",)

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
            automatic=False,  # slower than eager below 1,000 tokens on an H200, the one GPU that it ran on
            summary="portable fused kernels: the delta and the activation inside the GEMM; CUDA devices, fp16, bf16, fp32",
            check=_triton,
        ),
        Backend(
            name="cuda",
            modules={op: f"npt_kernels.ops.{op}.cuda" for op in cuda_support.OPS},
            absent=cuda_support.ABSENT,
            automatic=False,  # one device, one day: only when asked for by name
            summary="hand-written Hopper kernels (sm_90a): fused segmented-K GEMMs; bf16, fp16; ran on an H200",
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
    op: str,
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    act: str | None = None,
    part_of_layer: bool = False,
) -> str:
    """Name of the backend that will run ``op``; see the module's docstring for who gets what.

    Args:
        requested: The backend that was asked for; ``None``: ``NPT_BACKEND``, else the first that can.
        part_of_layer: ``requested`` was chosen for a whole layer, so an op that it does not implement goes elsewhere.

    Raises:
        BackendUnavailableError: The backend asked for cannot run the call (with its reason), or none can.
    """
    call = Call(op, device, dtype, act)
    for_all = requested is None or part_of_layer
    requested = requested or _DEFAULT_BACKEND
    if requested is not None:
        backend = get_backend(requested)
        missing = backend.lacks(op) if for_all else None
        if missing is None:
            reason = backend.reason(call)
            if reason is not None:
                raise BackendUnavailableError(f"backend={requested!r} cannot run {op}: {reason}")
            return requested
    for candidate in BACKENDS.values():
        if candidate.automatic and candidate.reason(call) is None:
            if requested is not None and not torch.compiler.is_compiling():
                _say_elsewhere(requested, op, str(missing), candidate.name)
            return candidate.name
    raise BackendUnavailableError(f"no backend can run {op} on {device} with {dtype}")


@lru_cache(maxsize=None)
def _say_elsewhere(requested: str, op: str, missing: str, chosen: str) -> None:
    """Once a process for each op."""
    warnings.warn(f"npt_kernels: {op} runs on {chosen!r}, not on {requested!r}: {missing}", stacklevel=3)


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
        backend: As it would be passed to the op; ``None`` is ``NPT_BACKEND`` or the automatic choice. For ``"matched_norm"``,
            which only layers run: the backend of the layer.

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
    for_all = backend is None or name in _LAYER_OPS
    chosen: str | None = None
    reasons: dict[str, str] = {}
    if requested is not None and requested not in BACKENDS:
        reasons[requested] = f"it is not part of this build; available: {', '.join(BACKENDS)}"
    elif requested is not None and for_all and BACKENDS[requested].lacks(name) is not None:
        reasons[requested] = f"{BACKENDS[requested].lacks(name)}; the automatic choice runs it instead"
        requested = None
    for candidate in BACKENDS.values():
        if candidate.name in reasons:
            continue
        reason = candidate.reason(call)
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
