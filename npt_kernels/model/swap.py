"""One instance gets a subclass of its own class, and later its class back.

That keeps parameters, names, hooks, ``isinstance`` and gradient checkpointing as they were, leaves every other instance and the
class itself alone, and is undone by putting the class back. (FSDP2 does the same.)
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

__all__ = ["Swapped", "own_forward", "restore_class", "swap_class"]


class Swapped:
    """Base of the mixins that are put in front of a module's class."""

    npt_original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The subclass is made at run time, so pickle must rebuild it from the two classes it is made of.
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self.npt_original_class), self.__dict__


_made: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def _class_of(mixin: type, original: type[nn.Module]) -> type[nn.Module]:
    """Subclass with the original's name: accelerate's ``_no_split_modules`` and printed trees go by it."""
    if (mixin, original) not in _made:
        namespace = {
            "forward": mixin.forward,  # type: ignore[attr-defined]
            "npt_original_class": original,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": f"{original.__name__} converted by npt_kernels.apply_npt.",
        }
        # Of two threads that convert at the same time, both get the class of the first.
        _made.setdefault((mixin, original), type(original.__name__, (mixin, original), namespace))
    return _made[mixin, original]


def _rebuild(mixin: type, original: type[nn.Module]) -> nn.Module:
    cls = _class_of(mixin, original)
    return cls.__new__(cls)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the module's class."""
    module.__class__ = _class_of(mixin, type(module))
    _rebind_hooked_forward(module)


def restore_class(module: nn.Module) -> None:
    """The original class back."""
    module.__class__ = type(module).npt_original_class  # type: ignore[attr-defined]
    _rebind_hooked_forward(module)


def own_forward(module: nn.Module) -> bool:
    """Whether an instance attribute ``forward`` is just the class's own (accelerate leaves it so when it removes a hook)."""
    forward = module.__dict__.get("forward")
    own = {c.__dict__["forward"] for c in type(module).__mro__ if "forward" in c.__dict__}
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) in own


def _rebind_hooked_forward(module: nn.Module) -> None:
    # A removed hook's leftover, bound to the class the module had then.
    if (
        "forward" in module.__dict__
        and not hasattr(module, "_hf_hook")
        and getattr(module.forward, "__self__", None) is module
    ):
        del module.forward
    # accelerate's hooks (device_map) call the forward they found when they were attached; show them the present one.
    if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        module._old_forward = types.MethodType(type(module).forward, module)  # type: ignore[assignment]
