"""One converted decoder layer: the instance gets a subclass of its own class, whose forward drops the attention residual.

Swapping ``__class__`` on the instance keeps parameters, names, hooks, ``isinstance`` and gradient checkpointing as they
were, leaves every other instance and the class itself alone, and is undone by putting the class back. (FSDP2 does the same.)
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..component import NPComponent
from ..functional import npt_gated_mlp, npt_mlp
from .linears import linear_bias, linear_weight
from .norms import NormKind, matched_norm
from .shapes.base import LayerShape

__all__ = [
    "LayerPlan",
    "NPTLayer",
    "convert_layer",
    "is_converted",
    "mlp_input",
    "restore_layer",
    "student_output",
    "teacher_output",
]


@dataclass(frozen=True)
class LayerPlan:
    """What a converted layer needs to know, fixed at conversion."""

    index: int
    shape: LayerShape
    act: str
    norm_kind: NormKind
    norm_match: bool


def teacher_output(layer: nn.Module, shape: LayerShape, h: Tensor, a: Tensor) -> Tensor:
    """What the original layer returns for its input ``h`` and attention output ``a``: ``h + a + MLP(norm(h + a))``."""
    total = h + a
    return total + shape.mlp(layer)(shape.norm(layer)(total))  # type: ignore[no-any-return]


def mlp_input(layer: nn.Module, plan: LayerPlan, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(u [..., d], key_scale [...] or None)``: the normed MLP input and 1/ρ_T."""
    norm = plan.shape.norm(layer)
    if plan.norm_match:
        return matched_norm(norm, plan.norm_kind, h, a)
    return norm(h), None


def student_output(layer: nn.Module, plan: LayerPlan, component: NPComponent, h: Tensor, a: Tensor) -> Tensor:
    """What the converted layer returns: ``h + MLP_Δ(u; a)``."""
    if not h.is_meta:
        # One weight of each of the two modules that the layer's own forward would have called; not all: this is a hot path.
        linear = plan.shape.linear(layer, next(iter(plan.shape.targets)))
        if any(getattr(module, "weight", h).is_meta for module in (plan.shape.norm(layer), linear)):
            raise RuntimeError(
                f"the weights of layer {plan.index} are offloaded, and accelerate brings back only those of modules that are "
                f"called; dispatch the model with preload_module_classes=['{type(layer).__name__}']"
            )
    u, key_scale = mlp_input(layer, plan, h, a)
    weights, biases = {}, {}
    for target, place in plan.shape.targets.items():
        linear = plan.shape.linear(layer, target)
        weights[place.slot], biases[place.slot] = linear_weight(linear, u.dtype), linear_bias(linear)
    dtype = weights["up"].dtype
    u, a = u.to(dtype), a.to(dtype)
    key_scale = None if key_scale is None else key_scale.to(dtype)
    if "gate" in weights:
        out = npt_gated_mlp(
            u, a, weights["gate"], weights["up"], weights["down"], component, act=plan.act, key_scale=key_scale,
            gate_bias=biases["gate"], up_bias=biases["up"], down_bias=biases["down"],
        )  # fmt: skip
    else:
        out = npt_mlp(
            u, a, weights["up"], weights["down"], component, act=plan.act, key_scale=key_scale,
            c_fc_bias=biases["up"], c_proj_bias=biases["down"],
        )  # fmt: skip
    return plan.shape.output(layer, h, out.to(h.dtype))


class NPTLayer:
    """Mixin of converted layers. ``forward`` returns ``h + MLP_Δ(norm(h); a)``; inside ``npt_disabled`` the original."""

    npt_original_class: type[nn.Module]
    npt_plan: LayerPlan
    np_component: NPComponent

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.np_component.enabled:
            return self.npt_original_class.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return self.npt_student(hidden_states, self.npt_attention(hidden_states, *args, **kwargs))

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Reentrant checkpointing gives no gradient to a block none of whose *inputs* needs one, and says so only in a
        # warning: below a frozen embedding the adapters of the first layer would silently stay untrained.
        if (
            getattr(self, "gradient_checkpointing", False)
            and self.training  # type: ignore[attr-defined]
            and torch.is_grad_enabled()
            and not hidden_states.requires_grad
            and getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", True)
        ):
            hidden_states = hidden_states.detach().requires_grad_()
        return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def npt_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention output ``a [..., d]`` for the layer input ``h [..., d]``; other arguments as the layer's forward."""
        return self.npt_plan.shape.attention(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]

    def npt_teacher(self, hidden_states: Tensor, a: Tensor) -> Tensor:
        """What the original layer returns: ``h + a + MLP(norm(h + a))``."""
        return teacher_output(self, self.npt_plan.shape, hidden_states, a)  # type: ignore[arg-type]

    def npt_mlp_input(self, hidden_states: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(u [..., d], key_scale [...] or None)``: the normed MLP input and 1/ρ_T."""
        return mlp_input(self, self.npt_plan, hidden_states, a)  # type: ignore[arg-type]

    def npt_student(self, hidden_states: Tensor, a: Tensor) -> Tensor:
        """What the converted layer returns: ``h + MLP_Δ(u; a)``."""
        return student_output(self, self.npt_plan, self.np_component, hidden_states, a)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The subclass is made at run time, so pickle must rebuild it from the original class.
        return _rebuild, (self.npt_original_class,), self.__dict__


_converted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _converted_class(original: type[nn.Module]) -> type[nn.Module]:
    """Subclass with the original's name: accelerate's ``_no_split_modules`` and printed trees go by it."""
    if original in _converted_classes:
        return _converted_classes[original]
    namespace = {
        "forward": NPTLayer.forward,
        "npt_original_class": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": f"{original.__name__} converted by npt_kernels.apply_npt.",
    }
    _converted_classes[original] = type(original.__name__, (NPTLayer, original), namespace)
    return _converted_classes[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = _converted_class(original)
    return cls.__new__(cls)


def is_converted(layer: nn.Module) -> bool:
    return isinstance(layer, NPTLayer)


def convert_layer(layer: nn.Module, plan: LayerPlan, component: NPComponent) -> None:
    """Make ``layer`` a converted layer, in place."""
    layer.np_component = component
    layer.npt_plan = plan  # type: ignore[assignment]
    layer.__class__ = _converted_class(type(layer))  # type: ignore[assignment]
    _rebind_hooked_forward(layer)


def restore_layer(layer: nn.Module) -> None:
    """The original layer back, in place. ``layer`` must be a converted one."""
    layer.__class__ = type(layer).npt_original_class  # type: ignore[attr-defined]
    del layer.np_component, layer.npt_plan
    _rebind_hooked_forward(layer)


def own_forward(layer: nn.Module) -> bool:
    """Whether an instance attribute ``forward`` is just the class's own (accelerate leaves it so when it removes a hook)."""
    forward = layer.__dict__.get("forward")
    own = (type(layer).forward, getattr(layer, "npt_original_class", type(layer)).forward, NPTLayer.forward)
    return getattr(forward, "__self__", None) is layer and getattr(forward, "__func__", None) in own


def _rebind_hooked_forward(layer: nn.Module) -> None:
    # A removed hook's leftover, bound to the class the layer had then.
    if (
        "forward" in layer.__dict__
        and not hasattr(layer, "_hf_hook")
        and getattr(layer.forward, "__self__", None) is layer
    ):
        del layer.forward
    # accelerate's hooks (device_map) call the forward they found when they were attached; show them the present one.
    if "_old_forward" in layer.__dict__ and hasattr(layer, "_hf_hook"):
        layer._old_forward = types.MethodType(type(layer).forward, layer)  # type: ignore[assignment]
