"""Host side of the backend ``cuda`` without a GPU: reasons, heuristics, argument checks, and the ops' bookkeeping against
``eager`` with the launch replaced by its definition (fake_launch.py)."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npt_kernels
from npt_kernels.kernels.cuda import choose as heuristics
from npt_kernels.kernels.cuda import launch, steps
from npt_kernels.kernels.cuda import support as _cuda
from npt_kernels.kernels.cuda.choose import Epilogue, Family, choose
from npt_kernels.ops.registry import BACKENDS, BackendUnavailableError, Call, resolve_backend
from npt_kernels.rules import RULES
from tests.support.cuda_instances import instances
from tests.support.fake_launch import CALLS, LAUNCHES, LOW, LOW_FIRST, LOW_SECOND, MAIN, OVERLAPS, install
from tests.support.mlp_calls import FactoredCalls, MlpCalls

mlp_cuda, mlp_eager = MlpCalls("cuda"), MlpCalls("eager")
factored_cuda, factored_eager = FactoredCalls("cuda"), FactoredCalls("eager")

ROOT = Path(__file__).resolve().parents[2]
BUILT = importlib.util.find_spec("npt_kernels._cuda") is not None
needs_build = pytest.mark.skipif(not BUILT, reason="npt_kernels._cuda is not built (no nvcc)")


# ------------------------------------------------------------------------------------- registry and reasons
def test_chosen_unasked_only_where_it_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sm_90a" in BACKENDS["cuda"].summary
    large = Call("mlp", torch.device("cuda", 0), torch.bfloat16, "silu", "self_key", 1024, (4096, 14336, 64), False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    unasked = BACKENDS["cuda"].chosen_unasked
    assert unasked(large) and unasked(large._replace(tokens=8192, trains=True))
    for other in (
        {"op": "matched_norm"}, {"device": torch.device("cpu")}, {"dtype": torch.float16}, {"sizes": ()},
        {"trains": True, "tokens": 8191}, {"tokens": 1023}, {"tokens": 0}, {"tokens": 1},
        {"sizes": (4096, 14336, 60)}, {"sizes": (2048, 8192, 64)},
    ):  # fmt: skip
        assert not unasked(large._replace(**other)), other
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert unasked(large._replace(tokens=1)) and unasked(large._replace(tokens=16)) and unasked(large)
    assert not unasked(large._replace(tokens=17)) and not unasked(large._replace(tokens=1, trains=True))


@pytest.mark.parametrize(
    ("op", "device", "dtype", "part"),
    [
        ("linear", "cuda", torch.bfloat16, "explicit form"),
        ("mlp", "cpu", torch.bfloat16, "on cpu"),
        ("mlp", "cuda", torch.float32, "torch.float32"),
        ("factored_linear", "cuda", torch.float64, "torch.float64"),
        ("matched_norm", "cuda", torch.float32, "torch.float32"),
    ],
)
def test_reasons(op: str, device: str, dtype: torch.dtype, part: str) -> None:
    reason = BACKENDS["cuda"].reason(Call(op, torch.device(device), dtype))
    assert reason is not None and part in reason


def test_wrong_gpu_and_missing_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_import", lambda: _cuda)
    monkeypatch.setattr(_cuda, "_capability", lambda index: (8, 0))
    assert "sm_80" in str(_cuda.unavailable(torch.device("cuda", 0), torch.bfloat16))
    monkeypatch.setattr(_cuda, "_capability", lambda index: (9, 0))
    assert _cuda.unavailable(torch.device("cuda", 0), torch.float16) is None
    monkeypatch.setattr(_cuda, "_import", lambda: "its kernels are not built")
    assert "not built" in str(_cuda.unavailable(torch.device("cuda", 0), torch.bfloat16))


def test_asked_for_by_name_raises_with_the_reason() -> None:
    with pytest.raises(BackendUnavailableError, match=r"on cpu"):
        resolve_backend("mlp", "cuda", torch.device("cpu"), torch.bfloat16)
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    with pytest.raises(BackendUnavailableError, match="cuda"):
        npt_kernels.npt_factored_linear(x, torch.randn(2, 8), w, None, w, rule="self_key", backend="cuda")


@needs_build
def test_imports_without_a_driver() -> None:
    code = "import npt_kernels._cuda as c; print(len(c.kernels()), c.tensor_map_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    count, maps = map(int, done.stdout.split())
    assert count >= 100 and maps == 0


def test_wgmma_wrappers_are_up_to_date() -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "gen_wgmma.py"), "--check"], check=True)


# ------------------------------------------------------------------------------------- heuristics
def test_choices() -> None:
    assert choose(Epilogue.STORE, 1, 4096, 4096).block_m == 8
    assert choose(Epilogue.GATE_UP, 64, 14336, 4160).family == Family.DECODE
    assert choose(Epilogue.GATE_UP, 65, 14336, 4160).family == Family.COOP
    assert choose(Epilogue.GATE_UP_BWD, 1, 14336, 4096).family == Family.PINGPONG  # no decode form of the backward
    big = choose(Epilogue.STORE, 8192, 4096, 14336)
    assert (big.family, big.cluster, big.block_n) == (Family.COOP, 2, 256)
    assert choose(Epilogue.ACT, 8192, 3072, 768).family == Family.PINGPONG
    short = choose(Epilogue.STORE, 8192, 3072, 768)
    assert (short.family, short.cluster, short.block_n) == (Family.PINGPONG, 1, 128)
    assert choose(Epilogue.GATE_UP, 128, 14336, 4096).cluster == 1  # one row tile: half of the pair would be empty
    assert choose(Epilogue.GATE_UP, 300, 14336, 4096).cluster == 1  # three
    assert choose(Epilogue.GATE_UP, 8000, 14336, 4096).cluster == 2
    short = choose(Epilogue.GATE_UP, 8000, 1536, 576)  # SmolLM2
    assert (short.family, short.block_m, short.block_n, short.cluster) == (Family.PINGPONG, 64, 256, 2)
    assert choose(Epilogue.GATE_UP, 8000, 1536, 576, mn_major=True).family == Family.COOP  # no such instance


def test_split_tiles_where_their_number_leaves_most_sms_idle() -> None:
    d, f = 4096, 14336 + 64
    ways = {t: choose(Epilogue.STORE, t, d, f) for t in (65, 128, 192, 256, 384, 512)}
    assert {t: (c.family, c.cluster, c.split) for t, c in ways.items()} == {
        65: (Family.SPLIT, 1, 4), 128: (Family.SPLIT, 1, 4), 192: (Family.PINGPONG, 2, 1), 256: (Family.PINGPONG, 2, 1),
        384: (Family.PINGPONG, 1, 1), 512: (Family.PINGPONG, 2, 1),
    }  # fmt: skip
    assert choose(Epilogue.STORE, 2048, d, f).family == Family.COOP  # 256 tiles
    assert choose(Epilogue.STORE, 256, d, 1024).family == Family.PINGPONG  # two k-blocks a part: the meeting costs more
    assert choose(Epilogue.ACT, 256, d, f).family != Family.SPLIT and choose(Epilogue.ACT_BWD, 256, d, f).split == 1
    for rows, cols, depth in itertools.product((65, 200, 700, 3000), (8, 768, 4096, 8192), (64, 4096, 28672)):
        c = choose(Epilogue.STORE, rows, cols, depth)
        if c.family == Family.SPLIT:
            tiles = -(-rows // (128 * c.cluster)) * -(-cols // 256)
            assert c.cluster * c.split <= 8 and tiles * c.cluster * c.split <= 132 and c.split > 1
            assert -(-depth // 64) >= c.split * heuristics.MIN_SPLIT_TILE_BLOCKS


@needs_build
def test_grid_of_a_split_product() -> None:
    """One cluster for each pair of row tiles and each 256 columns, of a multicast group for each part."""
    wide = {"rows": 300, "cols": 520, "outputs": [(1 << 20, 520)]}
    plan = _cuda.extension().launch(**(GOOD | {"family": 3, "split": 4, **wide}))
    assert (plan["grid"], plan["cluster"]) == ((2 * 3 * 8, 1, 1), 8)
    alone = _cuda.extension().launch(**(GOOD | {"family": 3, "cluster": 1, **wide}))
    assert (alone["grid"], alone["cluster"]) == ((3 * 3, 1, 1), 1)


@needs_build
def test_every_choice_is_an_instance() -> None:
    fields = ("family", "epilogue", "dtype", "mn_major", "cluster", "block_m")
    existing = {tuple(int(k[f]) for f in fields) for k in _cuda.extension().kernels()}
    sizes = {tuple(int(k[f]) for f in fields): k["block_n"] for k in _cuda.extension().kernels()}
    shapes = itertools.product((1, 9, 33, 64, 65, 200, 4096), (8, 768, 14336), (64, 2048, 4096, 16384))
    for (rows, cols, depth), epilogue, dtype, mn in itertools.product(shapes, Epilogue, (0, 1), (0, 1)):
        c = choose(epilogue, rows, cols, depth, mn_major=bool(mn))
        key = (int(c.family), int(epilogue), dtype, mn, c.cluster, c.block_m)
        assert key in existing, c
        assert sizes[key] == c.block_n


@needs_build
def test_every_instance_is_in_the_list_that_the_gpu_tests_run() -> None:
    listed = {
        (
            int(i.config.family),
            int(i.config.epilogue),
            dtype,
            i.mn_major,
            i.config.cluster,
            i.config.block_m,
            i.config.block_n,
        )
        for i in instances(*Epilogue)
        for dtype in (0, 1)
    }
    fields = ("family", "epilogue", "dtype", "mn_major", "cluster", "block_m", "block_n")
    built = [tuple(k[f] for f in fields) for k in _cuda.extension().kernels()]
    assert set(built) == listed and len(built) == len(listed)


def test_print_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NPT_PRINT_CONFIG", "1")
    heuristics._print_once.cache_clear()
    for _ in range(2):
        choose(Epilogue.GATE_UP, 8192, 14336, 4160)
    printed = capsys.readouterr().err
    assert printed.count("coop gate_up 128x256 cluster 2") == 1 and "K 4160" in printed


# ------------------------------------------------------------------------------------- argument checks
GOOD: dict[str, Any] = {
    "family": 0, "epilogue": 0, "dtype": 0, "mn_major": False, "cluster": 2, "block_m": 128, "rows": 512, "cols": 256,
    "segments": [(0, 4096, 512, 512, 8192, 512, 0, 0)], "inputs": [], "outputs": [(1 << 20, 256)], "bias": 0,
    "act_a": 1.0, "act_b": 0.0, "store_pre": False, "group_m": 8, "split": 1,
    "dependent_from": -1, "device": -1, "stream": 0,
}  # fmt: skip


@needs_build
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, None),
        ({"cols": 250}, "cols = 250"),
        ({"rows": 0}, "rows = 0"),
        ({"cluster": 4}, "cluster 4"),
        ({"segments": []}, "0 segments"),
        ({"segments": [(1, 4096, 512, 512, 8192, 512, 0, 0)]}, "first segment"),
        ({"segments": GOOD["segments"] + [(2, 1, 8, 8, 1, 8, 0, 0)]}, "half segments"),
        ({"segments": [(0, 4096, 512, 0, 8192, 512, 0, 0)]}, "K = 0"),
        ({"segments": [(0, 4096, 512, 512, 8192, 512, 64, 512)]}, "got two"),
        ({"outputs": []}, "0 outputs"),
        ({"outputs": [(1 << 20, 128)]}, "row pitch 128"),
        ({"bias": 2}, "multiple of 4 bytes"),
        ({"epilogue": 2}, "second operand"),
        ({"family": 2, "cluster": 1, "block_m": 64, "rows": 65}, "rows = 65"),
        ({"family": 2, "cluster": 1, "block_m": 64, "rows": 64, "split": 3}, "split = 3"),
        ({"split": 2}, "only the decode and split kernels"),
        ({"family": 3, "split": 4}, None),
        ({"family": 3, "split": 8}, "split = 8 times multicast groups of 2"),
        (
            {"family": 3, "cluster": 1, "split": 8, "segments": [(0, 4096, 512, 448, 8192, 512, 0, 0)]},
            "more than the 7 k-blocks",
        ),
        ({"family": 3, "epilogue": 1}, "no instance for family 3"),
        ({"family": 3, "dependent_from": 0}, "only the decode kernels"),
        ({"dependent_from": 0}, "only the decode kernels"),
        ({"family": 2, "cluster": 1, "block_m": 64, "rows": 64, "dependent_from": 1}, "dependent_from = 1"),
    ],
)
def test_launch_checks(change: dict[str, Any], part: str | None) -> None:
    arguments = GOOD | change
    if part is None:
        _cuda.extension().launch(**arguments)
    else:
        with pytest.raises(ValueError, match=part):
            _cuda.extension().launch(**arguments)


def test_refusals_name_the_value() -> None:
    weight = torch.zeros(64, 64)
    assert launch.refusal([("R", 16)], [("w", weight)]) is None
    assert "R = 12" in str(launch.refusal([("R", 12)], []))
    assert "strides (128, 2)" in str(launch.refusal([], [("w", torch.zeros(64, 128)[:, ::2])]))
    assert "address" in str(launch.refusal([], [("w", torch.zeros(64 * 64 + 1)[1:].view(64, 64))]))
    assert "different orders" in str(launch.refusal([], [("w", weight), ("v", weight.t())]))
    assert (launch.weights_layout(weight), launch.weights_layout(weight.t())) == ("k", "mn")


def test_rows_ok_copies_only_when_it_must() -> None:
    x = torch.randn(4, 64)
    assert launch.rows_ok(x) is x
    assert launch.rows_ok(x[:, :32]).data_ptr() == x.data_ptr()  # a slice of a wider buffer is read in place
    one = x[:1].as_strided((1, 64), (0, 1))  # a size-1 side with pitch 0: .contiguous() would keep it
    assert launch.rows_ok(one).stride() == (64, 1)
    torch.testing.assert_close(launch.rows_ok(x[:, 1:]), x[:, 1:])


# ------------------------------------------------------------------------------------- the ops against eager
@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(monkeypatch)
    launch.say_fallback.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 2


def key_for(rule: str, total: int, width: int) -> Tensor | None:
    kind = RULES[rule].key
    return None if kind == "none" else rand(width) if kind == "vector" else rand(total, width)


def compare(got: Any, want: Any) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("error")
def test_factored_linear(on_cpu: None, rule: str, bias: bool) -> None:
    t, d, f, total, k = 5, 32, 48, 16, 2
    x, z, w, key, value, b = rand(t, d), rand(t, total), rand(f, d), key_for(rule, total, d), rand(total, f), rand(f)
    args = (x, z, w, key, value, b if bias else None, rule, k, 0.7)
    got, want = factored_cuda.forward(*args), factored_eager.forward(*args)
    compare(got, want)
    assert CALLS == [(Epilogue.STORE, (MAIN, LOW))]
    dy = rand(t, f)
    for needs in itertools.product((False, True), repeat=6):
        needs = [*needs[:3], needs[3] and key is not None, *needs[4:]]
        given = (dy, x, z, w, key, value, want[1], rule, k, 0.7, needs)
        compare(factored_cuda.backward(*given), factored_eager.backward(*given))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("targets", ["gate", "up", "down", "gate up", "gate up down", ""])
@pytest.mark.parametrize("act", ["silu", "gelu_new"])
@pytest.mark.filterwarnings("error")
def test_gated_mlp(on_cpu: None, rule: str, targets: str, act: str) -> None:
    _check_mlp(rule, targets, act, gated=True, bias=len(targets) % 2 == 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("targets", ["up", "down", "up down"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.filterwarnings("error")
def test_plain_mlp(on_cpu: None, rule: str, targets: str, conv1d: bool) -> None:
    _check_mlp(rule, targets, "gelu_new", gated=False, bias=True, conv1d=conv1d)


def _check_mlp(rule: str, targets: str, act: str, gated: bool, bias: bool, conv1d: bool = False) -> None:
    t, d, f, total, k = 6, 32, 48, 16, 2

    def weight(out: int, width: int) -> Tensor:
        return rand(width, out).t() if conv1d else rand(out, width)

    x, a, scale = rand(t, d), rand(t, 24), rand(t).abs()
    pairs = []
    for name, width, out in (("gate", d, f), ("up", d, f), ("down", f, d)):
        present = name in targets.split()
        pairs += [key_for(rule, total, width) if present else None, rand(total, out) if present else None]
    weights = (weight(f, d) if gated else None, weight(f, d), weight(d, f))
    biases = (rand(f) if gated and bias else None, rand(f) if bias else None, rand(d) if bias else None)
    common = (x, a, scale, *weights, *biases, rand(24, total), *pairs)
    got = mlp_cuda.forward(*common, act, rule, k, 0.7, True)
    want = mlp_eager.forward(*common, act, rule, k, 0.7, True)
    compare(got, want)
    kinds = CALLS[0][1]
    assert CALLS[0][0] == (Epilogue.GATE_UP if gated else Epilogue.ACT)
    if gated and targets == "gate up down":
        assert kinds == ((MAIN, LOW, LOW) if rule == "self_key" and bias else
                         (MAIN, LOW) if rule == "self_key" else
                         (MAIN, LOW, LOW_SECOND, LOW_FIRST) if bias else (MAIN, LOW_SECOND, LOW_FIRST))  # fmt: skip
    compare(mlp_cuda.forward(*common, act, rule, k, 0.7, False)[:1], want[:1])

    dout = rand(t, d)
    out, z, *saved = want
    every = [True] * 16
    cases = [every, [False] * 9 + [True] * 7, [True] + [False] * 15, [False] * 10 + [True] * 2 + [False] * 4,
             [False] * 12 + [True] * 2 + [False] * 2, [False] * 2 + [True] + [False] * 13]  # fmt: skip
    present = [t is not None for t in common]
    for needs in cases:
        needs = [n and p for n, p in zip(needs, present, strict=True)]
        given = (dout, x, a, scale, *weights, common[9], *pairs, z, *saved, gated, act, rule, k, 0.7, needs)
        want_grads = mlp_eager.backward(*given)
        compare(mlp_cuda.backward(*given), want_grads)
        if not any(needs[3:6]):  # what local and end-to-end training ask for; gate and up are given up
            wide = [t.clone() for t in saved[3:5]]
            again = (*given[:18], *wide, *given[20:], True)
            calls = len(CALLS)
            compare(mlp_cuda.backward(*again), want_grads)
            touched = [not torch.equal(t, before) for t, before in zip(wide, saved[3:5], strict=True) if t.numel()]
            assert any(touched) == any(c[0] in (Epilogue.ACT_BWD, Epilogue.GATE_UP_BWD) for c in CALLS[calls:])


def test_unfused_activation_and_rank_fall_back_and_say_so(on_cpu: None) -> None:
    t, d, f, total = 4, 16, 24, 8
    pairs = [None, rand(total, f), None, rand(total, f), None, None]
    common = (
        rand(t, d),
        rand(t, d),
        None,
        rand(f, d),
        rand(f, d),
        rand(d, f),
        None,
        None,
        None,
        rand(d, total),
        *pairs,
    )
    with pytest.warns(UserWarning, match="relu"):
        got = mlp_cuda.forward(*common, "relu", "self_key", 1, 1.0, False)
    compare(got[:1], mlp_eager.forward(*common, "relu", "self_key", 1, 1.0, False)[:1])
    x, z, w, value = rand(t, d), rand(t, 12), rand(f, d), rand(12, f)
    with pytest.warns(UserWarning, match="R = 12"):
        got = factored_cuda.forward(x, z, w, None, value, None, "self_key", 1, 1.0)
    compare(got, factored_eager.forward(x, z, w, None, value, None, "self_key", 1, 1.0))


def test_no_tokens(on_cpu: None) -> None:
    x, z, w, value = rand(0, 16), rand(0, 8), rand(24, 16), rand(8, 24)
    assert factored_cuda.forward(x, z, w, None, value, None, "self_key", 1, 1.0)[0].shape == (0, 24)
    assert not CALLS


@pytest.mark.parametrize(
    ("rule", "total", "scaled", "overlaps", "launches"),
    [
        # c from our kernel, plainly launched, then gate and up; the down projection reads what those write.
        ("self_key", 16, True, ["low", "all"], ["coefficients", "launch", "launch"]),
        ("rank1", 16, True, ["low", "low"], ["coefficients", "coefficients", "launch", "coefficients", "launch"]),
        # c is z, made by the vendor's GEMM: nothing is known about how that was launched, so no overlap with it.
        ("self_key", 136, False, [None, "all"], ["launch", "launch"]),
        ("self_key", 136, True, ["low", "all"], ["rule", "launch", "launch"]),
    ],
)
def test_overlap_only_with_kernels_of_our_own(
    on_cpu: None, rule: str, total: int, scaled: bool, overlaps: list[str | None], launches: list[str]
) -> None:
    t, d, f = 4, 32, 48
    pairs = [m for width, out in ((d, f), (d, f), (f, d)) for m in (key_for(rule, total, width), rand(total, out))]
    scale = rand(t).abs() if scaled else None
    weights = (rand(f, d), rand(f, d), rand(d, f))
    mlp_cuda.forward(
        rand(t, d), rand(t, d), scale, *weights, None, None, None, rand(d, total), *pairs, "silu", rule, 1, 1.0, False
    )
    assert (overlaps, launches) == (OVERLAPS, LAUNCHES)


@pytest.mark.parametrize(("rule", "overlap"), [("self_key", None), ("rank1", "low"), ("anchored", "low")])
def test_overlap_of_a_single_linear(on_cpu: None, rule: str, overlap: str | None) -> None:
    """self_key: z is the caller's, so the kernel before is not known."""
    t, d, f, total = 4, 32, 48, 16
    key = key_for(rule, total, d)
    factored_cuda.forward(rand(t, d), rand(t, total), rand(f, d), key, rand(total, f), None, rule, 1, 1.0)
    assert [overlap] == OVERLAPS


