"""Cases of the segmented-K GEMMs: every instance on ragged shapes, every combination of segments that its epilogue takes."""

from __future__ import annotations

import random
from typing import Any

import torch
from checking import Case, Output, normal, pitched, ternary
from names import (
    ACT,
    ACT_BWD,
    ACTIVATIONS,
    DTYPES,
    GATE_UP,
    GATE_UP_BWD,
    LOW,
    LOW_FIRST,
    LOW_SECOND,
    MAIN,
    STORE,
    Segment,
    gemm_label,
    is_decode,
    run_gemm,
    splits,
)  # fmt: skip
from torch import Tensor

__all__ = ["gemm_case", "gemm_cases", "segment_sets"]

#: rows, columns, depth, rank: one element, one tile and a bit, several tiles, odd remainders.
SHAPES = (
    (300, 392, 136, 24), (600, 520, 72, 8), (257, 136, 264, 72), (1, 8, 8, 8), (200, 264, 136, 24), (129, 776, 64, 64),
    (520, 392, 200, 40),
)  # fmt: skip


def segment_sets(epilogue: Any) -> list[tuple[int, ...]]:
    """Kinds of segments, the richest set last."""
    if epilogue == GATE_UP:
        return [
            (MAIN,), (MAIN, LOW), (MAIN, LOW_FIRST), (MAIN, LOW_SECOND), (MAIN, LOW_SECOND, LOW_FIRST),
            (MAIN, LOW, LOW_SECOND, LOW_FIRST),
        ]  # fmt: skip
    return [(MAIN,), (MAIN, LOW), (MAIN, LOW, LOW), (MAIN, MAIN), (MAIN, MAIN, LOW, LOW)]


def _forward(v: Tensor, a: float, b: float) -> Tensor:
    return v * torch.sigmoid(v * (a + b * v * v))


def _slope(v: Tensor, a: float, b: float) -> Tensor:
    s = torch.sigmoid(v * (a + b * v * v))
    return s + v * s * (1 - s) * (a + 3 * b * v * v)


def _operands(
    kernel: dict[str, Any], shape: tuple[int, int, int, int], kinds: tuple[int, ...], exact: bool
) -> tuple[list[Segment], Tensor, Tensor]:
    """Segments, and the float64 sums of the first and the second operand."""
    rows, cols, depth, rank = shape
    dtype, make = DTYPES[kernel["dtype"]], ternary if exact else normal
    two = kernel["epilogue"] == GATE_UP
    segments, first, second = [], torch.zeros(rows, cols).double(), torch.zeros(rows, cols).double()
    for kind in kinds:
        k = depth if kind == MAIN else rank

        def weight(k: int = k, kind: int = kind) -> Tensor:
            if kind == MAIN and not kernel["mn_major"]:
                return pitched(make, cols, k, dtype)
            return pitched(make, k, cols, dtype).t()

        a, b0 = pitched(make, rows, k, dtype), weight()
        b1 = weight() if two and kind in (MAIN, LOW) else None
        segments.append(Segment(kind, a, b0, b1))
        if kind != LOW_SECOND:
            first = first + a.double() @ b0.double().t()
        if two and kind != LOW_FIRST:
            second = second + a.double() @ (b0 if b1 is None else b1).double().t()
    return segments, first, second


