"""What ``npt bench`` prints: plans, one line per finished group, a table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .providers import PROVIDERS
from .results import human_bytes

if TYPE_CHECKING:
    import torch

    from .compare import Comparison
    from .grid import Setting
    from .training_shapes import TrainRow

__all__ = [
    "line",
    "print_check",
    "print_comparison",
    "print_plan",
    "print_rows",
    "print_train",
    "print_train_plan",
    "train_line",
]


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- plans -----------------------------------------------------------------------------------------------------------


def print_plan(settings: Sequence[Setting], seconds: Sequence[float], device: torch.device, size: str) -> None:
    """Groups by op, mode and shape, with the providers that cannot run and why."""
    console = Console(highlight=False)
    groups: dict[tuple[str, str, str], list[tuple[Setting, float]]] = {}
    for setting, cost in zip(settings, seconds, strict=True):
        groups.setdefault((setting.op, setting.mode, setting.model.title), []).append((setting, cost))
    table = _table(f"would run on {device} ({size} sizes)", "op", "mode", "shape", "tokens", "ranks", "groups", "about",
                   right=("groups", "about"))  # fmt: skip
    for (op, mode, shape), entries in groups.items():
        tokens = ", ".join(map(str, dict.fromkeys(setting.tokens for setting, _ in entries)))
        ranks = "" if op == "norm" else ", ".join(map(str, dict.fromkeys(setting.rank for setting, _ in entries)))
        about = duration(sum(cost for _, cost in entries))
        table.add_row(op, mode, shape, tokens, ranks, str(len(entries)), about)
    console.print(table)
    _print_missing(console, settings, device)
    names = dict.fromkeys(provider.name for setting in settings for provider in setting.providers)
    console.print(f"providers: {', '.join(names)}")
    total = sum(seconds)
    console.print(f"{len(settings)} groups, about {duration(total)}", style="bold")
    if total > 540:
        parts = -(-int(total) // 420)
        console.print("narrow it with --op, --shape, --mode, --tokens, --rank or --provider" if device.type == "cpu" else
                      f"in parts of under 9 minutes: --part 1/{parts} … --part {parts}/{parts}")  # fmt: skip


def _print_missing(console: Console, settings: Sequence[Setting], device: torch.device) -> None:
    """Per provider the commonest reason why it does not take part, and in how many groups."""
    reasons: dict[str, dict[str, int]] = {}
    asked: dict[str, int] = {}
    for setting in settings:
        for provider in setting.providers:
            asked[provider.name] = asked.get(provider.name, 0) + 1
            reason = provider.why_not(setting.case, setting.mode, device)
            if reason is not None:
                counts = reasons.setdefault(provider.name, {})
                counts[reason] = counts.get(reason, 0) + 1
    for name, counts in reasons.items():
        reason, total = max(counts, key=lambda r: counts[r]), sum(counts.values())
        where = "anywhere" if total == asked[name] else f"in {total} of its {asked[name]} groups"
        example = "" if len(counts) == 1 else ", for instance"
        console.print(f"not {name} {where}{example}: {reason}", markup=False, soft_wrap=True)


def print_train_plan(rows: Sequence[TrainRow], seconds: Sequence[float], device: torch.device, size: str) -> None:
    from .training import predict
    from .training_shapes import availability

    console = Console(highlight=False)
    table = _table(f"would run on {device} ({size} sizes)", "model", "layers", "mode", "setting", "batch", "rank", "about",
                   "predicted", "s/step", right=("batch", "rank", "about", "predicted", "s/step"))  # fmt: skip
    missing = {}
    for row, cost in zip(rows, seconds, strict=True):
        reason = availability(row.setting, row.mode, device)
        if reason is not None:
            missing[row.setting] = reason
        about = "–" if reason else duration(cost)
        size_and_time = predict(row, device)
        table.add_row(
            row.model.title, row.converted, row.mode, row.setting, f"{row.batch} × {row.sequence}{row.at_once}", str(row.rank),
            about,
            *_predicted(size_and_time),
        )  # fmt: skip
    console.print(table)
    for setting, reason in missing.items():
        console.print(f"– {setting}: not available: {reason}", markup=False, soft_wrap=True)
    console.print(f"{len(rows)} rows, about {duration(sum(seconds))}", style="bold")


def _predicted(row: dict[str, Any]) -> tuple[str, str]:
    """Bytes and seconds of a step as ``npt plan`` has them; empty where it does not count the setting."""
    size, seconds = row.get("predicted_bytes"), row.get("predicted_seconds")
    return "" if size is None else human_bytes(size), "" if seconds is None else f"{seconds:.2f}"


# ---- results ---------------------------------------------------------------------------------------------------------


def _cell(row: dict[str, Any]) -> str:
    """Ratio or bytes of a row, else its status in a word; empty for what was skipped."""
    if row["status"] == "skipped":
        return ""
    if row["status"] in ("wrong", "failed"):
        return row["status"].upper()
    if "peak_bytes" in row:
        return human_bytes(row["peak_bytes"]) + ("*" if row["status"] == "formula" else "")
    if "ratio" in row:
        return f"{row['ratio']:.3f}" if row["ratio"] < 10 else f"{row['ratio']:,.0f}"
    return f"{row['us']:,.0f} µs" if "us" in row else str(row["status"])


def line(setting: Setting, rows: Sequence[dict[str, Any]]) -> str:
    """One finished group in one line."""
    cells = [f"{row['provider']} {_cell(row)}" for row in rows if _cell(row)]
    return f"{setting}: " + ", ".join(cells)


def train_line(row: TrainRow, measured: dict[str, Any]) -> str:
    if measured["status"] != "ok":
        return f"{row}: {measured['status']}: {measured['reason']}"
    return f"{row}: {measured['tokens_per_s']:,.0f} tokens/s, peak {human_bytes(measured['peak_bytes'])}"


def print_rows(suite: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table per op, mode and shape: tokens and rank down, providers across; then why providers are missing, once each."""
    console = Console(highlight=False)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mode"], row["shape"]), []).append(row)
    what = "time ÷ frozen, median of interleaved launches" if suite == "kernels" else "peak beyond inputs and weights"
    console.print(f"\n{what}")
    for (op, mode, shape), own in groups.items():
        shown = [name for name in PROVIDERS if any(row["provider"] == name and _cell(row) for row in own)]
        columns = ("T", "r", *shown)
        console.print(f"{op} {mode}, {shape}", style="bold")  # as the table's title it would wrap at its width
        table = _table("", *columns, right=columns)
        cells: dict[tuple[Any, Any], dict[str, str]] = {}
        for row in own:
            cells.setdefault((row["tokens"], row["rank"]), {})[row["provider"]] = _cell(row)
        for (tokens, rank), values in cells.items():
            ends = (f"{tokens:,}", "" if rank is None else f"{rank:,}")
            table.add_row(*ends, *(_coloured(values.get(name, "")) for name in shown))
        console.print(table)
    if any(row["status"] == "formula" for row in rows):
        console.print("* by formula: it does not fit")
    reasons = dict.fromkeys((row["provider"], row["reason"]) for row in rows if row["status"] in ("skipped", "checked"))
    for name, reason in list(reasons)[:12]:
        console.print(f"not timed: {name}: {reason}", markup=False, soft_wrap=True)
    if len(reasons) > 12:
        console.print(f"and {len(reasons) - 12} more reasons in the file")


