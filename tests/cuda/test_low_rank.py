"""Host side of the low-rank kernels: plans, when they run, every rule against the definition with the launches replaced by theirs
(fake_launch.py), and the launcher's own checks as dry runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from npt_kernels.kernels.cuda import choose as heuristics
from npt_kernels.kernels.cuda import coefficients as coefficients_module
from npt_kernels.kernels.cuda import launch, rules
from npt_kernels.kernels.cuda import support as _cuda
from npt_kernels.kernels.cuda.choose import Epilogue, choose
from npt_kernels.kernels.cuda.coefficients import coefficients, coefficients_plan
from npt_kernels.kernels.cuda.value_grads import pair_bytes, pair_ranges, value_grads
from npt_kernels.rules import RULES, get_rule
from tests.support.fake_launch import LAUNCHES, PLANS, install

BUILT = importlib.util.find_spec("npt_kernels._cuda") is not None
needs_build = pytest.mark.skipif(not BUILT, reason="npt_kernels._cuda is not built (no nvcc)")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 2


def key_for(rule: str, rank: int, width: int) -> Tensor | None:
    kind = RULES[rule].key
    return None if kind == "none" else rand(width) if kind == "vector" else rand(rank, width)


# ------------------------------------------------------------------------------------- plans
def test_coefficients_plan_fills_the_chip() -> None:
    assert coefficients_plan(8192, 64, 128).tile == 64 and coefficients_plan(8192, 65, 128).tile == 128
    assert coefficients_plan(8192, 64, 128).parts == 2  # 64 tiles of 128 tokens on 132 SMs
    assert coefficients_plan(1, 64, 128).parts == 8  # one tile: as many blocks as a portable cluster has
    assert coefficients_plan(2048, 128, 128).parts == 8
    assert coefficients_plan(65536, 64, 128).parts == 1  # enough tiles
    for tokens in (1, 100, 3000, 20000):
        for rank in (8, 64, 72, 1024):
            plan = coefficients_plan(tokens, rank, 64)
            assert plan.parts in (1, 2, 4, 8) and plan.reason


def test_pair_pays_up_to_64() -> None:
    for rank in (8, 16, 32, 64):
        one, two = pair_bytes(8192, 14336, rank, pair_ranges(8192, 14336, rank))
        assert one < two
    for rank in (72, 128, 1024):
        one, two = pair_bytes(8192, 14336, rank, pair_ranges(8192, 14336, rank))
        assert one >= two
    assert pair_ranges(64, 14336, 64) == 1  # one tile of tokens cannot be split
    assert 28 * pair_ranges(8192, 14336, 64) <= 132


def test_decode_splits_narrow_outputs_only() -> None:
    assert choose(Epilogue.STORE, 1, 4096, 14336).split == 2  # 64 tiles on 132 SMs
    assert choose(Epilogue.GATE_UP, 1, 14336, 4096).split == 1  # 224 tiles
    assert choose(Epilogue.STORE, 16, 768, 3072).split == 8
    assert choose(Epilogue.STORE, 16, 768, 256).split == 1  # 4 k-blocks: nothing to share
    assert (
        choose(Epilogue.GATE_UP, 65, 768, 3072).split == 1
    )  # no decode kernel, and only stores have a split one above
    for cols in (8, 768, 4096, 8192):
        for depth in (64, 768, 4096, 28672):
            config = choose(Epilogue.ACT, 8, cols, depth)
            assert config.split == 1 or -(-cols // 64) * config.split <= 132
            assert config.split == 1 or -(-depth // 64) >= config.split * heuristics.MIN_SPLIT_BLOCKS
    assert "split 2" in str(choose(Epilogue.STORE, 1, 4096, 14336))


# ------------------------------------------------------------------------------------- coefficients
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [8, 64, 96, 128])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_kernel_makes_z_p_and_c(rule: str, rank: int, scaled: bool) -> None:
    tokens, d, terms = 5, 48, 2
    a, u, w_down, key = rand(tokens, 24), rand(tokens, d), rand(24, rank), key_for(rule, rank, d)
    key_scale = rand(tokens).abs() if scaled else None
    z, p, c, own = coefficients(u, key, key_scale, rule, terms, 0.7, a=a, w_down=w_down)
    assert LAUNCHES == ["coefficients"] and own
    expected_z = a @ w_down
    torch.testing.assert_close(z, expected_z)
    expected_p = torch.empty(0)
    if key is not None:
        expected_p = u @ (key.t() if key.dim() == 2 else key.unsqueeze(1))
        torch.testing.assert_close(p, expected_p)
    z_in = expected_z if key_scale is None else expected_z * key_scale.unsqueeze(1)
    torch.testing.assert_close(c, get_rule(rule).coefficients(z_in, expected_p, terms, 0.7))
    if PLANS:
        assert PLANS[0]["grid"] == (PLANS[0]["cluster"], 1, 1) and not PLANS[0]["overlap"]
    # A later target: z is given, only its key product is computed.
    again = coefficients(u, key, key_scale, rule, terms, 0.7, z=z)
    assert again.z is z
    torch.testing.assert_close(again.c, c)


def test_a_tied_key_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """diagonal's key is w_downᵀ, a view: no copy of it."""
    a, u, w_down = rand(4, 48), rand(4, 48), rand(48, 16)
    monkeypatch.setattr(coefficients_module, "rows_ok", lambda t: t if t.stride(1) == 1 else pytest.fail("copied"))
    c = coefficients(u, w_down.t(), None, "diagonal", 1, 0.5, a=a, w_down=w_down).c
    torch.testing.assert_close(c, 0.5 * torch.tanh(a @ w_down) * (u @ w_down))