def gemm_case(
    kernel: dict[str, Any], shape: tuple[int, int, int, int], kinds: tuple[int, ...], *, exact: bool, sms: int, split: int = 1,
    act: str = "silu", store_pre: bool = True, bias: bool = True,
    in_place: bool = False, wanted: tuple[bool, bool] = (True, True),
    group: int = 2,
) -> Case:  # fmt: skip
    """One launch of one instance."""
    epilogue, dtype = kernel["epilogue"], DTYPES[kernel["dtype"]]
    rows, cols, _, _ = shape
    segments, y, second = _operands(kernel, shape, kinds, exact)
    curve = ACTIVATIONS[act]
    vector = (ternary if exact else normal)(cols, dtype=dtype) if bias and epilogue in (STORE, ACT) else None
    y = y if vector is None else y + vector.double()
    inputs = [pitched(normal, rows, cols, dtype) for _ in range({ACT_BWD: 1, GATE_UP_BWD: 2}.get(epilogue, 0))]
    if epilogue == STORE:
        outputs = [Output("out", y, dtype, exact)]
    elif epilogue == ACT:
        outputs = [Output("act", _forward(y, *curve), dtype), Output("pre", y, dtype, exact)]
    elif epilogue == GATE_UP:
        outputs = [
            Output("inter", _forward(y, *curve) * second, dtype), Output("gate", y, dtype, exact),
            Output("up", second, dtype, exact),
        ]  # fmt: skip
    elif epilogue == ACT_BWD:
        outputs = [
            Output("d pre", y * _slope(inputs[0].double(), *curve), dtype, start=inputs[0] if in_place else None)
        ]
    else:
        gate, up = (t.double() for t in inputs)
        outputs = [
            Output(
                "d gate", y * up * _slope(gate, *curve), dtype, wanted=wanted[0], start=inputs[0] if in_place else None
            ),
            Output("d up", y * _forward(gate, *curve), dtype, wanted=wanted[1], start=inputs[1] if in_place else None),
        ]
    if not store_pre and epilogue in (ACT, GATE_UP):
        outputs = outputs[:1]

    def run(views: list[Tensor]) -> None:
        run_gemm(
            kernel, segments, [view if o.wanted else None for view, o in zip(views, outputs, strict=True)], sms=sms,
            inputs=views if in_place and inputs else inputs, bias=vector, activation=curve,
            store_pre=store_pre and epilogue in (ACT, GATE_UP), group=group, split=split,
        )  # fmt: skip

    what = (
        f"{gemm_label(kernel)} {str(dtype).removeprefix('torch.')} mn_major {kernel['mn_major']} cluster {kernel['cluster']} "
        f"block_m {kernel['block_m']}: [rows, cols, depth, rank] {shape} kinds {kinds} exact {exact} split {split} SMs {sms} "
        f"act {act} store_pre {store_pre} bias {bias} in place {in_place} wanted {wanted} group {group}"
    )
    return Case(gemm_label(kernel), what, outputs, run)


def _shapes(kernel: dict[str, Any]) -> list[tuple[tuple[int, int, int, int], int]]:
    """(shape, split)."""
    if not is_decode(kernel):
        deep = 4 if len(splits(kernel, 1 << 20)) > 1 else 1  # so that every part has a k-block
        shapes = [(rows, cols, deep * depth, rank) for rows, cols, depth, rank in SHAPES]
        return [(shape, random.choice(splits(kernel, shape[2]))) for shape in shapes]
    tokens = kernel["block_m"]
    first = ((max(1, tokens - 3), 264, 520, 24), random.choice(splits(kernel, 520)))
    more = [
        ((tokens, 64, 64, 8), 8), ((max(1, tokens - 3), 520, 1032, 72), 1), ((tokens // 2 + 1, 264, 520, 8), 2),
        ((1, 8, 8, 8), 1), ((tokens, 72, 776, 40), 4), ((max(1, tokens - 1), 200, 1032, 24), 8), ((tokens, 136, 264, 24), 1),
    ]  # fmt: skip
    return [first, *more]


def gemm_cases(kernel: dict[str, Any], index: int, shapes: int) -> list[Case]:
    """Cases of one instance on its first ``shapes`` shapes; ``index`` seeds what is drawn."""
    random.seed(index)
    torch.manual_seed(index)
    sets = segment_sets(kernel["epilogue"])
    cases = []
    for number, (shape, split) in enumerate(_shapes(kernel)[:shapes]):
        if number == 0:  # everything at once, exact; then another set of segments on random numbers, in place
            options = dict(sms=2 * kernel["cluster"], split=split, act="gelu_tanh")
            cases.append(gemm_case(kernel, shape, sets[-1], exact=True, **options))
            cases.append(gemm_case(kernel, shape, sets[index % len(sets)], exact=False, in_place=True, **options))
            continue
        for kinds in {sets[number % len(sets)], sets[(number + index) % len(sets)]}:
            cases.append(gemm_case(
                kernel, shape, kinds, exact=random.random() < 0.5, sms=kernel["cluster"] * random.choice([1, 2, 3]), split=split,
                act=random.choice(sorted(ACTIVATIONS)), store_pre=random.random() < 0.6, bias=random.random() < 0.7,
                in_place=random.random() < 0.4, wanted=random.choice([(True, True), (True, False), (False, True)]),
                group=random.choice([1, 2, 16]),
            ))  # fmt: skip
    return cases
