"""Whole tiles of the low-rank kernels through the emulated hardware, with the addresses that the kernels compute: the coefficient
kernel's two products, its partial sums and row shares; the pair kernel's two uses of one tile; a split decode tile's slots."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.support.cuda_layout import Smem, fragments


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(float)


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize(("tile", "key"), [(64, "k"), (64, "mn"), (64, "vector"), (128, "k"), (64, "none")])
def test_coefficients(lib: ctypes.CDLL, tile: int, key: str, parts: int) -> None:
    """coefficients.cuh: z and p of 100 of 128 rows, R = 40 of the tile's ranks; a part may have no k-block at all."""
    rng = np.random.default_rng(0)
    tokens, rank, d_a, d_u = 100, 40, 136, 72
    a, u, w_down = integers(rng, tokens, d_a), integers(rng, tokens, d_u), integers(rng, d_a, rank)
    w_key = integers(rng, 1 if key == "vector" else rank, d_u)
    p_cols = {"none": 0, "vector": 8}.get(key, tile)
    width = tile + p_cols
    blocks = []  # shared memory of every block of the cluster
    for part in range(parts):
        sums = np.zeros((128, width))
        for is_z in (True, False):
            x, columns = (a, tile) if is_z else (u, p_cols)
            if columns == 0:
                continue
            count = -(-x.shape[1] // 64)
            for i in range(lib.l_split(count, parts, part), lib.l_split(count, parts, part + 1)):
                smem, k, b = Smem(), 64 * i, 128 * 128
                counted = smem.tma_load(0, x, k, 0, 64, 128)
                mn = is_z or key == "mn"
                if mn:
                    for j in range(tile // 64):
                        counted += smem.tma_load(b + j * 8192, w_down if is_z else w_key.T.copy(), 64 * j, k, 64, 64)
                else:
                    counted += smem.tma_load(b, w_key, k, 0, 64, 8 if key == "vector" else tile)
                assert counted == 128 * 128 + (8 if not is_z and key == "vector" else tile) * 128  # shrink_bytes
                for group in range(2):
                    for step in range(4):
                        a_desc = lib.l_desc_k(group * 64 * 128) + step * lib.l_step(0)
                        b_desc = (lib.l_desc_mn(b) if mn else lib.l_desc_k(b)) + step * lib.l_step(int(mn))
                        at = 0 if is_z else tile
                        sums[64 * group : 64 * group + 64, at : at + columns] += (
                            smem.operand(a_desc, 64, False) @ smem.operand(b_desc, columns, mn).T
                        )
        words = np.full(128 * lib.l_pitch(width), np.nan)
        for group in range(2):  # put_partials, z and p apart
            for at, columns in ((0, tile), (tile, p_cols)):
                for warp in range(4 if columns else 0):
                    held = fragments(sums[64 * group : 64 * group + 64, at : at + columns], warp)
                    for lane in range(32):
                        for i in range(0, columns // 2, 2):
                            row, column = 64 * group + lib.l_frow(warp, lane, i), at + lib.l_fcol(lane, i)
                            offset = lib.l_partial(row, column, width)
                            assert offset % 8 == 0 and np.isnan(words[offset // 4])
                            words[offset // 4 : offset // 4 + 2] = held[lane, i : i + 2]
        blocks.append(words)
    z, p = np.full((tokens, rank), np.nan), np.full((tokens, p_cols), np.nan)
    for part in range(parts):  # shrink_finish: every block its share of the rows
        for r in range(128 // parts):
            row = part * (128 // parts) + r
            if row < tokens:
                assert np.isnan(z[row]).all()
                line = sum(w[lib.l_partial(row, 0, width) // 4 :][:width] for w in blocks)
                z[row], p[row] = line[:rank], line[tile:]
    np.testing.assert_array_equal(z, a @ w_down)
    if key == "vector":
        np.testing.assert_array_equal(p[:, 0], u @ w_key[0])
    elif key != "none":
        np.testing.assert_array_equal(p[:, :rank], u @ w_key.T)
        assert (p[:, rank:] == 0).all()  # what the term sums read beyond R


def test_partial_sums_are_free_of_bank_conflicts(lib: ctypes.CDLL) -> None:
    """8-byte accesses go half a warp at a time: 16 lanes, 32 different banks. Writes by fragment, reads by row."""
    for width in (64, 72, 128, 136, 256, 8):
        for half in (0, 16):
            words = [lib.l_partial(lib.l_frow(1, half + n, 0), lib.l_fcol(half + n, 0), width) // 4 for n in range(16)]
            assert len({(w + e) % 32 for w in words for e in range(2)}) == 32
            words = [lib.l_partial(5, 2 * (half + n), width) // 4 for n in range(16)]
            assert len({(w + e) % 32 for w in words for e in range(2)}) == 32


def test_pair(lib: ctypes.CDLL) -> None:
    """value_grads.cuh: one tile of dy in shared memory is A of dc and B of d w_b_up; T, N, R ragged, 3 token ranges of two."""
    rng = np.random.default_rng(1)
    tokens, width, rank, ranges = 130, 552, 40, 2
    dy, c, b = integers(rng, tokens, width), integers(rng, tokens, rank), integers(rng, rank, width)
    tiles, blocks = -(-tokens // 64), -(-width // 512)
    dc_shares, db_shares = np.full((blocks, tokens, rank), np.nan), np.full((ranges, rank, width), np.nan)
    stage, c_at, resident = 0, 65536, 73728
    for block in range(blocks):
        for part in range(ranges):
            n, smem = 512 * block, Smem(1 << 18)
            for j in range(8):
                smem.tma_load(resident + 8192 * j, b, n + 64 * j, 0, 64, 64)
            db = np.zeros((2, 64, 256))
            for i in range(lib.l_split(tiles, ranges, part), lib.l_split(tiles, ranges, part + 1)):
                counted = sum(smem.tma_load(stage + 8192 * j, dy, n + 64 * j, 64 * i, 64, 64) for j in range(8))
                assert counted + smem.tma_load(c_at, c, 0, 64 * i, 64, 64) == 65536 + 8192
                for group in range(2):
                    for k in range(4):
                        a_desc = lib.l_desc_mn(c_at) + k * lib.l_step(1)
                        b_desc = lib.l_desc_mn(stage + group * 32768) + k * lib.l_step(1)
                        db[group] += smem.operand(a_desc, 64, True) @ smem.operand(b_desc, 256, True).T
                    dc = np.zeros((64, 32))
                    for j in range(8):
                        for k in range(4):
                            step = j * (8192 >> 4) + k * lib.l_step(0)
                            a_desc, b_desc = lib.l_desc_k(stage) + step, lib.l_desc_k(resident + group * 4096) + step
                            dc += smem.operand(a_desc, 64, False) @ smem.operand(b_desc, 32, False).T
                    for warp in range(4):
                        held = fragments(dc, warp)
                        for lane in range(32):
                            for e in range(16):
                                token, r = 64 * i + lib.l_frow(warp, lane, e), group * 32 + lib.l_fcol(lane, e)
                                if token < tokens and r < rank:
                                    dc_shares[block, token, r] = held[lane, e]
            for group in range(2):
                for warp in range(4):
                    held = fragments(db[group], warp)
                    for lane in range(32):
                        for e in range(128):
                            r, column = lib.l_frow(warp, lane, e), n + 256 * group + lib.l_fcol(lane, e)
                            if r < rank and column < width:
                                db_shares[part, r, column] = held[lane, e]
    np.testing.assert_array_equal(dc_shares.sum(0), dy @ b.T)
    np.testing.assert_array_equal(db_shares.sum(0), c.T @ dy)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_takes_every_block_once(lib: ctypes.CDLL, parts: int) -> None:
    for blocks in (1, 3, 8, 57, 225):
        edges = [lib.l_split(blocks, parts, part) for part in range(parts + 1)]
        assert edges[0] == 0 and edges[-1] == blocks and edges == sorted(edges)
        sizes = np.diff(edges)
        assert sizes.max() - sizes.min() <= 1
    kinds = [5, 2, 1, 1]  # main, low, second, first
    begins = np.cumsum([0, *kinds[:-1]])
    for begin, count in zip(begins, kinds, strict=True):
        shares = [
            lib.l_overlap(lib.l_split(9, parts, part), lib.l_split(9, parts, part + 1), int(begin), count)
            for part in range(parts)
        ]
        assert sum(shares) == count and min(shares) >= 0


@pytest.mark.parametrize("tokens", [8, 64])
def test_split_decode_slots(lib: ctypes.CDLL, tokens: int) -> None:
    """Each thread's accumulator pairs have slots of their own; shares of a cluster cover every pair once."""
    pairs = tokens // 4
    slots = [lib.l_slot(h, j, pairs, t) for h in range(2) for j in range(pairs) for t in range(128)]
    assert sorted(slots) == list(range(0, 2 * pairs * 128 * 8, 8))
    seen = [
        (lib.l_frow(warp, lane, 2 * j), lib.l_fcol(lane, 2 * j) + e)
        for part in range(4)
        for j in range(part, pairs, 4)  # decode_finish_split
        for warp in range(4)
        for lane in range(32)
        for e in range(2)
    ]
    assert len(seen) == len(set(seen)) == 64 * tokens
