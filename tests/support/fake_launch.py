"""What the kernels compute, in torch on the CPU: segments and epilogues as csrc/gemm/segk_params.h says, the low-rank kernels as
csrc/low_rank/low_rank_params.h says.

With it the host side (which segments, which outputs, which gradients) runs without a GPU. Where the module is built, every call
also goes through the launcher itself as a dry run, so that its checks see the real arguments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from npt_kernels.kernels.cuda import coefficients, launch, norm, rules, steps, value_grads
from npt_kernels.kernels.cuda import support as _cuda
from npt_kernels.kernels.cuda.choose import Config, Epilogue
from npt_kernels.kernels.cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Overlap, Segment, weights_layout
from npt_kernels.kernels.eager import EagerSteps
from npt_kernels.rules import get_rule

#: Segmented-K calls since the last test began: (epilogue, kinds), and beside each its overlap.
CALLS: list[tuple[Epilogue, tuple[int, ...]]] = []
OVERLAPS: list[Overlap] = []
#: Names of all launches since then, in order.
LAUNCHES: list[str] = []
#: Launch plans of the dry runs, beside LAUNCHES (empty where the module is not built).
PLANS: list[dict[str, Any]] = []


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the definitions in place of the launches; float64 counts as bf16 in dry runs."""
    monkeypatch.setitem(launch.DTYPES, torch.float64, 0)
    for module in (steps, launch):
        monkeypatch.setattr(module, "run", fake_run)
    for module, name in (
        (coefficients, "coefficients"),
        (value_grads, "value_grads"),
        (rules, "rule"),
        (rules, "reduce"),
        (norm, "norm"),
    ):
        monkeypatch.setattr(module, f"launch_{name}", globals()[f"fake_{name}"])
    for log in (CALLS, OVERLAPS, LAUNCHES, PLANS):
        log.clear()


def dry_run(name: str, arguments: Sequence[Any]) -> None:
    LAUNCHES.append(name)
    if importlib.util.find_spec("npt_kernels._cuda") is not None:
        module = _cuda.extension()
        PLANS.append(getattr(module, name)(*arguments, module.DRY_RUN, 0))


