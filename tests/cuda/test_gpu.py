"""Numerics of the backend ``cuda``: on an H100/H200, or emulated at smaller sizes (``NPT_EMULATE=1``, tools/emulator).

Collected only there (conftest.py). Float64 truth with the 2x rule, integer exactness, bitwise repeats; outputs are
NaN before every launch (tests/conftest.py).

An illegal instruction or address leaves the process without a GPU: every later test of the run errors too. Then run one part:
``pytest tests/cuda/test_gpu.py -k "coefficients or pair or value_grads"`` (or store, dual, mlp, split_decode, in_place), and
``pytest tests/cuda/test_instances.py -k coop`` (or pingpong, decode), which has a test for each kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from npt_kernels.kernels.cuda import coefficients, launch, value_grads
from npt_kernels.kernels.cuda.choose import Epilogue, choose
from npt_kernels.kernels.cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Segment
from npt_kernels.kernels.cuda.steps import CudaSteps, fused_sum
from npt_kernels.kernels.cuda.support import EMULATED
from npt_kernels.kernels.eager import EagerSteps
from npt_kernels.rules import RULES, get_rule
from tests.support.mlp_calls import FactoredCalls, MlpCalls

pytestmark = pytest.mark.gpu
mlp_cuda, mlp_eager = MlpCalls("cuda"), MlpCalls("eager")
factored_cuda, factored_eager = FactoredCalls("cuda"), FactoredCalls("eager")
DTYPES = (torch.bfloat16, torch.float16)
DEVICE = "cpu" if EMULATED else "cuda"


def sizes(on_gpu: Sequence[Any], emulated: Sequence[Any]) -> Sequence[Any]:
    """The emulator does some 10^8 products a second."""
    return emulated if EMULATED else on_gpu


ROWS = sizes((1, 7, 33, 64, 65, 128, 200, 300, 1000, 4096), (1, 33, 65, 200))


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def ternary(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 2, shape, device=DEVICE).to(dtype)


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
    ("cols", "depth", "rank"),
    sizes([(768, 768, 8), (264, 72, 40), (4096, 4096, 64), (1600, 6400, 1024)], [(264, 72, 40), (392, 328, 8)]),
)
def test_store(dtype: torch.dtype, mn: bool, rows: int, cols: int, depth: int, rank: int) -> None:
    for make in (ternary, randn):
        x, w = make(rows, depth, dtype=dtype), weight(cols, depth, mn, lambda *s, m=make: m(*s, dtype=dtype))
        c, b, bias = make(rows, rank, dtype=dtype), make(rank, cols, dtype=dtype), make(cols, dtype=dtype)
        y = fused_sum("test", [(x, w)], [(c, b)], bias)
        again = fused_sum("test", [(x, w)], [(c, b)], bias)
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
        outs = [torch.full((rows, f), float("nan"), device=DEVICE, dtype=dtype) for _ in range(3)]
        launch.run(Epilogue.GATE_UP, segments, outs, store_pre=True)
        assert torch.equal(outs[1], gate.to(dtype)) and torch.equal(outs[2], up.to(dtype))
        only = torch.full_like(outs[0], float("nan"))
        launch.run(Epilogue.GATE_UP, segments, [only])
        assert torch.equal(only, outs[0])
        plain = torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)
        twice(only, plain, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["rank1", "diagonal", "anchored", "self_key"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("rows", "d", "f", "rank"),
    sizes(
        [(40, 256, 512, 16), (300, 768, 3072, 64), (2048, 1600, 6400, 200)], [(40, 256, 512, 16), (200, 200, 264, 136)]
    ),
)
def test_mlp(dtype: torch.dtype, rule: str, gated: bool, rows: int, d: int, f: int, rank: int) -> None:
    def tensors() -> tuple[Tensor | None, ...]:
        def key(width: int) -> Tensor | None:
            shape = {"anchored": (width,), "self_key": None}.get(rule, (rank, width))
            return None if shape is None else torch.randn(*shape, device=DEVICE) / width**0.5

        weights = [torch.randn(f, d, device=DEVICE) / d**0.5 for _ in range(2)]
        adapters: list[Tensor | None] = []
        for width, out in ((d, f), (d, f), (f, d)):
            adapters += [key(width), torch.randn(rank, out, device=DEVICE) / (rank if rule == "rank1" else rank**0.5)]
        if not gated:
            adapters[:2] = [None, None]
        return (
            torch.randn(rows, d, device=DEVICE), torch.randn(rows, d, device=DEVICE), None,
            weights[0] if gated else None, weights[1], torch.randn(d, f, device=DEVICE) / f**0.5,
            None, torch.randn(f, device=DEVICE), None, torch.randn(d, rank, device=DEVICE) / d**0.5, *adapters,
        )  # fmt: skip

    low = [None if t is None else t.to(dtype) for t in tensors()]
    high = [None if t is None else t.double() for t in low]
    act = "silu" if gated else "gelu_new"
    got, plain = (m.forward(*low, act, rule, 1, 1.0, True) for m in (mlp_cuda, mlp_eager))
    truth = mlp_eager.forward(*high, act, rule, 1, 1.0, True)
    for g, p, t in zip(got, plain, truth, strict=True):
        if t.numel():
            twice(g, p, t)
    dout = torch.randn(rows, d, device=DEVICE).to(dtype)
    needs = [t is not None for t in low]
    needs[3:9] = [False] * 6
    results = []
    # Both low-precision backwards from cuda's saved tensors (checked above): their rounding is no difference of the backwards.
    for module, args, saved in ((mlp_cuda, low, got), (mlp_eager, low, got), (mlp_eager, high, truth)):
        grad = dout.to(saved[0].dtype)
        results.append(module.backward(
            grad, *args[:6], args[9], *args[10:], *saved[1:], gated, act, rule, 1, 1.0, needs
        ))  # fmt: skip
    for g, p, t in zip(*results, strict=True):
        twice(g, p, t)


@pytest.mark.parametrize("rule", ["rank1", "self_key"])
def test_factored_linear_backward(rule: str) -> None:
    rows, d, f, rank = sizes((700, 512, 768, 24), (140, 72, 136, 24))
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


# ------------------------------------------------------------------------------------- low-rank kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("rank", "terms"), sizes([(8, 1), (64, 2), (72, 3), (128, 1), (320, 5)], [(8, 1), (64, 2), (136, 1)])
)
def test_coefficients(dtype: torch.dtype, rule: str, rows: int, rank: int, terms: int) -> None:
    d_a, d_u = sizes((328, 4096), (200, 328))
    kind = RULES[rule].key
    for make in (ternary, randn):
        a, u, w_down = (make(*s, dtype=dtype) for s in ((rows, d_a), (rows, d_u), (d_a, rank)))
        w_down = w_down if make is ternary else w_down * d_a**-0.5
        key = None if kind == "none" else make(*((d_u,) if kind == "vector" else (rank, d_u)), dtype=dtype)
        if key is not None and make is randn:
            key = key * d_u**-0.5
        key_scale = torch.rand(rows, device=DEVICE).to(dtype)
        keys = [key] if kind != "matrix" else [key, key.t().contiguous().t()]  # type: ignore[union-attr]
        for stored in keys:
            for parts in sizes((None, 1, 2, 4, 8), (None, 4)):
                plan = (
                    None if parts is None else coefficients.CoefficientsPlan(64 if rank <= 64 else 128, parts, "test")
                )
                low, again = (
                    coefficients.coefficients(
                        u, stored, key_scale, rule, terms, 0.7, a=a, w_down=w_down, method="fused", plan=plan
                    )
                    for _ in range(2)
                )
                assert all(torch.equal(g, w) for g, w in zip(low[:3], again[:3], strict=True))
                truth_z = a.double() @ w_down.double()
                truth_p = (
                    None if key is None else u.double() @ (key.t() if key.dim() == 2 else key.unsqueeze(1)).double()
                )
                if make is ternary:
                    assert torch.equal(low.z, truth_z.to(dtype))
                    assert truth_p is None or torch.equal(low.p, truth_p.to(dtype))
                    continue
                plain_z = a @ w_down
                plain_p = None if key is None else u @ (key.t() if key.dim() == 2 else key.unsqueeze(1))
                twice(low.z, plain_z, truth_z)
                if truth_p is not None and plain_p is not None:
                    twice(low.p, plain_p, truth_p)
                twice(
                    low.c,
                    get_rule(rule).coefficients(plain_z * key_scale.unsqueeze(1), plain_p, terms, 0.7),
                    get_rule(rule).coefficients(truth_z * key_scale.double().unsqueeze(1), truth_p, terms, 0.7),
                )
                given = coefficients.coefficients(
                    u, stored, key_scale, rule, terms, 0.7, z=low.z, method="fused", plan=plan
                )
                assert not given.c.isnan().any() and (truth_p is None or torch.equal(given.p, low.p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", sizes((1, 64, 65, 300, 4096), (1, 65, 300)))
@pytest.mark.parametrize(
    ("width", "rank"), sizes([(8, 8), (512, 64), (520, 40), (14336, 64), (1600, 200)], [(8, 8), (520, 40), (520, 136)])
)
def test_pair(dtype: torch.dtype, rows: int, width: int, rank: int) -> None:
    for make in (ternary, randn):
        dy, b, c = (make(*s, dtype=dtype) for s in ((rows, width), (rank, width), (rows, rank)))
        got, again = (value_grads.dc_and_value_grad(dy, b, c) for _ in range(2))
        assert all(torch.equal(g, w) for g, w in zip(got, again, strict=True))
        truths = (dy.double() @ b.double().t(), c.double().t() @ dy.double())
        for g, plain, truth in zip(got, (dy @ b.t(), c.t() @ dy), truths, strict=True):
            if make is ternary:
                assert torch.equal(g, truth.to(dtype))
            else:
                twice(g, plain, truth)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rank", "terms"), [(64, 1), (24, 8), (1024, 1), (1048, 1)])
def test_value_grads(rule: str, rank: int, terms: int) -> None:
    rows, width, dtype = 300, 1032, torch.bfloat16
    dy, value, z = (randn(*s, dtype=dtype, scale=0.3) for s in ((rows, width), (rank, width), (rows, rank)))
    kind = RULES[rule].key
    p = None if kind == "none" else randn(rows, 1 if kind == "vector" else rank, dtype=dtype)
    high = [None if t is None else t.double() for t in (dy, value, z, p)]
    truth = (
        *get_rule(rule).backward(high[0] @ high[1].t(), high[2], high[3], terms, 0.7, True, True),  # type: ignore[union-attr]
        get_rule(rule).coefficients(high[2], high[3], terms, 0.7).t() @ high[0],  # type: ignore[arg-type]
    )
    plain = (
        *get_rule(rule).backward(dy @ value.t(), z, p, terms, 0.7, True, True),
        get_rule(rule).coefficients(z, p, terms, 0.7).t() @ dy,
    )
    for method in ("fused", "vendor"):
        got = value_grads.value_grads(dy, value, z, p, None, rule, terms, 0.7, True, True, True, method=method)  # type: ignore[arg-type]
        for g, pl, t in zip(got, plain, truth, strict=True):
            if g is not None:
                twice(g, pl, t)


# ------------------------------------------------------------------------------------- the norm before the MLP
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(0, 64), (1, 1), (1, 8), (5, 100), (33, 776), *sizes([(8192, 4096), (515, 8192), (64, 16384), (3, 5001)], [(3, 5001)])],
)  # fmt: skip
@pytest.mark.parametrize("affine", [True, False])
def test_matched_norm(dtype: torch.dtype, kind: str, rows: int, width: int, affine: bool) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    inputs = [tensor(rows, width) * 2 + 0.5, tensor(rows, width), None, None]
    if affine:
        inputs[2:] = [tensor(width), tensor(width) if kind == "layer" else None]
    inputs = [None if t is None else t.to(dtype) for t in inputs]
    # The gradient of the key scale is small beside the sum that it joins; a norm that is trained asks for the eager step.
    upstream, needs = (tensor(rows, width).to(dtype), tensor(rows).to(dtype)), [True, True, False, False]

    def run(steps: EagerSteps, *tensors: Tensor | None, high: bool = False) -> list[Tensor]:
        given = [t.double() for t in upstream] if high else upstream
        out = steps.matched_norm(*tensors, kind, 1e-5)  # type: ignore[arg-type]
        return [*out, *steps.matched_norm_backward(*given, *tensors, kind, 1e-5, needs)]  # type: ignore[arg-type]

    got, again, plain = (run(steps, *inputs) for steps in (CudaSteps(), CudaSteps(), EagerSteps()))
    truth = run(EagerSteps(), *(None if t is None else t.double() for t in inputs), high=True)
    for g, same, p, t in zip(got, again, plain, truth, strict=True):
        assert torch.equal(g, same) and g.shape == t.shape and g.dtype == dtype
        if rows:
            twice(g, p, t)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_matched_norm_of_other_strides_and_wishes(kind: str) -> None:
    """Rows at odd places, gradients left out, a trained norm: as on eager within the rule."""
    make = torch.randn(6, 2 * 72 + 1, device=DEVICE).bfloat16()
    h, a, weight = make[:, 1:73], make[:, 73:145], make[0, 3:75]
    bias = make[1, 3:75] if kind == "layer" else None
    du, d_key_scale = randn(6, 72, dtype=torch.bfloat16), randn(6, dtype=torch.bfloat16)
    high = [None if t is None else t.double() for t in (h, a, weight, bias)]
    for needs in itertools.product([True, False], [True, False], [True, False], [bias is not None]):
        for grads in ((du, d_key_scale), (du, None), (None, d_key_scale)):
            got, plain = (
                steps.matched_norm_backward(*grads, h, a, weight, bias, kind, 1e-5, list(needs))
                for steps in (CudaSteps(), EagerSteps())
            )
            exact = [None if g is None else g.double() for g in grads]
            truth = EagerSteps().matched_norm_backward(*exact, *high, kind, 1e-5, list(needs))
            assert len(got) == sum(needs)
            for g, p, t in zip(got, plain, truth, strict=True):
                twice(g, p, t)


def test_matched_norm_that_the_kernel_does_not_take_is_said() -> None:
    h, a = randn(2, 16, dtype=torch.bfloat16), randn(2, 16, dtype=torch.bfloat16)
    launch.say_fallback.cache_clear()
    with pytest.warns(UserWarning, match=r"matched_norm: not fused.*torch.float32.*ran as on 'eager'"):
        u, _ = CudaSteps().matched_norm(h, a, torch.ones(16, device=DEVICE), None, "rms", 1e-5)
    assert torch.equal(u, EagerSteps().matched_norm(h, a, torch.ones(16, device=DEVICE), None, "rms", 1e-5)[0])
    wide = randn(1, 16400, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"d = 16400 is more than the 16384"):
        CudaSteps().matched_norm(wide, wide, None, None, "rms", 1e-5)


# ------------------------------------------------------------------------------------- decode: split K, overlap
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", (1, 7, 16, 33, 64))
@pytest.mark.parametrize("epilogue", [Epilogue.STORE, Epilogue.ACT, Epilogue.GATE_UP])
def test_split_decode(split: int, rows: int, epilogue: Epilogue) -> None:
    d, width, rank = 1032, 520, 24
    make = ternary
    x, c = make(rows, d, dtype=torch.bfloat16), make(rows, rank, dtype=torch.bfloat16)
    first, second = (make(width, d, dtype=torch.bfloat16) for _ in range(2))
    b = make(rank, width, dtype=torch.bfloat16)
    dual = epilogue == Epilogue.GATE_UP
    segments = [Segment(MAIN, x, first, second if dual else None), Segment(LOW_FIRST if dual else LOW, c, b.t())]
    config = replace(choose(epilogue, rows, width, d + rank), split=split)
    outs = [
        torch.full((rows, width), float("nan"), device=DEVICE, dtype=torch.bfloat16) for _ in range(3 if dual else 2)
    ]
    outs = outs[:1] if epilogue == Epilogue.STORE else outs
    for _ in range(2):
        launch.run(epilogue, segments, outs, store_pre=epilogue != Epilogue.STORE, config=config)
    y = x.double() @ first.double().t() + c.double() @ b.double()
    if epilogue == Epilogue.STORE:
        assert torch.equal(outs[0], y.to(torch.bfloat16))
    else:
        assert torch.equal(outs[1], y.to(torch.bfloat16))
        if dual:
            assert torch.equal(outs[2], (x.double() @ second.double().t()).to(torch.bfloat16))


def test_overlap_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of decode MLPs, each reading what the one before wrote, 200 times: with and without overlap, bit for bit.

    Emulated launches end before the next begins here; tools/emulator/overlap.py lets them overlap.
    """
    (d, f), rank, dtype = sizes((1024, 2816), (264, 328)), 64, torch.bfloat16
    weights = [randn(*s, dtype=dtype, scale=s[1] ** -0.5) for s in ((f, d), (f, d), (d, f))]
    w_down = randn(d, rank, dtype=dtype, scale=d**-0.5)
    values = [randn(rank, n, dtype=dtype, scale=rank**-0.5) for n in (f, f, d)]

    def chain(x: Tensor) -> Tensor:
        for _ in range(2 if EMULATED else 200):
            out = mlp_cuda.forward(
                x, x, None, *weights, None, None, None, w_down, None, values[0], None, values[1], None, values[2],
                "silu", "self_key", 1, 1.0, False,
            )[0]  # fmt: skip
            x = out / out.float().norm(dim=1, keepdim=True).to(dtype) * d**0.5
        return x

    x = randn(4, d, dtype=dtype)
    results = []
    for allowed in ("1", "0"):
        monkeypatch.setenv("NPT_CUDA_OVERLAP", allowed)
        launch.overlap_allowed.cache_clear()
        results.append(chain(x))
    launch.overlap_allowed.cache_clear()
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------- in place
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", sizes((5, 70, 300, 4096), (5, 70, 300)))
def test_backward_in_place_is_the_same(gated: bool, rows: int) -> None:
    d, f = 328, 1000
    dout, weight, gate, up = (randn(*s, dtype=torch.bfloat16) for s in ((rows, d), (d, f), (rows, f), (rows, f)))
    segments = [Segment(MAIN, dout, weight.t())]
    inputs = [gate, up] if gated else [up]
    epilogue = Epilogue.GATE_UP_BWD if gated else Epilogue.ACT_BWD
    outs = [torch.full_like(up, float("nan")) for _ in inputs]
    launch.run(epilogue, segments, outs, inputs=inputs)
    copies = [t.clone() for t in inputs]
    launch.run(epilogue, segments, copies, inputs=copies)
    assert all(torch.equal(a, b) for a, b in zip(copies, outs, strict=True))
