"""The frozen linears of a layer, whatever their class: ``nn.Linear``, GPT-2's ``Conv1D``, quantised by NPT or by a library.

Everybody else reads weight ``[out, in]``, bias and sizes here and does not ask what kind of module it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops.dense_on_use import WeightSource
from ..quantised.foreign import library_problem, library_source, made_by_library
from ..quantised.linear import QuantisedLinear, readable

__all__ = [
    "LinearHalf",
    "count_parameters",
    "is_conv1d",
    "linear_bias",
    "linear_shape",
    "linear_weight",
    "unsupported_linear",
    "weight_source",
    "whole",
]


class LinearHalf:
    """One of the two matrices that a linear holds one above the other (``gate_up_proj``), read where it stands.

    Its weight is a view, made when it is asked for, so it follows whatever moves, casts or shards the linear; nothing is copied,
    and the model's modules, names and saved files stay as they are. Of a quantised linear the half is dense while it is used.
    """

    def __init__(self, source: nn.Module, part: int) -> None:
        self.source, self.part = source, part

    @property
    def weight(self) -> Tensor:
        return linear_weight(self)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        bias = linear_bias(self.source)
        return None if bias is None else bias.chunk(2)[self.part]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.source.parameters()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.source(x)
        return out.chunk(2, dim=-1)[self.part]


def whole(module: nn.Module) -> nn.Module:
    """The module that is called, and that hooks, wrappers and quantisers act on: of a half the linear that holds it."""
    return module.source if isinstance(module, LinearHalf) else module  # type: ignore[unreachable]


def is_conv1d(module: nn.Module) -> bool:
    """transformers' ``Conv1D`` (GPT-2), recognised without importing transformers: weight ``[in, out]`` and ``nf``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def unsupported_linear(module: nn.Module | None) -> str | None:
    """Why a module cannot serve as a frozen linear, or ``None``."""
    if module is None:
        return "is missing"
    if isinstance(module, QuantisedLinear):
        return None
    if made_by_library(module):
        return library_problem(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return (
            f"is a {type(module).__module__}.{type(module).__name__}, neither a plain Linear or Conv1D nor one quantised by "
            "NPT, bitsandbytes or torchao"
        )
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"has a weight of {getattr(weight, 'dtype', type(weight))}, not a floating type"
    return None


def weight_source(module: nn.Module, dtype: torch.dtype | None = None) -> WeightSource | None:
    """What makes the dense weight of a quantised linear; ``None`` for other modules. ``dtype`` as in :func:`linear_weight`."""
    return module if isinstance(module, QuantisedLinear) else library_source(module, dtype)


def linear_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The frozen weight as ``[out, in]``: a view for ``Conv1D``, which stores ``[in, out]``.

    Of a quantised linear it is a :class:`~npt_kernels.ops.dense_on_use.DeferredWeight`: it has shape, dtype and device of the
    dense weight, every operation takes it, and its values exist while an operation runs. ``dtype`` only counts for
    bitsandbytes' ``Linear8bitLt``, which does not say what it was quantised from (default float32).
    """
    if isinstance(module, LinearHalf):
        return linear_weight(module.source, dtype).chunk(2)[module.part]  # type: ignore[unreachable]
    if isinstance(module, QuantisedLinear):
        return module.weight
    source = library_source(module, dtype)
    if source is not None:
        return readable(source)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(module) else weight


def linear_bias(module: nn.Module) -> Tensor | None:
    """The bias ``[out]`` or ``None``."""
    return getattr(module, "bias", None)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, a quantised weight counted as the ``out × in`` numbers that it stands for."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        source = weight_source(module)
        if source is not None:
            total += source.weight_shape[0] * source.weight_shape[1]
            own = {name: parameter for name, parameter in own.items() if name == "bias"}
        total += sum(parameter.numel() for parameter in own.values() if id(parameter) not in seen)
        seen.update(map(id, own.values()))
    return total


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(in, out)``."""
    d_out, d_in = linear_weight(module).shape
    return d_in, d_out
