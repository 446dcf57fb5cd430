"""The report as one HTML file that needs nothing else: no network, no library, readable on a phone, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..results import BenchError, human_bytes
from .collect import Collected, Source
from .figures import Drawing, draw_all
from .goals import count, verdicts
from .summary import summarise

__all__ = ["render", "write_page", "write_pngs"]

_escape = html.escape


def write_page(collected: Collected, path: Path) -> Path:
    """Write the page. Raises :class:`BenchError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(collected), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from error
    return path


def write_pngs(collected: Collected, folder: Path) -> list[Path]:
    """The figures for documents as ``folder/bench-*.png``, from the same data and by the same code as the page's."""
    try:
        return [drawing.png(folder) for drawing in draw_all(collected) if drawing.document]
    except OSError as error:
        raise BenchError(f"{folder} cannot be written: {error.strerror}") from error


def render(collected: Collected) -> str:
    """The page's text."""
    folder = resources.files(__package__)
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [
        _summary(collected),
        _figures(draw_all(collected)),
        _goals(collected),
        _kernels(collected),
        _single_kernels(collected),
        _checks(collected),
        _overhead(collected),
        _memory(collected),
        _train(collected),
        _not_measured(collected),
        _runs(collected),
        _sources(collected.sources),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>npt_kernels benchmarks</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<h1>npt_kernels benchmarks</h1>
<p class="soft">Made {_escape(collected.made)} from {len(collected.sources)} result files.
Every figure was measured; what was not is called unverified.</p>
{"".join(parts)}</main>
<script>
{script}</script>
</body>
</html>
"""


def _summary(collected: Collected) -> str:
    items = "".join(f"<li>{line}</li>\n" for line in summarise(collected))
    stale = [source for source in collected.sources if source.stale]
    flag = ""
    if stale:
        share = f"{len(stale)} of {len(collected.sources)}"
        flag = f'<p class="stale">{share} files are stale: what they measure has changed since.</p>'
    return f'<section id="summary"><h2>What it costs, what it saves</h2>\n<ul class="summary">\n{items}</ul>{flag}</section>\n'


def _stale(reason: str | None) -> str:
    return f'<p class="stale">Stale: {_escape(reason)}</p>' if reason else ""


def _figures(drawings: Sequence[Drawing]) -> str:
    if not drawings:
        return (
            '<section id="plots"><h2>Plots</h2><p>No rows to draw: every result was skipped or refused.</p></section>\n'
        )
    boxes = "".join(
        f'<figure id="{drawing.name}"><h3>{_escape(drawing.title)}</h3>{_stale(drawing.stale)}{drawing.svg()}'
        f"<figcaption>{_escape(drawing.caption)}</figcaption></figure>\n"
        for drawing in drawings
    )
    return f'<section id="plots"><h2>Plots</h2>\n<div class="figures">\n{boxes}</div></section>\n'


# ---- tables ----------------------------------------------------------------------------------------------------------

#: A cell: text, and the number it sorts by (``None``: by its text).
Cell = tuple[str, float | None] | str


def _table(identity: str, title: str, intro: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    body = []
    numeric: set[int] = set()
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            if isinstance(cell, tuple):
                numeric.add(index)
                number = "" if cell[1] is None else f"{cell[1]:.12g}"
                cells.append(f'<td class="number" data-v="{number}">{cell[0]}</td>')
            else:
                cells.append(f"<td{' class=wide' if len(cell) > 60 else ''}>{cell}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    if not body:
        return ""
    heads = "".join(
        f'<th scope="col"{" class=number" if index in numeric else ""}><button type="button">{_escape(name)}</button></th>'
        for index, name in enumerate(columns)
    )
    search = (
        '<input type="search" placeholder="narrow to rows with…" aria-label="narrow the table">'
        if len(body) > 12
        else ""
    )
    return (
        f'<section id="{identity}"><h2>{_escape(title)}</h2>\n<p class="soft">{intro}</p>{search}\n<div class="scroll">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(body)
        + "\n</tbody></table></div></section>\n"
    )  # fmt: skip


def _number(value: Any, form: str = ",.3g") -> Cell:
    return ("", None) if value is None else (format(value, form), float(value))


def _percent(value: Any) -> Cell:
    return ("", None) if value is None else (f"{100 * value:.1f} %", float(value))


def _spread(row: dict[str, Any], figure: str, form: str) -> str:
    pair = row.get(f"{figure}_p10_p90")
    return "" if pair is None else f"{pair[0]:{form}} – {pair[1]:{form}}"


def _status(row: dict[str, Any]) -> str:
    colour = {"ok": "good", "wrong": "bad", "failed": "bad"}.get(row["status"], "soft")
    reason = f": {_escape(str(row['reason']))}" if row.get("reason") else ""
    return f'<span class="{colour}">{row["status"]}</span>{reason}'


def _device(row: dict[str, Any]) -> str:
    return _escape(row["device"]) + (" <span class=bad>stale</span>" if row.get("stale") else "")


def _goals(collected: Collected) -> str:
    found = verdicts(collected)
    rows = []
    for v in found:
        state = {True: '<span class="good">met</span>', False: '<span class="bad">not met</span>', None: ""}[v.met]
        measured = f'<span class="unverified">{v.measured}</span>' if v.met is None else _escape(v.measured)
        rows.append([_escape(v.goal.what), _escape(v.goal.at), _escape(v.goal.goal), measured, state, _escape(v.where)])
    intro = f"The design's goals: {count(found)}. Figures of a CPU do not speak for goals that are about a GPU."
    return _table("goals", "Goals", intro, ("what", "at", "goal", "measured", "", "on"), rows)


def _measured(collected: Collected, suite: str) -> list[dict[str, Any]]:
    return [row for row in collected.of(suite) if row["status"] not in ("skipped", "unavailable")]


def _not_measured(collected: Collected) -> str:
    """Who was left out and why, once each."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for row in collected.rows:
        if row["status"] in ("skipped", "unavailable"):
            key = (row["suite"], str(row.get("provider", row.get("setting"))), str(row["reason"]), row["device"])
            counts[key] = counts.get(key, 0) + 1
    rows = [[suite, _escape(who), _escape(why), _number(number, ",d"), _escape(device)]
            for (suite, who, why, device), number in counts.items()]  # fmt: skip
    intro = "Left out, with the reason and how many rows."
    return _table("not-measured", "Not measured", intro, ("suite", "who", "why", "rows", "device"), rows)


def _kernels(collected: Collected) -> str:
    rows = []
    for row in _measured(collected, "kernels"):
        rows.append([
            _escape(row["op"]), _escape(row["shape"]), row["mode"], _number(row["tokens"], ",d"), _number(row["rank"], ",d"),
            row["rule"], row["dtype"], _escape(row["provider"]), _number(row.get("us"), ",.1f"), _number(row.get("ratio"), ".3f"),
            _spread(row, "ratio", ".3f"), _percent(row.get("roofline_share")), _number(row.get("tflops"), ",.3g"),
            row["launch"], _status(row), _device(row),
        ])  # fmt: skip
    columns = ("op", "shape", "mode", "tokens", "rank", "rule", "dtype", "provider", "µs", "÷ frozen", "10–90 %", "roofline",
               "TFLOP/s", "launch", "status", "device")  # fmt: skip
    intro = ("Medians of interleaved launches. A provider whose numbers differ from float64 by more than it may is "
             "<em>wrong</em> and has no time.")  # fmt: skip
    return _table("kernels", "Kernels", intro, columns, rows)


def _single_kernels(collected: Collected) -> str:
    rows = []
    for row in collected.of("check", kind="kernel"):
        rows.append([
            _escape(row["case"]), _escape(row["provider"]), _escape(str(row.get("baseline", ""))), _number(row.get("us"), ",.1f"),
            _number(row.get("ratio"), ".3f"), _spread(row, "ratio", ".3f"), str(row["launch"]), _status(row), _device(row),
        ])  # fmt: skip
    columns = ("kernel", "by", "baseline", "µs", "÷ baseline", "10–90 %", "launch", "status", "device")
    intro = "From <code>npt bench check</code>: kernels that are no op of their own, beside the vendor's products."
    return _table("single-kernels", "Single kernels", intro, columns, rows)


def _checks(collected: Collected) -> str:
    rows = []
    for row in (r for r in collected.of("check") if r["kind"] != "kernel"):
        ratios = {name: float(value) for name, value in row.get("ratios", {}).items()}
        worst = max(ratios, key=lambda name: ratios[name], default="")
        repeats = _number(row.get("times"), ",d")
        rows.append([_escape(row["case"]), _escape(row["provider"]), row["kind"], _escape(worst),
                     _number(ratios.get(worst), ".3f"), repeats, _status(row), _device(row)])  # fmt: skip
    columns = ("case", "backend", "what", "worst result", "error ÷ bound", "runs", "status", "device")
    intro = ("Numerics at real sizes against float64 (at most 1 is right: twice PyTorch's own error), and repeats that must be "
             "bitwise equal.")  # fmt: skip
    return _table("checks", "Checks", intro, columns, rows)


def _overhead(collected: Collected) -> str:
    rows = [
        [_escape(e["op"]), e["mode"], "gated" if e["gated"] else "plain", _escape(e["provider"]), _number(e["host_us"], ",.1f"),
         _number(e.get("over_frozen_us"), ",.1f"), _escape(e["device"])]
        for e in collected.overhead
    ]  # fmt: skip
    intro = "Time until a call returns, at a size where the arithmetic is nothing; kept apart from the times above."
    columns = ("op", "mode", "MLP", "provider", "µs", "over frozen, µs", "device")
    return _table("overhead", "Host overhead", intro, columns, rows)


def _memory(collected: Collected) -> str:
    rows = [
        [_escape(r["op"]), _escape(r["shape"]), r["mode"], _number(r["tokens"], ",d"), _number(r["rank"], ",d"), r["dtype"],
         _escape(r["provider"]), (human_bytes(r["peak_bytes"]), float(r["peak_bytes"])) if "peak_bytes" in r else ("", None),
         _number(r.get("peak_units"), ",.3f"), _status(r), _device(r)]
        for r in _measured(collected, "memory")
    ]  # fmt: skip
    intro = "Peak of a call beyond its inputs and weights; results and gradients are in it. One unit is one tokens × f tensor."
    columns = ("op", "shape", "mode", "tokens", "rank", "dtype", "provider", "peak", "units", "status", "device")
    return _table("memory", "Memory", intro, columns, rows)


def _train(collected: Collected) -> str:
    rows = []
    for r in _measured(collected, "train"):
        parts = r.get("seconds_per_step", {})
        shares = (
            ", ".join(f"{n} {100 * parts[n] / parts['total']:.0f} %" for n in parts if n != "total") if parts else ""
        )
        rows.append([
            _escape(r["model"]), r["converted"], r["mode"], _escape(r["setting"]), r["rule"], _number(r["rank"], ",d"),
            f"{r['batch']} × {r['sequence']}" + (f" by {r['micro_batch']}" if "micro_batch" in r else ""),
            r["dtype"], _number(r.get("tokens_per_s"), ",.1f"),
            _spread(r, "tokens_per_s", ",.1f"),
            _percent(r.get("mfu")), (human_bytes(r["peak_bytes"]), float(r["peak_bytes"])) if "peak_bytes" in r else ("", None),
            _number(r.get("predicted_seconds"), ".3f"),
            (human_bytes(r["predicted_bytes"]), float(r["predicted_bytes"])) if "predicted_bytes" in r else ("", None),
            shares, _status(r), _device(r),
        ])  # fmt: skip
    intro = ("The package's own loop on random weights. MFU: the FLOPs that the mode needs ÷ time ÷ the GEMM rate measured in "
             "the same run. Predicted: what <code>npt plan</code> says, from data sheets.")  # fmt: skip
    columns = ("model", "layers", "mode", "setting", "rule", "rank", "batch", "dtype", "tokens/s", "10–90 %", "MFU", "peak",
               "predicted s/step", "predicted peak", "time", "status", "device")  # fmt: skip
    return _table("train", "Training", intro, columns, rows)


def _runs(collected: Collected) -> str:
    rows = []
    for run in collected.runs:
        for stage in ("converted", "trained"):
            result = run[stage]
            if result:
                rows.append([
                    _escape(run["name"]), f"<code>{_escape(str(run['command']))}</code>", stage,
                    _number(result["perplexity_ratio"], ".4f"), _number(round(result["kl"], 4) + 0.0, ".4f"),
                    _percent(result["top1_agreement"]),
                    _escape(str(run["source"].facts["device"])) + (" <span class=bad>stale</span>" if run["stale"] else ""),
                ])  # fmt: skip
    intro = "Records of real conversions: perplexity converted ÷ original and KL in nats per token, on held-out text."
    return _table("fidelity", "Fidelity", intro, ("run", "command", "after", "ratio", "KL", "top-1", "device"), rows)


def _sources(sources: Sequence[Source]) -> str:
    rows = []
    for s in sources:
        versions = ", ".join(
            f"{name} {s.facts[name]}"
            for name in ("torch", "triton", "cuda", "driver", "transformers", "python")
            if s.facts.get(name)
        )
        state = f'<span class="bad">{_escape(s.stale)}</span>' if s.stale else '<span class="good">current</span>'
        rows.append([
            _escape(s.name), s.suite, s.size, _escape(str(s.facts.get("device", ""))), _escape(versions),
            f"<code>{_escape(str(s.facts.get('commit', ''))[:9])}</code>", _escape(str(s.facts.get("date", ""))), state,
            _escape(s.note),
        ])  # fmt: skip
    columns = ("file", "suite", "size", "device", "versions", "commit", "date", "state", "notes")
    return _table("sources", "Where the figures come from", "One line a result file.", columns, rows)
