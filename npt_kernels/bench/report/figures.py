"""The figures of the report, each drawn once: as inline SVG for the page (light and dark) and as PNG for documents."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ..providers import BASELINE
from ..results import SIZES
from .collect import OURS, Collected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Drawing", "draw_all"]

#: Okabe-Ito: told apart with every common colour blindness. Ours are the strong ones.
_COLOURS = {
    "cuda": "#d55e00", "triton": "#0072b2", "eager": "#009e73", "kconcat": "#cc79a7", "compile": "#e69f00",
    "loop": "#7f7f7f", "materialised": "#8c6d31", "peft": "#56b4e9", "liger": "#b8860b", "frozen": "#5f5f5f",
    "triton-mainloop": "#4f8fc0", "cuda-mainloop": "#e08a50",
}  # fmt: skip
_MARKERS = {"cuda": "D", "triton": "o", "eager": "s", "kconcat": "^", "compile": "v", "loop": "x", "materialised": "+",
            "peft": "P", "liger": "*", "frozen": "."}  # fmt: skip
#: Ink and grid in these colours become the page's own in the SVG.
_INK, _GRID = "#101112", "#d8d9da"
_STYLE = {
    "font.size": 10.5, "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _GRID, "axes.spines.top": False, "axes.spines.right": False, "text.color": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "legend.frameon": False,
    "lines.linewidth": 1.7, "lines.markersize": 5.5, "svg.fonttype": "none", "svg.hashsalt": "npt", "legend.fontsize": 9.5,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        name: Id in the page.
        document: File name for documents, the same whatever model or size it was drawn for; ``None``: only in the page.
        title: Heading.
        caption: What is drawn, on what, at which commit.
        stale: Why it no longer describes the code, or ``None``.
        paint: Draws into new axes.
        height: Inches, at a width of 5.6.
    """

    name: str
    document: str | None
    title: str
    caption: str
    stale: str | None
    paint: Callable[[Axes], None]
    height: float = 3.9

    def _figure(self) -> Figure:
        # No pyplot: its figures are global, and a program that plots for itself must not meet ours.
        figure = Figure(figsize=(5.6, self.height), layout="constrained")
        FigureCanvasAgg(figure)
        self.paint(figure.subplots())
        return figure

    def svg(self) -> str:
        """Inline SVG without fixed ink: text and lines take the page's colours, ids are this figure's own."""
        with matplotlib.rc_context(_STYLE):
            buffer = io.StringIO()
            self._figure().savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="|url\()#', rf"\1#{self.name}-", text)
        text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*pt" ?', r"<svg \1", text)
        text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*pt" ?', r"<svg \1", text)
        label = f"{self.title}: {self.caption}".replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
        return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self, folder: Path) -> Path:
        """``folder/bench-DOCUMENT.png``, with what it was measured on, and whether it is stale, written below it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"bench-{self.document}.png"
        with matplotlib.rc_context(_STYLE):
            figure = self._figure()
            figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            note = self.caption + (f"\nSTALE: {self.stale}" if self.stale else "")
            figure.supxlabel("\n".join(_wrapped(note, 96)), fontsize=7.5, x=0.01, ha="left")
            figure.savefig(path, dpi=150, facecolor="white")
        return path


def _wrapped(text: str, width: int) -> Iterator[str]:
    import textwrap

    for line in text.splitlines():
        yield from textwrap.wrap(line, width)


def draw_all(collected: Collected) -> list[Drawing]:
    """Every figure that the data has rows for, best device first."""
    drawings: list[Drawing] = []
    for number, device in enumerate(collected.devices):
        for drawing in (*_ratios(collected, device), *_roofline(collected, device), *_memory(collected, device),
                        *_training(collected, device)):  # fmt: skip
            if number:
                drawing = replace(drawing, name=f"{drawing.name}-{number + 1}")
            if any(drawing.document == other.document for other in drawings):  # documents show the first device
                drawing = replace(drawing, document=None)
            drawings.append(drawing)
    return drawings


def _caption(rows: Sequence[dict[str, Any]], what: str) -> str:
    commits = ", ".join(dict.fromkeys((row["commit"] or "no commit")[:9] for row in rows))
    small = "; small stand-in shapes, which say nothing about real sizes" if rows[0]["size"] == "small" else ""
    return f"{what}. {rows[0]['device']}, commit {commits}{small}."


def _stale(rows: Sequence[dict[str, Any]]) -> str | None:
    return next((str(row["stale"]) for row in rows if row["stale"]), None)


def _document(figure: str, model: str, size: str) -> str | None:
    """Its name in documents, which show the goals' model and, at a CPU's sizes, the demo's."""
    if model.startswith("Llama-3.1-8B"):
        return figure
    return f"cpu-{figure}" if size == "cpu" and model == "SmolLM2-135M" else None


