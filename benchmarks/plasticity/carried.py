"""How much of a context comes over by replaying its weight changes, over many facts: ``python -m benchmarks.plasticity.carried``.

The table of ``npt transfer`` for every fact, and its mean over facts; ``largest_difference`` is of the logits from those in
context.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from npt_kernels.base_model.loading import load_model
from npt_kernels.configs.schema import RunConfig
from npt_kernels.plasticity.token_maps import write_json
from npt_kernels.plasticity.transfer import Carried, transfer
from npt_kernels.training.distributed import choose_device

from .__main__ import about
from .facts import facts


def mean(rows: list[Carried]) -> dict[str, Any]:
    """One row of the record, over facts."""
    return {
        "p": sum(row.p for row in rows) / len(rows),
        "first_choice": [sum(row.exact for row in rows), len(rows)],
        "kl": sum(row.kl for row in rows) / len(rows),
        "largest_difference": max(row.largest_difference for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plasticity.carried", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of plasticity-carried.json")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = RunConfig()
    config.model.base_model_name = "demo"
    model, tokenizer = load_model(config, choose_device())
    found: dict[str, list[Carried]] = {}
    for fact in facts(options.facts):
        for row in transfer(
            model, tokenizer, fact.fact, fact.prompt, answer=fact.answer, max_new_tokens=1, with_map=False
        ).rows:
            found.setdefault(row.name, []).append(row)
    rows = {name: mean(entries) for name, entries in found.items()}
    for name, row in rows.items():
        print(
            f"{name:40s} p {row['p']:.4f}, first choice {row['first_choice'][0]}/{row['first_choice'][1]}, "
            f"KL {row['kl']:.4f}, largest difference of a logit {row['largest_difference']:.1e}",
            flush=True,
        )
    if options.out is not None:
        write_json(options.out / "plasticity-carried.json", {"about": about(), "facts": options.facts, "rows": rows})


if __name__ == "__main__":
    main()
