"""Values by layer and token as a figure (PNG) and as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from ..durable_files import write_whole

__all__ = ["GridMap", "draw_maps", "write_json", "write_page"]

_TEMPLATE = Path(__file__).with_name("grid_page.html")
#: Tokens from which a figure names only every second, third … of them.
_LABELS = 60


@dataclass(frozen=True)
class GridMap:
    """One value per layer and token.

    Attributes:
        name: What it is, in two or three words.
        about: What it means, a sentence.
        rows: Names of the rows, lowest layer first.
        values: ``[rows][tokens]``; NaN: there is none.
        signed: A share, coloured from −1 to 1, and not from 0 to ``top``.
        top: Value from which on the colour is the same; default: the largest.
    """

    name: str
    about: str
    rows: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    signed: bool = False
    top: float | None = None


def write_page(
    path: Path,
    title: str,
    lead: Sequence[str],
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    tokens: Sequence[str],
    maps: Sequence[GridMap],
    details: Sequence[Sequence[str]] | None = None,
    footer: str = "",
    links: Sequence[Sequence[Sequence[tuple[int, float]]]] | None = None,
) -> Path:
    """Write the page: paragraphs, a table, and a grid in which a cell is chosen by mouse or arrow keys.

    Args:
        path: The file.
        title, lead, footer: Plain text.
        headings, rows: Of the table; empty: none.
        tokens: Columns of the grid.
        maps: What its colours can show.
        details: ``[rows][tokens]``: more text of a cell.
        links: ``[rows][tokens]``: ``(token, share)``, tokens that are underlined when the cell is chosen.
    """
    data = {
        "tokens": list(tokens),
        "maps": [{**asdict(m), "values": [[_number(v) for v in row] for row in m.values]} for m in maps],
        "details": None if details is None else [list(row) for row in details],
        "links": None if links is None else [[[[i, round(v, 3)] for i, v in cell] for cell in row] for row in links],
    }
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        lead="\n".join(f'<p class="lead">{html.escape(line)}</p>' for line in lead),
        table=_table(headings, rows),
        footer=html.escape(footer),
        # "</script>" within a token would end the element.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in headings)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def draw_maps(path: Path, title: str, tokens: Sequence[str], maps: Sequence[GridMap]) -> Path:
    """Draw the maps one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    count = len(tokens)
    figure = Figure(
        figsize=(max(6.0, min(24.0, 2.5 + 0.26 * count)), sum(1.6 + 0.15 * len(m.rows) for m in maps)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False)
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=[8 + len(m.rows) for m in maps])[:, 0]
    every = -(-count // _LABELS)
    for axes, m in zip(panels, maps, strict=True):
        finite = [v for row in m.values for v in row if math.isfinite(v)]
        low, high = (-1.0, 1.0) if m.signed else (0.0, max(m.top or max([*finite, 0.0]), 1e-12))
        image = axes.imshow(
            m.values, origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high,
            cmap="RdBu" if m.signed else "Blues",
        )  # fmt: skip
        axes.set_title(m.name, fontsize=9)
        axes.xaxis.set_major_locator(FixedLocator(list(range(0, count, every))))
        axes.set_xticklabels(
            [tokens[i].replace("\n", "⏎") for i in range(0, count, every)], rotation=90, fontsize=7, parse_math=False
        )
        step = max(1, len(m.rows) // 15)
        axes.yaxis.set_major_locator(FixedLocator(list(range(0, len(m.rows), step))))
        axes.set_yticklabels(m.rows[::step], fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(path, dpi=130)
    return path


def write_json(path: Path, report: dict[str, Any], indent: int | None = 2) -> Path:
    """Write a report whole or not at all."""
    write_whole(path, json.dumps(report, ensure_ascii=False, indent=indent) + "\n")
    return path