def fake_coefficients(
    a: Tensor | None, u: Tensor | None, w_down: Tensor | None, key: Tensor | None, key_kind: int, key_scale: Tensor | None,
    z: Tensor, p: Tensor | None, c: Tensor | None, rule: str, width: int, scale: float, plan: coefficients.CoefficientsPlan,
) -> None:  # fmt: skip
    dry_run(
        "coefficients",
        coefficients.coefficients_arguments(a, u, w_down, key, key_kind, key_scale, z, p, c, rule, width, scale, plan),
    )
    if a is not None:
        assert w_down is not None
        exact_z = a.double() @ w_down.double()
        z.copy_(exact_z)
    else:
        exact_z = z.double()
    exact_p = None
    if key is not None:
        assert u is not None and p is not None
        exact_p = u.double() @ {1: key.t(), 2: key, 3: key.unsqueeze(-1)}[key_kind].double()
        p.copy_(exact_p)
    if c is not None:  # the rule sees what was not rounded yet
        scaled = exact_z if key_scale is None else exact_z * key_scale.double().unsqueeze(1)
        c.copy_(get_rule(rule).coefficients(scaled, exact_p, z.shape[1] // width, scale))


def fake_value_grads(dy: Tensor, c: Tensor, w_b_up: Tensor, dc: Tensor, db: Tensor, ranges: int) -> None:
    dry_run("value_grads", value_grads.pair_arguments(dy, c, w_b_up, dc, db, ranges))
    tiles = -(-dy.shape[0] // 64)
    for block in range(dc.shape[0]):
        columns = slice(512 * block, 512 * (block + 1))
        dc[block].copy_(dy[:, columns].double() @ w_b_up[:, columns].double().t())
    for part in range(ranges):
        rows = slice(64 * (tiles * part // ranges), 64 * (tiles * (part + 1) // ranges))
        db[part].copy_(c[rows].double().t() @ dy[rows].double())


def fake_rule(
    backward: bool, z: Tensor, p: Tensor | None, c: Tensor | None, dc: Tensor | None, dz: Tensor | None, dp: Tensor | None,
    shares: Tensor | None, key_scale: Tensor | None, rule: str, num_ranks: int, scale: float,
) -> None:  # fmt: skip
    arguments = (backward, z, p, c, dc, dz, dp, shares, key_scale, rule, num_ranks, scale)
    dry_run("rule", rules.rule_arguments(*arguments))
    scaled = z.double() if key_scale is None else z.double() * key_scale.double().unsqueeze(1)
    exact_p = None if p is None else p.double()
    if not backward:
        assert c is not None
        c.copy_(get_rule(rule).coefficients(scaled, exact_p, num_ranks, scale))
        return
    assert (dc is None) != (shares is None)
    total = shares.sum(0).double() if shares is not None else dc.double()  # type: ignore[union-attr]
    made = get_rule(rule).backward(total, scaled, exact_p, num_ranks, scale, dz is not None, dp is not None)
    for out, value in zip((dz, dp), made, strict=True):
        if out is not None and value is not None:
            out.copy_(value)


def fake_reduce(shares: Tensor, out: Tensor) -> None:
    dry_run("reduce", rules.reduce_arguments(shares, out))
    out.copy_(shares.sum(0))


def fake_norm(
    backward: bool, h: Tensor, a: Tensor, du: Tensor | None, u: Tensor | None, dh: Tensor | None, da: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, key_scale: Tensor | None, d_key_scale: Tensor | None, kind: str, eps: float,
) -> None:  # fmt: skip
    dry_run("norm", norm.norm_arguments(backward, h, a, du, u, dh, da, weight, bias, key_scale, d_key_scale, kind, eps))
    if not backward:
        assert u is not None and key_scale is not None
        made = EagerSteps().matched_norm(h, a, weight, bias, kind, eps)
        u.copy_(made[0])
        key_scale.copy_(made[1])
        return
    needs = [dh is not None, da is not None, False, False]
    grads = EagerSteps().matched_norm_backward(du, d_key_scale, h, a, weight, bias, kind, eps, needs)
    for out, value in zip((t for t in (dh, da) if t is not None), grads, strict=True):
        out.copy_(value)


def fake_run(
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
    """Same signature as ``launch.run``."""
    options: dict[str, Any] = {"inputs": inputs, "bias": bias, "activation": activation, "store_pre": store_pre}
    dry_run("launch", launch.launch_arguments(epilogue, segments, outputs, overlap=overlap, config=config, **options))
    OVERLAPS.append(overlap)
    CALLS.append((epilogue, tuple(sorted(s.kind for s in segments))))
    assert 1 <= len(segments) <= 4 and any(s.kind == MAIN for s in segments)
    dual = epilogue == Epilogue.GATE_UP
    sums: list[Tensor | None] = [None, None]
    for s in segments:
        for t in (s.a, s.b0, *([s.b1] if s.b1 is not None else [])):
            layout = weights_layout(t)
            assert layout is not None, "TMA could not read this"
            assert s.kind == MAIN or t is s.a or layout == "mn"
        assert (s.b1 is not None) == (dual and s.kind in (MAIN, LOW))
        a, b0 = s.a.double(), s.b0.double()
        for half in range(2):
            if half == 1 and not dual:
                continue
            if s.kind in (LOW_FIRST, LOW_SECOND):
                assert dual
                if (s.kind == LOW_SECOND) != (half == 1):
                    continue
            weight = s.b1.double() if half == 1 and s.b1 is not None else b0
            term = a @ weight.t()
            sums[half] = term if sums[half] is None else sums[half] + term
    y = sums[0]
    assert y is not None
    if bias is not None:
        assert epilogue in (Epilogue.STORE, Epilogue.ACT)
        y = y + bias.double()
    c0, c1 = activation

    def act(v: Tensor) -> Tensor:
        return v * torch.sigmoid(v * (c0 + c1 * v * v))

    def slope(v: Tensor) -> Tensor:
        s = torch.sigmoid(v * (c0 + c1 * v * v))
        return s + v * s * (1 - s) * (c0 + 3 * c1 * v * v)

    results: list[Tensor]
    if epilogue == Epilogue.STORE:
        results = [y]
    elif epilogue == Epilogue.ACT:
        results = [act(y), y] if store_pre else [act(y)]
    elif epilogue == Epilogue.GATE_UP:
        assert sums[1] is not None
        results = [act(y) * sums[1], y, sums[1]] if store_pre else [act(y) * sums[1]]
    elif epilogue == Epilogue.ACT_BWD:
        results = [y * slope(inputs[0].double())]
    else:
        gate, up = (t.double() for t in inputs)
        results = [y * up * slope(gate), y * act(gate)]
    assert len(results) == len(outputs)
    for out, value in zip(outputs, results, strict=True):
        if out is not None:
            out.copy_(value)
        else:
            assert epilogue == Epilogue.GATE_UP_BWD


__all__ = [
    "CALLS", "LAUNCHES", "LOW", "LOW_FIRST", "LOW_SECOND", "MAIN", "OVERLAPS", "PLANS", "dry_run", "fake_run", "install",
]  # fmt: skip
