"""The hardware that the kernels' index arithmetic talks to, in NumPy: TMA's swizzle, wgmma's operand reads and fragments,
stmatrix. Written from the PTX manual and CUTLASS's description of the canonical layouts, not from csrc/."""

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
int l_split(int blocks, int parts, int part) { return npt::split_begin(blocks, parts, part); }
int l_overlap(int f, int l, int b, int c) { return npt::overlap_count(f, l, b, c); }
unsigned l_slot(int h, int p, int n, int t) { return npt::split_slot(h, p, n, t); }
unsigned l_partial(int r, int c, int w) { return npt::partial_offset(r, c, w); }
int l_pitch(int w) { return npt::partial_pitch(w); }
int l_outside() { return npt::kOutsideColumn; }
long long l_columns() { return npt::kMaxColumns; }
}
"""


def build_layout(folder: Path) -> ctypes.CDLL:
    """csrc/common/layout.h as a library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "shim.cpp").write_text(SHIM)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")], check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    for name in ("l_swizzle", "l_tile", "l_matrix", "l_stage", "l_slot", "l_partial"):
        getattr(library, name).restype = ctypes.c_uint
    for name in ("l_desc_k", "l_desc_mn", "l_step"):
        getattr(library, name).restype = ctypes.c_ulonglong
    library.l_columns.restype = ctypes.c_longlong
    return library


def swizzle(address: int) -> int:
    """128-byte swizzle on a shared-memory address: 16-byte unit 0..7 of a 128-byte row is XORed with the row modulo 8."""
    unit, row = (address // 16) % 8, (address // 128) % 8
    return address - unit * 16 + (unit ^ row) * 16


class Smem:
    """Shared memory of 16-bit elements, NaN where nothing was written."""

    def __init__(self, size: int = 1 << 17) -> None:
        self.data = np.full(size // 2, np.nan)

    def tma_load(self, dst: int, tensor: np.ndarray, x: int, y: int, box_x: int, box_y: int) -> int:
        """Box at (x, y) of a row-major tensor, zeros outside; returns the bytes counted.

        A byte position beyond 31 bits is an illegal instruction on an H200, although PTX promises zeros there.
        """
        assert dst % 1024 == 0 and box_x == 64
        assert 2 * x > -(1 << 31) and 2 * (x + box_x) < 1 << 31, "TMA computes byte positions in 31 bits"
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
