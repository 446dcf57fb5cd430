"""The report of :func:`~npt_kernels.plasticity.learn` as files: the edit, ``report.json``, ``report.png``."""

from __future__ import annotations

from pathlib import Path

from .learn import Learned
from .token_maps import write_json

__all__ = ["COLUMNS", "write_report"]

#: Attribute of a row → heading.
COLUMNS = (
    ("verbatim", "verbatim"),
    ("questions", "questions"),
    ("leak", "leak"),
    ("known", "known facts"),
    ("prose_ratio", "prose ratio"),
    ("kl_subject", "KL same subject"),
    ("kl_other", "KL other subjects"),
    ("kl_keep", "KL kept texts"),
)
_BARS = COLUMNS[:4]
_COLOURS = {"before": "#5F5F5F", "in context": "#0072B2", "after": "#D55E00"}


def write_report(learned: Learned, directory: Path | str) -> list[Path]:
    """Write edit, report and figure into ``directory``; the edit comes last, so that a folder with one is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report = write_json(directory / "report.json", learned.report)
    figure = _draw(learned, directory / "report.png")
    return [learned.edit.save(directory), report, figure]


def _draw(learned: Learned, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = {"before": learned.before, "in context": learned.in_context, "after": learned.after}
    for i, (label, row) in enumerate(rows.items()):
        heights = [getattr(row, key) or 0.0 for key, _ in _BARS]
        places = [x + (i - 1) * 0.27 for x in range(len(_BARS))]
        ratio = "" if row.prose_ratio is None else f", prose ratio {row.prose_ratio:.3f}"
        bars = axes.bar(places, heights, 0.25, color=_COLOURS[label], label=label + ratio)
        axes.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=8)
    axes.set_xticks(range(len(_BARS)), [heading for _, heading in _BARS])
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("share")
    axes.set_title(
        f"{learned.edit.method}: {len(learned.edit.facts)} fact(s), {'learned' if learned.learned else 'not learned'}"
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path
