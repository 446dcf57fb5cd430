"""How frozen weights are stored: bytes of a linear in each format, and where precision settings put the casts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..base_model.loading import resolve_dtype
from ..base_model.mixed_precision import choose_mixed_precision
from ..configs.schema import RunConfig

__all__ = ["FORMATS", "Format", "Precision", "quantization_of"]


@dataclass(frozen=True)
class Format:
    """A storage format of frozen linears.

    Attributes:
        name: As in ``optimization.quantization``.
        bits: Per weight.
        group: Weights per scale; 0: one scale per output row.
        scale_bytes: Bytes of the scale (and zero point) of a group or row.
        what: For people.
    """

    name: str
    bits: int
    group: int
    scale_bytes: int
    what: str

    def linear(self, d_in: int, d_out: int) -> int:
        """Bytes of one ``[out, in]`` weight with its scales."""
        scales = d_out if not self.group else -(-d_in * d_out // self.group)
        return -(-d_in * d_out * self.bits // 8) + scales * self.scale_bytes

    def linears(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Bytes of several ``(in, out)`` linears."""
        return sum(self.linear(*shape) for shape in shapes)


#: ``optimization.quantization`` → how it is stored. Scales: bitsandbytes LLM.int8() keeps a float32 per row; NF4 a float32 per
#: 64 weights; torchao's int4 a bfloat16 scale and an int8 zero point per 128; its fp8 a float32 per row.
FORMATS = {
    entry.name: entry
    for entry in (
        Format("int8", 8, 0, 4, "int8, a float32 scale per row"),
        Format("nf4", 4, 64, 4, "4-bit NormalFloat, a float32 scale per 64 weights"),
        Format("int4", 4, 128, 3, "int4, a bfloat16 scale and an int8 zero point per 128 weights"),
        Format("fp8", 8, 0, 4, "float8_e4m3, a float32 scale per row"),
    )
}


def quantization_of(config: RunConfig) -> str:
    """``none`` or a key of :data:`FORMATS`, the short forms ``use_8bit`` and ``use_4bit`` resolved."""
    o = config.optimization
    if o.quantization != "none":
        return o.quantization
    return "int8" if o.use_8bit else "nf4" if o.use_4bit else "none"


@dataclass(frozen=True)
class Precision:
    """Bytes per element of a run.

    Attributes:
        base: Dtype of the frozen base's plain tensors, and so of the residual stream.
        compute: Dtype of the products: autocast's, or the base's.
        format: Storage of the frozen linears, ``None``: ``base``.
        keeps_casts: Whether frozen weights are cast once for a phase (``training/kept_casts.py``), not in every call.
    """

    base: torch.dtype
    compute: torch.dtype
    format: Format | None
    keeps_casts: bool = False

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> Precision:
        base = resolve_dtype(config, device)
        chosen = choose_mixed_precision(config, device)
        autocast = {"no": base, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
        return cls(base, autocast, FORMATS.get(quantization_of(config)))

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream."""
        return self.base.itemsize

    @property
    def width(self) -> int:
        """Bytes of a number in a product."""
        return self.compute.itemsize

    @property
    def casts(self) -> bool:
        """Whether autocast makes low-precision copies of frozen weights (``Format`` dequantises instead)."""
        return self.base != self.compute

    @property
    def casts_adapter(self) -> bool:
        """Whether NP parameters (float32) are cast for the products."""
        return self.compute != torch.float32

    def linears(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Stored bytes of linears."""
        if self.format is not None:
            return self.format.linears(shapes)
        return sum(a * b for a, b in shapes) * self.stream

    @property
    def storage(self) -> str:
        """Name of the storage of the linears, for people."""
        return self.format.name if self.format is not None else str(self.base).removeprefix("torch.")
