"""Running a model that is not ours: its decoder without the head, the hidden states of an output, evaluation mode and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["decoder_of", "evaluating", "first_output"]


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head (the model itself if it has none)."""
    return getattr(model, "base_model", model)


def first_output(output: Any) -> Tensor:
    """Hidden states of an attention's or layer's output: the tensor itself or, by version and family, the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model in evaluation mode (no dropout); afterwards every module is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
