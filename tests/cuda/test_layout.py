"""Index arithmetic of the kernels (csrc/common/layout.h), compiled with g++, against the emulated hardware (emulation.py).

The last tests run a whole tile through it: TMA load → wgmma → epilogue → TMA store, in NumPy, with the addresses that the
kernels compute.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.support.cuda_layout import Smem, fragments, swizzle

MAIN, LOW, LOW_SECOND, LOW_FIRST = range(4)


# ------------------------------------------------------------------------------------- single functions
def test_swizzle_and_tiles(lib: ctypes.CDLL) -> None:
    for offset in range(0, 8192, 2):
        assert lib.l_swizzle(offset) == swizzle(offset)
    for row in range(64):
        for group in range(8):
            assert lib.l_tile(row, group) == swizzle(row * 128 + group * 16)


def test_fragment_positions(lib: ctypes.CDLL) -> None:
    d = np.arange(64 * 256, dtype=float).reshape(64, 256)
    for warp in range(4):
        held = fragments(d, warp)
        for lane in range(32):
            for i in range(128):
                assert held[lane, i] == d[lib.l_frow(warp, lane, i), lib.l_fcol(lane, i)]


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8, 12])
def test_ring(lib: ctypes.CDLL, stages: int) -> None:
    stage = phase = 0
    for k in range(5 * stages):
        assert lib.l_ring(k, stages) == stage * 2 + phase
        for by in range(3 * stages + 2):  # what ping-pong skips
            assert lib.l_advance(stage, phase, by, stages) == lib.l_ring(k + by, stages)
        stage += 1
        if stage == stages:
            stage, phase = 0, 1 - phase


@pytest.mark.parametrize(("m", "n", "group"), [(1, 1, 8), (64, 56, 8), (5, 7, 2), (9, 3, 16), (17, 2, 4)])
def test_every_tile_once(lib: ctypes.CDLL, m: int, n: int, group: int) -> None:
    seen = {(lib.l_coord(t, m, n, group, 0), lib.l_coord(t, m, n, group, 1)) for t in range(m * n)}
    assert seen == {(i, j) for i in range(m) for j in range(n)}


# ------------------------------------------------------------------------------------- whole tiles
def load_stage(smem: Smem, kind: int, mn: bool, dual: bool, cluster: int, bn: int, a: np.ndarray, b: list[np.ndarray],
               k: int, m: int, n: int, bm: int, outside: int) -> int:  # fmt: skip
    """``load_block`` of mainloop.cuh by all ranks of a cluster into one block: bytes that its barrier counts."""
    a_dst, b_dst, total = 0, bm * 128, 0
    total += smem.tma_load(a_dst, a, k, m, 64, bm)
    for rank in range(cluster):
        if not mn and kind == MAIN:
            half = bn // 2
            for h in range(2):
                if cluster == 1 or h == rank:
                    total += smem.tma_load(b_dst + h * half * 128, b[h], k, n if dual else n + h * half, 64, half)
        else:
            rows = 64 // cluster
            for c in range((bn // 2 if dual and kind == LOW_FIRST else bn) // 64):
                x = n + (c % 2 if dual else c) * 64
                if dual and c < 2 and kind == LOW_SECOND:
                    x = outside
                source = b[c // 2 if dual else 0]
                total += smem.tma_load(b_dst + c * 8192 + rank * rows * 128, source, x, k + rank * rows, 64, rows)
    return total


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("kind", "mn", "dual", "bn"),
    [
        (MAIN, False, False, 256), (MAIN, True, False, 256), (MAIN, False, True, 256), (MAIN, True, True, 256),
        (LOW, False, False, 256), (LOW, False, True, 256), (LOW_FIRST, False, True, 256), (LOW_SECOND, True, True, 256),
        (MAIN, False, False, 192), (MAIN, True, False, 192), (LOW, False, False, 128), (MAIN, False, False, 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bm", [128, 64])
def test_stage_to_accumulators(
    lib: ctypes.CDLL, kind: int, mn: bool, dual: bool, bn: int, cluster: int, bm: int
) -> None:
    rng = np.random.default_rng(0)
    depth, rows, width = 56, 200, 304  # all ragged: the last k16 step is half zeros, the tile hangs over the edge
    k, m, n = 0, 128, 256 if not dual else 192
    mn = mn or kind != MAIN
    a = rng.integers(-3, 4, (rows, depth)).astype(float)
    weights = [rng.integers(-3, 4, (width, depth)).astype(float) for _ in range(2)]
    stored = [w.T if mn else w for w in weights]
    smem = Smem()
    pair = stored if dual else [stored[0]] * 2
    counted = load_stage(smem, kind, mn, dual, cluster, bn, a, pair, k, m, n, bm, lib.l_outside())
    assert counted == lib.l_stage(bm, bn, kind)

    columns = bn // 2 if kind == LOW_FIRST else bn
    for slab in range(bm // 64):  # cooperative warpgroup or ping-pong slab
        d = np.zeros((64, columns))
        for step in range(4):
            a_desc = lib.l_desc_k(slab * 64 * 128) + step * lib.l_step(0)
            b_start = lib.l_desc_mn(bm * 128) if mn else lib.l_desc_k(bm * 128)
            b_desc = b_start + step * lib.l_step(int(mn))
            d += smem.operand(a_desc, 64, False) @ smem.operand(b_desc, columns, mn).T
        # In units of descriptors, slab 1 is 512 further (multiply()).
        assert lib.l_desc_k(64 * 128) - lib.l_desc_k(0) == 512
        padded = np.zeros((512, 64))
        padded[:rows, :depth] = a
        wide = []
        for w in weights:
            full = np.zeros((1024, 64))
            full[:width, :depth] = w
            wide.append(full)
        x = padded[m + slab * 64 : m + slab * 64 + 64]
        if not dual:
            expected = x @ wide[0][n : n + bn].T
        else:
            gate, up = (x @ w[n : n + 128].T for w in wide)
            expected = gate if kind == LOW_FIRST else np.hstack([gate * (kind != LOW_SECOND), up])
        np.testing.assert_array_equal(d, expected)


def test_coordinates_stay_within_31_bits_of_bytes(lib: ctypes.CDLL) -> None:
    """The column outside every tensor was once INT32_MAX / 2: an illegal instruction on the first GPU that saw it."""
    outside, widest = lib.l_outside(), lib.l_columns()
    assert outside + 64 <= 0, "the whole box lies left of the tensor"
    assert 2 * (widest + 512 + 64) <= 1 << 31, "the last column block of the widest kernel hangs over by less than 512"
    smem, tensor = Smem(), np.ones((64, 8))
    assert smem.tma_load(0, tensor, outside, 0, 64, 64) == 8192
    assert not smem.data[:4096].any(), "zeros, not what was there"
    with pytest.raises(AssertionError, match="31 bits"):
        smem.tma_load(0, tensor, (1 << 30) - 1, 0, 64, 64)


def addresses(lib: ctypes.CDLL, tile: int, warp: int, pair: int) -> list[int]:
    return [tile + lib.l_matrix(warp, lane, pair) for lane in range(32)]


def test_epilogue_tile_and_back(lib: ctypes.CDLL) -> None:
    """put_tile: accumulators → stmatrix → TMA store clipped at the edge; backward(): TMA load → ldmatrix → same positions."""
    d = np.arange(64 * 64, dtype=float).reshape(64, 64) + 1
    smem = Smem()
    for warp in range(4):
        held = fragments(d, warp)
        for pair in range(4):
            smem.stmatrix(addresses(lib, 8192, warp, pair), held[:, 8 * pair : 8 * pair + 8].reshape(32, 4, 2))
    out = np.zeros((50, 40))
    smem.tma_store(8192, out, 0, 0)
    np.testing.assert_array_equal(out, d[:50, :40])

    other = Smem()
    other.tma_load(16384, d, 0, 0, 64, 64)
    for warp in range(4):
        held = fragments(d, warp)
        for pair in range(4):
            got = other.ldmatrix(addresses(lib, 16384, warp, pair)).reshape(32, 8)
            np.testing.assert_array_equal(got, held[:, 8 * pair : 8 * pair + 8])


def test_epilogue_is_free_of_bank_conflicts(lib: ctypes.CDLL) -> None:
    """Each 8-lane phase of stmatrix / ldmatrix touches eight different 16-byte columns of the 128-byte bank row."""
    for warp in range(4):
        for pair in range(4):
            for m in range(4):
                banks = {(lib.l_matrix(warp, 8 * m + r, pair) // 16) % 8 for r in range(8)}
                assert len(banks) == 8


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("mn", [False, True])
def test_decode_stage(lib: ctypes.CDLL, tokens: int, mn: bool) -> None:
    """Operands swapped: weights [64 rows] are A (either layout), tokens are B; transposed accumulators are y."""
    rng = np.random.default_rng(1)
    weight = rng.integers(-3, 4, (64, 64)).astype(float)
    x = rng.integers(-3, 4, (tokens - 3, 64)).astype(float)
    smem = Smem()
    smem.tma_load(0, weight.T.copy() if mn else weight, 0, 0, 64, 64)
    smem.tma_load(8192, x, 0, 0, 64, tokens)
    d = np.zeros((64, tokens))
    for step in range(4):
        w_desc = (lib.l_desc_mn(0) if mn else lib.l_desc_k(0)) + step * lib.l_step(int(mn))
        x_desc = lib.l_desc_k(8192) + step * lib.l_step(0)
        d += smem.operand(w_desc, 64, mn) @ smem.operand(x_desc, tokens, False).T
    y = np.zeros((tokens - 3, 64))
    for warp in range(4):
        held = fragments(d, warp)
        for lane in range(32):
            for i in range(tokens // 2):
                token, column = lib.l_fcol(lane, i), lib.l_frow(warp, lane, i)
                if token < tokens - 3:
                    y[token, column] = held[lane, i]
    np.testing.assert_array_equal(y, x @ weight.T)
