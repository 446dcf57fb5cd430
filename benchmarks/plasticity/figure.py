"""The figure of the records: ``python -m benchmarks.plasticity.figure FILES --out plasticity.png``.

Left: facts written alone, one group of bars a method: recall, questions, leak, known facts. Right: N facts at once, and what
prose pays. Bars and lines have the binomial standard error of their counts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

#: Measure → (label, colour): Okabe and Ito's, told apart by the colour-blind too.
MEASURES = {
    "verbatim": ("word for word", "#0072B2"),
    "questions": ("questions", "#56B4E9"),
    "leak": ("leak: other subjects", "#D55E00"),
    "known": ("facts of the world, of those known before", "#009E73"),
}
MARKS = ("o", "s", "^", "D")


def share(row: dict[str, Any], name: str) -> tuple[float, float]:
    """``(share, standard error)`` of a measure after the edit; known facts: of those known before."""
    hits, asked = row["after"]["counts"][name]
    if name == "known":
        asked = row["before"]["counts"][name][0]
    p = hits / max(1, asked)
    return p, math.sqrt(max(0.0, p * (1 - p)) / max(1, asked))


def alone(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Bars of the rows with one fact at a time."""
    reference = dict(rows[0], method="in context", after=rows[0]["in_context"])
    shown = [reference, *rows]
    width = 0.8 / len(MEASURES)
    for i, (name, (label, colour)) in enumerate(MEASURES.items()):
        found = [share(row, name) for row in shown]
        at = [y + (i - 1.5) * width for y in range(len(shown))]
        axes.barh(
            at, [p for p, _ in found], width, xerr=[e for _, e in found], color=colour, label=label, ecolor="#555"
        )
    axes.set_yticks(
        range(len(shown)), [f"{row['method']}\nprose {row['after']['prose_ratio']:.3f}" for row in shown], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("share (bar: standard error)")
    axes.set_title(f"one fact at a time ({rows[0]['facts']} facts; fine-tuning and LoRA 6)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def together(axes: Any, prose: Any, rows: list[dict[str, Any]]) -> None:
    """Lines over N of the rows with several facts at once."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    styles = ("-", "--", ":")
    for method, style in zip(methods, styles, strict=False):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["together"])
        n = [row["together"] for row in mine]
        for k, ((name, (_, colour)), mark) in enumerate(zip(MEASURES.items(), MARKS, strict=True)):
            found = [share(row, name) for row in mine]
            beside = [value * (1 + 0.04 * (k - 1.5)) for value in n]  # else equal shares hide each other
            axes.errorbar(
                beside,
                [p for p, _ in found],
                [e for _, e in found],
                color=colour,
                linestyle=style,
                marker=mark,
                capsize=2,
            )
        prose.plot(n, [row["after"]["prose_ratio"] for row in mine], color="#333", linestyle=style, marker="o")
        axes.plot([], [], color="#333", linestyle=style, label=method)
    for panel in (axes, prose):
        panel.set_xscale("log")
        counts = sorted({row["together"] for row in rows})
        panel.set_xticks(counts, [str(n) for n in counts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("share")
    axes.set_title("N facts at once", fontsize=10)
    axes.legend(fontsize=8)
    prose.axhline(1.0, color="#999", linewidth=0.8)
    prose.set_ylabel("prose perplexity ÷ before")
    prose.set_xlabel("N facts in the model")


def draw(records: list[dict[str, Any]], path: Path) -> Path:
    rows = [row for record in records for row in record["rows"]]
    single = [row for row in rows if row["together"] == 1 and row["facts"] > 1]
    joint = [row for row in rows if not (row["together"] == 1 and row["facts"] > 1)]
    if not single or not joint:
        raise SystemExit("the records need rows of facts written alone and of several at once")
    figure, panels = pyplot.subplot_mosaic(
        [["alone", "joint"], ["alone", "prose"]], figsize=(12, 8), height_ratios=[2, 1]
    )
    alone(panels["alone"], single)
    together(panels["joint"], panels["prose"], joint)
    about = records[0]["about"]
    figure.suptitle(f"Facts written into the weights: {about['model']}", fontsize=12)
    handles, labels = panels["alone"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plasticity.figure", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="JSON files of python -m benchmarks.plasticity")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args()
    print(draw([json.loads(path.read_text(encoding="utf-8")) for path in options.records], options.out))


if __name__ == "__main__":
    main()