@pytest.mark.parametrize(
    ("rank", "width", "terms", "method"),
    [(12, 48, 1, "fused"), (64, 44, 1, "fused"), (256, 48, 1, "auto"), (320, 48, 2, "fused")],
)
def test_what_the_kernel_cannot_take_is_the_vendors_and_one_rule_kernel(
    rank: int, width: int, terms: int, method: Any
) -> None:
    a, u, w_down, key = rand(3, width), rand(3, width), rand(width, rank), rand(rank, width)
    low = coefficients(u, key, None, "rank1", terms, a=a, w_down=w_down, method=method)
    assert LAUNCHES == ["rule"] and low.own
    torch.testing.assert_close(low.c, get_rule("rank1").coefficients(a @ w_down, u @ key.t(), terms, 1.0))


def test_wide_ranks_run_in_tiles_when_asked() -> None:
    """R = 320 with terms of 64: no term crosses a tile of 128."""
    a, u, w_down, key = rand(130, 48), rand(130, 48), rand(48, 320), rand(320, 48)
    c = coefficients(u, key, None, "rank1", 5, a=a, w_down=w_down, method="fused").c
    assert LAUNCHES == ["coefficients"]
    torch.testing.assert_close(c, get_rule("rank1").coefficients(a @ w_down, u @ key.t(), 5, 1.0))
    if PLANS:
        assert PLANS[0]["grid"] == (2 * PLANS[0]["cluster"], 3, 1)


def test_no_tokens() -> None:
    z, p, c, own = coefficients(rand(0, 16), rand(8, 16), None, "rank1", a=rand(0, 16), w_down=rand(16, 8))
    assert z.shape == p.shape == c.shape == (0, 8) and not own and not LAUNCHES


# ------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["fused", "vendor", "auto"])
@pytest.mark.parametrize("scaled", [False, True])
def test_value_grads(rule: str, method: Any, scaled: bool) -> None:
    tokens, width, rank, terms = 300, 1032, 16, 2
    dy, value, z = rand(tokens, width), rand(rank, width), rand(tokens, rank)
    p = None if RULES[rule].key == "none" else rand(tokens, 1 if RULES[rule].key == "vector" else rank)
    key_scale = rand(tokens).abs() if scaled else None
    z_in = z if key_scale is None else z * key_scale.unsqueeze(1)
    dz, dp, db = value_grads(dy, value, z, p, key_scale, rule, terms, 0.7, True, True, True, method=method)
    want_dz, want_dp = get_rule(rule).backward(dy @ value.t(), z_in, p, terms, 0.7, True, True)
    # Shares are fp32, whatever the tensors are.
    torch.testing.assert_close(dz, want_dz, rtol=1e-5, atol=1e-5)
    if want_dp is None:
        assert dp is None
    else:
        torch.testing.assert_close(dp, want_dp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, get_rule(rule).coefficients(z_in, p, terms, 0.7).t() @ dy, rtol=1e-5, atol=1e-5)
    assert ("value_grads" in LAUNCHES) == (method != "vendor")
    if method != "vendor" and rule != "self_key":
        assert LAUNCHES[-2:] == ["rule", "reduce"], "dc itself is never written"


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
def test_value_grads_makes_only_what_is_asked_for(needs: tuple[bool, bool, bool]) -> None:
    dy, value, z, p = rand(300, 520), rand(16, 520), rand(300, 16), rand(300, 16)
    got = value_grads(dy, None if needs == (False, False, True) else value, z, p, None, "rank1", 1, 1.0, *needs)
    assert [g is not None for g in got] == list(needs)
    assert "value_grads" not in LAUNCHES  # one product reads dy once either way


