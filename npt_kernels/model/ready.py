"""The second half of a converted layer with its questions answered once, for calls without gradients.

Before a layer reads its linears in place of calling them it asks some forty things (a hook? another module there now? a forward
of its own? quantised? which backend?). When text is written token by token the questions cost more than the arithmetic. Their
answers hold until something moves, and whether something moved is a short list of comparisons: the same modules in the same
places, none with hooks, the same parameters. Anything else, training included, goes the long way (``layer.py``), and so does
a module that is more than a plain ``Linear`` or ``Conv1D``. Both ways run the same operations and give the same bits, but for one
token on a CPU, where this one rounds less (``one_row.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..component import NPComponent, sample_of
from ..kernels.cpu_layout import k_contiguous
from ..kernels.steps import Projection, Steps
from ..ops.mlp.operands import Operands, Spec
from ..ops.mlp.passes import forward
from ..ops.registry import BackendUnavailableError, default_backend, get_steps, resolve_backend
from .fold import foldable, folded_weight, heads_output, output_projection
from .linears import is_conv1d, linear_shape
from .mlp import LayerPlan, plain_forward
from .norms import norm_eps, norm_weight
from .one_row import OneRow, serves
from .own_thread import any_acts_here

__all__ = ["ReadyHalf", "ready_half"]


def ready_half(layer: nn.Module, plan: LayerPlan, component: NPComponent, h: Tensor) -> ReadyHalf | None:
    """The kept answers if they hold for this call, new ones if they can be had, else ``None``."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    kept = component.ready
    if kept is not None and kept.holds(layer, component, h):
        return kept  # type: ignore[no-any-return]
    component.ready = made = _make(layer, plan, component, h)
    return made


def _unmoved(module: nn.Module, kind: type[nn.Module]) -> bool:
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (module._forward_hooks and any_acts_here(module._forward_hooks))
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _settings(component: NPComponent) -> tuple[Any, ...]:
    return (
        component.rule_name, component.num_ranks, component.scale, component.strength, default_backend(),
        torch.is_inference_mode_enabled(),
    )  # fmt: skip


