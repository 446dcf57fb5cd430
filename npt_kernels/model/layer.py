"""One converted decoder layer: the instance gets a subclass of its own class, whose forward drops the attention residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..component import NPComponent, switched
from .fold import (
    NPTOutputProjection,
    bottleneck_of_heads,
    heads_output,
    output_projection,
    skippable_projection,
)
from .mlp import LayerPlan, NPTMlp, changed_mlp, make_change
from .ready import ready_half
from .shapes.base import LayerShape
from .swap import Swapped, own_forward, restore_class, swap_class

__all__ = [
    "LayerPlan",
    "NPTLayer",
    "convert_layer",
    "is_converted",
    "restore_layer",
    "student_output",
    "teacher_output",
]


def teacher_output(layer: nn.Module, shape: LayerShape, h: Tensor, a: Tensor) -> Tensor:
    """What the original layer returns for its input ``h`` and attention output ``a``: ``h + a + MLP(norm(h + a))``."""
    return shape.original(layer, h, a)


def student_output(
    layer: nn.Module,
    plan: LayerPlan,
    component: NPComponent,
    h: Tensor,
    a: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """What the converted layer returns: ``h + MLP_Δ(u; a)``, from ``a`` or from the bottleneck ``z = a @ w_down``.

    With the attention residual where the plan keeps it: ``h + a + …``; it needs ``a``.

    ``layer`` may not be converted yet.
    """
    mlp = plan.shape.mlp(layer)
    if not h.is_meta:
        # One weight of each of the two modules that the layer's own forward would have called; not all: this is a hot path.
        linear = plan.shape.called(layer, next(iter(plan.shape.targets)))[0]
        if any(getattr(module, "weight", h).is_meta for module in (plan.shape.norm(layer), linear)):
            raise RuntimeError(
                f"the weights of layer {plan.index} are offloaded, and accelerate brings back only those of modules that are "
                f"called; dispatch the model with preload_module_classes=['{type(layer).__name__}']"
            )
    u, change = make_change(layer, plan, component, h, a, z)
    if not is_converted(layer) or mlp is layer:
        out = changed_mlp(change, u)
    elif not isinstance(mlp, NPTMlp):
        raise RuntimeError(
            f"the MLP of layer {plan.index} was replaced by a {type(mlp).__name__} after the conversion; remove_npt, then "
            "convert the model as it is now"
        )
    elif "forward" in mlp.__dict__ and not hasattr(mlp, "_hf_hook") and not own_forward(mlp):
        raise RuntimeError(
            f"mlp.forward of layer {plan.index} was replaced on the instance after the conversion, and what it computes is not "
            "known here; use a hook (register_forward_hook), or remove_npt first"
        )
    else:
        out = mlp(u, npt=change)
    if plan.attention_residual:
        assert a is not None
        h = h + a
    return plan.shape.output(layer, h, out.to(h.dtype))


class NPTLayer(Swapped):
    """Mixin of converted layers. ``forward`` returns ``h + MLP_Δ(norm(h); a)``; inside ``npt_disabled`` the original."""

    npt_plan: LayerPlan
    np_component: NPComponent

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        npt_enabled: bool | None = None,
        npt_folded: bool | None = None,
        npt_strength: float | None = None,
        **kwargs: Any,
    ) -> Any:
        component: NPComponent = self._modules["np_component"]  # type: ignore[assignment,attr-defined]  # by name: a call of Python
        if npt_strength is not None and npt_strength != component.strength:
            with switched({component.switch: npt_strength}):
                # Not self.forward, in which transformers' newer layers checkpoint.
                return NPTLayer.forward(
                    self, hidden_states, *args, npt_enabled=npt_enabled, npt_folded=npt_folded, **kwargs
                )
        if not (component.enabled if npt_enabled is None else npt_enabled):
            return self.npt_original_class.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        if self.npt_plan.returns_tuple and kwargs.get("output_attentions"):
            raise ValueError(
                f"layer {self.npt_plan.index} is converted and returns no attention weights; use output_attentions=False, or "
                "npt_disabled(model)"
            )
        own = (
            "npt_student" in self.__dict__ or "npt_attention" in self.__dict__
        )  # replaced on the instance: nothing is left out
        if npt_folded is None and not own:
            ready = ready_half(self, self.npt_plan, component, hidden_states)  # type: ignore[arg-type]
            if ready is not None:
                return self._as_own(ready(self, component, hidden_states, *args, **kwargs))  # type: ignore[arg-type]
        projection = output_projection(self, self.npt_plan) if npt_folded and not own else None  # type: ignore[arg-type]
        if npt_folded is None and not own:
            projection = skippable_projection(self, self.npt_plan, component, hidden_states)  # type: ignore[arg-type]
        if projection is None:
            return self._as_own(self.npt_student(hidden_states, self.npt_attention(hidden_states, *args, **kwargs)))
        o = heads_output(self, self.npt_plan, projection, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        z = bottleneck_of_heads(component, projection, o)
        return self._as_own(student_output(self, self.npt_plan, component, hidden_states, z=z))  # type: ignore[arg-type]

    def _as_own(self, output: Tensor) -> Any:
        """What the original's forward would return it in."""
        return (output, None) if self.npt_plan.returns_tuple else output

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "gradient_checkpointing", False) and self.training:  # type: ignore[attr-defined]
            # The recomputation must do what the forward did, and npt_disabled or npt_scale may have ended, or begun, by then;
            # hooks likewise.
            kwargs["npt_enabled"] = self.np_component.enabled
            kwargs["npt_strength"] = self.np_component.strength
            kwargs["npt_folded"] = (
                skippable_projection(self, self.npt_plan, self.np_component, hidden_states) is not None  # type: ignore[arg-type]
            )
            # Reentrant checkpointing gives no gradient to a block none of whose *inputs* needs one, and says so only in a
            # warning: below a frozen embedding the adapters of the first layer would silently stay untrained.
            if (
                torch.is_grad_enabled()
                and not hidden_states.requires_grad
                and getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {}).get(
                    "use_reentrant", True
                )
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
        u, change = make_change(self, self.npt_plan, self.np_component, hidden_states, a)  # type: ignore[arg-type]
        return u, change.key_scale

    def npt_student(self, hidden_states: Tensor, a: Tensor) -> Tensor:
        """What the converted layer returns: ``h + MLP_Δ(u; a)``."""
        return student_output(self, self.npt_plan, self.np_component, hidden_states, a)  # type: ignore[arg-type]


def is_converted(layer: nn.Module) -> bool:
    return isinstance(layer, NPTLayer)


def convert_layer(layer: nn.Module, plan: LayerPlan, component: NPComponent) -> None:
    """Make ``layer`` a converted layer, in place."""
    layer.np_component = component
    layer.npt_plan = plan  # type: ignore[assignment]
    swap_class(layer, NPTLayer)
    if plan.shape.mlp(layer) is not layer:
        swap_class(plan.shape.mlp(layer), NPTMlp)
    if plan.projection is not None:
        swap_class(getattr(plan.shape.attention_module(layer), plan.projection), NPTOutputProjection)


def restore_layer(layer: nn.Module) -> None:
    """The original layer back, in place. ``layer`` must be a converted one."""
    plan: LayerPlan = layer.npt_plan  # type: ignore[assignment]
    mlp = plan.shape.mlp(layer)
    if isinstance(mlp, NPTMlp):
        restore_class(mlp)  # type: ignore[arg-type]
    for module in plan.shape.attention_module(layer).modules():
        if isinstance(module, NPTOutputProjection):
            restore_class(module)
    restore_class(layer)
    layer._modules.pop("np_extra", None)
    del layer.np_component, layer.npt_plan