def test_x_is_copied_before_the_coefficients_not_after(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode kernel that overlaps reads x early: a copy of x may not be the kernel right before it."""
    order: list[str] = []
    real = launch.rows_ok

    def spy(tensor: Tensor) -> Tensor:
        made = real(tensor)
        if made is not tensor:
            order.append("copy")
        return made

    t, d, f, total = 4, 32, 48, 16
    x = rand(t, d + 1)[:, 1:]  # rows that TMA cannot read
    inner = steps.coefficients

    def spied(*args: Any, **options: Any) -> Any:
        order.append("coefficients")
        return inner(*args, **options)

    monkeypatch.setattr(steps, "rows_ok", spy)
    monkeypatch.setattr(steps, "coefficients", spied)
    factored_cuda.forward(x, rand(t, total), rand(f, d), rand(total, d), rand(total, f), None, "rank1", 1, 1.0)
    assert order == ["copy", "coefficients"]
    order.clear()
    pairs = [rand(total, d), rand(total, f), None, None, None, None]
    mlp_cuda.forward(
        x, rand(t, d), None, rand(f, d), rand(f, d), rand(d, f), None, None, None, rand(d, total), *pairs,
        "silu", "rank1", 1, 1.0, False,
    )  # fmt: skip
    assert order == ["copy", "coefficients"]


def test_rows_of_an_expanded_tensor_are_laid_apart():
    from npt_kernels.kernels.cuda.rules import unit_rows

    row = torch.randn(1, 6)
    for overlapping in (row.expand(5, 6), row.expand(5, 6)[:1], torch.randn(6, 5).t(), torch.randn(20).unfold(0, 6, 2)):
        rows = unit_rows(overlapping)
        assert rows.stride(-1) == 1 and rows.stride(0) >= 6 and torch.equal(rows, overlapping)
    apart = torch.randn(5, 9)[:, :6]
    assert unit_rows(apart) is apart
