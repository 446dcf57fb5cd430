"""What ``tuning.tune`` may vary in the GEMM-like kernels: shapes, candidate tiles, how to run one.

The other kernels say so in their own files; these five share weights, shapes and :class:`runtime.TileConfig`. Every candidate
compiles for sm_90 without spills (``tools/check_triton.py --candidates``); fields that a candidate leaves out (``tma``,
``persistent``) are those of the GPU generation's default, as when the table is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .decode import decode_gate_up, decode_gemm
from .gate_up import gate_up_forward
from .launch import candidate_config
from .segmented_gemm import gate_up_backward, gemm_act, segmented_gemm

__all__ = ["candidates", "tunables"]

# (d, f): Llama-3.1-8B, 70B and GPT-2 small.
_LLAMA_8B, _LLAMA_70B, _GPT2 = (4096, 14336), (8192, 28672), (768, 3072)
_KEYS = ("tokens", "out", "inner", "rank")


def _tiles(stages: tuple[int, ...], *shapes: tuple[int, int, int, int, int]) -> list[dict[str, int]]:
    """``(block_t, block_n, block_k, num_warps, subtiles)`` with each number of stages."""
    names = ("block_t", "block_n", "block_k", "num_warps", "subtiles")
    return [dict(zip(names, shape, strict=True)) | {"num_stages": n} for shape in shapes for n in stages]


_FP32 = [*_tiles((2, 3), (64, 64, 16, 8, 1), (32, 32, 16, 4, 1), (16, 32, 16, 4, 1)), *_tiles((2,), (64, 32, 16, 8, 1))]
_FP32_PAIR = [*_tiles((2, 3), (64, 32, 16, 8, 1)), *_tiles((2,), (16, 32, 16, 4, 1))]
_SINGLE = [
    *_tiles((3, 4), (128, 128, 64, 8, 1), (128, 128, 64, 8, 2), (64, 128, 64, 4, 1), (64, 64, 64, 4, 1)),
    *_tiles((3, 4, 5), (128, 128, 32, 8, 2), (16, 64, 64, 4, 1)),
]
_16_BIT = {
    "segmented_gemm": [*_tiles((3,), (128, 256, 64, 8, 2)), *_tiles((3, 4), (64, 256, 64, 8, 2)), *_SINGLE],
    "gemm_act": _SINGLE,
    "gate_up_forward": [
        *_tiles((3,), (128, 128, 64, 8, 1)),
        *_tiles((3, 4), (128, 64, 64, 8, 1), (64, 128, 64, 8, 1), (64, 64, 64, 4, 1)),
        *_tiles((3, 4, 5), (128, 64, 32, 8, 1)),
        *_tiles((4, 5), (16, 64, 64, 4, 1)),
    ],
    # Two outputs and two reads beside the accumulator: one of 64 × 128 in 4 warps or of 128 × 128 in 8 only in halves.
    "gate_up_backward": [
        *_tiles((3, 4), (128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 1)),
        *_tiles((3, 4, 5), (128, 128, 32, 8, 2), (16, 64, 64, 4, 1)),
    ],
    # All tokens are one row of tiles: block_t stays with the default. split_k = 1 leaves the number to decode.num_splits.
    "decode": [
        {"block_n": n, "block_k": k, "num_warps": 4, "num_stages": stages, "split_k": split}
        for n, k in ((16, 128), (32, 64), (32, 128), (64, 64)) for stages in (4, 6) for split in (1, 4, 8)
    ],
}  # fmt: skip
# fp32: wider or deeper tiles than these spill where a pair has 64 tokens.
_FP32_DECODE = [
    {"block_n": 16, "block_k": 64, "num_warps": 4, "num_stages": stages, "split_k": split}
    for stages in (2, 3) for split in (1, 4, 8)
]  # fmt: skip


def candidates(kernel: str, dtype: torch.dtype) -> list[dict[str, int]]:
    """Tiles to try; fp32 products run on the FMA units and want small ones."""
    if dtype != torch.float32:
        return _16_BIT[kernel]
    return {"decode": _FP32_DECODE, "gate_up_forward": _FP32_PAIR}.get(kernel, _FP32)


def _shapes(tokens: tuple[int, ...], *matrices: tuple[int, int]) -> list[dict[str, int]]:
    """``matrices``: (out, inner)."""
    return [
        {"tokens": t, "out": out, "inner": inner, "rank": rank}
        for out, inner in matrices for t in tokens for rank in (64, 1024) if rank <= min(out, inner)
    ]  # fmt: skip


def _up(model: tuple[int, int]) -> tuple[int, int]:
    return model[1], model[0]


def _new(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    def new(*shape: int) -> Tensor:
        """Numbers whose products over the last dimension stay of order one."""
        return torch.randn(shape, dtype=dtype, device=device) / shape[-1] ** 0.5

    return new


def _prepare(kernel: str) -> Callable[[dict[str, int], torch.dtype, torch.device], Callable[[dict[str, Any]], object]]:
    def prepare(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Callable[[dict[str, Any]], object]:
        tokens, out, inner, rank = (shape[key] for key in _KEYS)
        new = _new(dtype, device)
        x, c = new(tokens, inner), new(tokens, rank)
        weight, low = new(out, inner), (c, new(rank, out).t())
        segments = [(x, weight), low]

        def tile(fields: dict[str, Any]) -> Any:
            return candidate_config(kernel, x, tokens, fields)

        if kernel == "segmented_gemm":
            return lambda fields: segmented_gemm(segments, config=tile(fields))
        if kernel == "gemm_act":
            bias = new(out)
            return lambda fields: gemm_act(segments, bias, "gelu_tanh", True, config=tile(fields))
        if kernel == "gate_up_backward":
            backward_segments = [(x, new(inner, out).t()), low]  # dy @ w_down, as the op reads it
            gate, up = new(tokens, out), new(tokens, out)
            return lambda fields: gate_up_backward(backward_segments, gate, up, "silu", True, True, config=tile(fields))
        if kernel == "decode" and not shape.get("pair"):
            return lambda fields: decode_gemm(segments, None, config=tile(fields))
        up_weight, up_low = new(out, inner), (new(tokens, rank), new(rank, out).t())
        run, last = (decode_gate_up, (False,)) if kernel == "decode" else (gate_up_forward, (True,))
        return lambda fields: run(x, weight, up_weight, low, up_low, None, None, "silu", *last, config=tile(fields))

    return prepare


def tunables() -> dict[str, Any]:
    """For ``tuning.tune``. Up to 64 tokens the forward is ``decode``'s; only the backward sees few tokens in a large tile."""
    many, few = (256, 2048, 8192), (1, 16, 64)
    llamas = (_LLAMA_8B, _LLAMA_70B)
    gated = [_up(model) for model in llamas]
    shapes = {
        "segmented_gemm": _shapes(many, *llamas, _GPT2, (4096, 4096)),
        "gemm_act": _shapes(many, _up(_GPT2)),
        "gate_up_forward": _shapes(many, *gated),
        "gate_up_backward": _shapes((16, *many), *gated),
        "decode": [shape | {"pair": 1} for shape in _shapes(few, *gated)] + _shapes(few, *llamas, _GPT2, _up(_GPT2)),
    }
    return {
        kernel: {
            "shapes": shapes[kernel], "keys": _KEYS, "prepare": _prepare(kernel),
            "candidates": lambda dtype, kernel=kernel: candidates(kernel, dtype),
        }
        for kernel in shapes
    }  # fmt: skip
