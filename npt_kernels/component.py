"""The trainable part of a converted layer: :class:`NPComponent`, which turns attention output into weight changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .kernels.cpu_layout import k_contiguous
from .rules import Rule, get_rule

__all__ = ["AdapterTensors", "NPComponent", "as_adapter_tensors"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of one NP component, as the ops take them. Targets are ``gate``/``up``/``down`` or ``c_fc``/``c_proj``.

    Attributes:
        w_down: ``[d, R]``, the bottleneck shared by the targets: ``z = a @ w_down``. ``None``: what the op is given as ``a`` is
            ``z [..., R]`` itself.
        w_a_up: Target → ``[R, in]`` (``rank1``, ``diagonal``) or ``[in]`` (``anchored``); empty for ``self_key``.
        w_b_up: Target → ``[R, out]``. A target without an entry has no delta.
        rule, num_ranks, scale: As in :func:`npt_kernels.npt_factored_linear`.
    """

    w_down: Tensor | None
    w_a_up: Mapping[str, Tensor] = field(default_factory=dict)
    w_b_up: Mapping[str, Tensor] = field(default_factory=dict)
    rule: str = "rank1"
    num_ranks: int = 1
    scale: float = 1.0


#: Tells every component of the process from every other.
_switches = itertools.count()
_blocks_made = itertools.count()


@dataclass(frozen=True)
class _Open:
    """The blocks that this thread or coroutine is in: ``(number, switch → strength, or None for off)`` in order of entry."""

    blocks: tuple[tuple[int, dict[int, float | None]], ...]
    off: frozenset[int]
    strengths: dict[int, float]

    @staticmethod
    def of(blocks: tuple[tuple[int, dict[int, float | None]], ...]) -> _Open:
        """A switch is off if any block has it off; of several strengths the last block's holds."""
        pairs = [pair for _, settings in blocks for pair in settings.items()]
        off = frozenset(switch for switch, strength in pairs if strength is None)
        return _Open(blocks, off, {switch: strength for switch, strength in pairs if strength is not None})


_open: ContextVar[Any] = ContextVar("npt_open_blocks")


class _Here:
    """Where a component reads what holds for this thread or coroutine: ``now`` is an :class:`_Open`, or this object itself.

    ``torch.compile`` traces no method of a ``ContextVar``, but a property whose getter is written in C it takes for an attribute,
    and guards what it reads. The getter is ``ContextVar.get(default)``, whose default is then the object. It is also the fastest
    way: .12 µs, where a thread-local takes .43.
    """

    now = property(_open.get)


_here = _Here()


@contextmanager
def switched(settings: Mapping[int, float | None]) -> Iterator[None]:
    """Inside the block, in this thread or coroutine, switches have a strength or are off (``None``). Blocks end in any order."""
    number = next(_blocks_made)
    now = _here.now
    _open.set(_Open.of((*(() if now is _here else now.blocks), (number, dict(settings)))))
    try:
        yield
    finally:
        now = _here.now
        left = () if now is _here else tuple(block for block in now.blocks if block[0] != number)
        _open.set(_Open.of(left) if left else _here)


