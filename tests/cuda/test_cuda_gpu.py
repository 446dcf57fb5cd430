"""Numerics of the backend ``cuda`` on an H100/H200. Collected only there (conftest.py); has not run yet.

Float64 truth with the 2x rule, integer exactness, bitwise repeats; outputs are NaN before every launch (tests/conftest.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from npt_kernels.ops._cuda import launch
from npt_kernels.ops._cuda.heuristics import Epilogue
from npt_kernels.ops._cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Segment
from npt_kernels.ops.factored_linear import cuda as factored_cuda
from npt_kernels.ops.factored_linear import eager as factored_eager
from npt_kernels.ops.mlp import cuda as mlp_cuda
from npt_kernels.ops.mlp import eager as mlp_eager

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
ROWS = (1, 7, 33, 64, 65, 128, 200, 300, 1000, 4096)


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def ternary(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 2, shape, device="cuda").to(dtype)


def weight(n: int, k: int, mn: bool, make) -> Tensor:  # type: ignore[no-untyped-def]
    return make(k, n).t() if mn else make(n, k)


def twice(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of the unfused computation in the same dtype, and no NaN left."""
    assert not got.isnan().any()
    error, bound = (got.double() - truth).norm(), (plain.double() - truth).norm()
    assert error <= 2 * bound + 1e-6 * truth.norm(), (error / truth.norm(), bound / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mn", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("cols", "depth", "rank"), [(768, 768, 8), (264, 72, 40), (4096, 4096, 64), (1600, 6400, 1024)]
)
def test_store(dtype: torch.dtype, mn: bool, rows: int, cols: int, depth: int, rank: int) -> None:
    for make in (ternary, randn):
        x, w = make(rows, depth, dtype=dtype), weight(cols, depth, mn, lambda *s, m=make: m(*s, dtype=dtype))
        c, b, bias = make(rows, rank, dtype=dtype), make(rank, cols, dtype=dtype), make(cols, dtype=dtype)
        y = factored_cuda.fused_sum("test", [(x, w)], [(c, b)], bias)
        again = factored_cuda.fused_sum("test", [(x, w)], [(c, b)], bias)
        assert y is not None and again is not None
        assert torch.equal(y, again)
        truth = x.double() @ w.double().t() + c.double() @ b.double() + bias.double()
        if make is ternary:
            assert torch.equal(y, truth.to(dtype))
        else:
            twice(y, (x @ w.t()).addmm_(c, b).add_(bias), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "kinds", [(), (LOW,), (LOW_FIRST,), (LOW_SECOND,), (LOW_SECOND, LOW_FIRST), (LOW, LOW_SECOND, LOW_FIRST)]
)
def test_dual_is_exact_on_integers(dtype: torch.dtype, rows: int, kinds: tuple[int, ...]) -> None:
    d, f, rank = 328, 456, 72
    for mn in (False, True):
        x = ternary(rows, d, dtype=dtype)
        gate_w, up_w = (weight(f, d, mn, lambda *s: ternary(*s, dtype=dtype)) for _ in range(2))
        gate, up = (x.double() @ w.double().t() for w in (gate_w, up_w))
        segments = [Segment(MAIN, x, gate_w, up_w)]
        for kind in kinds:
            c, b, b2 = (ternary(*s, dtype=dtype) for s in ((rows, rank), (rank, f), (rank, f)))
            segments.append(Segment(kind, c, b.t(), b2.t() if kind == LOW else None))
            if kind != LOW_SECOND:
                gate = gate + c.double() @ b.double()
            if kind != LOW_FIRST:
                up = up + c.double() @ (b2 if kind == LOW else b).double()
        outs = [torch.full((rows, f), float("nan"), device="cuda", dtype=dtype) for _ in range(3)]
        launch.run(Epilogue.DUAL, segments, outs, store_pre=True)
        assert torch.equal(outs[1], gate.to(dtype)) and torch.equal(outs[2], up.to(dtype))
        only = torch.full_like(outs[0], float("nan"))
        launch.run(Epilogue.DUAL, segments, [only])
        assert torch.equal(only, outs[0])
        plain = torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)
        twice(only, plain, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored", "self_key"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("rows", "d", "f", "rank"), [(5, 256, 512, 16), (300, 768, 3072, 64), (2048, 1600, 6400, 200)])
def test_mlp(dtype: torch.dtype, rule: str, gated: bool, rows: int, d: int, f: int, rank: int) -> None:
    def tensors() -> tuple[Tensor | None, ...]:
        def key(width: int) -> Tensor | None:
            shape = {"anchored": (width,), "self_key": None}.get(rule, (rank, width))
            return None if shape is None else torch.randn(*shape, device="cuda") / width**0.5

        weights = [torch.randn(f, d, device="cuda") / d**0.5 for _ in range(2)]
        adapters: list[Tensor | None] = []
        for width, out in ((d, f), (d, f), (f, d)):
            adapters += [key(width), torch.randn(rank, out, device="cuda") / rank**0.5]
        if not gated:
            adapters[:2] = [None, None]
        return (
            torch.randn(rows, d, device="cuda"), torch.randn(rows, d, device="cuda"), None,
            weights[0] if gated else None, weights[1], torch.randn(d, f, device="cuda") / f**0.5,
            None, torch.randn(f, device="cuda"), None, torch.randn(d, rank, device="cuda") / d**0.5, *adapters,
        )  # fmt: skip

    low = [None if t is None else t.to(dtype) for t in tensors()]
    high = [None if t is None else t.double() for t in low]
    act = "silu" if gated else "gelu_new"
    got, plain = (m.forward(*low, act, rule, 1, 1.0, True) for m in (mlp_cuda, mlp_eager))
    truth = mlp_eager.forward(*high, act, rule, 1, 1.0, True)
    for g, p, t in zip(got, plain, truth, strict=True):
        if t.numel():
            twice(g, p, t)
    dout = torch.randn(rows, d, device="cuda").to(dtype)
    needs = [t is not None for t in low]
    needs[3:9] = [False] * 6
    results = []
    for module, args, saved in ((mlp_cuda, low, got), (mlp_eager, low, plain), (mlp_eager, high, truth)):
        grad = dout.to(saved[0].dtype)
        results.append(module.backward(
            grad, *args[:6], args[9], *args[10:], *saved[1:], gated, act, rule, 1, 1.0, needs
        ))  # fmt: skip
    for g, p, t in zip(*results, strict=True):
        twice(g, p, t)


@pytest.mark.parametrize("rule", ["rank1", "self_key"])
def test_factored_linear_backward(rule: str) -> None:
    rows, d, f, rank = 700, 512, 768, 24
    x, z, w = (randn(*s, dtype=torch.bfloat16, scale=0.3) for s in ((rows, d), (rows, rank), (f, d)))
    key = None if rule == "self_key" else randn(rank, d, dtype=torch.bfloat16, scale=0.1)
    value, dy = randn(rank, f, dtype=torch.bfloat16, scale=0.3), randn(rows, f, dtype=torch.bfloat16)
    for needs in itertools.product((False, True), repeat=6):
        chosen = [*needs[:3], needs[3] and key is not None, *needs[4:]]
        p = factored_eager.forward(x, z, w, key, value, None, rule, 1, 1.0)[1]
        args = (dy, x, z, w, key, value, p, rule, 1, 1.0, chosen)
        high = tuple(t.double() if isinstance(t, Tensor) else t for t in args)
        for g, plain, truth in zip(
            factored_cuda.backward(*args), factored_eager.backward(*args), factored_eager.backward(*high), strict=True
        ):
            twice(g, plain, truth)
