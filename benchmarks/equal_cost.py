"""KL of converted SmolLM2-135M against its cost, in multiplications and in minutes of conversion, on two kinds of text.

    python benchmarks/equal_cost.py --out benchmarks/results/cpu-2-cores              every point (half an hour on two cores)
    python benchmarks/equal_cost.py --against minutes --out …                         those alone that need a quiet machine
    python benchmarks/equal_cost.py --figure FILE.json --png docs/images/equal-cost.png

The closed form of `npt train demo`, without training: ranks allotted, o_proj folded, the directions that the loss feels, refit.
Texts: the plays of the demo, and Python's language reference (`pydoc_data.topics`, of this Python); of each the end is held out.
Calibrated on plays alone, or on both by halves. Multiplications are the weights that a token meets: linear layers, the head, the
components.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from npt_kernels import apply_npt, npt_parameters, remove_npt
from npt_kernels.bench.results import environment, write_json
from npt_kernels.configs import load_run_config
from npt_kernels.evaluation.perplexity import TeacherStates, evaluate, evaluate_base
from npt_kernels.model.install import converted_layers
from npt_kernels.run.open import OpenRun, keep_freed_memory, make_accelerator, open_run
from npt_kernels.text.packing import pack
from npt_kernels.training.kept_casts import kept_casts
from npt_kernels.training.precision import autocast

RANKS = (78, 128, 184, 206, 256)
#: Of calibration, for every rank; KL hardly falls any more from there (the other points).
TOKENS = 32768
#: What KL is set against → points: calibration text, its tokens, mean rank.
POINTS = {
    "minutes": [("plays", tokens, 184) for tokens in (8192, 16384, 32768, 81920)],
    "multiplications": [
        *(("plays", TOKENS, rank) for rank in RANKS),
        *(("both", TOKENS, rank) for rank in (184, 128, 256)),
    ],
}
#: The end of the reference that is held out.
HELD_OUT = 0.3
LENGTH = 256


def reference(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Python's language reference: ``(calibration, held out)``, both ``[n, LENGTH]``."""
    blocks = pack([topics[name] for name in sorted(topics)], tokenizer, LENGTH, None)
    cut = int(len(blocks) * (1 - HELD_OUT))
    return blocks[:cut], blocks[cut:]


