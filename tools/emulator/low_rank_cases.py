"""Cases of the low-rank side: coefficients, gradients through w_b_up with the sum of their shares, the rules alone, the norm."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from checking import Case, Output, normal, pitched, ternary
from names import DTYPES, low_rank_kind, run_coefficients, run_norm, run_reduce, run_rule, run_value_grads
from torch import Tensor

from npt_kernels.rules import get_rule

__all__ = ["coefficients_case", "low_rank_cases", "value_grads_case"]

SCALE, SMS = 0.7, 132
#: Rounding of z and p inside, then a product (or a sum over a term), then the element.
OF_A_RULE = (4.0, 4.0)
#: How a key is stored → rules that have such a key: none, [R, d], [d, R], [d].
RULES_OF_KEY = (("self_key",), ("rank1", "diagonal"), ("diagonal", "rank1"), ("anchored",))


def coefficients_case(
    dtype: torch.dtype, rule: str, key_kind: int, given: bool, shape: tuple[int, int, int, int], terms: int,
    tile: int, parts: int, exact: bool, scaled: bool, want_p: bool = True,
) -> Case:  # fmt: skip
    """z (unless ``given``), p and c from one reading of a and u; ``shape``: tokens, d_a, d_u, R."""
    rows, d_a, d_u, rank = shape
    make = ternary if exact else normal
    shrink = 1.0 if exact else d_a**-0.5
    a, w_down = pitched(make, rows, d_a, dtype), pitched(make, d_a, rank, dtype) * shrink
    u = pitched(make, rows, d_u, dtype)
    key = None
    if key_kind == 3:
        key = make(d_u, dtype=dtype)
    elif key_kind:
        key = pitched(make, *((rank, d_u) if key_kind == 1 else (d_u, rank)), dtype)
    key = key if key is None or exact else key * d_u**-0.5
    key_scale = None
    if scaled:
        key_scale = torch.full((rows,), 2.0).to(dtype) if exact else (torch.rand(rows) + 0.5).to(dtype)
    z = a.double() @ w_down.double()
    z_given = z.to(dtype) if given else None
    p = None
    if key is not None:
        matrix = key.double().unsqueeze(1) if key_kind == 3 else key.double() if key_kind == 2 else key.double().t()
        p = u.double() @ matrix
    z_inside = z if z_given is None else z_given.double()
    z_inside = z_inside if key_scale is None else z_inside * key_scale.double().unsqueeze(1)
    terms = terms if rule == "rank1" else 1
    outputs = [Output("c", get_rule(rule).coefficients(z_inside, p, terms, SCALE), dtype, slack=OF_A_RULE)]
    if not given:
        outputs.append(Output("z", z, dtype, exact))
    if p is not None:
        outputs.append(Output("p", p, dtype, exact, wanted=want_p))

    def run(views: Sequence[Tensor]) -> None:
        place = dict(zip((o.name for o in outputs), views, strict=True))
        run_coefficients(
            None if given else a, u if key_kind else None, None if given else w_down, key, key_kind, key_scale,
            z_given if z_given is not None else place["z"], place.get("p") if want_p else None, place["c"], rule, terms, SCALE,
            tile, parts, SMS,
        )  # fmt: skip

    what = (
        f"{rule} {dtype} key {key_kind} z given {given} {shape} terms {terms} tile {tile} parts {parts} exact {exact}"
    )
    return Case(f"coefficients {rule}", what, outputs, run)


def value_grads_case(dtype: torch.dtype, rows: int, width: int, rank: int, ranges: int, exact: bool) -> Case:
    """Shares of dc and d w_b_up, and their sums."""
    make = ternary if exact else normal
    dy, b, c = pitched(make, rows, width, dtype), pitched(make, rank, width, dtype), pitched(make, rows, rank, dtype)
    dc_parts = torch.stack([
        d.double() @ w.double().t() for d, w in zip(dy.split(512, dim=1), b.split(512, dim=1), strict=True)
    ])  # fmt: skip
    tiles = -(-rows // 64)
    edges = [min(rows, 64 * (tiles * i // ranges)) for i in range(ranges + 1)]
    db_parts = torch.stack([
        c[first:last].double().t() @ dy[first:last].double() for first, last in itertools.pairwise(edges)
    ])  # fmt: skip
    # 512 fp32 additions, each rounded: a standard deviation of 0.4 · sqrt(512) = 9 eps of the mean size; 64 is 6 of them.
    sums = (64.0, 64.0)
    outputs = [
        Output("dc shares", dc_parts, torch.float32, exact, slack=sums, compact=True),
        Output("d w_b_up shares", db_parts, torch.float32, exact, slack=sums, compact=True),
        Output("dc", dc_parts.sum(0), dtype, exact, compact=True),
        Output("d w_b_up", db_parts.sum(0), dtype, exact, compact=True),
    ]

    def run(views: Sequence[Tensor]) -> None:
        run_value_grads(dy, c, b, views[0], views[1], ranges, SMS)
        run_reduce(views[0], views[2], SMS)
        run_reduce(views[1], views[3], SMS)

    return Case(
        "value_grads + reduce", f"value_grads {dtype} {(rows, width, rank)} ranges {ranges} exact {exact}", outputs, run
    )


def rule_case(
    dtype: torch.dtype, rule: str, backward: bool, vector: int, shares: int, shape: tuple[int, int], terms: int,
    scaled: bool, want: tuple[bool, bool] = (True, True),
) -> Case:  # fmt: skip
    """c from z and p, or dz and dp from dc (a tensor, or ``shares`` fp32 shares)."""
    rows, rank = shape
    key = get_rule(rule).key
    terms = terms if rule == "rank1" else 1
    extra = 8 if vector == 2 else 9  # an odd pitch, so that elements go one by one
    z = pitched(normal, rows, rank, dtype, extra)
    p = None if key == "none" else pitched(normal, rows, 1 if key == "vector" else rank, dtype, extra)
    key_scale = (torch.rand(rows) + 0.5).to(dtype) if scaled else None
    scaled_z = z.double() if key_scale is None else z.double() * key_scale.double().unsqueeze(1)
    p64 = None if p is None else p.double()
    label = f"rule {rule} {'backward' if backward else 'forward'}"
    what = f"{label} {dtype} {shape} terms {terms} vector {vector} shares {shares} want {want}"
    if not backward:
        truth = get_rule(rule).coefficients(scaled_z, p64, terms, SCALE)
        outputs = [Output("c", truth, dtype, slack=(2.0, 2.0), extra=2 * extra)]

        def run_forward(views: Sequence[Tensor]) -> None:
            run_rule(False, z, p, views[0], None, None, None, None, key_scale, rule, terms, SCALE, SMS)

        return Case(label, what, outputs, run_forward)
    parts = torch.randn(shares, rows, rank) if shares else None
    dc = None if shares else pitched(normal, rows, rank, dtype, extra)
    total = dc.double() if dc is not None else parts.double().sum(0)  # type: ignore[union-attr]
    dz, dp = get_rule(rule).backward(total, scaled_z, p64, terms, SCALE, True, True)
    assert dz is not None and dp is not None
    outputs = [
        Output(name, truth, dtype, slack=(2.0, 2.0), wanted=wanted, extra=2 * extra)
        for name, truth, wanted in (("dz", dz, want[0]), ("dp", dp, want[1]))
    ]

    def run_backward(views: Sequence[Tensor]) -> None:
        given = [view if wanted else None for view, wanted in zip(views, want, strict=True)]
        run_rule(True, z, p, None, dc, *given, parts, key_scale, rule, terms, SCALE, SMS)

    return Case(label, what, outputs, run_backward)


def norm_case(
    dtype: torch.dtype, backward: bool, shape: tuple[int, int], layer: bool, affine: bool, extra: int,
    want: tuple[bool, bool] = (True, True), given: tuple[bool, bool] = (True, True),
) -> Case:  # fmt: skip
    """u and key_scale, or dh and da from the gradients of those ``given``; a pitch of no multiple of 8 is read by elements."""
    rows, width = shape
    kind, eps = "layer" if layer else "rms", 1e-5
    h, a = pitched(normal, rows, width, dtype, extra) + 0.25, pitched(normal, rows, width, dtype, extra)
    h = torch.nn.functional.pad(h, (0, extra))[:, :width]
    weight = normal(width, dtype=dtype) + 1 if affine else None
    bias = normal(width, dtype=dtype) if affine and layer else None
    x, total = h.double(), (h.float() + a.float()).to(dtype).double()
    if layer:
        x, total = x - x.mean(1, keepdim=True), total - total.mean(1, keepdim=True)
    s = (total.square().mean(1, keepdim=True) + eps).rsqrt()
    gamma = 1.0 if weight is None else weight.double()
    frame = 16 if (width + extra) % 8 == 0 else 18
    label = f"norm {kind} {'backward' if backward else 'forward'}"
    what = f"{label} {dtype} {shape} affine {affine} extra {extra} want {want} given {given}"
    if not backward:
        u = x * s * gamma + (0.0 if bias is None else bias.double())
        outputs = [Output("u", u, dtype, extra=frame), Output("key_scale", s.squeeze(1), dtype, compact=True)]

        def run_forward(views: Sequence[Tensor]) -> None:
            run_norm(False, h, a, None, views[0], None, None, weight, bias, views[1], None, kind, eps, SMS)

        return Case(label, what, outputs, run_forward)
    du = pitched(normal, rows, width, dtype, extra) if given[0] else None
    d_key_scale = normal(rows, dtype=dtype) if given[1] else None
    g = torch.zeros_like(x) if du is None else du.double() * gamma
    ds = (g * x).sum(1, keepdim=True) + (0.0 if d_key_scale is None else d_key_scale.double().unsqueeze(1))
    dt = total * (-ds * s**3 / width)
    dh = s * (g - g.mean(1, keepdim=True) if layer else g) + dt
    outputs = [
        Output(name, truth, dtype, wanted=wanted, extra=frame)
        for name, truth, wanted in (("dh", dh, want[0]), ("da", dt, want[1]))
    ]

    def run_backward(views: Sequence[Tensor]) -> None:
        places = [view if wanted else None for view, wanted in zip(views, want, strict=True)]
        run_norm(True, h, a, du, None, *places, weight, None, None, d_key_scale, kind, eps, SMS)

    return Case(label, what, outputs, run_backward)


# ------------------------------------------------------------------------------------------------ by instance
def _coefficients(dtype: torch.dtype, kernel: dict[str, Any], kind: dict[str, Any], count: int) -> list[Case]:
    tile, key_kind, given = kernel["tile"], kind["key_kind"], not kind["compute_z"]
    shapes = [((140, 200, 264, 24), 3)] if tile == 64 else [((140, 200, 264, 200), 25)]
    if tile == 64:
        shapes += [((1, 8, 8, 8), 1), ((200, 264, 520, 24), 3), ((130, 1032, 72, 64), 2), ((129, 72, 600, 40), 5)]
    else:
        shapes += [
            ((5, 72, 200, 72), 3),
            ((257, 328, 520, 128), 4),
            ((130, 136, 136, 320), 5),
            ((64, 520, 264, 200), 25),
        ]
    cases = []
    for shape, terms in shapes[:count]:
        for rule in RULES_OF_KEY[key_kind]:
            parts, exact, scaled, want_p = random.choice([1, 2, 4, 8]), *(random.random() < p for p in (0.5, 0.5, 0.7))
            cases.append(
                coefficients_case(dtype, rule, key_kind, given, shape, terms, tile, parts, exact, scaled, want_p)
            )
    return cases


def _value_grads(dtype: torch.dtype, count: int) -> list[Case]:
    shapes = [
        (300, 520, 72, 2), (130, 1032, 40, 1), (700, 72, 24, 11), (1, 8, 8, 1), (65, 512, 64, 2), (300, 520, 40, 3),
        (130, 1032, 200, 1),
    ]  # fmt: skip
    return [value_grads_case(dtype, *shape, exact) for shape in shapes[: count + 1] for exact in (True, False)]


def _rules(dtype: torch.dtype, backward: bool, vector: int, shares: bool, count: int) -> list[Case]:
    shapes = [(37, 24, 2), (1, 8, 1), (65, 72, 3), (300, 64, 1), (20, 1048, 1), (33, 130, 2)]  # rows, R, terms
    cases = []
    for rule in ("rank1", "diagonal", "anchored", "self_key"):
        if backward and rule == "self_key":  # its gradient is dc itself: no kernel
            continue
        for rows, rank, terms in shapes[:count]:
            width = rank // terms if rule == "rank1" else rank
            if (vector == 2 and width % 2) or (shares and width > 1024):
                continue
            wishes = [(True, True), (True, False), (False, True)] if backward else [(True, True)]
            for want in wishes:
                parts = random.choice([1, 3]) if shares else 0
                cases.append(
                    rule_case(dtype, rule, backward, vector, parts, (rows, rank), terms, random.random() < 0.5, want)
                )
    return cases


def _norms(dtype: torch.dtype, backward: bool, accesses: int, count: int) -> list[Case]:
    shapes = [(5, 776), (1, 8), (3, 100), (2, 4096), (4, 1), (2, 1001)]  # rows, d
    if accesses > 1:
        shapes = [(2, 5000), (1, 4104), (2, 8192), (1, 16384), (2, 4097)]
    cases = []
    for shape in shapes[:count]:
        even = -shape[1] % 8 + 8
        for layer in (False, True):
            affine, extra = random.random() < 0.7, random.choice([even, even, 9])
            cases.append(norm_case(dtype, backward, shape, layer, affine, extra))
            if backward:
                cases.append(norm_case(dtype, True, shape, layer, affine, even, (True, False), (True, False)))
                cases.append(norm_case(dtype, True, shape, layer, affine, 9, (False, True), (False, True)))
            else:
                cases.append(norm_case(dtype, False, shape, layer, not affine, 9 if extra == even else even))
    return cases


def low_rank_cases(kernel: dict[str, Any], index: int, shapes: int) -> list[Case]:
    """Cases of one instance; those that sum shares come with value_grads."""
    random.seed(index)
    torch.manual_seed(index)
    kind, dtype = low_rank_kind(kernel), DTYPES[kernel["dtype"]]
    if kind["kind"] == "coefficients":
        return _coefficients(dtype, kernel, kind, shapes)
    if kind["kind"] == "value_grads":
        return _value_grads(dtype, shapes)
    if kind["kind"] == "reduce":
        return []
    if kind["kind"].startswith("norm"):
        return _norms(dtype, kind["kind"] == "norm_bwd", kind["accesses"], shapes)
    return _rules(dtype, kind["kind"] == "rule_bwd", kind["vector"], kind.get("shares", False), shapes)
