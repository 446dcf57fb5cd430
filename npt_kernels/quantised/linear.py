"""Quantised frozen linears: int8, NF4, int4 and fp8 storage by bitsandbytes or torchao, computed with in the model's own dtype.

The library quantises; what it stores is kept here as plain tensors, and every use goes through
:class:`~npt_kernels.ops.dense_on_use.DeferredWeight`, which makes the dense weight for the time of one operation. The libraries'
own modules are read too (a model that somebody loaded with ``BitsAndBytesConfig`` or ``TorchAoConfig`` converts), but not
made here. Seen with bitsandbytes 0.50 and torchao 0.18 on a CPU: ``Linear4bit`` repacks its weight in place on the first
forward in evaluation mode where there is AVX-512 BF16 (and fails when out is no multiple of 32); its CPU kernel mixes up the
blocks of rows that are no multiple of 64 long (22 % error instead of 9 %); ``Linear8bitLt`` rounds the activations too;
torchao's int8 product keeps the dense weight for its backward; its int4 tensors need kernels that exist on GPUs only.

Formulas, memory and measurements: ``docs/quantisation.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dense_on_use import DeferredWeight, WeightSource
from .names import choose_library, import_library

__all__ = ["QuantisedLinear", "dequantise_4bit", "quantise_weight", "readable", "weight_problem"]

#: NF4: weights that share one absmax, along the flattened weight (bitsandbytes' default).
_NF4_BLOCK = 64
#: int4: weights of a row that share scale and zero point: the largest of these that divides ``in``.
_INT4_GROUPS = (128, 64, 32, 16, 8)
#: Elements made dense at a time: temporaries stay this small. On a CPU 2²⁰ stays in the cache: measured (bf16, 14336 × 4096)
#: 26 ms against 146 ms with 2²². On a GPU larger pieces save launches (unverified).
_PIECE = {"cpu": 2**20}
_PIECE_ELSEWHERE = 2**24
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- the module ------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """A frozen linear with a quantised weight: ``y = x Wᵀ + bias``, ``W [out, in]`` made dense only while it is used.

    Drop-in for ``nn.Linear`` (and GPT-2's ``Conv1D``, whose ``[in, out]`` weight is stored transposed). Its tensors are plain
    frozen parameters; casts of the module (``.to(dtype)``, ``.half()``) change the dtype of ``weight``, not what is stored.

    Attributes:
        format, library: As in :data:`npt_kernels.quantised.names.FORMATS`.
        in_features, out_features: Of the weight.
        weight_dtype: Dtype that the weight had when it was quantised, and in which it is made dense.
        dtype: Dtype of ``weight``: the same until the module is cast.
        codes: ``int8``, ``fp8`` (bytes of e4m3fn): ``[out, in]``. ``int4``: ``[out, in/2]``, columns j and j + in/2 in a
            byte. ``nf4``: two in a byte, flat.
        scale: ``int8``, ``fp8``: ``[out, 1]``. ``int4``: ``[out, in/group]``. ``nf4``: absmax of every block.
        zero_point: ``int4``: ``[out, in/group]``; ``None`` elsewhere.
        bias: ``[out]`` or ``None``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        format: str,
        library: str,
        shape: tuple[int, int],
        weight_dtype: torch.dtype,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        code: str = "nf4",
        block: int = _NF4_BLOCK,
    ) -> None:
        super().__init__()
        self.format, self.library, self.weight_dtype, self.dtype = format, library, weight_dtype, weight_dtype
        self.out_features, self.in_features = shape
        self.code, self.block = code, block
        for name, tensor in (("codes", codes), ("scale", scale), ("zero_point", zero_point), ("bias", bias)):
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight_device(self) -> torch.device:
        return self.codes.device

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` as a deferred tensor, which any operation may use; frozen."""
        return readable(self, self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored instead of the weight."""
        return sum(p.numel() * p.element_size() for name, p in self.named_parameters(recurse=False) if name != "bias")

    def fill_weight(self, out: Tensor) -> None:
        """Dequantise into ``out [out, in]`` (contiguous, ``weight_dtype``)."""
        _FILL[self.format](self, out)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        stored = {name: p.data for name, p in self.named_parameters(recurse=False) if name != "bias"}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            parameter = self.get_parameter(name)
            # A scale rounded to half precision would be another weight.
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_device)).dtype
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.format} by {self.library}, {self.dtype}"
        )


def readable(source: WeightSource, dtype: torch.dtype | None = None) -> Tensor:
    """The deferred weight; under ``torch.compile`` a dense one, made by operations that the compiler sees."""
    if torch.compiler.is_compiling():
        out = torch.empty(source.weight_shape, dtype=source.weight_dtype, device=source.weight_device)
        source.fill_weight(out)
        return out if dtype is None else out.to(dtype)
    return DeferredWeight(source, dtype)


# ---- dequantising ----------------------------------------------------------------------------------------------------


def _pieces(rows: int, columns: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of about ``_PIECE`` elements, each a multiple of ``multiple`` rows (but the last)."""
    if torch.compiler.is_compiling():
        # The compiler makes one loop of it.
        yield slice(0, rows)
        return
    step = max(1, _PIECE.get(device.type, _PIECE_ELSEWHERE) // columns)
    step = -(-step // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _fill_rows(linear: QuantisedLinear, out: Tensor) -> None:
    """``q · s`` per row. Every int8 and e4m3 number is one of bfloat16 and float16: only the product is rounded, once."""
    codes, scale = linear.codes, linear.scale
    codes = codes.view(torch.float8_e4m3fn) if linear.format == "fp8" else codes
    for rows in _pieces(*linear.weight_shape, out.device):
        out[rows].copy_(codes[rows])
        out[rows].mul_(scale[rows])


def _fill_int4(linear: QuantisedLinear, out: Tensor) -> None:
    """``(q − zero) · s`` per group of a row."""
    codes, scale, zero_point = linear.codes, linear.scale, linear.zero_point
    assert zero_point is not None
    half, groups = linear.in_features // 2, scale.shape[1]
    for rows in _pieces(*linear.weight_shape, out.device):
        piece, packed = out[rows], codes[rows]
        piece[:, :half].copy_(packed & 15)
        piece[:, half:].copy_(packed >> 4)
        by_group = piece.view(len(piece), groups, -1)
        by_group.sub_(zero_point[rows].unsqueeze(-1)).mul_(scale[rows].unsqueeze(-1))


def _fill_4bit(linear: QuantisedLinear, out: Tensor) -> None:
    """bitsandbytes' kernel, given the flattened weight as rows of one block each: blocks run on over the ends of rows."""
    # The import registers the kernel; a pickled model may come to a process without it.
    if not torch.compiler.is_compiling() and "bitsandbytes" not in sys.modules:
        import_library("bitsandbytes")
    dequantise_4bit(linear.codes, linear.scale, linear.block, linear.code, out)


def dequantise_4bit(codes: Tensor, absmax: Tensor, block: int, code: str, out: Tensor) -> None:
    """``out [out, in]`` from bitsandbytes' packed ``codes`` (nf4 or fp4) and one ``absmax`` per block."""
    flat, packed = out.view(-1), codes.view(-1)
    for blocks in _pieces(len(absmax), block, out.device):
        values = torch.ops.bitsandbytes.dequantize_4bit(
            packed[blocks.start * block // 2 : blocks.stop * block // 2],
            absmax[blocks], block, code, (blocks.stop - blocks.start, block), out.dtype,
        )  # fmt: skip
        target = flat[blocks.start * block : blocks.stop * block]
        target.copy_(values.view(-1)[: len(target)])


_FILL: dict[str, Callable[[QuantisedLinear, Tensor], None]] = {
    "int8": _fill_rows,
    "fp8": _fill_rows,
    "int4": _fill_int4,
    "nf4": _fill_4bit,
}


# ---- quantising ------------------------------------------------------------------------------------------------------


def _int8_bitsandbytes(weight: Tensor) -> dict[str, Any]:
    bnb = import_library("bitsandbytes")
    data, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    # A row of zeros has absmax 0, and 0/0 became whatever the cast of NaN gives.
    return {"codes": data * (absmax != 0).unsqueeze(1), "scale": absmax.float().unsqueeze(1) * (1.0 / 127.0)}


def _int8_torchao(weight: Tensor) -> dict[str, Any]:
    ao = import_library("torchao")
    stored = ao.Int8Tensor.from_hp(weight, ao.PerRow())
    return {"codes": stored.qdata, "scale": stored.scale}


def _fp8_torchao(weight: Tensor) -> dict[str, Any]:
    ao = import_library("torchao")
    stored = ao.Float8Tensor.from_hp(weight, granularity=ao.PerRow())
    # A row of zeros has scale 0, and torchao 0.18 stores 0/0 for it.
    some = (weight != 0).any(1, keepdim=True)
    # As bytes: pickle cannot restore a parameter of this dtype.
    return {"codes": stored.qdata.view(torch.uint8) * some, "scale": stored.scale}


def _int4_torchao(weight: Tensor) -> dict[str, Any]:
    ao = import_library("torchao")
    group = _int4_group(weight.shape[1])
    assert group is not None
    # From torch 2.7 on, which torchao needs anyway.
    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]
    stored = ao.IntxUnpackedToInt8Tensor.from_hp(weight, (1, group), int4, mapping_type=ao.MappingType.ASYMMETRIC)
    # -8 … 7 to 0 … 15.
    codes = (stored.qdata + 8).to(torch.uint8)
    low, high = codes.chunk(2, dim=1)
    return {"codes": low | (high << 4), "scale": stored.scale, "zero_point": stored.zero_point + 8}


def _int4_group(d_in: int) -> int | None:
    return next((group for group in _INT4_GROUPS if d_in % group == 0), None)


def _nf4_bitsandbytes(weight: Tensor) -> dict[str, Any]:
    bnb = import_library("bitsandbytes")
    flat = weight.reshape(-1)
    flat = nn.functional.pad(flat, (0, -len(flat) % _NF4_BLOCK))
    data, state = bnb.functional.quantize_4bit(flat, blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=False)
    return {"codes": data.view(-1), "scale": state.absmax}


_QUANTISE: dict[tuple[str, str], Callable[[Tensor], dict[str, Any]]] = {
    ("int8", "bitsandbytes"): _int8_bitsandbytes,
    ("int8", "torchao"): _int8_torchao,
    ("nf4", "bitsandbytes"): _nf4_bitsandbytes,
    ("int4", "torchao"): _int4_torchao,
    ("fp8", "torchao"): _fp8_torchao,
}


def weight_problem(weight: Tensor, format: str) -> str | None:
    """Why a weight ``[out, in]`` cannot be quantised, or ``None``."""
    d_in = weight.shape[1]
    if weight.is_meta:
        return "has no values yet (device 'meta'); load them first"
    if weight.dtype not in _DTYPES:
        return f"is {weight.dtype}; quantise float32, bfloat16 or float16"
    if format == "int4" and _int4_group(d_in) is None:
        return f"has {d_in} input features, which no group of {_INT4_GROUPS[-1]} or more divides; use int8 or nf4"
    if not bool(weight.isfinite().all()):
        return "holds values that are not finite"
    return None


@torch.no_grad()
def quantise_weight(
    weight: Tensor, format: str, library: str, bias: Tensor | None = None, *, device: torch.device | str | None = None
) -> QuantisedLinear:
    """A linear that holds ``weight [out, in]`` quantised and ``bias [out]`` as it is, on ``device`` (default: the weight's).

    Raises:
        ValueError: An unknown format or pair, a weight that cannot be quantised.
        ImportError: The library is not installed; the message names what is.
    """
    library = choose_library(format, library)
    if (problem := weight_problem(weight, format)) is not None:
        raise ValueError(f"the weight {problem}")
    weight = weight.detach().to(device or weight.device).contiguous()
    bias = None if bias is None else bias.detach().to(weight.device)
    stored = _QUANTISE[format, library](weight)
    return QuantisedLinear(format, library, (weight.shape[0], weight.shape[1]), weight.dtype, bias=bias, **stored)