def test_wide_terms_are_summed_before_the_rule() -> None:
    """Shares of a term wider than the rule kernel holds: dc is added up first."""
    rank = rules.MAX_SHARED_WIDTH + 8
    dy, value, z, p = rand(64, 16), rand(rank, 16), rand(64, rank), rand(64, rank)
    dz, _, _ = value_grads(dy, value, z, p, None, "rank1", 1, 1.0, True, True, True, method="fused")
    assert LAUNCHES == ["rule", "value_grads", "reduce", "rule", "reduce"]
    want = get_rule("rank1").backward(dy @ value.t(), z, p, 1, 1.0, True, False)[0]
    torch.testing.assert_close(dz, want, rtol=1e-4, atol=1e-3)


def test_impossible_pair_says_why() -> None:
    with pytest.raises(ValueError, match=r"dy \[64, 20\] with R = 8"):
        value_grads(
            rand(64, 20), rand(8, 20), rand(64, 8), None, None, "self_key", 1, 1.0, True, False, True, method="fused"
        )


# ------------------------------------------------------------------------------------- the launcher's own checks
COEFFICIENTS: dict[str, Any] = {
    "dtype": 0, "rule": 0, "width": 64, "scale": 1.0, "a": (4096, 128), "u": (8192, 256), "w_down": (16384, 64),
    "key": (32768, 256), "key_kind": 1, "z": (65536, 64), "p": (131072, 64), "c": (262144, 64), "compute_z": True,
    "key_scale": 0, "rows": 300, "d_a": 128, "d_u": 256, "rank": 64, "tile": 64, "parts": 4, "device": -1, "stream": 0,
}  # fmt: skip
VALUE_GRADS: dict[str, Any] = {
    "dtype": 1, "dy": (4096, 1024), "c": (8192, 32), "b": (16384, 1024), "dc": 32768, "db": 65536, "rows": 300, "cols": 1024,
    "rank": 32, "ranges": 2, "device": -1, "stream": 0,
}  # fmt: skip
RULE: dict[str, Any] = {
    "backward": True, "dtype": 0, "rule": 0, "terms": 2, "width": 32, "scale": 1.0, "z": (4096, 64), "p": (8192, 64),
    "c": (0, 0), "dc": (16384, 64), "dz": (32768, 64), "dp": (65536, 64), "shares": 0, "parts": 0, "key_scale": 0, "rows": 300,
    "rank": 64, "vec": 2, "device": -1, "stream": 0,
}  # fmt: skip
REDUCE: dict[str, Any] = {"dtype": 0, "source": 4096, "out": 8192, "size": 2048, "parts": 3, "device": -1, "stream": 0}


