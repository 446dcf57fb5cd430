"""The ops in a network of one's own: a memory that is written per token and read by a weight change. No transformers needed.

    python examples/ops_in_your_network.py

The task: pairs (key, value) are shown, then one key alone; the value is to be said. A linear layer whose weight changes with a
summary of the pairs learns it; the same layer without the change cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npt_kernels import npt_factored_linear, npt_linear

WIDTH, PAIRS, RANK = 8, 2, 24


class Associative(nn.Module):
    """``y = (W + ΔW) q``, ``ΔW`` of rank 1 for each of R numbers ``z`` made of the pairs: ``ΔW = Σ v_b ⊗ v_a``."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.change = change
        self.write = nn.Sequential(nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, RANK))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.w_a_up = nn.Parameter(torch.randn(RANK, WIDTH) / WIDTH**0.5)
        self.w_b_up = nn.Parameter(torch.randn(RANK, WIDTH) / RANK**0.5)

    def forward(self, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        """``keys, values [n, PAIRS, d]``, ``query [n, d]`` → ``[n, d]``."""
        z = self.write(torch.cat([keys, values], -1)).sum(1)  # [n, R]
        z = z if self.change else torch.zeros_like(z)
        # ΔW [n, d, d] is never made: query and z go in, the output comes out. k terms of rank 1: R = k·r.
        return npt_factored_linear(query, z, self.weight, self.w_a_up, self.w_b_up, rule="rank1", num_ranks=RANK)


def problem(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys = F.normalize(torch.randn(n, PAIRS, WIDTH, generator=generator), dim=-1)
    values = torch.randn(n, PAIRS, WIDTH, generator=generator)
    asked = torch.randint(PAIRS, (n,), generator=generator)
    rows = torch.arange(n)
    return keys, values, keys[rows, asked], values[rows, asked]


def trained(change: bool, steps: int = 600) -> float:
    """Mean squared error of the values on new pairs, over their variance."""
    torch.manual_seed(0)
    network, generator = Associative(change), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        keys, values, query, want = problem(128, generator)
        F.mse_loss(network(keys, values, query), want).backward()
        optimizer.step()
        optimizer.zero_grad()
    keys, values, query, want = problem(2048, generator)
    with torch.no_grad():
        return float(F.mse_loss(network(keys, values, query), want) / want.square().mean())


def main() -> None:
    # With explicit vectors the change can be written by hand: v_a = the key, v_b = the value, and W + Σ v_b ⊗ v_a answers.
    keys, values, query, want = problem(4, torch.Generator().manual_seed(2))
    answer = npt_linear(query, torch.zeros(WIDTH, WIDTH), keys, values)  # x [n, in], v_a [n, k, in], v_b [n, k, out]
    print(f"written by hand: correlation with the value {F.cosine_similarity(answer, want).mean():.2f}")
    print(f"learned with ΔW: error {trained(True):.2f} of the variance; without: {trained(False):.2f}")


if __name__ == "__main__":
    main()