def _order(providers: Sequence[str]) -> list[str]:
    known = [*OURS, *(name for name in _COLOURS if name not in OURS)]
    return sorted(dict.fromkeys(providers), key=lambda name: known.index(name) if name in known else len(known))


def _line(axes: Axes, provider: str, x: Sequence[float], y: Sequence[float], spread: Any = None) -> None:
    width = 2.2 if provider in OURS else 1.3
    colour = _COLOURS.get(provider, "#7f7f7f")
    axes.plot(x, y, label=provider, color=colour, marker=_MARKERS.get(provider, "."), linewidth=width)
    if spread is not None:
        low, high = zip(*spread, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, columnspacing=1.2, handlelength=1.8)


# ---- time ratio by tokens --------------------------------------------------------------------------------------------

_MODE_TITLES = {"forward": "forward", "local": "local training", "end_to_end": "end-to-end training"}


def _ratios(collected: Collected, device: str) -> Iterator[Drawing]:
    for size in SIZES:
        rows = [r for r in collected.of("kernels", device, op="mlp", size=size) if "ratio" in r]
        if not rows:
            continue
        for shape in dict.fromkeys(row["shape"] for row in rows):
            for mode, title in _MODE_TITLES.items():
                chosen = [r for r in rows if r["shape"] == shape and r["mode"] == mode]
                rank = _commonest(chosen, "rank")
                chosen = [r for r in chosen if r["rank"] == rank]
                if len({r["tokens"] for r in chosen}) < 2:
                    continue
                slug = re.sub(r"[^a-z0-9]+", "-", f"{shape} {mode}".lower())
                what = f"time of an MLP call ÷ the same MLP without a delta, interleaved launches, r = {rank}; band: 10–90 %"
                yield Drawing(
                    f"ratio-{slug}", _document(f"ratio-{mode}", shape, size), f"{shape}, {title}",
                    _caption(chosen, what), _stale(chosen), _paint_ratios(chosen),
                )  # fmt: skip
        return  # small shapes are drawn only where there is nothing better


def _commonest(rows: Sequence[dict[str, Any]], field: str) -> Any:
    values = [row[field] for row in rows]
    return max(dict.fromkeys(values), key=values.count, default=None)


