"""Every segmented-K kernel by name on an H100/H200: each kind of segment x family x cluster x layout of the weights.

``choose`` reaches some kernels with large shapes only (the cooperative gate-up kernel with K-major weights above K = 2048), and a
fault may need one kind of segment in one family. Exact on integers, 2x rule for activations and their gradients.

An illegal instruction or address leaves the process without a GPU: every later test of the run errors too. One family alone:
``pytest tests/cuda/test_instances.py -k coop`` (or pingpong, decode, split; low_second; cluster2; mn; any part of an id).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npt_kernels.kernels.cuda import launch
from npt_kernels.kernels.cuda.choose import Config, Epilogue, Family
from npt_kernels.kernels.cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Segment
from tests.support.cuda_instances import BACKWARD, FORWARD, Instance, instances

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
NAMES = {LOW: "low", LOW_SECOND: "low_second", LOW_FIRST: "low_first"}
GATE_UP_KINDS = ((), (LOW,), (LOW_FIRST,), (LOW_SECOND,), (LOW_SECOND, LOW_FIRST), (LOW, LOW_SECOND, LOW_FIRST))
PLAIN_KINDS = ((), (LOW,), (LOW, LOW))
#: Ragged K and R, one k-block and a bit more; columns over several tiles and an eighth of the next.
DEPTH, COLUMNS, RANK = 328, 1032, 72
#: 17 k-blocks: eight parts of two and, with segments of R, parts that begin in one segment and end in the next.
SPLIT_DEPTH = 1032
#: Rows of a GEMM: less than a tile; three row tiles of 128 (half of a pair is empty) or five of 64; more tiles than SMs, so that
#: blocks take several and both warpgroups of a ping-pong kernel get one.
GEMM_ROWS = (65, 300, 8200)


def ternary(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-1, 2, shape, device=DEVICE).to(dtype)


def weight(rows: int, depth: int, mn_major: bool, dtype: torch.dtype) -> Tensor:
    return ternary(depth, rows, dtype=dtype).t() if mn_major else ternary(rows, depth, dtype=dtype)


def empty(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, COLUMNS), float("nan"), device=DEVICE, dtype=dtype)


def rows_of(config: Config) -> tuple[int, ...]:
    return (config.block_m - 3, config.block_m) if config.family == Family.DECODE else GEMM_ROWS


def twice(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of the unfused computation in the same dtype, and no NaN left."""
    assert not got.isnan().any()
    error, bound = (got.double() - truth).norm(), (plain.double() - truth).norm()
    assert error <= 2 * bound + 1e-6 * truth.norm(), (error / truth.norm(), bound / truth.norm())


def operands(
    instance: Instance, rows: int, kinds: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[Segment], Tensor, Tensor]:
    """Segments of ternary numbers, and their exact sums: of the one product or of gate, and of up."""
    two = instance.config.epilogue == Epilogue.GATE_UP
    depth = SPLIT_DEPTH if instance.config.family == Family.SPLIT else DEPTH
    x = ternary(rows, depth, dtype=dtype)
    first, second = (weight(COLUMNS, depth, instance.mn_major, dtype) for _ in range(2))
    segments = [Segment(MAIN, x, first, second if two else None)]
    gate, up = (x.double() @ w.double().t() for w in (first, second))
    for kind in kinds:
        c, b, b2 = (ternary(*shape, dtype=dtype) for shape in ((rows, RANK), (RANK, COLUMNS), (RANK, COLUMNS)))
        segments.append(Segment(kind, c, b.t(), b2.t() if two and kind == LOW else None))
        if kind != LOW_SECOND:
            gate = gate + c.double() @ b.double()
        if kind != LOW_FIRST:
            up = up + c.double() @ (b2 if kind == LOW else b).double()
    return segments, gate, up


def cases(*epilogues: Epilogue) -> list[object]:
    """(instance, kinds), with an id that names both."""
    return [
        pytest.param(instance, kinds, id=f"{instance}-{'+'.join(NAMES[k] for k in kinds) or 'main'}")
        for instance in instances(*epilogues)
        for kinds in (GATE_UP_KINDS if instance.config.epilogue == Epilogue.GATE_UP else PLAIN_KINDS)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("instance", "kinds"), cases(*FORWARD))
def test_forward(instance: Instance, kinds: tuple[int, ...], dtype: torch.dtype) -> None:
    config = instance.config
    for rows in rows_of(config):
        segments, first, up = operands(instance, rows, kinds, dtype)
        bias = None
        if config.epilogue != Epilogue.GATE_UP:
            bias = ternary(COLUMNS, dtype=dtype)
            first = first + bias.double()
        if config.epilogue == Epilogue.STORE:
            out = empty(rows, dtype)
            launch.run(config.epilogue, segments, [out], bias=bias, config=config)
            assert torch.equal(out, first.to(dtype))
            continue
        outs = [empty(rows, dtype) for _ in range(3 if config.epilogue == Epilogue.GATE_UP else 2)]
        launch.run(config.epilogue, segments, outs, bias=bias, store_pre=True, config=config)
        assert torch.equal(outs[1], first.to(dtype))
        plain, truth = torch.nn.functional.silu(first.to(dtype)), torch.nn.functional.silu(first)
        if config.epilogue == Epilogue.GATE_UP:
            assert torch.equal(outs[2], up.to(dtype))
            plain, truth = plain * up.to(dtype), truth * up
        twice(outs[0], plain, truth)
        only = empty(rows, dtype)
        launch.run(config.epilogue, segments, [only], bias=bias, config=config)
        assert torch.equal(only, outs[0]), "without the outputs for the backward"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("instance", "kinds"), cases(*BACKWARD))
def test_backward(instance: Instance, kinds: tuple[int, ...], dtype: torch.dtype) -> None:
    config, silu_backward = instance.config, torch.ops.aten.silu_backward
    for rows in rows_of(config):
        segments, dinter, _ = operands(instance, rows, kinds, dtype)
        gate, up = (torch.randn(rows, COLUMNS, device=DEVICE).to(dtype) for _ in range(2))
        inputs = [gate, up] if config.epilogue == Epilogue.GATE_UP_BWD else [gate]
        outs = [empty(rows, dtype) for _ in inputs]
        launch.run(config.epilogue, segments, outs, inputs=inputs, config=config)
        if config.epilogue == Epilogue.ACT_BWD:
            twice(outs[0], silu_backward(dinter.to(dtype), gate), silu_backward(dinter, gate.double()))
            continue
        low, exact = dinter.to(dtype), [t.double() for t in inputs]
        twice(outs[0], silu_backward(low * up, gate), silu_backward(dinter * exact[1], exact[0]))
        twice(outs[1], torch.nn.functional.silu(gate) * low, torch.nn.functional.silu(exact[0]) * dinter)
        alone = empty(rows, dtype)
        launch.run(config.epilogue, segments, [None, alone], inputs=inputs, config=config)
        assert torch.equal(alone, outs[1]), "one gradient alone"
