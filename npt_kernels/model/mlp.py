"""The MLP of a converted layer. Called as a module, so that hooks on it fire; inside, its linears are read by the fused op.

A linear that is more than ``x Wᵀ + b`` (a PEFT adapter, a subclass with a forward of its own, anything with hooks) is *called*
instead, and the factored change is added to its output: the same result, without the fusion. The norm in front likewise.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..argument_checks import autocast_dtype
from ..component import AdapterTensors, NPComponent
from ..functional import npt_gated_mlp, npt_mlp
from ..kernels.cpu_layout import k_contiguous
from ..quantised.foreign import made_by_library
from ..quantised.linear import QuantisedLinear
from ..rules import get_rule
from .linears import is_conv1d, linear_bias, linear_weight
from .norms import NormKind, matched_norm, matched_scale
from .own_thread import any_acts_here
from .shapes.base import LayerShape
from .swap import Swapped, own_forward

__all__ = ["Change", "LayerPlan", "NPTMlp", "changed_mlp", "has_hooks", "make_change", "mlp_input", "plain_forward"]


@dataclass(frozen=True)
class LayerPlan:
    """What a converted layer needs to know, fixed at conversion."""

    index: int
    shape: LayerShape
    act: str
    norm_kind: NormKind
    norm_match: bool
    attention_residual: bool = False
    """``h + a`` stays in the stream and in front of the norm; the weight change is extra."""
    fold: bool = False
    """The norm match is to ``h + m``, ``m`` the change of the last linear's output, and not to ``h + a``."""
    projection: str | None = None
    """Attribute of the attention that holds its output projection, where its result is not needed (``fold.py``)"""
    folds_in_training: bool = False
    """Whether nothing random (dropout) stands behind that projection"""
    returns_tuple: bool = False
    """The layer's forward returns ``(hidden states, attention weights or None)``, and the model takes the first of it"""

    @property
    def down(self) -> str:
        """The target whose output is the MLP's."""
        return next(target for target, place in self.shape.targets.items() if place.slot == "down")

    @property
    def matches_change(self) -> bool:
        """Whether the norm is matched to ``h + m``."""
        return self.fold and self.norm_match


class Change:
    """What changes the weights in one call.

    Attributes:
        layer, plan, component: Whose.
        a: ``[..., d]``, or
        z: ``[..., R]``, the bottleneck where it is made already.
        moved: ``m [..., d]``, the last linear's change of output, where it is made already.
        key_scale: ``[...]`` or ``None``.
        heard: ``a`` for the layer's extra change (``extra.py``), which it cannot do without.
        row_scale: ``[...]`` of ones that carry the gradient of 1/ρ_T where ``key_scale`` and the input do not, or ``None``.
        backend: By name, or ``None``.
    """

    def __init__(
        self,
        layer: nn.Module,
        plan: LayerPlan,
        component: NPComponent,
        a: Tensor | None,
        key_scale: Tensor | None,
        backend: str | None = None,
        *,
        z: Tensor | None = None,
        moved: Tensor | None = None,
        row_scale: Tensor | None = None,
        heard: Tensor | None = None,
    ) -> None:
        self.layer, self.plan, self.component, self.a, self.key_scale = layer, plan, component, a, key_scale
        self.backend, self.z, self.moved, self.row_scale = backend, z, moved, row_scale
        self.heard = heard if "np_extra" in layer._modules else None


class NPTMlp(Swapped):
    """Mixin of a converted layer's MLP. Without ``npt`` it is the original."""

    def forward(self, hidden_states: Tensor, *args: Any, npt: Change | None = None, **kwargs: Any) -> Any:
        if npt is None:
            return self.npt_original_class.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return changed_mlp(npt, hidden_states)