def _paint_ratios(rows: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for provider in _order([row["provider"] for row in rows]):
            if provider == BASELINE:
                continue
            own = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["tokens"])
            _line(
                axes, provider, [r["tokens"] for r in own], [r["ratio"] for r in own], [r["ratio_p10_p90"] for r in own]
            )
        axes.axhline(1, color=_INK, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _log_axis(axes.xaxis, [row["tokens"] for row in rows])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens")
        axes.set_ylabel("time ÷ frozen layer")
        _legend(axes)

    return paint


# ---- roofline --------------------------------------------------------------------------------------------------------


def _roofline(collected: Collected, device: str) -> Iterator[Drawing]:
    for size in SIZES:
        rows = [r for r in collected.of("kernels", device, size=size) if "roofline_share" in r and r["op"] != "norm"
                and r["mode"] in ("forward", "decode")]  # fmt: skip
        if rows:
            what = "share of the roofline measured in the same run, forward and decode, every shape and rank"
            yield Drawing(
                "roofline",
                "roofline",
                "Share of the roofline",
                _caption(rows, what),
                _stale(rows),
                _paint_roofline(rows),
            )
            return


def _paint_roofline(rows: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for provider in _order([row["provider"] for row in rows]):
            own = [r for r in rows if r["provider"] == provider]
            axes.scatter(
                [r["tokens"] for r in own], [100 * r["roofline_share"] for r in own], s=22, alpha=0.75, label=provider,
                color=_COLOURS.get(provider, "#7f7f7f"), marker=_MARKERS.get(provider, "."),
            )  # fmt: skip
        axes.axhline(100, color=_INK, linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, max(105.0, *(105 * r["roofline_share"] for r in rows)))
        _log_axis(axes.xaxis, [row["tokens"] for row in rows])
        axes.set_xlabel("tokens")
        axes.set_ylabel("% of the roofline")
        _legend(axes)

    return paint


# ---- memory by rank --------------------------------------------------------------------------------------------------


def _memory(collected: Collected, device: str) -> Iterator[Drawing]:
    for size in SIZES:
        rows = [r for r in collected.of("memory", device, op="mlp", mode="local", size=size) if "peak_bytes" in r]
        for shape in dict.fromkeys(row["shape"] for row in rows):
            own = [r for r in rows if r["shape"] == shape]
            # The token count at which the ranks vary.
            ranks = {t: len({r["rank"] for r in own if r["tokens"] == t}) for t in {r["tokens"] for r in own}}
            tokens = max(ranks, key=lambda t: (ranks[t], t))
            chosen = [r for r in own if r["tokens"] == tokens]
            if ranks[tokens] < 2:
                continue
            slug = re.sub(r"[^a-z0-9]+", "-", shape.lower())
            what = f"peak of an MLP's forward and local backward beyond inputs and weights, T = {tokens:,}; hollow: by formula"
            yield Drawing(
                f"memory-{slug}", _document("memory", shape, size), f"Memory by rank, {shape}",
                _caption(chosen, what), _stale(chosen), _paint_memory(chosen),
            )  # fmt: skip
        if rows:
            return


def _paint_memory(rows: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for provider in _order([row["provider"] for row in rows]):
            own = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["rank"])
            _line(axes, provider, [r["rank"] for r in own], [r["peak_bytes"] / 2**20 for r in own])
            formula = [r for r in own if r["status"] == "formula"]
            axes.plot([r["rank"] for r in formula], [r["peak_bytes"] / 2**20 for r in formula], "o", mfc="none",
                      color=_COLOURS.get(provider, "#7f7f7f"))  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _log_axis(axes.xaxis, [row["rank"] for row in rows])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank")
        axes.set_ylabel("MiB")
        _legend(axes)

    return paint


# ---- training speed --------------------------------------------------------------------------------------------------


def _training(collected: Collected, device: str) -> Iterator[Drawing]:
    for size in SIZES:
        rows = [r for r in collected.of("train", device, size=size) if "tokens_per_s" in r]
        for model in dict.fromkeys(row["model"] for row in rows):
            chosen = [r for r in rows if r["model"] == model]
            slug = re.sub(r"[^a-z0-9]+", "-", model.lower())
            what = "median training speed on random weights; line: 10–90 % of the steps"
            yield Drawing(
                f"train-{slug}", _document("train", model, size), f"Training, {model}",
                _caption(chosen, what), _stale(chosen), _paint_training(chosen), max(2.2, 1.3 + 0.27 * len(chosen)),
            )  # fmt: skip
        if rows:
            return


def _paint_training(rows: Sequence[dict[str, Any]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        labels = []
        dtypes = len({row["dtype"] for row in rows}) > 1
        for place, row in enumerate(reversed(list(rows))):
            low, high = row["tokens_per_s_p10_p90"]
            colour = (
                _COLOURS["loop"]
                if "loop" in row["setting"]
                else _COLOURS["triton" if row["mode"] == "local" else "eager"]
            )
            axes.barh(place, row["tokens_per_s"], color=colour, height=0.7)
            axes.plot([low, high], [place, place], color=_INK, linewidth=1.2)
            axes.annotate(
                f" {row['tokens_per_s']:,.0f}", (max(high, row["tokens_per_s"]), place), va="center", fontsize=9
            )
            layers = "all layers" if row["converted"] == "all" else f"{row['converted']} layers"
            # Speeds at other batches and lengths stand side by side, so each names its own.
            size = f"{row['batch']}×{row['sequence']}" + (f" {row['dtype']}" if dtypes else "")
            labels.append(f"{row['setting']}, {row['mode'].replace('_', ' ')}, {layers}, {size}")
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(False, axis="y")
        axes.margins(x=0.16)
        axes.set_xlabel("tokens per second")

    return paint
