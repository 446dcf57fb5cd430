"""Tensors → launches: layouts, alignment, segments. TMA's rules are checked here and again in csrc/dispatch.cpp."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ...activations import get_activation
from .choose import Config, Epilogue, Family, choose
from .support import EMULATED, extension

__all__ = [
    "DTYPES",
    "FUSED_ACTIVATIONS",
    "Overlap",
    "Segment",
    "bias_segment",
    "fused_activation",
    "launch_arguments",
    "low_rank",
    "multiprocessors",
    "padded_vector",
    "refusal",
    "rows_ok",
    "run",
    "say_fallback",
    "submit",
    "weights_layout",
]

MAIN, LOW, LOW_SECOND, LOW_FIRST = range(4)  # npt::SegmentKind
#: Element types of the kernels, numbered as ``npt::Dtype``.
DTYPES = {torch.bfloat16: 0, torch.float16: 1}

Overlap = Literal["low", "all"] | None

#: Activations that are ``v · sigmoid(v · (a + b·v²))``: name → (a, b). Others run unfused.
FUSED_ACTIVATIONS = {
    "silu": (1.0, 0.0),
    "quick_gelu": (1.702, 0.0),
    "gelu_tanh": (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715),
}


def fused_activation(act: str) -> tuple[float, float] | None:
    """``(a, b)`` of an activation by any of its names, ``None`` if it is not of that form."""
    return FUSED_ACTIVATIONS.get(get_activation(act).name)


@dataclass(frozen=True)
class Segment:
    """One term of the K sum: activations ``a [T, K]`` times one or two weights seen as ``[N, K]``."""

    kind: int
    a: Tensor
    b0: Tensor
    b1: Tensor | None = None


def weights_layout(weight: Tensor) -> str | None:
    """``"k"`` if K is contiguous in ``weight [N, K]``, ``"mn"`` if N is, ``None`` if TMA cannot read it in place."""
    n, k = weight.shape
    if weight.data_ptr() % 16:
        return None
    if weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.stride(0) >= k:
        return "k"
    if weight.stride(0) == 1 and weight.stride(1) % 8 == 0 and weight.stride(1) >= n:
        return "mn"
    return None


def rows_ok(tensor: Tensor) -> Tensor:
    """``tensor [T, K]`` readable by TMA: itself, or a copy if its strides or address are not."""
    pitch = tensor.stride(0)
    if tensor.stride(1) == 1 and pitch % 8 == 0 and pitch >= tensor.shape[1] and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(
        memory_format=torch.contiguous_format
    )  # not .contiguous(): it keeps odd strides of size-1 sides


def refusal(widths: Sequence[tuple[str, int]], weights: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why a call cannot be fused, with the bad value, or ``None``. Widths must be multiples of 8; weights TMA-readable."""
    for name, width in widths:
        if width % 8 or width < 8:
            mend = "; choose a rank that is one" if name == "R" else ""
            return f"{name} = {width} is not a multiple of 8 (TMA reads rows in units of 16 bytes{mend})"
    layouts = set()
    for name, weight in weights:
        layout = weights_layout(weight)
        if layout is None:
            return (
                f"{name} has strides {tuple(weight.stride())} and address {weight.data_ptr():#x}; one stride must be 1, the "
                "other a multiple of 8, the address a multiple of 16"
            )
        layouts.add(layout)
    if len(layouts) > 1:
        return "weights of one product are stored in different orders (one row-major, one column-major)"
    return None


@lru_cache(maxsize=256)
def say_fallback(op: str, reason: str, where: str = "on the vendor's GEMM") -> None:
    """Warn once for each step and reason that it ran elsewhere: right numbers, not the speed that was asked for."""
    warnings.warn(f"npt_kernels {op}: not fused on backend 'cuda': {reason}; ran {where}", stacklevel=3)


def low_rank(c: Tensor, value: Tensor, kind: int = LOW, second: Tensor | None = None) -> Segment:
    """Segment of coefficients ``c [T, R]`` and ``w_b_up [R, N]``."""
    return Segment(kind, rows_ok(c), rows_ok(value).t(), None if second is None else rows_ok(second).t())