def evenly(blocks: Tensor, count: int) -> Tensor:
    """``count`` of the blocks from all over them, each once."""
    if count > len(blocks):
        raise SystemExit(f"{count} sequences wanted, the text has {len(blocks)}")
    return blocks[torch.arange(count) * len(blocks) // count]


def multiplications(model: nn.Module) -> int:
    """Of one token: its linear weights, the head's among them; folded layers leave ``o_proj`` out."""
    layers = [layer for layer in converted_layers(model).values() if layer.npt_plan.projection is not None]
    unused = [layer.self_attn.o_proj.weight.numel() for layer in layers]
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    components = npt_parameters(model) if converted_layers(model) else []
    return linears - sum(unused) + sum(p.numel() for p in components if p.dim() == 2)


def measure(
    opened: OpenRun, config: Any, texts: dict[str, Tensor], teachers: dict[str, TeacherStates], point: Any
) -> dict[str, Any]:
    """One conversion and what it gives on every text; the model is the original again afterwards."""
    model, (calibration, tokens, rank) = opened.model, point
    plays, other = opened.blocks.calibration, texts["reference, for calibration"]
    count = tokens // LENGTH
    if calibration == "both":
        ids = torch.stack([evenly(plays, count // 2), evenly(other, count // 2)], 1).flatten(0, 1)
    else:
        ids = evenly(plays, count)
    original = multiplications(model)
    config.model.rank = f"auto:{rank}"
    accelerator = make_accelerator(config)
    started = time.perf_counter()
    with autocast(accelerator, model, kept_casts(model, config)):
        apply_npt(model, config.npt_config(), ids)
    seconds = time.perf_counter() - started
    row = {"calibration": calibration, "tokens": tokens, "mean_rank": rank, "seconds": seconds,
           "multiplications": multiplications(model) / original}  # fmt: skip
    row["texts"] = {
        name: evaluate(model, teacher.tokens, teacher=teacher).to_dict() for name, teacher in teachers.items()
    }
    remove_npt(model)
    return row


def figure(record: Path, png: Path) -> None:
    """Left: KL against multiplications. Right: KL against minutes of conversion, at one rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(record.read_text())["rows"]
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    colours, styles = {"plays": "#0072B2", "reference": "#D55E00"}, {"plays": "-", "both": "--"}
    for text, colour in colours.items():
        for calibration, style in styles.items():
            mine = [r for r in rows if r["against"] == "multiplications" and r["calibration"] == calibration]
            mine.sort(key=lambda row: row["multiplications"])
            label = f"{text}, calibrated on {'plays' if calibration == 'plays' else 'both texts'}"
            draw(left, [r["multiplications"] for r in mine], mine, text, colour, style, label)
        mine = [r for r in rows if r["against"] == "minutes"]
        draw(right, [r["seconds"] / 60 for r in mine], mine, text, colour, "-", f"{text}, calibrated on plays")
    for row in mine:
        kl = min(row["texts"][text]["kl"] for text in colours)
        right.annotate(
            f"{row['tokens'] // 1024}k",
            (row["seconds"] / 60, kl),
            (0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    left.set(
        xlabel="multiplications of a token ÷ the original's",
        ylabel="KL(original‖converted), nats a token",
        yscale="log",
    )
    left.set_title("mean ranks " + ", ".join(map(str, RANKS)) + f"; {TOKENS // 1024}k calibration tokens", fontsize=9)
    right.set(xlabel="minutes of conversion")
    right.set_title("mean rank 184, by tokens of calibration", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    canvas.savefig(png, dpi=130)


def draw(axes: Any, x: list[float], rows: list[dict[str, Any]], text: str, colour: str, style: str, label: str) -> None:
    kl = [row["texts"][text]["kl"] for row in rows]
    spread = [row["texts"][text]["kl_se"] for row in rows]
    axes.errorbar(x, kl, spread, color=colour, linestyle=style, marker="o", markersize=4, capsize=2, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder of the record, equal-cost.json; its points are not measured again"
    )
    parser.add_argument("--against", choices=[*POINTS], help="only these points")
    parser.add_argument("--figure", type=Path, help="a record to draw, instead of measuring")
    parser.add_argument("--png", type=Path, default=Path("docs/images/equal-cost.png"))
    args = parser.parse_args()
    if args.figure:
        figure(args.figure, args.png)
        return
    if args.out is None:
        parser.error("--out DIR, or --figure FILE")
    keep_freed_memory()
    config = load_run_config("demo")
    with open_run(config, training=False, console=Console()) as opened:
        train, held_out = reference(opened.tokenizer)
        texts = {"reference, for calibration": train}
        ends = {"plays": opened.blocks.heldout, "reference": evenly(held_out, 33)}
        found = {name: evaluate_base(opened.model, ids) for name, ids in ends.items()}
        teachers = {name: teacher for name, (_, teacher) in found.items()}
        path = args.out / "equal-cost.json"
        wanted = [args.against] if args.against else [*POINTS]
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        done = {(row["against"], row["calibration"], row["tokens"], row["mean_rank"]) for row in rows}
        facts = environment(opened.world.device) | {"precision": config.optimization.mixed_precision}
        original = {name: result.to_dict() for name, (result, _) in found.items()}
        for against in wanted:
            for point in [point for point in POINTS[against] if (against, *point) not in done]:
                row = {"against": against, "environment": facts, **measure(opened, config, texts, teachers, point)}
                kl = ", ".join(
                    f"{n} KL {v['kl']:.4f} ratio {v['perplexity_ratio']:.4f}" for n, v in row["texts"].items()
                )
                print(f"{point}: {row['multiplications']:.3f} x, {row['seconds']:.0f} s, {kl}", flush=True)
                rows.append(row)
                write_json({"about": __doc__, "original": original, "rows": rows}, path)


if __name__ == "__main__":
    main()
