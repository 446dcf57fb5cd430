"""Quantise a model's frozen linears, before it is converted, or take over those that a library has quantised.

Formulas, memory and measurements: ``docs/quantisation.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.install import converted_layers
from ..model.linears import is_conv1d, linear_bias, linear_weight, weight_source
from ..model.select import find_layers
from ..progress import progress_bar
from ..quantised.foreign import made_by_library, taken_over
from ..quantised.linear import QuantisedLinear, quantise_weight, weight_problem
from ..quantised.names import choose_library, import_library

__all__ = ["QuantisationReport", "adopt_quantised", "quantise_base", "quantise_linear"]


def _dense_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


@torch.no_grad()
def quantise_linear(
    linear: nn.Module, format: str, library: str = "auto", *, device: torch.device | str | None = None
) -> QuantisedLinear:
    """A quantised copy of an ``nn.Linear`` or ``Conv1D``, on ``device`` (default: where the linear is).

    Raises:
        ValueError: Not such a linear, an unknown format or pair, a weight that cannot be quantised.
        ImportError: The library is not installed; the message names what is.
    """
    library = choose_library(format, library)
    if not _dense_linear(linear):
        raise ValueError(
            f"a {type(linear).__module__}.{type(linear).__name__} cannot be quantised, only Linear or Conv1D"
        )
    return quantise_weight(linear_weight(linear), format, library, linear_bias(linear), device=device)


@dataclass(frozen=True)
class QuantisationReport:
    """What :func:`quantise_base` did: how many linears, and the bytes of their weights before and after."""

    format: str
    library: str
    linears: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"quantised {self.linears} frozen linears to {self.format} ({self.library}): "
            f"{self.bytes_before / 2**20:,.1f} -> {self.bytes_after / 2**20:,.1f} MiB"
        )


@torch.no_grad()
def quantise_base(
    model: nn.Module,
    format: str,
    library: str = "auto",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> QuantisationReport:
    """Quantise all linears of the decoder layers (attention and MLP), in place, one after the other.

    Embeddings, norms, biases and the language-model head stay as they are. Quantise *before* ``apply_npt``: the closed form is
    then fitted to the weights that will be used, and the teacher is the quantised model.

    Args:
        model: A causal language model (or its decoder) with layers that NPT knows.
        format, library: As in :data:`npt_kernels.quantised.names.FORMATS`; ``auto`` takes the format's first library.
        device: Where the quantised linears go; each dense weight is moved, quantised and freed, so a GPU never holds more than
            one of them. The rest of the model is left where it is. ``None``: every linear stays on its device.
        dtype: Of the base: each dense weight is cast to it on its own before it is quantised, and so are the parameters that
            stay. A model loaded in the dtype of its files, which are mapped, so never is in memory as a whole.
        progress: Show a progress bar.

    Raises:
        ValueError: Nothing to quantise, a model that is converted or quantised already, a weight that cannot be quantised
            (checked for all linears before the first is touched).
        ImportError: The library is not installed.
    """
    library = choose_library(format, library)
    if converted_layers(model):
        raise ValueError("the model is converted already; quantise it before apply_npt, or call remove_npt first")
    _, layers = find_layers(model)
    found = [
        (parent, name, child, f"layer {index}: {path + '.' if path else ''}{name}")
        for index, layer in enumerate(layers)
        for path, parent in layer.named_modules()
        for name, child in parent.named_children()
    ]
    for _, _, child, where in found:
        if weight_source(child) is not None:
            raise ValueError(f"{where} is quantised already ({type(child).__name__}); quantise a dense model")
    linears = [(parent, name, child, where) for parent, name, child, where in found if _dense_linear(child)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv1D in its decoder layers")
    for _, _, child, where in linears:
        weight = linear_weight(child)
        if (problem := weight_problem(weight, format)) is not None:
            raise ValueError(f"{where}: the weight {problem}")
    import_library(library)
    before = after = 0
    # By identity: a linear that two layers share stays shared. Places of one linear together, so that it can be let go.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent, name, child, _ in linears:
        places.setdefault(id(child), []).append((parent, name))
    del found, linears, parent, child, weight
    with progress_bar(f"quantising to {format}", len(places), "linears", enabled=progress) as advance:
        for (parent, name), *others in places.values():
            quantised, size = _quantised_child(parent, name, format, library, device, dtype)
            before += size
            after += quantised.stored_bytes
            for place, other in ((parent, name), *others):
                setattr(place, other, quantised)
            advance(1)
    if dtype is not None:
        _cast_parameters(model, dtype)
    return QuantisationReport(format, library, len(places), before, after)


def _quantised_child(
    parent: nn.Module, name: str, format: str, library: str, device: Any, dtype: torch.dtype | None
) -> tuple[QuantisedLinear, int]:
    """Of the child of that name, and the bytes of its dense weight."""
    child = parent.get_submodule(name)
    if dtype is not None:
        child.to(dtype)
    weight = linear_weight(child)
    quantised = quantise_linear(child, format, library, device=device)
    return quantised.train(child.training), weight.numel() * weight.element_size()


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Buffers keep theirs: rotary frequencies are float32 in every model."""
    for module in model.modules():
        if not isinstance(module, QuantisedLinear):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def adopt_quantised(model: nn.Module) -> int:
    """Replace the quantised linears of bitsandbytes and torchao by ones that share their storage; returns how many.

    For models loaded with ``BitsAndBytesConfig`` or ``TorchAoConfig``, before their first forward. The adopted model computes
    with the dequantised weight in the model's dtype: activations are not rounded (``Linear8bitLt`` rounds them), and no dense
    weight is kept for the backward. What cannot be taken over exactly is left as it is.
    """
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1]
    dtype = dtypes[0] if dtypes else torch.float32
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if made_by_library(child) and (adopted := taken_over(child, dtype)) is not None:
                setattr(parent, name, adopted.train(child.training))
                count += 1
    return count
