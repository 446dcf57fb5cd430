"""Floating-point operations and bytes that an op cannot do without, and the time they take on a measured roofline.

Bytes are those of a perfect fusion: every input, weight and result once, and of the wide tensors only the activated
intermediate between the two products of an MLP, written once and read once (plus gate and up where a backward needs them).
"""

from __future__ import annotations

from typing import Any

from ..measure.shapes import Case
from ..rules import get_rule

__all__ = ["minimum_bytes", "minimum_flops", "roofline_us"]


def _projections(case: Case) -> list[tuple[int, int]]:
    """``(in, out)`` of the op's projections."""
    d, f = case.model.d, case.model.f
    if case.op == "factored_linear":
        return [(d, f)]
    if case.op == "mlp":
        return [(d, f), (d, f), (f, d)] if case.model.gated else [(d, f), (f, d)]
    return []


def minimum_flops(case: Case, mode: str, function: str) -> int:
    """Multiply–adds count as two. Elementwise work counts nothing."""
    tokens, rank = case.tokens, case.rank
    projections = _projections(case)
    dense = sum(2 * tokens * i * o for i, o in projections)
    keyed = get_rule(case.rule).key == "matrix"
    if function == "lora":
        low = sum(2 * tokens * rank * (i + o) for i, o in projections)
    elif function == "npt":
        low = sum(2 * tokens * rank * (o + (i if keyed else 0)) for i, o in projections)
        low += 2 * tokens * rank * case.model.d if case.op == "mlp" else 0
    else:
        low = 0
    total = dense + low
    if mode not in ("local", "end_to_end") or not projections:
        return total
    total += 2 * low  # gradients of the low-rank factors and through them
    down = projections[-1]
    if case.op == "mlp":
        total += 2 * tokens * down[0] * down[1]  # dinter
    if mode == "end_to_end" or function == "frozen":
        total += sum(2 * tokens * i * o for i, o in projections[: -1 if case.op == "mlp" else None])  # dx
    return total


def minimum_bytes(case: Case, mode: str, function: str) -> int:
    tokens, d, f, rank = case.tokens, case.model.d, case.model.f, case.rank
    projections = _projections(case)
    if case.op == "matched_norm":
        reads, writes = (2 if function == "npt" else 1), 1
        backward = 0 if mode in ("forward", "decode") else reads + 1 + reads
        return (reads + writes + backward) * tokens * d * case.dtype.itemsize
    weights = sum(i * o for i, o in projections)
    keyed = get_rule(case.rule).key == "matrix"
    adapters = 0
    if function != "frozen":
        adapters = sum(rank * (o + (i if keyed or function == "lora" else 0)) for i, o in projections)
        adapters += rank * d if function == "npt" and case.op == "mlp" else 0
    ends = tokens * (projections[0][0] + projections[-1][1])
    ends += tokens * (d if case.op == "mlp" else rank) if function == "npt" else 0
    wide = 2 * tokens * f if case.op == "mlp" else 0
    total = weights + adapters + ends + wide
    if mode in ("local", "end_to_end"):
        through_input = mode == "end_to_end" or function == "frozen"
        saved = tokens * f * (2 if case.model.gated else 1) if case.op == "mlp" else 0
        dense = weights if through_input else (d * f if case.op == "mlp" else 0)
        total += dense + 2 * adapters + 2 * saved + ends + wide
    return total * case.dtype.itemsize


def roofline_us(case: Case, mode: str, function: str, ceilings: dict[str, Any]) -> float | None:
    """Microseconds at the measured ceilings (``gemm_tflops``, ``copy_tbs``), whichever of the two binds.

    Repeated calls on a CPU find what fits its cache there (``cached_copy_tbs`` up to ``cached_bytes``); on a GPU inputs rotate
    through more than the cache holds.
    """
    if not ceilings:
        return None
    size = minimum_bytes(case, mode, function)
    rate = ceilings["cached_copy_tbs"] if size <= ceilings.get("cached_bytes", 0) else ceilings["copy_tbs"]
    return max(minimum_flops(case, mode, function) / ceilings["gemm_tflops"] / 1e6, size / rate / 1e6)
