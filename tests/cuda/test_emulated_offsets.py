"""Offsets beyond 32 bits in the emulated kernels (``NPT_EMULATE=1``): rows 2^31 elements apart in a sparse address space.

Only the pages that are touched exist, so 17 GB of addresses cost some hundred KB. An offset held in a signed or unsigned 32-bit
number ends outside the memory or in another row: row 1 begins at 2^31 + 64 elements, row 2 at 2^32 + 128.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from npt_kernels.kernels.cuda import launch, norm, rules
from npt_kernels.kernels.cuda.choose import Config, Epilogue, Family
from npt_kernels.kernels.cuda.launch import MAIN, Segment
from npt_kernels.kernels.eager import EagerSteps

NORESERVE = 0x4000  # MAP_NORESERVE of Linux; the module has a name for it from Python 3.13 on
ROWS, PITCH, DTYPE = 3, 2**31 + 64, torch.bfloat16


def far_apart(width: int, values: Tensor | None = None) -> Tensor:
    """``[3, width]`` with rows ``PITCH`` elements apart, of NaN or of ``values``."""
    size = 2 * (ROWS * PITCH)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    view = torch.frombuffer(memory, dtype=DTYPE).as_strided((ROWS, width), (PITCH, 1))
    view.fill_(float("nan"))
    if values is not None:
        view.copy_(values)
    assert view.stride(0) > 2**31 and view[-1].data_ptr() - view.data_ptr() > 2**33
    return view


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DTYPE)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind: str) -> None:
    width = 776
    dense = [randn(ROWS, width) for _ in range(3)]
    h, a, du = (far_apart(width, t) for t in dense)
    weight, key_scale = randn(width), torch.full((ROWS,), float("nan"), dtype=DTYPE)
    u, dh, da = (far_apart(width) for _ in range(3))
    norm.launch_norm(False, h, a, None, u, None, None, weight, None, key_scale, None, kind, 1e-5)
    norm.launch_norm(True, h, a, du, None, dh, da, weight, None, None, None, kind, 1e-5)
    near = [torch.full((ROWS, width), float("nan"), dtype=DTYPE) for _ in range(3)]
    again = torch.empty_like(key_scale)
    norm.launch_norm(False, *dense[:2], None, near[0], None, None, weight, None, again, None, kind, 1e-5)
    norm.launch_norm(True, *dense[:2], dense[2], None, near[1], near[2], weight, None, None, None, kind, 1e-5)
    assert all(torch.equal(far, t) for far, t in zip((u, dh, da, key_scale), (*near, again), strict=True))
    exact = EagerSteps().matched_norm(*(t.double() for t in dense[:2]), weight.double(), None, kind, 1e-5)[0]
    assert (u.double() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize(
    "config",
    [
        Config(Family.DECODE, Epilogue.STORE, 1, 8, 64, 1, "test"),
        Config(Family.COOP, Epilogue.STORE, 1, 128, 256, 1, "test"),
        Config(Family.PINGPONG, Epilogue.STORE, 1, 128, 128, 1, "test"),
        Config(Family.SPLIT, Epilogue.STORE, 1, 128, 256, 1, "test", 2),
    ],
    ids=lambda config: config.family.name.lower(),
)
def test_products(config: Config) -> None:
    """The tensor maps of x and y: TMA's pitches, and the plain stores of the decode and split kernels."""
    x, weight = torch.randint(-1, 2, (ROWS, 264)).to(DTYPE), torch.randint(-1, 2, (328, 264)).to(DTYPE)
    y = far_apart(328)
    launch.run(Epilogue.STORE, [Segment(MAIN, far_apart(264, x), weight)], [y], config=config)
    assert torch.equal(y, (x.double() @ weight.double().t()).to(DTYPE))


@pytest.mark.parametrize("rule", ["rank1", "diagonal"])
def test_rules(rule: str) -> None:
    rank = 24
    z, p, dc = (randn(ROWS, rank) for _ in range(3))
    far = [far_apart(rank, t) for t in (z, p, dc)]
    c, dz, dp = (far_apart(rank) for _ in range(3))
    rules.launch_rule(False, *far[:2], c, None, None, None, None, None, rule, 1, 0.7)
    rules.launch_rule(True, *far[:2], None, far[2], dz, dp, None, None, rule, 1, 0.7)
    near = [torch.full((ROWS, rank), float("nan"), dtype=DTYPE) for _ in range(3)]
    rules.launch_rule(False, z, p, near[0], None, None, None, None, None, rule, 1, 0.7)
    rules.launch_rule(True, z, p, None, dc, near[1], near[2], None, None, rule, 1, 0.7)
    for got, want in zip((c, dz, dp), near, strict=True):
        assert not got.isnan().any() and torch.equal(got, want)
