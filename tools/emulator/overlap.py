"""Decode layers whose kernels overlap (programmatic dependent launch), in memory that is reused: the same bits as one by one.

Runs the package's own MLP forward, layer after layer, so its decisions about overlap are under test too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import names  # noqa: F401  (chooses the emulated module)
import torch
from control import EARLIEST, Emulator
from names import forward_mlp
from stream import Stream
from torch import Tensor

from npt_kernels.rules import RULES

__all__ = ["SHAPES", "fault", "run_all"]

#: tokens, d, f, R.
SHAPES = ((3, 328, 264, 24), (17, 200, 520, 64), (64, 264, 328, 40))
LAYERS = 3


def _weights(rule: str, d: int, f: int, rank: int, layer: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(layer)

    def make(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * cols**-0.5).bfloat16()

    def key(width: int) -> Tensor | None:
        kind = RULES[rule].key
        return None if kind == "none" else make(1, width)[0] if kind == "vector" else make(rank, width)

    weights: dict[str, Tensor | None] = {
        "gate_weight": make(f, d), "up_weight": make(f, d), "down_weight": make(d, f), "w_down": make(rank, d).t().contiguous(),
    }  # fmt: skip
    for name, width, out in (("gate", d, f), ("up", d, f), ("down", f, d)):
        weights |= {f"{name}_key": key(width), f"{name}_value": make(rank, out) * 0.02}  # rank1 is cubic in x
    return weights


def _layers(rule: str, x: Tensor, weights: list[dict[str, Tensor | None]]) -> Tensor:
    for layer in weights:
        x = forward_mlp(x, layer, rule)
    return x


def fault(emulator: Emulator, rule: str, shape: tuple[int, int, int, int], seeds: range) -> tuple[str | None, int]:
    """What differs between overlapped and sequential layers, or ``None``; and how many allocations were given used memory."""
    tokens, d, f, rank = shape
    weights = [_weights(rule, d, f, rank, layer) for layer in range(LAYERS)]
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(99)).bfloat16()
    emulator.follow(EARLIEST)
    expected = _layers(rule, x, weights)
    if expected.isnan().any():
        return f"{rule} {shape}: NaN one by one", 0
    reused = 0
    for seed in seeds:
        try:
            with Stream(emulator, seed) as stream:
                got = _layers(rule, x, weights)
            reused += stream.reused
        except RuntimeError as error:
            return f"{rule} {shape} seed {seed}: {error}", reused
        if not torch.equal(got, expected):
            wrong = int((got != expected).sum())
            return f"{rule} {shape} seed {seed}: {wrong} of {got.numel()} elements differ when kernels overlap", reused
    return None, reused


def run_all(seeds: int) -> tuple[list[str], dict[str, int]]:
    """Faults of every rule and shape, and counts."""
    emulator = Emulator()
    before, faults, reused, runs = emulator.stats(), [], 0, 0
    for rule in RULES:
        for shape in SHAPES:
            why, count = fault(emulator, rule, shape, range(seeds))
            reused, runs = reused + count, runs + seeds
            faults += [why] if why else []
    after = emulator.stats()
    counts = {"runs": runs, "reused": reused, **{n: after[n] - before[n] for n in ("launches", "overlapped")}}
    return faults, counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    found, numbers = run_all(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    print("\n".join([*found, str(numbers)]))
    sys.exit(1 if found or not numbers["overlapped"] or not numbers["reused"] else 0)
