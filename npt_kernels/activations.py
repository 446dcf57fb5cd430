"""Activations of the MLP with their derivative by name: the ones that fused kernels can put in an epilogue.

Names follow ``transformers.activations.ACT2FN``. Derivatives use aten's own backward formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "get_activation", "identify_activation"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``forward(pre) -> post`` and ``backward(grad_post, pre) -> grad_pre``, both out of place."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(1.702 * x)
    return grad * (sigmoid + 1.702 * x * sigmoid * (1 - sigmoid))


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_KERNELS = (
    Activation("silu", F.silu, lambda g, x: _aten.silu_backward(g, x)),
    Activation("gelu", F.gelu, lambda g, x: _aten.gelu_backward(g, x)),
    Activation(
        "gelu_tanh",
        lambda x: F.gelu(x, approximate="tanh"),
        lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    ),
    Activation("relu", F.relu, lambda g, x: _aten.threshold_backward(g, x, 0)),
    Activation("relu2", _relu2, lambda g, x: g * (2 * F.relu(x))),
    Activation("quick_gelu", _quick_gelu, _quick_gelu_backward),
)
_ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu_squared": "relu2",
}
_BY_NAME = {activation.name: activation for activation in _KERNELS}

#: Every accepted name, aliases included.
ACTIVATIONS: dict[str, Activation] = _BY_NAME | {alias: _BY_NAME[name] for alias, name in _ALIASES.items()}


def get_activation(name: str) -> Activation:
    """The activation of that name. Raises ``ValueError`` naming the ones that exist."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"act={name!r} is not supported; choose one of {', '.join(sorted(ACTIVATIONS))}") from None


def identify_activation(module: Callable[[Tensor], Tensor]) -> str | None:
    """Name of the activation that a module computes, found by running it on a grid; ``None`` if it is none of ours."""
    grid = torch.linspace(-24.0, 24.0, 385)  # wide enough to tell relu6 and clipped gelus from the plain ones
    with torch.no_grad():
        try:
            expected = module(grid)
        except (RuntimeError, TypeError, ValueError):
            return None
        for activation in _KERNELS:
            if torch.allclose(activation.forward(grid), expected, rtol=1e-5, atol=2e-6):
                return activation.name
    return None