def _coloured(cell: str) -> str:
    return f"[bold red]{cell}[/bold red]" if cell.isupper() else escape(cell)


def print_train(rows: Sequence[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    table = _table("\ntraining on random weights", "model", "layers", "mode", "setting", "tokens/s", "s/step",
                   "predicted", "MFU", "peak", "predicted", right=("tokens/s", "s/step", "predicted", "MFU", "peak"))  # fmt: skip
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["model"], row["converted"], row["mode"], row["setting"], _coloured(row["status"].upper())
                          if row["status"] != "unavailable" else "–")  # fmt: skip
            continue
        mfu = f"{100 * row['mfu']:.0f} %" if "mfu" in row else ""
        size, seconds = _predicted(row)
        step = f"{row['batch'] * row['sequence'] / row['tokens_per_s']:.2f}"
        table.add_row(row["model"], row["converted"], row["mode"], row["setting"], f"{row['tokens_per_s']:,.0f}", step, seconds,
                      mfu, human_bytes(row["peak_bytes"]), size)  # fmt: skip
    console.print(table)
    for setting, reason in dict.fromkeys((r["setting"], r["reason"]) for r in rows if r["status"] == "unavailable"):
        console.print(f"– {setting}: {reason}", markup=False, soft_wrap=True)


def print_check(rows: Sequence[dict[str, Any]], extra: dict[str, Any], not_run: Sequence[str]) -> None:
    """What passed, what failed and why, what did not run; then the timings."""
    console = Console(highlight=False)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    for title, kind in (("numerics", "numerics"), ("repeats", "repeat")):
        own = [row for row in rows if row.get("kind") == kind]
        bad = [row for row in own if row["status"] != "ok"]
        say(f"{title}: {len(own) - len(bad)} of {len(own)} passed", "bold")
        for row in bad:
            say(f"  {row['status'].upper()} {row['provider']} {row['case']}: {row['reason']}", "red")
    for name in not_run:
        say(f"  not run: {name}")
    for suite in ("kernels", "memory"):
        own = [row for row in rows if row.get("suite") == suite]
        if own:
            print_rows(suite, own)
    kernels = [row for row in rows if row.get("kind") == "kernel"]
    if kernels:
        table = _table(
            "\nsingle kernels", "kernel", "launch", "by", "µs", "÷ baseline", "10–90 %", right=("µs", "÷ baseline")
        )
        for row in kernels:
            spread = " – ".join(f"{value:.3f}" for value in row.get("ratio_p10_p90", ()))
            cells = (f"{row['us']:,.1f}", f"{row.get('ratio', float('nan')):.3f}", spread) if "us" in row else (
                _coloured("FAILED"), "", escape(str(row.get("reason", ""))))  # fmt: skip
            table.add_row(escape(row["case"]), row["launch"], escape(row["provider"]), *cells)
        console.print(table)
    if "stopped" in extra:
        say(str(extra["stopped"]), "bold red")


def print_comparison(found: Comparison) -> None:
    console = Console(highlight=False)
    moved = [change for change in found.changes if change.verdict != "same"]
    if moved:
        table = _table("", "row", "figure", "before", "after", "factor", "", right=("before", "after", "factor"))
        for change in sorted(moved, key=lambda c: -c.factor):
            style = "red" if change.verdict == "worse" else "green"
            table.add_row(escape(change.name), change.figure, f"{change.before:,.4g}", f"{change.after:,.4g}",
                          f"{change.factor:.3f}", f"[{style}]{change.verdict}[/{style}]")  # fmt: skip
        console.print(table)
    for text in found.broken:
        console.print(f"broken: {text}", style="red", markup=False, soft_wrap=True)
    for label, names in (("missing", found.missing), ("new", found.added)):
        for name in names:
            console.print(f"{label}: {name}", markup=False, soft_wrap=True)
    same = len(found.changes) - len(moved)
    console.print(f"{len(found.worse)} worse, {len(moved) - len(found.worse)} better, {same} the same, "
                  f"{len(found.broken)} broken, {len(found.missing)} missing, {len(found.added)} new", style="bold")  # fmt: skip
    if found.devices[0] != found.devices[1]:
        console.print(f"different devices: {found.devices[0]}; {found.devices[1]}", style="yellow", markup=False)
