"""What ``_cuda.launch`` computes, in torch on the CPU: the meaning of segments and epilogues, read from csrc/gemm/segk_params.h.

With it the host side (which segments, which outputs, which gradients) runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npt_kernels.ops._cuda.heuristics import Epilogue
from npt_kernels.ops._cuda.launch import LOW, LOW_FIRST, LOW_SECOND, MAIN, Segment, weights_layout

#: Calls since the last test began: (epilogue, kinds).
CALLS: list[tuple[Epilogue, tuple[int, ...]]] = []


def fake_run(
    epilogue: Epilogue,
    segments: Sequence[Segment],
    outputs: Sequence[Tensor | None],
    *,
    inputs: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    activation: tuple[float, float] = (1.0, 0.0),
    store_pre: bool = False,
) -> None:
    """Same signature as ``launch.run``."""
    CALLS.append((epilogue, tuple(sorted(s.kind for s in segments))))
    assert 1 <= len(segments) <= 4 and any(s.kind == MAIN for s in segments)
    dual = epilogue == Epilogue.DUAL
    sums: list[Tensor | None] = [None, None]
    for s in segments:
        for t in (s.a, s.b0, *([s.b1] if s.b1 is not None else [])):
            layout = weights_layout(t)
            assert layout is not None, "TMA could not read this"
            assert s.kind == MAIN or t is s.a or layout == "mn"
        assert (s.b1 is not None) == (dual and s.kind in (MAIN, LOW))
        a, b0 = s.a.double(), s.b0.double()
        for half in range(2):
            if half == 1 and not dual:
                continue
            if s.kind in (LOW_FIRST, LOW_SECOND):
                assert dual
                if (s.kind == LOW_SECOND) != (half == 1):
                    continue
            weight = s.b1.double() if half == 1 and s.b1 is not None else b0
            term = a @ weight.t()
            sums[half] = term if sums[half] is None else sums[half] + term
    y = sums[0]
    assert y is not None
    if bias is not None:
        assert epilogue in (Epilogue.STORE, Epilogue.ACT)
        y = y + bias.double()
    c0, c1 = activation

    def act(v: Tensor) -> Tensor:
        return v * torch.sigmoid(v * (c0 + c1 * v * v))

    def slope(v: Tensor) -> Tensor:
        s = torch.sigmoid(v * (c0 + c1 * v * v))
        return s + v * s * (1 - s) * (c0 + 3 * c1 * v * v)

    results: list[Tensor]
    if epilogue == Epilogue.STORE:
        results = [y]
    elif epilogue == Epilogue.ACT:
        results = [act(y), y] if store_pre else [act(y)]
    elif epilogue == Epilogue.DUAL:
        assert sums[1] is not None
        results = [act(y) * sums[1], y, sums[1]] if store_pre else [act(y) * sums[1]]
    elif epilogue == Epilogue.ACT_BWD:
        results = [y * slope(inputs[0].double())]
    else:
        gate, up = (t.double() for t in inputs)
        results = [y * up * slope(gate), y * act(gate)]
    assert len(results) == len(outputs)
    for out, value in zip(outputs, results, strict=True):
        if out is not None:
            out.copy_(value)
        else:
            assert epilogue == Epilogue.DUAL_BWD


__all__ = ["CALLS", "LOW", "LOW_FIRST", "LOW_SECOND", "MAIN", "fake_run"]
