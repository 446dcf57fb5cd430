"""Half precision on every device: a loss scale wherever gradients pass through float16, autocast over any base dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.schema import RunConfig
from .kept_casts import KeptCasts

__all__ = ["autocast", "scale_losses", "unscale_gradients"]


def scale_losses(accelerator: Any, config: RunConfig) -> None:
    """Give accelerate a loss scale wherever gradients pass through float16, whose smallest number is 6e-8.

    accelerate 1.15 has one for autocast on a GPU only: on a CPU it takes ``fp16`` and then computes in float32 without a word,
    and a base *stored* in float16 has no autocast at all.
    """
    precision = config.optimization.mixed_precision
    if precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.native_amp = True  # torch has float16 autocast on a CPU
    through_float16 = precision == "fp16" or (precision == "no" and config.model.dtype == "float16")
    if accelerator.scaler is None and through_float16:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)


def unscale_gradients(accelerator: Any, optimizer: Any) -> None:
    """Divide the gradients by the loss scale where accelerate's clipping does not: it does under fp16 autocast only."""
    if accelerator.scaler is not None and accelerator.mixed_precision != "fp16":
        accelerator.scaler.unscale_(optimizer.optimizer)


@contextmanager
def autocast(accelerator: Any, model: nn.Module, kept: KeptCasts | None = None) -> Iterator[None]:
    """accelerate's autocast; with ``kept`` copies of frozen weights are not made anew in every call.

    On a CPU, LayerNorms also take a stream in another dtype than their weight.

    On a GPU autocast runs them in float32. On a CPU it leaves them alone, and torch has no kernel for, say, the float32 sum of
    a bfloat16 residual and a float16 attention output under bfloat16 weights: GPT-2 in bfloat16 under fp16 autocast fails.
    """
    handles = []
    if accelerator.native_amp and accelerator.device.type == "cpu":
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.weight is not None]
        handles = [m.register_forward_pre_hook(_to_weight_dtype) for m in norms if m.weight.element_size() == 2]
    try:
        with accelerator.autocast(), kept if kept is not None and accelerator.native_amp else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _to_weight_dtype(norm: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(norm.weight.dtype), *args[1:])
