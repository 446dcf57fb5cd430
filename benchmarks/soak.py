"""Does anything grow? Convert → train → save → load → generate → remove, over and over in one process, on a tiny model.

    python benchmarks/soak.py                       20 minutes, prints
    python benchmarks/soak.py --minutes 1           shorter
    python benchmarks/soak.py --out benchmarks/results --png docs/images      the record and its figure

Behind every round: resident memory, file descriptors and threads of the process, Python objects, and whether the round gave the
bits of the first one. Every tenth round is a whole ``run_training`` (accelerate, checkpoints, records, plots) instead of a loop
of its own. The first tenth of the time is warm-up; memory is flat if the median of the last tenth is within 1 % of that of the
tenth behind the warm-up, and descriptors and threads must not be more. Exit code 1 where anything grows or a bit differs.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, remove_npt, save_npt
from npt_kernels.bench.results import device_folder, environment, write_json
from npt_kernels.configs.schema import RunConfig
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run.run import run_training
from npt_kernels.training.objectives import KLObjective, LocalObjective

#: Of the time, at the start.
WARM_UP = 0.1
#: The memory of the end may differ by so much.
FLAT = 0.01
RULES = ("self_key", "rank1", "diagonal", "anchored")


@dataclass
class Text:
    """What ``run_training`` reads."""

    train: Tensor
    calibration: Tensor
    heldout: Tensor
    sources: list[str] = field(default_factory=lambda: ["random numbers"])


def tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def token_ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def bits_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def one_round(model: nn.Module, number: int, folder: Path) -> dict[str, str]:
    """The bits of everything that came out of it, by name."""
    rule = RULES[number % len(RULES)]
    text = Text(token_ids(8, 24, 1), token_ids(4, 24, 2), token_ids(2, 24, 3))
    settings: dict[str, Any] = {"layers": "all", "rank": 8, "rule": rule}
    apply_npt(model, NPTConfig(**settings), calibration=text.calibration if rule == "self_key" else None)
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-3)
    for step, objective in enumerate((LocalObjective(model), KLObjective(model))):
        objective.accumulate(text.train[2 * step : 2 * step + 2], 1.0, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
    save_npt(model, folder / "adapter")
    trained = bits_of(adapter_state_dict(model))
    remove_npt(model)
    load_npt(model, folder / "adapter")
    found = {f"{rule}: loaded": bits_of(adapter_state_dict(model)), f"{rule}: trained": trained}
    written = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(1, 8, 4)
    found[f"{rule}: text"] = str(model.generate(ids, attention_mask=torch.ones_like(ids), **written).tolist())  # type: ignore[operator]
    with npt_disabled(model):
        found["original's text"] = str(model.generate(ids, attention_mask=torch.ones_like(ids), **written).tolist())  # type: ignore[operator]
    remove_npt(model)
    return found


def whole_run(model: nn.Module, folder: Path) -> dict[str, str]:
    """The same by ``run_training``, resumed once."""
    text = Text(token_ids(8, 24, 1), token_ids(4, 24, 2), token_ids(2, 24, 3))
    config = RunConfig.from_mapping(
        {
            "model": {"rank": 8, "basis": "pca"},
            "training": {
                "mode": "local",
                "batch_size": 2,
                "max_steps": 3,
                "num_epochs": 4,
                "save_steps": 1,
                "eval_steps": 2,
            },
            "optimization": {"mixed_precision": "no"},
            "evaluation": {"tokens": 48, "prompts": []},
            "paths": {"output_dir": str(folder / "run")},
        }
    )
    console = Console(file=io.StringIO(), width=120)
    run_training(config, model, None, text, console=console)
    found = {"run: trained": bits_of(adapter_state_dict(model))}
    remove_npt(model)
    run_training(config, model, None, text, console=console, resume=folder / "run")
    found["run: resumed"] = bits_of(adapter_state_dict(model))
    remove_npt(model)
    return found


def sample(process: psutil.Process, started: float, rounds: int) -> dict[str, float]:
    gc.collect()
    return {
        "seconds": time.monotonic() - started,
        "rounds": rounds,
        "rss": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "objects": len(gc.get_objects()),
    }


def soak(minutes: float) -> dict[str, Any]:
    model, process, started = tiny_model(), psutil.Process(), time.monotonic()
    base = bits_of(dict(model.state_dict()))
    samples: list[dict[str, float]] = []
    first: dict[str, str] = {}
    differing: list[str] = []
    rounds = runs = 0
    while time.monotonic() - started < 60 * minutes:
        with tempfile.TemporaryDirectory(prefix="npt-soak-") as folder:
            if rounds % 10 == 9:
                found, runs = whole_run(model, Path(folder)), runs + 1
            else:
                found = one_round(model, rounds, Path(folder))
        found["base"] = bits_of(dict(model.state_dict()))
        rounds += 1
        differing += [
            f"round {rounds}: {name}" for name, value in found.items() if first.setdefault(name, value) != value
        ]
        samples.append(sample(process, started, rounds))
        if rounds % 50 == 0:
            last = samples[-1]
            print(
                f"{last['seconds'] / 60:5.1f} min  {rounds:5} rounds  {last['rss'] / 2**20:8.2f} MiB  "
                f"{last['descriptors']:.0f} descriptors  {last['threads']:.0f} threads  {last['objects']:,} objects",
                flush=True,
            )
    if first["base"] != base:
        differing.append("the base itself")
    return {"rounds": rounds, "whole_runs": runs, "minutes": (time.monotonic() - started) / 60, "differing": differing,
            "samples": samples}  # fmt: skip


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """What grew, from the start behind the warm-up to the end."""
    samples, total = record["samples"], record["samples"][-1]["seconds"]
    start = [s for s in samples if WARM_UP * total <= s["seconds"] < 2 * WARM_UP * total]
    end = [s for s in samples if s["seconds"] >= (1 - WARM_UP) * total]

    def median(part: list[dict[str, float]], name: str) -> float:
        return statistics.median(s[name] for s in part)

    values: dict[str, Any] = {
        name: {"start": median(start, name), "end": median(end, name)}
        for name in ("rss", "descriptors", "threads", "objects")
    }
    values["rss"]["change"] = values["rss"]["end"] / values["rss"]["start"] - 1
    values["rss"]["bytes_per_round"] = (values["rss"]["end"] - values["rss"]["start"]) / (
        median(end, "rounds") - median(start, "rounds")
    )
    bad = []
    if abs(values["rss"]["change"]) > FLAT:
        bad.append(f"memory changed by {values['rss']['change']:+.2%}")
    bad += [
        f"{name} grew from {values[name]['start']:.0f} to {values[name]['end']:.0f}"
        for name in ("descriptors", "threads")
        if values[name]["end"] > values[name]["start"]
    ]
    if record["differing"]:
        bad.append(f"{len(record['differing'])} results differ, first {record['differing'][0]}")
    return {**values, "bad": bad}


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    samples = record["samples"]
    minutes = [s["seconds"] / 60 for s in samples]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 4.4), sharex=True, height_ratios=(2, 1), constrained_layout=True
    )
    upper.plot(minutes, [s["rss"] / 2**20 for s in samples], linewidth=0.8)
    start = record["verdict"]["rss"]["start"] / 2**20
    upper.axhspan(start * (1 - FLAT), start * (1 + FLAT), alpha=0.15, label="± 1 % of the start behind the warm-up")
    upper.axvspan(0, minutes[-1] * WARM_UP, color="grey", alpha=0.12, label="warm-up")
    upper.set_ylim(start * 0.93, start * 1.04)
    upper.set_ylabel("resident memory, MiB")
    upper.legend(frameon=False, fontsize=8, loc="lower right")
    upper.set_title(
        f"{record['rounds']:,} × convert, train, save, load, generate, remove ({record['whole_runs']} as whole runs)",
        fontsize=9,
    )
    for name in ("descriptors", "threads"):
        lower.plot(minutes, [s[name] for s in samples], linewidth=0.8, label=name)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("minutes")
    lower.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, help="folder for the record (default: print only)")
    parser.add_argument("--png", type=Path, help="folder for the figure, soak.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    record = {"suite": "soak", "environment": facts, **soak(args.minutes)}
    record["verdict"] = found = verdict(record)
    rss = found["rss"]
    print(
        f"{record['rounds']:,} rounds, {record['whole_runs']} of them whole runs, in {record['minutes']:.1f} min: memory "
        f"{rss['start'] / 2**20:.2f} → {rss['end'] / 2**20:.2f} MiB ({rss['change']:+.2%}, {rss['bytes_per_round']:.0f} bytes a "
        f"round), descriptors {found['descriptors']['start']:.0f} → {found['descriptors']['end']:.0f}, threads "
        f"{found['threads']['start']:.0f} → {found['threads']['end']:.0f}, objects {found['objects']['start']:,.0f} → "
        f"{found['objects']['end']:,.0f}"
    )
    for line in found["bad"]:
        print(f"BAD: {line}")
    # A point every few seconds draws the same curve.
    step = max(1, len(record["samples"]) // 600)
    record["samples"] = record["samples"][::step]
    if args.out:
        print(write_json(record, args.out / device_folder(facts) / "soak.json"))
    if args.png:
        plot(record, args.png / "soak.png")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