# ---- may a module be read, or must it be called? ------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs anything beside its forward, in this thread. What only moves its weights does not count."""
    return bool(
        (module._forward_hooks and any_acts_here(module._forward_hooks))
        or (
            module._forward_pre_hooks
            and any(not getattr(hook, "only_moves_weights", False) for hook in list(module._forward_pre_hooks.values()))
        )
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _reads_weight(kind: type[nn.Module]) -> bool:
    """Whether the class's forward is ``x Wᵀ + b`` with the weight that :func:`~.linears.linear_weight` reads.

    ``torch.nn.utils.parametrize`` makes a class of its own too, but leaves the forward and computes ``weight`` when it is read.
    """
    if issubclass(kind, QuantisedLinear):
        return True
    if issubclass(kind, Swapped):  # an output projection (fold.py)
        kind = kind.npt_original_class
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return conv1d or kind.forward is nn.Linear.forward


def plain_forward(module: nn.Module) -> bool:
    """Whether the module's forward, hooks apart, is what its class says, and for a linear ``x Wᵀ + b``."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook") and not own_forward(module):
        return False
    if isinstance(module, nn.Linear) or is_conv1d(module) or hasattr(module, "weight"):
        return _reads_weight(type(module)) or made_by_library(module)
    return False


def _replaced_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ and not hasattr(module, "_hf_hook") and not own_forward(module)


@lru_cache(maxsize=None)
def _say_called(name: str, kind: str) -> None:
    """Once a process for each kind of module."""
    warnings.warn(
        f"npt_kernels: {name} is {kind}: it is called, and the weight change added to its output, instead of both in one op",
        stacklevel=5,
    )


# ---- the layer's second half --------------------------------------------------------------------------------------------


def make_change(
    layer: nn.Module,
    plan: LayerPlan,
    component: NPComponent,
    h: Tensor,
    a: Tensor | None = None,
    z: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Change]:
    """``(u [..., d], change)`` of a layer's input ``h`` and its attention output ``a`` or the bottleneck ``z`` of it."""
    moved = None
    if plan.matches_change:
        # Under a rule without key the change of the last linear's output is a function of z alone.
        dtype = autocast_dtype(h) or linear_weight(plan.shape.linear(layer, plan.down), h.dtype).dtype
        adapter = component.tensors(dtype)
        assert adapter.w_down is not None
        if z is None:
            assert a is not None
            z = a.to(dtype) @ k_contiguous(adapter.w_down)
        moved = z.to(dtype) @ k_contiguous(adapter.w_b_up[plan.down])
    row_scale = None
    if moved is not None and _scales_alone(plan.shape.norm(layer), h, moved):
        u, key_scale = mlp_input(layer, plan, h, moved.detach(), backend)
        assert key_scale is not None
        row_scale = matched_scale(plan.norm_kind, h, moved, key_scale)
    else:
        u, key_scale = mlp_input(layer, plan, h, _heard(plan, component, a) if moved is None else moved, backend)
    change = Change(
        layer,
        plan,
        component,
        None if z is not None else a,
        key_scale,
        backend,
        z=z,
        moved=moved,
        row_scale=row_scale,
        heard=a,
    )
    return u, change


def _heard(plan: LayerPlan, component: NPComponent, a: Tensor | None) -> Tensor | None:
    """What the norm is matched to beside ``h``: as much of ``a`` as the change brings to the stream (``npt_scale``)."""
    if a is None or not plan.norm_match or component.strength == 1.0:
        return a
    return a * component.strength


def _scales_alone(norm: nn.Module, h: Tensor, moved: Tensor) -> bool:
    """Whether a gradient reaches the normed input through 1/ρ_T only, and 1/ρ_T is a factor of all of it.

    So it is where nothing below trains: in local training and in the first converted layer. Its gradient is then taken behind the
    linears (``row_scale`` of the op), which saves the two products of ``du``: 40 % of local training's arithmetic.
    """
    return (
        moved.requires_grad
        and torch.is_grad_enabled()
        and not h.requires_grad
        and getattr(norm, "bias", None) is None
        and not any(parameter.requires_grad for parameter in norm.parameters())
        and not has_hooks(norm)
        and not _replaced_forward(norm)
    )


def mlp_input(
    layer: nn.Module, plan: LayerPlan, h: Tensor, a: Tensor | None, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(u [..., d], key_scale [...] or None)``: the normed MLP input and 1/ρ_T, ρ_T the norm of ``h + a``."""
    norm = plan.shape.norm(layer)
    if plan.attention_residual and not plan.shape.parallel:
        assert a is not None
        h = h + a
    if not plan.norm_match:
        return norm(h), None
    assert a is not None
    if not has_hooks(norm) and not _replaced_forward(norm):
        return matched_norm(norm, plan.norm_kind, h, a, backend=backend)
    # What the module makes of h, brought from the norm of h to that of h + a.
    out, (_, key_scale) = norm(h), matched_norm(norm, plan.norm_kind, h, a)
    ratio = (key_scale / matched_norm(norm, plan.norm_kind, h, torch.zeros_like(a))[1]).unsqueeze(-1).to(out.dtype)
    bias = getattr(norm, "bias", None)
    return out * ratio if bias is None else (out - bias) * ratio + bias, key_scale


def changed_mlp(change: Change, u: Tensor) -> Tensor:
    """``MLP_Δ(u; a) [..., d]``, as one op where every linear can be read."""
    plan, layer = change.plan, change.layer
    mlp = plan.shape.mlp(layer)
    return plan.shape.after_down(mlp, _changed(change, mlp, u))


def _changed(change: Change, mlp: nn.Module, u: Tensor) -> Tensor:
    plan, layer = change.plan, change.layer
    shape, act = plan.shape, plan.shape.activation(layer)
    if (
        "np_extra" in layer._modules
        or any(
            has_hooks(module) or not plain_forward(module)
            for module, _ in map(partial(shape.called, layer), shape.targets)
        )
        or (isinstance(act, nn.Module) and has_hooks(act))
    ):
        return _called(change, mlp, u)
    linears = {place.slot: shape.linear(layer, target) for target, place in shape.targets.items()}
    weights = {slot: linear_weight(linear, u.dtype) for slot, linear in linears.items()}
    biases = {slot: linear_bias(linear) for slot, linear in linears.items()}
    dtype = weights["up"].dtype
    u, key_scale = u.to(dtype), None if change.key_scale is None else change.key_scale.to(dtype)
    adapter: NPComponent | AdapterTensors = change.component
    a = change.a
    if change.z is not None:
        a, adapter = change.z, _given_bottleneck(change, autocast_dtype(u) or dtype)
    assert a is not None
    a = a.to(dtype)
    row_scale = None if change.row_scale is None else change.row_scale.to(torch.promote_types(dtype, torch.float32))
    if "gate" in weights:
        out = npt_gated_mlp(
            u, a, weights["gate"], weights["up"], weights["down"], adapter, act=plan.act, key_scale=key_scale,
            row_scale=row_scale, gate_bias=biases["gate"], up_bias=biases["up"], down_bias=biases["down"], backend=change.backend,
        )  # fmt: skip
    else:
        out = npt_mlp(
            u, a, weights["up"], weights["down"], adapter, act=plan.act, key_scale=key_scale, row_scale=row_scale,
            c_fc_bias=biases["up"], c_proj_bias=biases["down"], backend=change.backend,
        )  # fmt: skip
    return out if change.moved is None else out + change.moved


def _given_bottleneck(change: Change, dtype: torch.dtype) -> AdapterTensors:
    """The component's tensors without what has been computed: the bottleneck and, if ``moved``, the last linear's change."""
    made = change.component.tensors(dtype)
    values = made.w_b_up
    if change.moved is not None:
        values = {target: value for target, value in values.items() if target != change.plan.down}
    return AdapterTensors(None, made.w_a_up, values, made.rule, made.num_ranks, made.scale)


def _called(change: Change, mlp: nn.Module, u: Tensor) -> Tensor:
    """Linears and activation called as modules, each change added to the output: ``linear(x) + c @ w_b_up``."""
    plan, component = change.plan, change.component
    dtype = next((t.dtype for t in mlp.parameters() if t.is_floating_point()), u.dtype)
    u = u.to(dtype)
    adapter = component.tensors(dtype)
    if change.z is not None:
        z = change.z.to(dtype)
    else:
        assert change.a is not None and adapter.w_down is not None
        z = change.a.to(dtype) @ adapter.w_down
    scaled = z if change.key_scale is None else z * change.key_scale.to(z.dtype).unsqueeze(-1)
    if change.row_scale is not None:
        rows = change.row_scale.unsqueeze(-1)
        u, scaled = (u * rows).to(u.dtype), (scaled * rows).to(scaled.dtype)
    places = {place.slot: (target, place.attribute) for target, place in plan.shape.targets.items()}
    fused: Tensor | None = None
    extra: NPComponent | None = change.layer._modules.get("np_extra")  # type: ignore[assignment]
    extra_tensors = z_extra = None
    if extra is not None:
        if change.heard is None:
            raise RuntimeError(
                f"layer {plan.index} has an extra change, which needs the attention output, not the bottleneck of it"
            )
        extra_tensors = extra.tensors(dtype)
        z_extra = change.heard.to(dtype) @ extra_tensors.w_down  # type: ignore[operator]
        if change.row_scale is not None:
            raise RuntimeError(f"layer {plan.index} has an extra change; its component does not train, locally neither")

    def linear(slot: str, x: Tensor, z: Tensor) -> Tensor:
        nonlocal fused
        target, attribute = places[slot]
        module, part = plan.shape.called(change.layer, target)
        if not torch.compiler.is_compiling() and (has_hooks(module) or not plain_forward(module)):
            kind = (
                "a module with hooks" if plain_forward(module) else f"{type(module).__module__}.{type(module).__name__}"
            )
            _say_called(f"mlp.{attribute}", kind)
            _say_frozen(component, mlp)
        if part is None:
            y: Tensor = module(x)
        else:  # gate and up read the same x: one call, as in the original
            fused = module(x) if fused is None else fused
            y = fused[..., part]
        y = _plus_change(y, x, z, adapter, target)
        return y if extra_tensors is None else _plus_change(y, x, z_extra, extra_tensors, target)  # type: ignore[arg-type]

    act = plan.shape.activation(change.layer)
    up = linear("up", u, scaled)
    inter = act(linear("gate", u, scaled)) * up if "gate" in places else act(up)
    return linear("down", inter, z)


def _plus_change(y: Tensor, x: Tensor, z: Tensor, adapter: AdapterTensors, target: str) -> Tensor:
    """``y + c @ w_b_up``; ``y`` itself where the target does not change."""
    value, key, rule = adapter.w_b_up.get(target), adapter.w_a_up.get(target), get_rule(adapter.rule)
    if value is None:
        return y
    p = None if key is None else F.linear(x.to(key.dtype), key if rule.key == "matrix" else key.unsqueeze(0))
    c = rule.coefficients(z, p, adapter.num_ranks, adapter.scale)
    return y + (c.to(value.dtype) @ value).to(y.dtype)


def _say_frozen(component: NPComponent, mlp: nn.Module) -> None:
    if "peft" in sys.modules and mlp.training and torch.is_grad_enabled() and not component.w_down.requires_grad:
        _warn_frozen()


@lru_cache(maxsize=1)
def _warn_frozen() -> None:
    warnings.warn(
        "npt_kernels: the NP components do not train: peft.get_peft_model freezes all that is not its own; to train both, "
        "[p.requires_grad_(True) for p in npt_parameters(model)]",
        stacklevel=6,
    )
