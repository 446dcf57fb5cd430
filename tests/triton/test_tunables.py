"""Every kernel that can be tuned runs with a candidate's tile and computes what it computes with its own."""

from __future__ import annotations

import pytest
import torch

from npt_kernels.kernels.triton import tunables as module
from npt_kernels.kernels.triton.launch import candidate_config

SMALL = {"block_t": 16, "block_n": 16, "block_k": 16, "num_stages": 2, "subtiles": 1}
SHAPES = [(kernel, {}) for kernel in module.tunables()] + [("decode", {"pair": 1})]


@pytest.mark.parametrize(("kernel", "extra"), SHAPES)
def test_runs_with_a_given_tile(kernel, extra):
    torch.manual_seed(0)
    shape = {"tokens": 17, "out": 40, "inner": 24, "rank": 8} | extra
    run = module.tunables()[kernel]["prepare"](shape, torch.float32, torch.device("cpu"))
    small, own = run(SMALL), run({})
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (small, own)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == (17, 40)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_fields_complete_the_default():
    like = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    tile = candidate_config("segmented_gemm", like, 8192, {"block_n": 64})
    assert (tile.block_t, tile.block_n, tile.tma) == (128, 64, True)


def test_candidates_are_fields_and_every_shape_has_its_keys():
    for kernel, spec in module.tunables().items():
        for dtype in (torch.float16, torch.float32):
            like = torch.empty(16, 16, dtype=dtype, device="meta")
            for tile in module.candidates(kernel, dtype):
                candidate_config(kernel, like, 16, tile)  # an unknown field raises
        assert {tuple(sorted(shape)) for shape in spec["shapes"]} <= {
            ("inner", "out", "rank", "tokens"),
            ("inner", "out", "pair", "rank", "tokens"),
        }
