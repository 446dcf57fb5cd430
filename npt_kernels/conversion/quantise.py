"""Quantise a model's frozen linears, before it is converted, or take over those that a library has quantised.

Formulas, memory and measurements: ``docs/quantisation.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    # By identity: a linear that two layers share stays shared.
    made: dict[int, QuantisedLinear] = {}
    with progress_bar(f"quantising to {format}", len(linears), "linears", enabled=progress) as advance:
        for parent, name, child, _ in linears:
            if id(child) not in made:
                weight = linear_weight(child)
                before += weight.numel() * weight.element_size()
                made[id(child)] = quantise_linear(child, format, library, device=device)
                after += made[id(child)].stored_bytes
                made[id(child)].train(child.training)
            setattr(parent, name, made[id(child)])
            advance(1)
    return QuantisationReport(format, library, len(made), before, after)


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
