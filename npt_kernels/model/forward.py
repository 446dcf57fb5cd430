"""Running a model that is not ours: its decoder without the head, the hidden states of an output, evaluation mode and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..thread_locks import ThreadLock

__all__ = ["cache_in", "decoder_of", "evaluating", "first_output"]


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head (the model itself if it has none)."""
    return getattr(model, "base_model", model)


def first_output(output: Any) -> Tensor:
    """Hidden states of an attention's or layer's output: the tensor itself or, by version and family, the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def cache_in(values: Any) -> Any:
    """The key-value cache among the arguments or in the output of a decoder, ``None`` without: transformers 5.24 renamed
    ``past_key_values`` to ``cache``."""
    if not isinstance(values, Mapping):
        return None
    return next((values[name] for name in ("cache", "past_key_values") if values.get(name) is not None), None)


class _Modes:
    """Of all modules of a model, before the first of the blocks that are open now."""

    def __init__(self, model: nn.Module) -> None:
        self.of = [(module, module.training) for module in model.modules()]
        self.blocks = 0


_lock = ThreadLock()
_before: WeakKeyDictionary[nn.Module, _Modes] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model in evaluation mode (no dropout); afterwards every module is in the mode it had.

    Blocks of several threads may overlap: the last one that ends puts back what the first one found.
    """
    with _lock:
        modes = _before.setdefault(model, _Modes(model))
        modes.blocks += 1
        model.eval()
    try:
        yield
    finally:
        with _lock:
            modes.blocks -= 1
            if not modes.blocks:
                _before.pop(model, None)
                for module, mode in modes.of:
                    module.training = mode