class NPComponent(nn.Module):
    """Neuro-plastic component of one decoder layer: ``w_down [d, R]`` and, per target, ``w_a_up`` and ``w_b_up``.

    Parameters are fp32 master copies by default; the ops get them cast to the dtype of the hidden states.

    Args:
        hidden_size: d, the width of the attention output.
        targets: Target name → ``(in, out)`` of its frozen weight.
        rank: r, rows of one rank-1 term's block.
        rule: One of ``npt_kernels.rules.RULES``.
        num_ranks: k, the number of rank-1 terms; R = k·r.
        scale: Modulation scale of the ``diagonal`` rule.
        dtype, device: Of the parameters.

    Raises:
        ValueError: A size that is not positive, an unknown rule, or no target.
    """

    def __init__(
        self,
        hidden_size: int,
        targets: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        rule: str = "self_key",
        num_ranks: int = 1,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("rank", rank), ("num_ranks", num_ranks)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"NPComponent: {name}={value!r} must be a positive whole number")
        if not isinstance(targets, Mapping):
            raise TypeError(
                f"NPComponent: targets={targets!r} must map a name to (in, out), such as {{'down': (512, 128)}}"
            )
        if not targets:
            raise ValueError("NPComponent: targets is empty; name at least one, such as 'down'")
        if not isinstance(scale, int | float):
            raise TypeError(f"NPComponent: scale={scale!r} must be a number")
        self.rule_name, self.rank, self.num_ranks, self.scale = rule, rank, num_ranks, float(scale)
        self.hidden_size, self.target_shapes = hidden_size, dict(targets)
        self._kept: tuple[Any, AdapterTensors, Any] | None = None
        self._derived: tuple[Any, ...] | None = None
        #: What a layer found out about itself (``model/ready.py``)
        self.ready: Any = None
        #: Tells this component from others, copies of it included.
        self.switch = next(_switches)
        self._enabled = True
        total = self.total_rank
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.w_down = nn.Parameter(torch.zeros(hidden_size, total, **kwargs))
        self.w_a_up, self.w_b_up = nn.ParameterDict(), nn.ParameterDict()
        for target, (d_in, d_out) in targets.items():
            if self.rule.key == "vector":
                self.w_a_up[target] = nn.Parameter(torch.zeros(d_in, **kwargs))
            elif self.rule.key == "matrix" and not self.is_tied(target):
                self.w_a_up[target] = nn.Parameter(torch.zeros(total, d_in, **kwargs))
            self.w_b_up[target] = nn.Parameter(torch.zeros(total, d_out, **kwargs))

    @property
    def enabled(self) -> bool:
        """Whether the layer uses it. Set it to ``False`` to switch one layer off, for everybody; ``npt_disabled`` switches layers
        off for one thread or coroutine."""
        now = _here.now
        return self._enabled and (now is _here or self.switch not in now.off)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)

    @property
    def strength(self) -> float:
        """s of ``W + s·ΔW_t``: 1, or what ``npt_scale`` says for this thread or coroutine."""
        now = _here.now
        return 1.0 if now is _here else now.strengths.get(self.switch, 1.0)  # type: ignore[no-any-return]

    @property
    def rule(self) -> Rule:
        return get_rule(self.rule_name)

    @property
    def total_rank(self) -> int:
        """R = k·r."""
        return self.num_ranks * self.rank

    def is_tied(self, target: str) -> bool:
        """Whether the target's key matrix is ``w_downᵀ`` itself (rule ``diagonal``, input as wide as the attention output)."""
        return self.rule.ties_key_to_w_down and self.target_shapes[target][0] == self.hidden_size

    def tensors(self, dtype: torch.dtype | None = None) -> AdapterTensors:
        """The parameters as the ops take them, cast to ``dtype`` and, inside ``npt_scale``, scaled (differentiable).

        Kept until a parameter is another or, where they are cast, was written to: decoding would cast every one at every token.
        A write through ``parameter.data`` is invisible to PyTorch's version counter; call ``train()`` or ``eval()`` after it.
        """
        if torch.compiler.is_compiling():
            return self._tensors(dtype)
        # Made under a mode these may be fake tensors, and the mode (a count of flops, say) should see the casts.
        if torch._C._len_torch_dispatch_stack() > 0:
            return self._tensors(dtype)
        parameters = (self._parameters["w_down"], *self.w_a_up._parameters.values(), *self.w_b_up._parameters.values())
        strength = self.strength
        # Scaled ones are made anew like those that are cast.
        cast = strength != 1.0 or (dtype is not None and any(p is not None and p.dtype != dtype for p in parameters))
        try:
            # A cast has a graph of its own where gradients are wanted, and a tied key is a view with one.
            if (cast or self.rule.ties_key_to_w_down) and torch.is_grad_enabled():
                self._forget()  # training has no room for what decoding kept
                return self._tensors(dtype)
            # FSDP2 fills a parameter anew without a new version.
            if cast and torch.distributed.is_available() and torch.distributed.is_initialized():
                return self._tensors(dtype)
            # A CUDA graph is replayed after the parameters have changed, so the casts belong in it; and what a capture makes
            # has no values before the first replay.
            if cast and self.w_down.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._tensors(dtype)
            state = (dtype, self.rule_name, self.num_ranks, self.scale, strength, torch.is_inference_mode_enabled(),
                     *((id(p), p._version, p.data_ptr()) if cast else id(p) for p in parameters))  # type: ignore[union-attr]  # fmt: skip
        except RuntimeError:  # inference tensors have no version
            return self._tensors(dtype)
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != state:
            # The parameters are held too, so that no other can have one's id.
            kept = self._kept = (state, self._tensors(dtype, keep=cast), parameters)
        return kept[1]

    def derived(self, key: Any, watched: Sequence[Tensor | None], make: Callable[[Tensor], _T]) -> _T:
        """``make(w_down)``, kept as :meth:`tensors` keeps casts, until ``key``, ``w_down`` or a ``watched`` tensor changes.

        Others write to ``watched`` through ``.data`` (PEFT merges so), which no version counts: a sample of their values is
        compared too. That takes a wait on a GPU, where nothing is kept.
        """
        parameter, tensors = self.w_down, [t for t in watched if t is not None]
        if not self.keeps_derived():
            if torch.is_grad_enabled():
                self._forget()
            return make(parameter)
        try:
            state = (key, torch.is_inference_mode_enabled(), id(parameter), parameter._version, parameter.data_ptr(),
                     *((id(t), t._version, t.data_ptr()) for t in tensors))  # fmt: skip
        except RuntimeError:  # inference tensors have no version
            return make(parameter)
        kept = self.__dict__.get("_derived")
        if kept is None or kept[0] != state or not all(map(torch.equal, map(sample_of, tensors), kept[3])):
            samples = [sample_of(t).clone() for t in tensors]
            kept = self._derived = (state, make(parameter), (parameter, *tensors), samples)
        return kept[1]  # type: ignore[no-any-return]

    def keeps_derived(self) -> bool:
        """Whether :meth:`derived` keeps anything in this call."""
        return not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self.w_down.device.type != "cpu"
            or torch._C._len_torch_dispatch_stack() > 0
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
        )

    def _forget(self) -> None:
        self._kept = self._derived = self.ready = None

    def train(self, mode: bool = True) -> NPComponent:
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Moved away to free a device's memory: no casts stay behind.
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_derived": None, "ready": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.switch = next(_switches)

    def _tensors(self, dtype: torch.dtype | None, keep: bool = False) -> AdapterTensors:
        """``keep``: casts that many calls will read, so in the layout that the products want, not copied into it by each."""
        w_down = self.w_down if dtype is None else self.w_down.to(dtype)
        keys: dict[str, Tensor] = {}
        if self.rule.key != "none":
            for target in self.target_shapes:
                key = w_down.t() if self.is_tied(target) else self.w_a_up[target]
                keys[target] = key if dtype is None else key.to(dtype)
        values = {t: v if dtype is None else v.to(dtype) for t, v in self.w_b_up.items()}
        strength = self.strength
        if strength != 1.0:
            values = {target: value * strength for target, value in values.items()}
        if keep:
            w_down, values = k_contiguous(w_down), {t: k_contiguous(v) for t, v in values.items()}
        return AdapterTensors(w_down, keys, values, self.rule_name, self.num_ranks, self.scale)

    def forward(self, a: Tensor) -> Tensor:
        """``z [..., R] = a @ w_down``, ``a [..., d]``."""
        return a @ self.w_down.to(a.dtype)

    def vectors(self, a: Tensor, u: Tensor, target: str) -> tuple[Tensor, Tensor]:
        """Explicit ``(v_a [T, n, in], v_b [T, n, out])`` of one target for ``a [T, d]`` and its input ``u [T, in]``."""
        self._check_target(target)
        adapter = self.tensors(u.dtype)
        key, value = adapter.w_a_up.get(target), adapter.w_b_up[target]
        return self.rule.vectors(self(a.to(u.dtype)), u, key, value, self.num_ranks, self.scale)

    def vector_norms(self, z: Tensor, u: Tensor, target: str) -> tuple[Tensor, Tensor]:
        """``(|v_a|², |v_b|²)`` per token, each ``[T]``, for ``z [T, R]`` and ``u [T, in]``; no ``[T, in]`` tensor is made."""
        self._check_target(target)
        adapter = self.tensors(z.dtype)
        key, value = adapter.w_a_up.get(target), adapter.w_b_up[target]
        return self.rule.vector_norms(z, u, key, value, self.num_ranks, self.scale)

    def _check_target(self, target: str) -> None:
        if target not in self.target_shapes:
            raise ValueError(f"target={target!r} is not one of this component: {', '.join(self.target_shapes)}")

    def extra_repr(self) -> str:
        targets = ", ".join(f"{t} {i}->{o}" for t, (i, o) in self.target_shapes.items())
        return f"rule={self.rule_name}, rank={self.rank}, num_ranks={self.num_ranks}, targets: {targets}"


