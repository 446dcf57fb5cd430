"""Fine-tuning SmolLM2 by per-token weight changes beside LoRA: ``python -m benchmarks.task --out benchmarks/results/<device>``.

The same layers, matrices, batches and seeds, about the same number of parameters, AdamW at the same two learning rates: PEFT's
LoRA, and every rule as an extra change of the original layer (``attention_residual=True``). ``--beside RULE…``: the extra change
beside the components of a converted model (``add_extra``), in a record of its own. Measured before and after: −log p of
held-out text of the task (a play), of other text (this package's documentation: what was forgotten), and facts of the world.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, __version__, add_extra, apply_npt, npt_parameters, remove_extra, remove_npt
from npt_kernels.base_model.loading import load_model
from npt_kernels.configs.schema import RunConfig
from npt_kernels.model.head import OutputHead
from npt_kernels.plasticity.corpus import demo_corpus, windows
from npt_kernels.plasticity.recall import Examination, prose_nll
from npt_kernels.plasticity.token_maps import write_json
from npt_kernels.training.distributed import choose_device
from npt_kernels.training.task import cross_entropy

from .plasticity.__main__ import cpu

LAYERS = range(20, 30)
#: Ranks that come nearest to LoRA's 101,376 parameters a layer at r = 16.
RANKS = {"LoRA": 16, "self_key": 24, "rank1": 15, "diagonal": 18, "anchored": 23}
RATES = (1e-3, 3e-3)
#: Tokens of a step: one sequence.
LENGTH = 256


@contextmanager
def adapted(model: nn.Module, method: str, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside the block ``model`` has a fresh adapter, whose parameters these are; afterwards none."""
    if method == "LoRA":
        import peft

        config = peft.LoraConfig(
            r=RANKS[method],
            lora_alpha=2 * RANKS[method],
            target_modules=["gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(LAYERS),
        )
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(model, config)
        try:
            yield [p for p in tuned.parameters() if p.requires_grad]
        finally:
            tuned.unload()
        return
    settings = NPTConfig(
        layers=list(LAYERS), rule=method, rank=RANKS[method], attention_residual=True, init="small", seed=seed
    )
    apply_npt(model, settings)
    try:
        yield npt_parameters(model)
    finally:
        remove_npt(model)


@contextmanager
def beside(model: nn.Module, rule: str, seed: int) -> Iterator[list[nn.Parameter]]:
    """As :func:`adapted`, on a converted model, whose components stay."""
    add_extra(model, RANKS[rule], rule=rule, layers=list(LAYERS), seed=seed)
    try:
        yield npt_parameters(model)
    finally:
        remove_extra(model)


def train(model: nn.Module, parameters: list[nn.Parameter], text: Tensor, rate: float, seed: int, steps: int) -> bool:
    """``steps`` AdamW steps of one sequence each, in the seed's order; whether every loss was finite."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    optimizer, head = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0), OutputHead(model)
    for step in range(steps):
        ids = text[order[step % len(text)]].unsqueeze(0)
        loss = cross_entropy(head.states(ids)[0, :-1], ids[0, 1:], head.weight, head.bias)
        if not loss.isfinite():
            return False
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return True


class Measures:
    def __init__(self, model: nn.Module, tokenizer: Any, task: Tensor, other: Tensor) -> None:
        self.model, self.task, self.other = model, task, other
        self.examination = Examination(model, tokenizer, [])

    def __call__(self) -> dict[str, float]:
        return {
            "task": prose_nll(self.model, self.task, []),
            "other": prose_nll(self.model, self.other, []),
            "known": self.examination.row().counts["known"][0],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of task.json")
    parser.add_argument("--methods", nargs="*", default=list(RANKS))
    parser.add_argument(
        "--beside", nargs="*", default=[], metavar="RULE", help="instead: beside a converted model's components"
    )
    parser.add_argument("--rank", default="auto:184", help="of those components")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, start = RunConfig(), time.perf_counter()
    config.model.base_model_name = "demo"
    model, tokenizer = load_model(config, choose_device())
    model.eval().requires_grad_(False)
    corpus, docs = demo_corpus(), Path(__file__).parents[1] / "docs"
    text = windows(tokenizer, corpus.calibration, 128, LENGTH)
    other = [
        "\n\n".join((docs / name).read_text(encoding="utf-8") for name in ("data.md", "quantisation.md", "scaling.md"))
    ]
    measure = Measures(
        model, tokenizer, windows(tokenizer, corpus.heldout, 12, LENGTH), windows(tokenizer, other, 12, LENGTH)
    )
    before, rows, converted = measure(), [], None
    print(f"before: task {before['task']:.3f}, other {before['other']:.3f} nats a token, known {before['known']} of 16")
    put = adapted
    if options.beside:
        apply_npt(model, NPTConfig(rank=options.rank), windows(tokenizer, corpus.calibration, 128, LENGTH))
        put, converted = beside, measure()
        print(
            f"converted: task {converted['task']:.3f}, other {converted['other']:.3f}, known {converted['known']}",
            flush=True,
        )
    for method in options.beside or options.methods:
        for rate in RATES:
            for seed in range(options.seeds):
                with put(model, method, seed) as parameters:
                    finite = train(model, parameters, text, rate, seed, options.steps)
                    after = measure()
                    count = sum(p.numel() for p in parameters)
                row = {
                    "method": f"beside, {method}" if options.beside else method,
                    "learning_rate": rate,
                    "seed": seed,
                    "parameters": count,
                    "finite": finite,
                    **after,
                }
                rows.append(row)
                print(
                    f"{method:9s} lr {rate:g} seed {seed}: {count:,} parameters, task {after['task'] - before['task']:+.3f}, "
                    f"other {after['other'] - before['other']:+.3f}, known {after['known']}",
                    flush=True,
                )
                if options.out is not None:
                    name = "task-beside.json" if options.beside else "task.json"
                    write(options.out / name, before, rows, options, time.perf_counter() - start, converted)


def write(
    path: Path, before: dict[str, float], rows: list[dict[str, Any]], options: Any, seconds: float, converted: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "model": "SmolLM2-135M-Instruct, float32",
        "layers": f"{LAYERS.start}-{LAYERS.stop - 1}, gate, up and down",
        "steps": options.steps,
        "tokens_per_step": LENGTH,
        "cpu": cpu(),
        "threads": options.threads,
        "date": date.today().isoformat(),
        "npt_kernels": __version__,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
    }
    more = {} if converted is None else {"converted": converted, "rank": options.rank}
    write_json(path, {"about": about, "before": before, **more, "rows": rows})


if __name__ == "__main__":
    main()