def _elsewhere(h: Tensor, casts: bool) -> bool:
    """Whether this is a call for the long way: casts of autocast, in a capture, of a sharded adapter; tensors that are traced."""
    return bool(
        torch.is_autocast_enabled(h.device.type)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _global_hooks()
        or (casts and torch.distributed.is_available() and torch.distributed.is_initialized())
        or (casts and h.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class ReadyHalf:
    """What :func:`ready_half` keeps; calling it gives the layer's output."""

    def __init__(self, plan: LayerPlan, component: NPComponent, h: Tensor) -> None:
        self.plan, self.dtype, self.device = plan, h.dtype, h.device
        self.settings = _settings(component)
        #: (``_modules`` of the parent, name, module there)
        self.places: list[tuple[dict[str, Any], str, Any]] = []
        #: (module, its class)
        self.modules: list[tuple[nn.Module, type[nn.Module]]] = []
        #: (``_parameters`` of a module, name, parameter there)
        self.parameters: list[tuple[dict[str, Any], str, Tensor | None]] = []
        #: (parameter of the component, version, address): what casts and the folded weight were made of.
        self.versions: list[tuple[Tensor, int, int]] = []
        #: Likewise of the projection, with some values as a view and as they were; written to through ``.data`` by PEFT's merge.
        self.samples: list[tuple[Tensor, int, int, Tensor, Tensor]] = []
        self.casts = False
        #: Gate, up, down; ``None`` where a weight is a view, which another ``.data`` would leave behind.
        self.projections: list[Projection] | None = None
        self.projection: nn.Module | None = None
        self.folded: tuple[Tensor, Tensor | None] | None = None

        #: Of the op, and the widths that the automatic choice asks for.
        self.backend = ""
        self.sizes: tuple[int, ...] = ()
        #: Whether calls of one token go to ``row``, made at the first; what its compiled code reads beside the component.
        self.serves_rows = False
        self.frozen: list[Tensor] = []
        self.row: OneRow | None = None

    # Set by _make.
    mlp: nn.Module
    norm: nn.Module
    eps: float
    steps: Steps
    norm_steps: Steps
    spec: Spec
    w_down: Tensor
    value_down: Tensor | None
    linears: dict[str, tuple[nn.Module, slice | None, Tensor | None, Tensor | None]]

    def choice(self, h: Tensor, component: NPComponent) -> str:
        """Name of the backend for a call of as many tokens."""
        return resolve_backend(
            "mlp", None, self.device, self.dtype, act=self.plan.act, rule=component.rule_name, tokens=h.shape[:-1].numel(),
            sizes=self.sizes, trains=False,
        )  # fmt: skip

    # ---- what must not have moved ---------------------------------------------------------------------------------------

    def watch_module(self, layer: nn.Module, module: nn.Module) -> bool:
        """``False`` if the module is not below the layer."""
        path = next((name for name, other in layer.named_modules() if other is module), None)
        if path is None:
            return False
        parent = layer
        for name in path.split("."):
            self.places.append((parent._modules, name, parent._modules[name]))
            parent = parent._modules[name]  # type: ignore[assignment]
        self.modules.append((module, type(module)))
        return True

    def watch_parameters(self, module: nn.Module, versions: bool = False) -> bool:
        """``False`` if one of them is not a plain tensor of this call's kind."""
        for name, parameter in module._parameters.items():
            self.parameters.append((module._parameters, name, parameter))
            if parameter is None:
                continue
            plain = (
                type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.device == self.device
            )
            if not plain or not (versions or parameter.dtype is self.dtype):
                return False
            if versions:
                self.versions.append((parameter, parameter._version, parameter.data_ptr()))
                self.casts |= parameter.dtype is not self.dtype
        return True

    def holds(self, layer: nn.Module, component: NPComponent, h: Tensor) -> bool:
        """Whether the answers are those of this call. Loops, not ``all(...)``: half the time, at every token in every layer."""
        if h.dtype is not self.dtype or h.device != self.device or type(h) is not Tensor:
            return False
        for parent, name, module in self.places:
            if parent.get(name) is not module:
                return False
        for own, name, tensor in self.parameters:
            if own.get(name) is not tensor:
                return False
        for module, kind in self.modules:
            if not _unmoved(module, kind):
                return False
        if _settings(component) != self.settings or norm_eps(self.norm) != self.eps or _elsewhere(h, self.casts):
            return False
        if h.is_cuda and self.choice(h, component) != self.backend:
            return False
        try:
            for tensor, version, at in self.versions:
                if tensor._version != version or tensor.data_ptr() != at:
                    return False
            for tensor, version, at, now, before in self.samples:
                if tensor._version != version or tensor.data_ptr() != at or not torch.equal(now, before):
                    return False
        except RuntimeError:  # inference tensors have no version
            return False
        return True

    # ---- the call -------------------------------------------------------------------------------------------------------

    def __call__(self, layer: nn.Module, component: NPComponent, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan, flat = self.plan, h.reshape(-1, h.shape[-1])
        folds = self._folds(layer, component, flat.shape[0])
        if folds:
            assert self.projection is not None
            heard = heads_output(layer, plan, self.projection, h, *args, **kwargs)
        else:
            heard = plan.shape.attention(layer, h, *args, **kwargs).to(self.dtype)
        if self.serves_rows and flat.shape[0] == 1:
            out = self._row(component, h, flat, heard, folds)
        else:
            out = self._rows(component, h, flat, heard, folds)
        return plan.shape.output(
            layer, h, plan.shape.after_down(self.mlp, out.view(*h.shape[:-1], out.shape[-1])).to(h.dtype)
        )

    def _rows(self, component: NPComponent, h: Tensor, flat: Tensor, heard: Tensor, folds: bool) -> Tensor:
        """The MLP's output ``[T, d]``, by the op."""
        a = z = moved = None
        if folds:
            folded, shift = self.folded or folded_weight(component.w_down, self.projection)  # type: ignore[arg-type]
            z = F.linear(heard.to(folded.dtype), folded, shift)
            z = z.reshape(-1, z.shape[-1])
        else:
            a = heard.reshape(-1, heard.shape[-1])
        w_down = None if z is not None else self.w_down
        if self.plan.matches_change:
            z = a @ k_contiguous(self.w_down) if z is None else z.to(self.dtype)  # type: ignore[operator]
            w_down, moved = None, z @ k_contiguous(self.value_down)  # type: ignore[arg-type]
        u, scale = self._normed(h, flat, a if moved is None else moved)
        gate, up, down = self.projections or self._projections()
        if moved is not None:
            down = down._replace(value=None)
        # Without a weight that has to be made dense first, and without gradients, the op is its passes.
        operands = Operands(u, a if z is None else z, scale, w_down, gate, up, down)
        out = forward(self.steps, operands, self.spec, False)[0]
        if moved is not None:
            out += moved
        return out

    def _row(self, component: NPComponent, h: Tensor, flat: Tensor, heard: Tensor, folds: bool) -> Tensor:
        """The same ``[1, d]`` for one token (``one_row.py``)."""
        if self.row is None:
            targets = {place.slot: target for target, place in self.plan.shape.targets.items()}
            self.row = OneRow(component, targets, self.projection if self.folded is not None else None)
        if not folds or self.folded is not None:
            native = self.row.native(folds, self._describe)
            if native is not None:
                if self.plan.norm_match:
                    return native(flat.contiguous(), heard.to(self.dtype).contiguous())
                return native(None, heard.to(self.dtype).contiguous(), self.norm(h).to(self.dtype).contiguous())
        z = self.row.bottleneck(heard, folds)
        moved = z @ self.row.values["down"] if self.plan.matches_change else None
        a = heard.reshape(1, -1) if moved is None else moved.to(self.dtype)
        u, scale = self._normed(h, flat, a)
        return self.row.mlp(u, z, scale, self.projections or self._projections(), self.spec.act, moved)

    def _describe(self) -> dict[str, Any]:
        """What ``native_row`` asks of a layer beside its component."""
        plan = self.plan
        told: dict[str, Any] = {
            "projections": self.projections or self._projections(), "act": self.spec.act, "dtype": self.dtype,
            "norm": "given", "watched": self.frozen,
        }  # fmt: skip
        if plan.norm_match:
            told |= {
                "norm": plan.norm_kind, "norm_weight": getattr(self.norm, "weight", None),
                "norm_bias": getattr(self.norm, "bias", None), "eps": self.eps, "matches_change": plan.matches_change,
            }  # fmt: skip
        return told

    def _normed(self, h: Tensor, flat: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.plan.norm_match:
            return self.norm(h).to(self.dtype).reshape(flat.shape), None
        weight, bias = norm_weight(self.norm, self.plan.norm_kind), getattr(self.norm, "bias", None)
        kind = self.plan.norm_kind.removesuffix("1")
        return self.norm_steps.matched_norm(flat, a, weight, bias, kind, self.eps)  # type: ignore[arg-type]

    def _folds(self, layer: nn.Module, component: NPComponent, tokens: int) -> bool:
        return (
            self.projection is not None
            and (self.folded is not None or tokens >= component.total_rank)
            and (self.plan.folds_in_training or not self.plan.shape.attention_module(layer).training)
        )

    def _projections(self) -> list[Projection]:
        return [self._projection(slot) for slot in ("gate", "up", "down")]

    def _projection(self, slot: str) -> Projection:
        if slot not in self.linears:
            return _NONE
        module, part, key, value = self.linears[slot]
        weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        bias: Tensor | None = module._parameters.get("bias")
        if part is not None:
            weight, bias = weight[part], None if bias is None else bias[part]
        return Projection(weight.t() if is_conv1d(module) else weight, bias, key, value)


_NONE = Projection()


def _make(layer: nn.Module, plan: LayerPlan, component: NPComponent, h: Tensor) -> ReadyHalf | None:
    if (
        plan.attention_residual
        or "np_extra" in layer._modules
        or type(h) is not Tensor
        or h.is_meta
        or _elsewhere(h, casts=False)
    ):
        return None
    # Of a norm that is matched to more than the last linear's change, only the long way knows.
    if component.strength != 1.0:
        return None
    try:
        return _made(layer, plan, component, h)
    except (
        RuntimeError,
        BackendUnavailableError,
    ):  # inference tensors have no version; the long way says what is wrong
        return None


def _made(layer: nn.Module, plan: LayerPlan, component: NPComponent, h: Tensor) -> ReadyHalf | None:
    ready = ReadyHalf(plan, component, h)
    shape = plan.shape
    ready.mlp, ready.norm, act = shape.mlp(layer), shape.norm(layer), shape.activation(layer)
    linears = {place.slot: (target, *shape.called(layer, target)) for target, place in shape.targets.items()}
    read = list(dict.fromkeys(module for _, module, _ in linears.values()))
    if plan.norm_match:
        read.append(ready.norm)
    for module in (*([] if ready.mlp is layer else [ready.mlp]), *read, *([act] if isinstance(act, nn.Module) else [])):
        if not _unmoved(module, type(module)) or not ready.watch_module(layer, module):
            return None
    if not all(plain_forward(module) and "weight" in module._parameters and not module._buffers
               for _, module, _ in linears.values()):  # fmt: skip
        return None
    if not all(ready.watch_parameters(module) for module in read):
        return None
    if not all(ready.watch_parameters(m, versions=True) for m in (component, component.w_a_up, component.w_b_up)):
        return None
    if _elsewhere(h, ready.casts):
        return None
    ready.frozen = [tensor for module in read for tensor in module._parameters.values() if tensor is not None]
    ready.eps = norm_eps(ready.norm)
    _, up, part = linears["up"]
    d, f = linear_shape(up)
    ready.sizes = d, f if part is None else part.stop - part.start, component.total_rank
    ready.backend = backend = ready.choice(h, component)
    ready.steps = get_steps(backend)
    ready.serves_rows = backend == "eager" and serves(component.rule_name, h.dtype, h.device)
    ready.norm_steps = get_steps(resolve_backend("matched_norm", None, h.device, h.dtype))
    tensors = component.tensors(h.dtype)
    assert tensors.w_down is not None
    ready.w_down = tensors.w_down
    ready.spec = Spec(plan.act, tensors.rule, tensors.num_ranks, tensors.scale)
    ready.linears = {
        slot: (module, part, tensors.w_a_up.get(target), tensors.w_b_up.get(target))
        for slot, (target, module, part) in linears.items()
    }
    ready.value_down = tensors.w_b_up.get(plan.down)
    if not any(is_conv1d(module) or part is not None for _, module, part in linears.values()):
        ready.projections = ready._projections()
    return ready if plan.projection is None or _with_projection(ready, layer, component) else None


def _with_projection(ready: ReadyHalf, layer: nn.Module, component: NPComponent) -> bool:
    plan = ready.plan
    projection, attention = output_projection(layer, plan), plan.shape.attention_module(layer)
    if (
        projection is None
        or not foldable(layer, plan, projection)
        or not isinstance(projection._parameters.get("weight"), Tensor)
    ):
        return False
    for module in (attention, projection):
        if not _unmoved(module, type(module)) or not ready.watch_module(layer, module):
            return False
    if projection._buffers or not ready.watch_parameters(projection):
        return False
    ready.projection = projection
    if component.keeps_derived():
        for tensor in projection._parameters.values():
            if tensor is not None:
                view = sample_of(tensor)
                ready.samples.append((tensor, tensor._version, tensor.data_ptr(), view, view.clone()))
        # After what it is watched by: another thread may write to the weight in between, and must be seen to have done so.
        ready.folded = folded_weight(component.w_down, projection)
    return True
