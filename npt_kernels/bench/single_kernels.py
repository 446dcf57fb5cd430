"""Timings of single kernels: kernels that are no op beside the vendor's products, and the Hopper kernels each beside the vendor's
GEMM of the same FLOPs, which tells the main loop's quality from the fusion's gain. Numbers in names are rows of
``benchmarks/notes.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cuda import launch
from ..kernels.cuda.choose import Config, Epilogue, choose
from ..kernels.cuda.launch import LOW, LOW_FIRST, MAIN, Segment, low_rank
from ..measure.problems import Problem
from ..measure.shapes import Case
from ..measure.timing import Call, compare, compare_graphs, rotation

__all__ = ["SingleKernel", "against_products", "cuda_kernels"]

#: ``make(device) -> (contenders, number of input sets)``.
Make = Callable[[torch.device], tuple[dict[str, Call], int]]
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class SingleKernel:
    """Contenders on the same tensors; ``baseline`` is whose time the others are divided by."""

    name: str
    baseline: str
    tokens: int
    make: Make

    def rows(self, device: torch.device, rounds: int) -> list[dict[str, Any]]:
        """A row per contender and launch: eagerly and, for at most 256 tokens on a GPU, from a CUDA graph."""
        contenders, sets = self.make(device)
        rows = []
        for launched in ("graph", "eager") if device.type == "cuda" and self.tokens <= 256 else ("eager",):
            function = compare_graphs if launched == "graph" else compare
            for provider, times in function(contenders, self.baseline, device, rounds=rounds, sets=sets).items():
                row = {
                    "kind": "kernel",
                    "case": self.name,
                    "launch": launched,
                    "provider": provider,
                    "baseline": self.baseline,
                }
                failed = {"status": "failed", "reason": times.get("error")}
                rows.append(row | (failed if "error" in times else {"status": "ok", "sets": sets, **times}))
        return rows


def against_products(name: str, case: Case, backends: Sequence[str], names: tuple[str, str]) -> SingleKernel:
    """``coefficients`` or ``value_grads`` of every backend against the vendor's products. ``names``: (the vendor's, ours)."""

    def make(device: torch.device) -> tuple[dict[str, Call], int]:
        first = Problem(case, device)
        size = sum(t.numel() * t.element_size() for t in first.tensors.values())
        problems = [first, *(Problem(case, device, seed) for seed in range(1, rotation(size, device)))]

        def run(backend: str) -> Call:
            return lambda index: problems[index].run(backend)

        ours = {f"{backend}, {names[1]}": run(backend) for backend in backends if backend != "eager"}
        return {names[0]: run("eager"), **ours}, len(problems)

    return SingleKernel(name, names[0], case.tokens, make)


def _sets(device: torch.device, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Random normal inputs, matrices divided by sqrt of their last side as weights are."""
    size = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())

    def one(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device=device).manual_seed(seed)
        return {
            name: torch.randn(shape, dtype=DTYPE, device=device, generator=generator)
            * (shape[-1] ** -0.5 if name.startswith("w") else 1)
            for name, shape in shapes.items()
        }

    return [one(seed) for seed in range(rotation(size, device))]


def _store(tokens: int, width: int, depth: int) -> Make:
    """One segment against the vendor: as chosen, without a cluster, MN-major weights."""

    def make(device: torch.device) -> tuple[dict[str, Call], int]:
        sets = _sets(device, {"x": (tokens, depth), "w": (width, depth), "w_mn": (depth, width)})
        out = torch.empty(tokens, width, dtype=DTYPE, device=device)
        chosen = choose(Epilogue.STORE, tokens, width, depth, launch.multiprocessors(device))
        alone = replace(chosen, cluster=1, reason="no cluster")

        def ours(i: int, weight: Callable[[dict[str, Tensor]], Tensor], config: Config) -> Tensor:
            launch.run(Epilogue.STORE, [Segment(MAIN, sets[i]["x"], weight(sets[i]))], [out], config=config)
            return out

        contenders: dict[str, Call] = {
            "cuBLAS": lambda i: torch.mm(sets[i]["x"], sets[i]["w"].t(), out=out),
            "cuda": lambda i: ours(i, lambda t: t["w"], chosen),
            "cuda, MN-major": lambda i: ours(i, lambda t: t["w_mn"].t(), chosen),
        }
        if chosen.cluster > 1:
            contenders["cuda, no cluster"] = lambda i: ours(i, lambda t: t["w"], alone)
        if chosen.split > 1:
            contenders["cuda, not split"] = lambda i: ours(i, lambda t: t["w"], replace(chosen, split=1))
        return contenders, len(sets)

    return make


