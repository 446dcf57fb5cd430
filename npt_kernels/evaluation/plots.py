"""The figures of a run, one PNG each: loss, explained variance, ‖ΔW‖, perplexity and KL, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .fidelity import LayerFidelity
from .perplexity import EvalResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_delta_distribution", "plot_delta_norms", "plot_explained_variance", "plot_loss", "plot_perplexity", "plot_ranks",
    "write_plots",
]  # fmt: skip

#: Okabe-Ito: told apart with every common colour blindness.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5F5F5F"
_TARGETS = {
    "gate": (_BLUE, "o"),
    "up": (_ORANGE, "s"),
    "down": (_GREEN, "^"),
    "c_fc": (_BLUE, "o"),
    "c_proj": (_GREEN, "^"),
}
_STYLE = {
    "font.size": 11, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip


def _figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (8.0, 4.5)) -> tuple[Figure, Any]:
    # No pyplot: its figures are global, and a program that plots for itself must not meet ours.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@matplotlib.rc_context(_STYLE)
def plot_loss(steps: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss against optimizer step, one panel per phase. ``steps``: the logged ``train`` records of ``metrics.jsonl``."""
    units = {"kl": "KL (nats per token)", "task": "cross-entropy (nats per token)"}
    phases = list(dict.fromkeys(record["phase"] for record in steps))
    figure, panels = _figure(1, len(phases), size=(8.0 if len(phases) == 1 else 11.0, 4.5))
    for axes, phase in zip(panels[0], phases, strict=True):
        records = [record for record in steps if record["phase"] == phase]
        x, y = [r["step"] for r in records], [r["loss"] for r in records]
        few = len(records) < 40
        axes.plot(x, y, color=_BLUE, marker="o" if few else None, alpha=1.0 if few else 0.35, label="logged mean")
        if not few:
            window = max(5, len(y) // 20)
            smooth = [
                sum(y[max(0, i - window + 1) : i + 1]) / len(y[max(0, i - window + 1) : i + 1]) for i in range(len(y))
            ]
            axes.plot(x, smooth, color=_ORANGE, label=f"mean of {window} logs")
            axes.legend()
        axes.set_title(f"training loss: {phase}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(units.get(records[0].get("objective", ""), "mean loss over layers"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if min(y) > 0 and max(y) / min(y) > 20:
            axes.set_yscale("log")
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def plot_explained_variance(
    converted: Sequence[LayerFidelity],
    trained: Sequence[LayerFidelity] | None,
    path: Path,
    name: str = "after conversion",
) -> Path:
    """1 − explained variance per layer on a log axis (what is missing is what differs), after conversion and training."""
    figure, panels = _figure()
    axes = panels[0, 0]
    floor = 1e-6
    for entries, label, color, marker in (
        (converted, name, _GREY, "o"), (trained, "after training", _BLUE, "s"),
    ):  # fmt: skip
        if entries:
            missing = [100 * max(1 - entry.explained_variance, floor) for entry in entries]
            mean = sum(entry.explained_variance for entry in entries) / len(entries)
            axes.plot(
                [e.index for e in entries], missing, color=color, marker=marker, label=f"{label} (mean EV {mean:.4f})"
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("What each converted layer misses (original's input)")
    axes.set_ylabel("unexplained variance, 1 − EV (%)\nlower is better")
    _layer_axis(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def plot_delta_norms(layers: Sequence[LayerFidelity], path: Path) -> Path:
    """‖ΔW‖_F ÷ ‖W‖_F per layer and target, mean over tokens, norm match included."""
    figure, panels = _figure()
    axes = panels[0, 0]
    for target in layers[0].delta_norm:
        color, marker = _TARGETS.get(target, (_PINK, "D"))
        share = [100 * entry.delta_norm[target] / max(entry.weight_norm[target], 1e-30) for entry in layers]
        axes.plot([entry.index for entry in layers], share, color=color, marker=marker, label=target)
    axes.set_title("Size of the per-token weight change")
    axes.set_ylabel("mean ‖ΔW‖$_F$ / ‖W‖$_F$ (%)")
    axes.set_ylim(bottom=0)
    _layer_axis(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, title="target")
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def plot_delta_distribution(layers: Sequence[LayerFidelity], path: Path) -> Path:
    """‖ΔW_t‖_F ÷ ‖W‖_F over tokens, a panel per target: median, from there to the 95th percentile, maximum."""
    targets = list(layers[0].delta_statistics)
    figure, panels = _figure(1, len(targets), size=(max(8.0, 4.2 * len(targets)), 4.5))
    index = [entry.index for entry in layers]
    shares = {
        target: {
            name: [100 * entry.delta_statistics[target].relative[name] for entry in layers]
            for name in ("p50", "p95", "max")
        }
        for target in targets
    }
    # A few tokens (attention sinks) can be far above all others; one such target puts every panel on a log axis.
    medians = {target: min(values["p50"]) for target, values in shares.items()}
    log = all(m > 0 for m in medians.values()) and any(max(shares[t]["max"]) > 30 * m for t, m in medians.items())
    for axes, target in zip(panels[0], targets, strict=True):
        color, marker = _TARGETS.get(target, (_PINK, "D"))
        values = shares[target]
        axes.fill_between(index, values["p50"], values["p95"], color=color, alpha=0.2, label="to the 95th percentile")
        axes.plot(index, values["p50"], color=color, marker=marker, label="median token")
        axes.plot(index, values["max"], color=_GREY, marker=".", linestyle="none", label="largest")
        axes.set_title(target)
        if log:
            axes.set_yscale("log")
            axes.set_ylim(medians[target] / 1.5, max(values["max"]) * 1.5)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        _layer_axis(axes)
    panels[0, 0].set_ylabel("‖ΔW‖$_F$ / ‖W‖$_F$ (%)")
    tokens = layers[0].delta_statistics[targets[0]].tokens
    figure.suptitle(f"Size of the per-token weight change, {tokens:,} tokens", x=0.01, ha="left", fontweight="bold")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return _save(figure, path)


@matplotlib.rc_context(_STYLE)
def plot_perplexity(
    base: EvalResult, converted: EvalResult, trained: EvalResult | None, path: Path, name: str = "after\nconversion"
) -> Path:
    """Perplexity and KL of the original, after conversion and after training, with standard errors."""
    figure, panels = _figure(1, 2, size=(9.5, 4.5))
    left, right = panels[0]
    entries = [("original", base, _GREY), (name, converted, _ORANGE)]
    if trained is not None:
        entries.append(("after\ntraining", trained, _BLUE))
    _bars(
        left, entries, [r.npt_perplexity for _, r, _ in entries],
        # The text's own spread is common to all bars; only that of the ratio tells them apart.
        [0.0] + [r.base_perplexity * r.perplexity_ratio_se for _, r, _ in entries[1:]],
        [f"{base.base_perplexity:.2f}"] + [f"{r.npt_perplexity:.2f}\n(×{r.perplexity_ratio:.4f})" for _, r, _ in entries[1:]],
    )  # fmt: skip
    left.set_title(f"Perplexity, {base.tokens:,} held-out tokens")
    left.set_ylabel("perplexity (± s.e. against original)")
    rest = entries[1:]
    _bars(right, rest, [r.kl for _, r, _ in rest], [r.kl_se for _, r, _ in rest],
          [f"{r.kl:.4f}\ntop-1 {r.top1_agreement:.1%}" for _, r, _ in rest])  # fmt: skip
    right.set_title("KL(original‖converted)")
    right.set_ylabel("nats per token (± s.e.)")
    return _save(figure, path)


def _bars(
    axes: Axes,
    entries: Sequence[tuple[str, EvalResult, str]],
    heights: list[float],
    errors: list[float],
    texts: list[str],
) -> None:
    positions = range(len(entries))
    bars = axes.bar(positions, heights, yerr=errors, color=[color for _, _, color in entries], width=0.6, capsize=4)
    axes.set_xticks(list(positions), [name for name, _, _ in entries])
    axes.set_xlim(-0.6, len(entries) - 0.4)
    axes.grid(axis="x", visible=False)
    top = max((h + e for h, e in zip(heights, errors, strict=True)), default=0.0) or 1.0
    axes.set_ylim(0, top * 1.22)
    for bar, error, text in zip(bars, errors, texts, strict=True):
        axes.annotate(
            text, (bar.get_x() + bar.get_width() / 2, bar.get_height() + error), xytext=(0, 4),
            textcoords="offset points", ha="center", va="bottom", fontsize=10,
        )  # fmt: skip


@matplotlib.rc_context(_STYLE)
def plot_ranks(layers: Sequence[LayerFidelity], path: Path) -> Path:
    """Rank per layer, for runs that allot them."""
    figure, panels = _figure()
    axes = panels[0, 0]
    ranks = [entry.rank for entry in layers]
    axes.bar([entry.index for entry in layers], ranks, color=_BLUE, width=0.75)
    mean = sum(ranks) / len(ranks)
    axes.axhline(mean, color=_ORANGE, linestyle="--", label=f"mean {mean:.1f}")
    axes.set_title("Rank allotted to each layer")
    axes.set_ylabel("rank r")
    axes.grid(axis="x", visible=False)
    _layer_axis(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return _save(figure, path)


def write_plots(
    directory: Path,
    *,
    steps: Sequence[Mapping[str, Any]],
    base: EvalResult,
    converted: EvalResult,
    trained: EvalResult | None,
    fidelity_converted: Sequence[LayerFidelity],
    fidelity_trained: Sequence[LayerFidelity] | None,
) -> list[Path]:
    """All figures that the run has numbers for; returns their paths."""
    paths = [plot_loss(steps, directory / "loss.png")] if steps else []
    paths.append(plot_perplexity(base, converted, trained, directory / "perplexity.png"))
    if fidelity_converted:
        latest = fidelity_trained or fidelity_converted
        paths.append(
            plot_explained_variance(fidelity_converted, fidelity_trained, directory / "explained_variance.png")
        )
        paths.append(plot_delta_norms(latest, directory / "delta_norms.png"))
        if len({entry.rank for entry in latest}) > 1:
            paths.append(plot_ranks(latest, directory / "ranks.png"))
    return paths