def sample_of(tensor: Tensor) -> Tensor:
    """Some 30 of its values, from all over it: a merge changes all. Each is a cache miss at every token (250: 18 us a layer)."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 31)]


def _from_mapping(mapping: Mapping[str, Any]) -> AdapterTensors:
    """Nested (``{"w_b_up": {"gate": ...}}``) or flat as in ``state_dict()`` (``{"w_b_up.gate": ...}``); the rule may be left out.

    Without ``rule`` it follows from the keys' shapes: none → ``self_key``, vectors → ``anchored``, matrices → ``rank1``.
    """
    known = ("w_down", "w_a_up", "w_b_up", "rule", "num_ranks", "scale")
    fields: dict[str, Any] = {"w_a_up": {}, "w_b_up": {}}
    for name, value in mapping.items():
        group, _, target = name.partition(".")
        if group not in known or (target and group not in ("w_a_up", "w_b_up")):
            raise ValueError(f"adapter has a key {name!r}; expected {', '.join(known)} (or w_b_up.gate, ...)")
        if target:
            fields[group][target] = value
        else:
            fields[group] = dict(value) if isinstance(value, Mapping) else value
    if "w_down" not in fields:
        raise ValueError(f"adapter has no w_down; it has {', '.join(mapping) or 'no keys'}")
    if "rule" not in fields:
        keys = list(fields["w_a_up"].values()) if isinstance(fields["w_a_up"], dict) else []
        fields["rule"] = "self_key" if not keys else "anchored" if keys[0].dim() == 1 else "rank1"
    return AdapterTensors(**fields)


def as_adapter_tensors(
    adapter: NPComponent | AdapterTensors | Mapping[str, Any], dtype: torch.dtype, targets: tuple[str, ...]
) -> AdapterTensors:
    """What a user may pass as ``adapter`` to the MLP ops, as :class:`AdapterTensors` with targets checked."""
    if isinstance(adapter, NPComponent):
        adapter = adapter.tensors(dtype)
    elif isinstance(adapter, Mapping):
        adapter = _from_mapping(adapter)
    elif not isinstance(adapter, AdapterTensors):
        raise TypeError(f"adapter must be an NPComponent, AdapterTensors or a mapping, got {type(adapter).__name__}")
    get_rule(adapter.rule)
    if not isinstance(adapter.scale, int | float):
        raise TypeError(f"adapter has scale={adapter.scale!r}, which must be a number")
    for name, entry in (("w_a_up", adapter.w_a_up), ("w_b_up", adapter.w_b_up)):
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"adapter has {name} of type {type(entry).__name__}; expected a mapping {targets} -> tensor"
            )
    unknown = [t for t in (*adapter.w_a_up, *adapter.w_b_up) if t not in targets]
    if unknown:
        raise ValueError(f"adapter has target {unknown[0]!r}; this MLP has {', '.join(targets)}")
    return adapter
