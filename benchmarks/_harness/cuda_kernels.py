"""The rows of benchmarks/notes.md that are about single Hopper kernels, each beside the vendor's GEMM of the same flops: what is
the main loop's quality, and what is the fusion's gain. Names begin with the row's number there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from npt_kernels.kernels.cuda import launch
from npt_kernels.kernels.cuda.choose import Config, Epilogue, choose
from npt_kernels.kernels.cuda.launch import LOW, LOW_FIRST, MAIN, Segment, low_rank
from npt_kernels.measure.timing import Call, rotation

__all__ = ["cuda_rows"]

Make = Callable[[torch.device], tuple[dict[str, Call], int]]
DTYPE = torch.bfloat16


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


def cuda_rows(small: bool) -> Iterator[tuple[str, str, int, Make]]:
    """(name, baseline, tokens, make) of every row."""
    if small:
        big, eight, gpt2, smol, many, few, rank = 256, (64, 96), (32, 64), (24, 40), 72, (1, 16), 8
    else:
        big, eight, gpt2, smol, many, few, rank = 8192, (4096, 14336), (768, 3072), (576, 1536), 8192, (1, 16, 64), 64
    d, f = eight
    yield f"1-3 cuda store {big}^3", "cuBLAS", big, _store(big, big, big)
    yield f"5 cuda dual 8B T={many}", "cuBLAS, N = 2f", many, _dual(many, f, d, rank)
    yield f"5c cuda dual SmolLM2 T={many}", "cuBLAS, N = 2f", many, _dual(many, smol[1], smol[0], rank)
    yield f"6 cuda backward 8B T={many}", "cuBLAS, GEMM alone", many, _backward(many, f, d)
    yield f"6b cuda backward GPT-2 T={many}", "cuBLAS, GEMM alone", many, _backward(many, gpt2[1], gpt2[0])
    yield f"8 cuda store GPT-2 T={many}", "cuBLAS", many, _store(many, gpt2[1], gpt2[0])
    for tokens in few:
        yield f"7 cuda decode dual 8B T={tokens}", "cuBLAS, N = 2f", tokens, _dual(tokens, f, d, rank)
        yield f"7b cuda decode store 8B T={tokens}", "cuBLAS", tokens, _store(tokens, d, f)