@needs_build
@pytest.mark.parametrize(
    ("name", "good", "change", "part"),
    [
        ("coefficients", COEFFICIENTS, {"rank": 60}, "R = 60 must be a multiple of 8"),
        ("coefficients", COEFFICIENTS, {"d_u": 100}, "d_u = 100"),
        ("coefficients", COEFFICIENTS, {"parts": 3}, "parts = 3"),
        ("coefficients", COEFFICIENTS, {"tile": 96}, "no low-rank instance"),
        ("coefficients", COEFFICIENTS, {"rule": 3}, "does not go with key kind"),
        ("coefficients", COEFFICIENTS, {"width": 48}, "width 48 does not divide R = 64"),
        ("coefficients", COEFFICIENTS, {"rank": 192, "width": 96, "w_down": (16384, 192), "z": (65536, 192), "p": (131072, 192),
                            "c": (262144, 192)}, "crosses the tiles of 64"),
        ("coefficients", COEFFICIENTS, {"compute_z": False, "z": (0, 0)}, "neither computed nor given"),
        ("coefficients", COEFFICIENTS, {"c": (262144, 63)}, "row pitch 63"),
        ("coefficients", COEFFICIENTS, {"a": (4098, 128)}, "a starts at 0x1002"),
        ("value_grads", VALUE_GRADS, {"ranges": 6}, r"ranges = 6 is outside \[1, 5\]"),
        ("value_grads", VALUE_GRADS, {"cols": 1020}, "N = 1020"),
        ("value_grads", VALUE_GRADS, {"db": 0}, "dc and db are needed"),
        ("rule", RULE, {"terms": 3}, "3 terms of width 32 are not R = 64"),
        ("rule", RULE, {"rule": 1}, "only rank1 has terms"),
        ("rule", RULE, {"width": 1, "terms": 64}, "even width"),
        ("rule", RULE, {"shares": 4096}, "parts = 0"),
        ("rule", RULE, {"shares": 4096, "parts": 2, "terms": 1, "width": 2048, "rank": 2048, "vec": 1}, "up to 1024 columns"),
        ("reduce", REDUCE, {"size": 2046}, "size = 2046"),
        ("reduce", REDUCE, {"source": 4100}, "multiple of 16 bytes"),
    ],
)  # fmt: skip
def test_launch_checks(name: str, good: dict[str, Any], change: dict[str, Any], part: str) -> None:
    call = getattr(_cuda.extension(), name)
    assert call(**good)["threads"] >= 256
    with pytest.raises(ValueError, match=part):
        call(**(good | change))


@needs_build
def test_every_variant_that_the_host_asks_for_exists() -> None:
    for dtype in (0, 1):
        for tile in (64, 128):
            for kind, rule, pitch in ((0, 3, 0), (1, 0, 256), (2, 1, 64), (3, 2, 256)):
                for compute_z in (True, False):
                    if kind == 0 and not compute_z:
                        continue
                    key = (32768, pitch) if kind else (0, 0)
                    _cuda.extension().coefficients(**(COEFFICIENTS | {
                        "dtype": dtype, "tile": tile, "key_kind": kind, "rule": rule, "key": key, "compute_z": compute_z,
                    }))  # fmt: skip
    assert len(_cuda.extension().low_rank_kernels()) == 52


# ------------------------------------------------------------------------------------- overlap
@needs_build
@pytest.mark.parametrize(("overlap", "dependent"), [(None, -1), ("low", 1), ("all", 0)])
def test_overlap_is_asked_of_decode_kernels_only(monkeypatch: pytest.MonkeyPatch, overlap: Any, dependent: int) -> None:
    launch.overlap_allowed.cache_clear()
    module = _cuda.extension()
    for tokens in (16, 300):
        x, w, c, b, y = (
            torch.zeros(*s, dtype=torch.bfloat16)
            for s in ((tokens, 256), (512, 256), (tokens, 8), (8, 512), (tokens, 512))
        )
        arguments = launch.launch_arguments(
            Epilogue.STORE, [launch.Segment(launch.MAIN, x, w), launch.low_rank(c, b)], [y], overlap=overlap
        )
        assert arguments[-1] == (dependent if tokens == 16 else -1)
        assert module.launch(*arguments, module.DRY_RUN, 0)["overlap"] == (tokens == 16 and overlap is not None)
    alone = launch.launch_arguments(Epilogue.STORE, [launch.Segment(launch.MAIN, x[:16], w)], [y[:16]], overlap="low")
    assert alone[-1] == -1  # nothing depends on the kernel before
    monkeypatch.setenv("NPT_CUDA_OVERLAP", "0")
    launch.overlap_allowed.cache_clear()
    off = launch.launch_arguments(Epilogue.STORE, [launch.Segment(launch.MAIN, x[:16], w)], [y[:16]], overlap="all")
    assert off[-1] == -1
    launch.overlap_allowed.cache_clear()
