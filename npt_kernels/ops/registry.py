"""The backend registry: which implementations exist, what each can run, which one is chosen and why.

Dispatch, tests and benchmarks share this one table. A backend (``kernels/backend.py``) has the steps of the ops, says of an op
that it lacks why, and has a ``check`` that says why it cannot run a call. Who names a backend gets it or an error, never
something else in silence:

* **For one call** (``backend="..."`` of a public op): that backend, or ``BackendUnavailableError`` with the reason.
* **For everything** (``NPT_BACKEND``; a converted layer is several ops): "this one wherever it exists". An
  op that the backend does not implement at all (``cuda`` has no explicit ``linear``) runs on the automatic choice instead; a
  warning says so once, and :func:`explain` always. An op that it does implement but refuses here (a dtype, a device, a missing
  build) still raises: that is what the user wanted to know. Sizes are no reason of an op: a *step* of it that the kernels cannot
  read (``cuda``: a width or rank that is no multiple of 8) runs on the vendor's GEMM, with one warning that names the size.
* **Nobody**: the first that can run the call, and only ever one that was verified on such hardware and found no slower for
  such a call: its tokens, its widths, with or without gradients.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from ..activations import get_activation
from ..kernels import backends
from ..kernels.backend import OPS, Backend, Call

if TYPE_CHECKING:
    from ..kernels.steps import Steps

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailableError",
    "Call",
    "Explanation",
    "available_backends",
    "default_backend",
    "explain",
    "get_backend",
    "get_steps",
    "resolve_backend",
]


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


#: In order of preference for the automatic choice.
BACKENDS: dict[str, Backend] = backends()

NOT_UNASKED = "it is used only when asked for by name: it was not found faster on such hardware"

_DEFAULT_BACKEND: str | None = os.environ.get("NPT_BACKEND") or None


def available_backends() -> tuple[str, ...]:
    """Names of the backends of this build, in order of preference."""
    return tuple(BACKENDS)


def default_backend() -> str | None:
    """``NPT_BACKEND``, or ``None``."""
    return _DEFAULT_BACKEND


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises ``BackendUnavailableError`` naming those that exist."""
    try:
        return BACKENDS[name]
    except (KeyError, TypeError):
        raise BackendUnavailableError(
            f"backend={name!r} is not part of this build; available: {', '.join(BACKENDS)} (None chooses by itself)"
        ) from None


def get_steps(name: str) -> Steps:
    """The steps of the backend of that name, loaded at the first use."""
    backend = BACKENDS.get(name)  # on every call: no second function on the way
    return (backend or get_backend(name)).steps


def resolve_backend(
    op: str,
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    act: str | None = None,
    rule: str | None = None,
    tokens: int = 0,
    sizes: tuple[int, ...] = (),
    trains: bool = True,
) -> str:
    """Name of the backend that will run ``op``; see the module's docstring for who gets what.

    Args:
        requested: The backend that was asked for; ``None``: ``NPT_BACKEND``, else the first that can.
        act, rule, tokens, sizes, trains: As in :class:`~..kernels.backend.Call`.

    Raises:
        BackendUnavailableError: The backend asked for cannot run the call (with its reason), or none can.
    """
    call = Call(op, device, dtype, act, rule, tokens, sizes, trains)
    for_all = requested is None
    requested = requested or _DEFAULT_BACKEND
    if requested is not None:
        backend = get_backend(requested)
        missing = backend.lacks(op) if for_all else None
        if missing is None and for_all and op == "matched_norm" and torch.is_autocast_enabled(device.type):
            missing = backend.reason(call)  # the stream's dtype is autocast's choice, not the user's
        if missing is None:
            reason = backend.reason(call)
            if reason is not None:
                raise BackendUnavailableError(f"backend={requested!r} cannot run {op}: {reason}")
            return requested
    for candidate in BACKENDS.values():
        if candidate.chosen_unasked(call) and candidate.reason(call) is None:
            if requested is not None and not torch.compiler.is_compiling():
                _say_elsewhere(requested, op, str(missing), candidate.name)
            return candidate.name
    raise BackendUnavailableError(f"no backend can run {op} on {device} with {dtype}")


@lru_cache(maxsize=None)
def _say_elsewhere(requested: str, op: str, missing: str, chosen: str) -> None:
    """Once a process for each op."""
    warnings.warn(f"npt_kernels: {op} runs on {chosen!r}, not on {requested!r}: {missing}", stacklevel=3)


def _facts_of(op: str, tensors: tuple[torch.Tensor, ...]) -> tuple[int, tuple[int, ...], bool]:
    """``tokens``, ``sizes`` and ``trains`` of a call with these tensors, as far as they tell."""
    if op != "mlp" or len(tensors) < 3:
        return 0, (), torch.is_grad_enabled()
    x, _, weight = tensors[:3]
    return x.shape[:-1].numel(), (*weight.shape[::-1], 0), torch.is_grad_enabled()


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
    rule: str | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend would run ``op`` and why each other would not. Runs nothing and raises nothing about backends.

    Args:
        op: ``"linear"``, ``"factored_linear"``, ``"mlp"`` or ``"matched_norm"``; the public names (``npt_linear``, ...) too.
        tensors: Arguments of the call, in its order; device and dtype are those of the first. The choice for an MLP depends on
            tokens and widths too, and on whether gradients are enabled.
        device, dtype: Instead of tensors; default to ``cpu`` and torch's default dtype.
        act: The activation, for ops that have one.
        rule: The rule by name, for ops that have one.
        backend: As it would be passed to the op; ``None`` is ``NPT_BACKEND`` or the automatic choice. For ``"matched_norm"``,
            which only layers run: the backend of the layer.

    Raises:
        ValueError: ``op`` is no op, or ``act`` no activation.
    """
    name = {"npt_gated_mlp": "mlp", "npt_mlp": "mlp"}.get(op, op.removeprefix("npt_"))
    if name not in OPS:
        raise ValueError(f"op={op!r} is not known; choose one of {', '.join(OPS)}")
    if act is not None:
        get_activation(act)
    call = Call(
        name,
        tensors[0].device if tensors and device is None else torch.device(device or "cpu"),
        dtype or (tensors[0].dtype if tensors else torch.get_default_dtype()),
        act,
        rule,
        *_facts_of(name, tensors),
    )
    requested = backend or _DEFAULT_BACKEND
    for_all = backend is None
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
        elif reason is None and requested is None and not candidate.chosen_unasked(call):
            reason = f"unasked it runs only {candidate.unasked}" if candidate.unasked else NOT_UNASKED
        elif reason is None and chosen is not None:
            reason = f"{chosen!r} comes first"
        if reason is None:
            chosen = candidate.name
        else:
            reasons[candidate.name] = reason
    return Explanation(call, chosen, reasons)
