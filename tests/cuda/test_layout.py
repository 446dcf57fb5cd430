"""Index arithmetic of the kernels (csrc/common/layout.h), compiled with g++ and held against an emulation written from the
PTX manual and CUTLASS's description of the canonical layouts: TMA's swizzle, wgmma's operand reads and fragments, stmatrix.

The last tests run a whole tile through it: TMA load → wgmma → epilogue → TMA store, in NumPy, with the addresses that the
kernels compute.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = """
#include "common/layout.h"
extern "C" {
unsigned l_swizzle(unsigned o) { return npt::swizzle128(o); }
unsigned l_tile(int r, int g) { return npt::tile_offset(r, g); }
int l_frow(int w, int l, int i) { return npt::fragment_row(w, l, i); }
int l_fcol(int l, int i) { return npt::fragment_col(l, i); }
unsigned l_matrix(int w, int l, int p) { return npt::matrix_offset(w, l, p); }
unsigned long long l_desc_k(unsigned a) { return npt::descriptor_k_major(a); }
unsigned long long l_desc_mn(unsigned a) { return npt::descriptor_mn_major(a, npt::kMnChunkBytes); }
unsigned long long l_step(int mn) { return npt::descriptor_step(mn != 0); }
unsigned l_stage(int m, int n, int k) { return npt::stage_bytes(m, n, k); }
int l_ring(unsigned k, int s) { auto p = npt::ring_position(k, s); return p.stage * 2 + int(p.phase); }
int l_advance(int stage, int phase, int by, int s) {
  auto p = npt::ring_advance({stage, unsigned(phase)}, by, s); return p.stage * 2 + int(p.phase); }
int l_coord(int t, int m, int n, int g, int which) {
  auto c = npt::tile_coord(t, m, n, g); return which ? c.n : c.m; }
}
"""
MAIN, LOW, LOW_SECOND, LOW_FIRST = range(4)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("layout")
    (folder / "shim.cpp").write_text(SHIM)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")], check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    for name in ("l_swizzle", "l_tile", "l_matrix", "l_stage"):
        getattr(library, name).restype = ctypes.c_uint
    for name in ("l_desc_k", "l_desc_mn", "l_step"):
        getattr(library, name).restype = ctypes.c_ulonglong
    return library


# ------------------------------------------------------------------------------------- the hardware, emulated
def swizzle(address: int) -> int:
    """128-byte swizzle on a shared-memory address: 16-byte unit 0..7 of a 128-byte row is XORed with the row modulo 8."""
    unit, row = (address // 16) % 8, (address // 128) % 8
    return address - unit * 16 + (unit ^ row) * 16


class Smem:
    """Shared memory of 16-bit elements, NaN where nothing was written."""

    def __init__(self, size: int = 1 << 17) -> None:
        self.data = np.full(size // 2, np.nan)

    def tma_load(self, dst: int, tensor: np.ndarray, x: int, y: int, box_x: int, box_y: int) -> int:
        """Box at (x, y) of a row-major tensor, zeros outside; returns the bytes counted."""
        assert dst % 1024 == 0 and box_x == 64
        for r in range(box_y):
            for c in range(box_x):
                inside = 0 <= y + r < tensor.shape[0] and 0 <= x + c < tensor.shape[1]
                self.data[swizzle(dst + r * 128 + c * 2) // 2] = tensor[y + r, x + c] if inside else 0.0
        return box_x * box_y * 2

    def tma_store(self, src: int, tensor: np.ndarray, x: int, y: int) -> None:
        for r in range(64):
            for c in range(64):
                if y + r < tensor.shape[0] and x + c < tensor.shape[1]:
                    tensor[y + r, x + c] = self.data[swizzle(src + r * 128 + c * 2) // 2]

    def operand(self, descriptor: int, size: int, mn_major: bool) -> np.ndarray:
        """``[size, 16]`` as wgmma reads it: the canonical 128-byte-swizzle layouts, strides from the descriptor."""
        start = (descriptor & 0x3FFF) << 4
        leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0
        out = np.empty((size, 16))
        for i in range(size):
            for k in range(16):
                if mn_major:  # ((8, 8, m), (8, k)) : ((1, 8, leading), (64, stride))
                    offset = (i % 64) * 2 + (i // 64) * leading + (k % 8) * 128 + (k // 8) * stride
                else:  # ((8, m), (8, 2)) : ((64, stride), (1, 8))
                    offset = (i % 8) * 128 + (i // 8) * stride + k * 2
                out[i, k] = self.data[swizzle(start + offset) // 2]
        return out

    def stmatrix(self, addresses: list[int], registers: np.ndarray) -> None:
        """``registers[lane, matrix, 2]``; lane 8·m + r gives the address of row r of matrix m."""
        for lane in range(32):
            for m in range(4):
                at = addresses[8 * m + lane // 4] + 4 * (lane % 4)
                self.data[at // 2 : at // 2 + 2] = registers[lane, m]

    def ldmatrix(self, addresses: list[int]) -> np.ndarray:
        registers = np.empty((32, 4, 2))
        for lane in range(32):
            for m in range(4):
                at = addresses[8 * m + lane // 4] + 4 * (lane % 4)
                registers[lane, m] = self.data[at // 2 : at // 2 + 2]
        return registers


def fragments(d: np.ndarray, warp: int) -> np.ndarray:
    """Accumulators ``[lane, i]`` of a warp, as the PTX manual draws m64nNk16's D."""
    out = np.empty((32, d.shape[1] // 2))
    for lane in range(32):
        for i in range(out.shape[1]):
            out[lane, i] = d[warp * 16 + lane // 4 + (8 if i % 4 >= 2 else 0), (i // 4) * 8 + (lane % 4) * 2 + i % 2]
    return out


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
               k: int, m: int, n: int) -> int:  # fmt: skip
    """``load_block`` of mainloop.cuh by all ranks of a cluster into one block: bytes that its barrier counts."""
    a_dst, b_dst, total = 0, 128 * 128, 0
    total += smem.tma_load(a_dst, a, k, m, 64, 128)
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
                    x = (1 << 30) - 1
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
def test_stage_to_accumulators(lib: ctypes.CDLL, kind: int, mn: bool, dual: bool, bn: int, cluster: int) -> None:
    rng = np.random.default_rng(0)
    depth, rows, width = 56, 200, 304  # all ragged: the last k16 step is half zeros, the tile hangs over the edge
    k, m, n = 0, 128, 256 if not dual else 192
    mn = mn or kind != MAIN
    a = rng.integers(-3, 4, (rows, depth)).astype(float)
    weights = [rng.integers(-3, 4, (width, depth)).astype(float) for _ in range(2)]
    stored = [w.T if mn else w for w in weights]
    smem = Smem()
    counted = load_stage(smem, kind, mn, dual, cluster, bn, a, stored if dual else [stored[0]] * 2, k, m, n)
    assert counted == lib.l_stage(128, bn, kind)

    columns = bn // 2 if kind == LOW_FIRST else bn
    for slab in range(2):  # cooperative warpgroup or ping-pong slab
        d = np.zeros((64, columns))
        for step in range(4):
            a_desc = lib.l_desc_k(slab * 64 * 128) + step * lib.l_step(0)
            b_start = lib.l_desc_mn(128 * 128) if mn else lib.l_desc_k(128 * 128)
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
