"""Starts without data. The closed form, which needs a calibration text, is in ``npt_kernels/conversion``."""

from __future__ import annotations

import torch

from ..component import NPComponent

__all__ = ["initialise"]

#: Width of the Gaussians of earlier recipes' start. Measured on a tiny model: .01 on every factor trains,
#: zeros on both up-projections never do (their gradients are exactly zero), .1 starts far off.
_PUBLISHED_STD = 0.01


@torch.no_grad()
def initialise(component: NPComponent, init: str, generator: torch.Generator) -> None:
    """Fill a component of zeros.

    ``small`` (and ``auto``): ``w_down ~ N(0, 1/d)``, keys ``~ N(0, 1/in)``, ``w_b_up = 0``, so ΔW = 0 at the start and the
    gradient of ``w_b_up`` is not. ``published``: every factor ``~ N(0, 0.01²)``.
    """

    def normal_(parameter: torch.nn.Parameter, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(std))

    published = init == "published"
    normal_(component.w_down, _PUBLISHED_STD if published else component.hidden_size**-0.5)
    for key in component.w_a_up.values():
        normal_(key, _PUBLISHED_STD if published else key.shape[-1] ** -0.5)
    if published:
        for value in component.w_b_up.values():
            normal_(value, _PUBLISHED_STD)