def padded_vector(column: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """A rank-1 term ``column [T, 1] · row [N]`` as K = 8 with seven zero columns, which TMA can read."""
    c = column.new_zeros(column.shape[0], 8)
    c[:, :1] = column
    b = row.new_zeros(8, row.shape[0])
    b[0] = row
    return c, b


def bias_segment(x: Tensor, first: Tensor | None, second: Tensor | None, width: int) -> Segment:
    """Biases of a gate-up tile as one more K block: ones [T, 8] times [bias; 0]."""
    ones = x.new_ones(x.shape[0], 8)
    rows = x.new_zeros(2, 8, width)
    for index, bias in enumerate((first, second)):
        if bias is not None:
            rows[index, 0] = bias
    return Segment(LOW, ones, rows[0].t(), rows[1].t())


@lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; of an H200 for anything else (tests and dry runs)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def submit(name: str, arguments: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Call ``_cuda.<name>`` on the current stream of ``device``: the one place where a kernel is put on a stream."""
    if EMULATED:  # a device's number is its number of SMs there
        return getattr(extension(), name)(*arguments, multiprocessors(device), 0)  # type: ignore[no-any-return]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        return getattr(extension(), name)(*arguments, device.index, stream)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def overlap_allowed() -> bool:
    """Whether chained decode kernels may overlap: ``NPT_CUDA_OVERLAP=0`` says no (the first thing to try on wrong numbers)."""
    return os.environ.get("NPT_CUDA_OVERLAP", "1") != "0"


def run(
    epilogue: Epilogue,
    segments: Sequence[Segment],
    outputs: Sequence[Tensor | None],
    *,
    inputs: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    activation: tuple[float, float] = (1.0, 0.0),
    store_pre: bool = False,
    overlap: Overlap = None,
    config: Config | None = None,
) -> None:
    """Launch one segmented-K product on the current stream. ``outputs[0]`` (or the first given) sets ``[rows, cols]``.

    ``overlap``: what the kernel before this one on the stream may still be writing, so that a decode kernel may start early:
    the activations of the low-rank segments (``"low"``), all activations (``"all"``), or anything (``None``: no overlap). The
    caller vouches that the kernel before was launched plainly, or with overlap, by this package, after x and weights were final.
    ``config``: the instance instead of :func:`choose`'s (benchmarks and tests).
    """
    arguments = launch_arguments(
        epilogue, segments, outputs, inputs=inputs, bias=bias, activation=activation, store_pre=store_pre, overlap=overlap,
        config=config,
    )  # fmt: skip
    submit("launch", arguments, next(out for out in outputs if out is not None).device)


def launch_arguments(
    epilogue: Epilogue,
    segments: Sequence[Segment],
    outputs: Sequence[Tensor | None],
    *,
    inputs: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    activation: tuple[float, float] = (1.0, 0.0),
    store_pre: bool = False,
    overlap: Overlap = None,
    config: Config | None = None,
) -> Sequence[Any]:
    """The arguments of ``_cuda.launch`` but device and stream."""
    sample = next(out for out in outputs if out is not None)
    rows, cols = sample.shape
    device = sample.device
    for tensor in (*inputs, *(t for s in segments for t in (s.a, s.b0, s.b1) if t is not None)):
        if tensor.device != device or tensor.dtype != sample.dtype:
            raise ValueError(
                f"npt_kernels cuda: a {tensor.dtype} tensor on {tensor.device} meets {sample.dtype} on {device}"
            )
    main = next(s for s in segments if s.kind == MAIN)
    mn_major = weights_layout(main.b0) == "mn"
    ordered = sorted(segments, key=lambda s: s.kind)
    packed = []
    for s in ordered:
        along_n = mn_major or s.kind != MAIN
        ld0 = s.b0.stride(1 if along_n else 0)
        ld1 = 0 if s.b1 is None else s.b1.stride(1 if along_n else 0)
        b1 = 0 if s.b1 is None else s.b1.data_ptr()
        packed.append((s.kind, s.a.data_ptr(), s.a.stride(0), s.a.shape[1], s.b0.data_ptr(), ld0, b1, ld1))
    config = config or choose(
        epilogue, rows, cols, sum(s.a.shape[1] for s in segments), multiprocessors(device), mn_major
    )
    dependent = -1
    if overlap is not None and config.family == Family.DECODE and overlap_allowed():
        first_low = next((i for i, s in enumerate(ordered) if s.kind != MAIN), -1)
        dependent = 0 if overlap == "all" else first_low
    if bias is not None:
        bias = bias.contiguous()
        bias = bias.clone() if bias.data_ptr() % 4 else bias
    return (
        int(config.family), int(epilogue), DTYPES[sample.dtype], mn_major, config.cluster, config.block_m, rows, cols,
        packed, [(t.data_ptr(), t.stride(0)) for t in inputs],
        [(0, 0) if t is None else (t.data_ptr(), t.stride(0)) for t in outputs],
        0 if bias is None else bias.data_ptr(), *activation, store_pre, config.group_m,
        config.split, dependent,
    )  # fmt: skip
