"""What a row gives does not depend on the other rows: the same bits whatever they hold and wherever it stands among them.

One exception, the vendor's: ``anchored`` in fp32 on a CPU has a product with one column, and MKL's sum for it goes by the row's
place (seen with ``F.linear`` alone, 5 rows turned round; torch 2.13).

With another *number* of rows a GEMM may sum in another order. On ``eager`` that is the vendor's: held here is that the op's rows
differ only where those of its plain products do (MKL in fp32: one row against five; torch offers no switch against it), and
that one row alone, without gradients, is summed by compiled code of its own (``kernels/native_row.py``). On ``triton`` and
``cuda`` tiles are chosen by the number of rows. Where sizes must not matter, pad batches to one size.

Triton's interpreter multiplies with numpy, whose OpenBLAS on an AMD EPYC (Zen 5) sums a row by its place; there only what the
other rows hold is tried.

``make check-emulated`` runs this with ``NPT_EMULATE=1``, and then the backend ``cuda`` too.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from npt_kernels import npt_factored_linear, npt_gated_mlp
from npt_kernels.component import AdapterTensors
from npt_kernels.kernels import native
from npt_kernels.rules import RULES

BACKENDS = ["eager", "triton"] + (["cuda"] if os.environ.get("NPT_EMULATE") == "1" else [])
D, INNER, R = 64, 96, 16
SIZES = {"eager": (1, 2, 5, 8, 17, 33, 64, 65, 130), "triton": (17,), "cuda": (1, 3, 17, 65)}


class Call:
    """One gated MLP and one linear, over any rows of the same data."""

    def __init__(self, backend: str, dtype: torch.dtype, rule: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

        self.backend, self.rule, self.weights = backend, rule, (draw(INNER, D), draw(INNER, D), draw(D, INNER))
        kind = RULES[rule].key
        keys = {} if kind == "none" else {
            target: draw(width) if kind == "vector" else draw(R, width)
            for target, width in (("gate", D), ("up", D), ("down", INNER))
        }  # fmt: skip
        self.adapter = AdapterTensors(
            draw(D, R), keys, {"gate": draw(R, INNER), "up": draw(R, INNER), "down": draw(R, D)}, rule
        )
        self.x, self.a, self.scale = draw(max(SIZES["eager"]), D), draw(max(SIZES["eager"]), D), draw(130).abs()

    @torch.no_grad()
    def __call__(
        self, rows: torch.Tensor, x: torch.Tensor | None = None, a: torch.Tensor | None = None
    ) -> torch.Tensor:
        x, a = (self.x if x is None else x)[rows], (self.a if a is None else a)[rows]
        scale = self.scale[rows] if self.rule == "self_key" else None
        out = npt_gated_mlp(x, a, *self.weights, self.adapter, act="silu", key_scale=scale, backend=self.backend)
        linear = npt_factored_linear(
            x, a @ self.adapter.w_down, self.weights[0], self.adapter.w_a_up.get("gate"), self.adapter.w_b_up["gate"],
            rule=self.rule, backend=self.backend,
        ) if self.backend == "eager" else out  # fmt: skip
        return torch.cat([out, linear], -1)

    def gemm_goes_by_rows(self, count: int) -> bool:
        """Whether the library's product, with the one column of ``anchored``, gives a row the same bits in another place."""
        if self.backend == "triton":
            return numpy_goes_by_rows()
        columns = [key for key in self.adapter.w_a_up.values() if key.dim() == 1 and key.numel() == D]
        turned = self.x[:count].flip(0)
        return all(
            torch.equal(F.linear(turned, key[None]).flip(0), F.linear(self.x[:count], key[None])) for key in columns
        )

    def products(self, count: int) -> list[torch.Tensor]:
        """The first row of the plain products of ``count`` rows."""
        x, a, (gate, up, down) = self.x[:count], self.a[:count], self.weights
        z, inner = a @ self.adapter.w_down, F.linear(x, gate)
        c = [z @ value for value in self.adapter.w_b_up.values()]
        p = [
            F.linear(inner if key.shape[-1] == INNER else x, key.reshape(-1, key.shape[-1]))
            for key in self.adapter.w_a_up.values()
        ]
        return [part[0] for part in (z, inner, F.linear(x, up), F.linear(inner, down), *c, *p)]


def numpy_goes_by_rows() -> bool:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape, dtype=np.float32) for shape in ((16, 32), (32, 32)))
    return np.array_equal((a[::-1].copy() @ b)[::-1], a @ b)


CASES = [("eager", dtype, rule) for dtype in (torch.float32, torch.bfloat16) for rule in RULES]
# A call takes a second in the interpreter.
CASES += [("triton", torch.float32, rule) for rule in RULES] + [("triton", torch.bfloat16, "self_key")]
CASES += [("cuda", torch.bfloat16, rule) for rule in RULES if "cuda" in BACKENDS]


@pytest.mark.parametrize(("backend", "dtype", "rule"), CASES, ids=str)
def test_other_rows_do_not_matter(backend, dtype, rule):
    call = Call(backend, dtype, rule)
    turned = 0
    for count in SIZES[backend]:
        rows = torch.arange(count)
        expected = call(rows)
        if call.gemm_goes_by_rows(count):
            turned += 1
            assert torch.equal(call(rows.flip(0)).flip(0), expected), f"{count} rows, turned round"
        for other in (1e4, float("nan")):
            x, a = call.x.clone(), call.a.clone()
            kept = rows[:: max(1, count // 3)]
            foreign = torch.ones(len(x), dtype=torch.bool)
            foreign[kept] = False
            x[foreign], a[foreign] = other, other
            assert torch.equal(call(rows, x, a)[kept], expected[kept]), f"{count} rows, others {other}"
    library = (rule == "anchored" and dtype == torch.float32) or (backend == "triton" and not numpy_goes_by_rows())
    assert turned == len(SIZES[backend]) or library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_rows_matters_only_where_it_does_to_the_gemm(dtype, rule):
    call = Call("eager", dtype, rule)
    compared = 0
    found = {count: (call(torch.arange(count))[0], call.products(count)) for count in SIZES["eager"]}
    if RULES[rule].key == "none" and native.available():
        del found[1]
    for (one, plain), (other, plain_other) in itertools.combinations(found.values(), 2):
        if all(map(torch.equal, plain, plain_other)):
            assert torch.equal(one, other)
            compared += 1
    assert compared >= 10, "the vendor's GEMM differs almost everywhere; nothing was tested"