def _dual(tokens: int, width: int, depth: int, rank: int) -> Make:
    """Gate, up and SwiGLU in one kernel against one plain GEMM of N = 2f: without a delta, with one on the gate, on both."""

    def make(device: torch.device) -> tuple[dict[str, Call], int]:
        sets = _sets(device, {
            "x": (tokens, depth), "w": (2 * width, depth), "c": (tokens, rank), "w_b": (rank, width), "w_b2": (rank, width),
        })  # fmt: skip
        both = torch.empty(tokens, 2 * width, dtype=DTYPE, device=device)
        inter = torch.empty(tokens, width, dtype=DTYPE, device=device)

        chosen = choose(Epilogue.GATE_UP, tokens, width, depth, launch.multiprocessors(device))
        other = choose(Epilogue.GATE_UP, tokens, width, depth, launch.multiprocessors(device), mn_major=True)

        def ours(i: int, kind: int | None, config: Config | None = None) -> Tensor:
            t = sets[i]
            segments = [Segment(MAIN, t["x"], t["w"][:width], t["w"][width:])]
            if kind is not None:
                segments.append(low_rank(t["c"], t["w_b"], kind, t["w_b2"] if kind == LOW else None))
            launch.run(Epilogue.GATE_UP, segments, [inter], config=config)
            return inter

        def vendor(i: int) -> Tensor:
            torch.mm(sets[i]["x"], sets[i]["w"].t(), out=both)
            return F.silu(both[:, :width]).mul_(both[:, width:])

        contenders: dict[str, Call] = {
            "cuBLAS, N = 2f": lambda i: torch.mm(sets[i]["x"], sets[i]["w"].t(), out=both),
            "cuBLAS + elementwise": vendor,
            "cuda dual": lambda i: ours(i, None),
            f"cuda dual, gate R={rank}": lambda i: ours(i, LOW_FIRST),
            f"cuda dual, both R={rank}": lambda i: ours(i, LOW),
        }
        if other.family != chosen.family:  # short K: the ping-pong kernel beside the cooperative one
            contenders["cuda dual, cooperative"] = lambda i: ours(i, None, other)
        return contenders, len(sets)

    return make


def _backward(tokens: int, width: int, depth: int) -> Make:
    """dgate and dup in the epilogue of dout @ Wd against that GEMM alone."""

    def make(device: torch.device) -> tuple[dict[str, Call], int]:
        sets = _sets(
            device, {"dout": (tokens, depth), "w": (depth, width), "gate": (tokens, width), "up": (tokens, width)}
        )
        outs = [torch.empty(tokens, width, dtype=DTYPE, device=device) for _ in range(2)]

        def ours(i: int, to: list[Tensor]) -> list[Tensor]:
            t = sets[i]
            segments = [Segment(MAIN, t["dout"], t["w"].t())]
            launch.run(Epilogue.GATE_UP_BWD, segments, to, inputs=[t["gate"], t["up"]])
            return to

        def vendor(i: int) -> tuple[Tensor, Tensor]:
            t = sets[i]
            d = torch.mm(t["dout"], t["w"], out=outs[0])
            dup = F.silu(t["gate"]).mul_(d)
            return torch.ops.aten.silu_backward(d.mul_(t["up"]), t["gate"]), dup

        return {
            "cuBLAS, GEMM alone": lambda i: torch.mm(sets[i]["dout"], sets[i]["w"], out=outs[0]),
            "cuBLAS + elementwise": vendor,
            "cuda": lambda i: ours(i, outs),
        }, len(sets)

    return make


def cuda_kernels(small: bool) -> Iterator[SingleKernel]:
    """The Hopper kernels, at real sizes or tiny ones."""
    if small:
        big, (d, f), gpt2, smol, many, rank = 256, (64, 96), (32, 64), (24, 40), 72, 8
    else:
        big, (d, f), gpt2, smol, many, rank = 8192, (4096, 14336), (768, 3072), (576, 1536), 8192, 64
    few = [1, 16] if small else [1, 16, 64]
    k = SingleKernel
    yield k(f"1-3 cuda store {big}^3", "cuBLAS", big, _store(big, big, big))
    yield k(f"5 cuda dual 8B T={many}", "cuBLAS, N = 2f", many, _dual(many, f, d, rank))
    yield k(f"5c cuda dual SmolLM2 T={many}", "cuBLAS, N = 2f", many, _dual(many, smol[1], smol[0], rank))
    yield k(f"6 cuda backward 8B T={many}", "cuBLAS, GEMM alone", many, _backward(many, f, d))
    yield k(f"6b cuda backward GPT-2 T={many}", "cuBLAS, GEMM alone", many, _backward(many, gpt2[1], gpt2[0]))
    yield k(f"8 cuda store GPT-2 T={many}", "cuBLAS", many, _store(many, gpt2[1], gpt2[0]))
    for tokens in few:
        yield k(f"7 cuda decode dual 8B T={tokens}", "cuBLAS, N = 2f", tokens, _dual(tokens, f, d, rank))
        yield k(f"7b cuda decode store 8B T={tokens}", "cuBLAS", tokens, _store(tokens, d, f))
