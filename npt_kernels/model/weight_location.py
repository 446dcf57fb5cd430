"""Where a layer's frozen weights are while it works: whoever moves them (streaming, sharding) says so on the layer instance.

A mover puts a *residence* on the layers it moves. Code that runs parts of a layer itself, several times in a row, wraps that
in :func:`resident`; code that makes something beside the weights asks :func:`compute_device` instead of a parameter, which
may lie in host memory at the time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

__all__ = ["Residence", "compute_device", "resident", "set_residence"]

_ATTRIBUTE = "npt_residence"


class Residence(Protocol):
    """What moves weights. ``device`` is where layers compute."""

    device: torch.device

    def hold(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the weights of ``layer`` are on ``device``."""


def set_residence(layer: nn.Module, residence: Residence | None) -> None:
    """Put a residence on a layer instance; ``None`` takes it off. Raises ``RuntimeError`` if another one is there."""
    if residence is None:
        layer.__dict__.pop(_ATTRIBUTE, None)
        return
    if _ATTRIBUTE in layer.__dict__:
        raise RuntimeError("the layer's weights are already moved by something else; leave that context first")
    layer.__dict__[_ATTRIBUTE] = residence


def resident(layer: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the weights of ``layer`` are where it computes; nothing to do for a layer that nobody moves."""
    residence: Residence | None = layer.__dict__.get(_ATTRIBUTE)
    return nullcontext() if residence is None else residence.hold(layer)


def compute_device(layer: nn.Module) -> torch.device:
    """The device on which ``layer`` computes, wherever its weights lie now."""
    residence: Residence | None = layer.__dict__.get(_ATTRIBUTE)
    return next(layer.parameters()).device if residence is None else residence.device
