"""Linears that bitsandbytes or torchao quantised (``BitsAndBytesConfig``, ``TorchAoConfig``, ready-made checkpoints): reading
their weights, and taking their storage over into :class:`~npt_kernels.quantised.linear.QuantisedLinear` without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dense_on_use import WeightSource
from .linear import QuantisedLinear, dequantise_4bit
from .names import import_library

__all__ = ["library_problem", "library_source", "made_by_library", "stored_tensors", "taken_over"]


def _kind(module: nn.Module) -> str | None:
    """``8bit``, ``4bit`` (bitsandbytes), ``torchao``, or ``None``; by names, so that neither library is imported."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes."):
            return {"Linear8bitLt": "8bit", "Linear4bit": "4bit"}.get(cls.__name__)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        tensor = weight.data if type(weight) is nn.Parameter else weight
        return "torchao" if type(tensor).__module__.startswith("torchao.") else None
    return None


def made_by_library(module: nn.Module) -> bool:
    """Whether a library's quantised linear, readable or not."""
    return _kind(module) is not None


def _int8_state(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """``(codes [out, in], absmax [out])``: on the parameter before the first forward, on the module's state after it."""
    weight, state = module.weight, module.state
    codes = weight.data if weight.dtype == torch.int8 else None
    return codes, getattr(weight, "SCB", None) if state.SCB is None else state.SCB


def library_problem(module: nn.Module) -> str | None:
    """Why the weight of a library's linear cannot be read, or ``None``."""
    kind, weight = _kind(module), getattr(module, "weight", None)
    assert isinstance(weight, Tensor)
    if kind == "8bit" and None in _int8_state(module):
        return "is a Linear8bitLt whose weight is not int8 yet; move it to its device first (has_fp16_weights=False)"
    if kind == "4bit":
        state = getattr(weight, "quant_state", None)
        if state is None:
            return "is a Linear4bit whose weight is not quantised yet; move it to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "is a Linear4bit that bitsandbytes has repacked for this CPU, with rounded scales, in its first forward; load "
                "the model again and call npt_kernels.conversion.quantise.adopt_quantised(model) before it runs"
            )
        if weight.device.type == "cpu" and getattr(module, "support_avx512bf16_for_cpu", False):
            return (
                "is a Linear4bit, which bitsandbytes repacks in place on this CPU when it runs; call "
                "npt_kernels.conversion.quantise.adopt_quantised(model) first"
            )
    if kind == "torchao" and not callable(getattr(weight, "dequantize", None)):
        return f"holds a torchao {type(weight.data).__name__}, which has no dequantize(); quantise to int8, fp8 or int4 with NPT"
    return None


class _LibraryWeight:
    """The weight of a library's linear as a :class:`~npt_kernels.ops.dense_on_use.WeightSource`."""

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        self.module, self.kind = module, _kind(module)
        if self.kind == "4bit":
            self.weight_dtype = module.weight.quant_state.dtype
        elif self.kind == "torchao":
            self.weight_dtype = module.weight.dtype
        else:
            # Linear8bitLt does not say what it was.
            self.weight_dtype = dtype or torch.float32

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def weight_device(self) -> torch.device:
        device: torch.device = self.module.weight.device
        return device

    def fill_weight(self, out: Tensor) -> None:
        weight = self.module.weight
        if self.kind == "8bit":
            codes, absmax = _int8_state(self.module)
            assert codes is not None and absmax is not None
            out.copy_(codes).mul_(absmax.float().unsqueeze(1) * (1.0 / 127.0))
        elif self.kind == "4bit":
            state = weight.quant_state
            dequantise_4bit(_bytes(weight), _absmax(state), state.blocksize, state.quant_type, out)
        else:
            out.copy_(weight.dequantize())


def library_source(module: nn.Module, dtype: torch.dtype | None = None) -> WeightSource | None:
    """The source of a library's linear, ``None`` for other modules. ``dtype``: of an int8 weight, which does not say its own."""
    if _kind(module) is None or library_problem(module) is not None:
        return None
    return _LibraryWeight(module, dtype)


def _bytes(weight: Tensor) -> Tensor:
    """Packed 4-bit codes as bytes, whatever ``quant_storage`` they are kept in."""
    return weight.data.view(-1).view(torch.uint8)


def _absmax(state: Any) -> Tensor:
    """One scale per block in float32; unpacked where the scales themselves are quantised (double quantisation)."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    functional = import_library("bitsandbytes").functional
    return (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def taken_over(module: Any, dtype: torch.dtype) -> QuantisedLinear | None:
    """A linear of ours on the storage of a library's; ``None`` where that would not be exact. ``dtype``: of the dense weight."""
    shape = (module.out_features, module.in_features)
    kind, weight, bias = _kind(module), module.weight, module.bias
    if kind == "8bit":
        codes, absmax = _int8_state(module)
        if codes is None or absmax is None:
            return None
        scale = absmax.float().unsqueeze(1) * (1.0 / 127.0)
        return QuantisedLinear("int8", "bitsandbytes", shape, dtype, codes, scale, bias=bias)
    if kind == "4bit" and getattr(weight, "quant_state", None) is not None:
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return None
        return QuantisedLinear(
            "nf4", "bitsandbytes", shape, state.dtype, _bytes(weight), _absmax(state), bias=bias,
            code=state.quant_type, block=state.blocksize,
        )  # fmt: skip
    if kind == "torchao":
        stored = weight.data
        format = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}.get(type(stored).__name__)
        zero_point = getattr(stored, "zero_point", None)
        per_row = format and stored.scale.shape == (shape[0], 1)
        codes = stored.qdata.view(torch.uint8) if stored.qdata.dtype == torch.float8_e4m3fn else stored.qdata
        exact = stored.act_quant_kwargs is None and (zero_point is None or not bool(zero_point.any()))
        if per_row and exact and codes.element_size() == 1:
            return QuantisedLinear(str(format), "torchao", shape, stored.dtype, codes, stored.scale, bias=bias)
    return None


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``(name, plain tensor)`` of all that a model stores: parameters and buffers, tensor subclasses as their parts, and the
    scales that bitsandbytes keeps beside its parameters.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _parts(name, tensor)
    for path, module in model.named_modules():
        kind = _kind(module)
        if kind == "8bit" and (absmax := _int8_state(module)[1]) is not None:
            yield f"{path}.SCB", absmax
        elif kind == "4bit" and (state := getattr(module.weight, "quant_state", None)) is not None:
            yield f"{path}.absmax", state.absmax
            if state.nested:
                yield f"{path}.nested_absmax", state.state2.absmax


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    # A sharded tensor is one tensor, of which this process has a part.
    if flatten is None or hasattr(tensor, "device_mesh"):
        yield name, tensor
        return
    for attribute in flatten()[0]:
        yield from _parts(f"{name}.{attribute}", getattr(tensor, attribute))
