"""What a run shows while it trains and when it ends: a live table on a terminal, plain lines elsewhere, tables, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ..evaluation.perplexity import EvalResult, Sample
from .loop import StepReport

__all__ = ["TrainingDisplay", "clock", "describe", "results_table", "samples_markdown", "samples_table"]


def clock(seconds: float) -> str:
    """``75`` → ``1:15``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.2e}"


class TrainingDisplay:
    """Rows of a live table (the last few logged ones and the present step); one plain line per log off a terminal."""

    _KEEP = 8

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rows: list[list[str]] = []
        self._live: Live | None = None
        self._relative = True

    @contextmanager
    def open(self, *, relative: bool) -> Iterator[TrainingDisplay]:
        """``relative``: whether 1 − layer loss is an explained variance."""
        self._rows, self._relative = [], relative
        if not self.console.is_terminal:
            yield self
            return
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def step(self, report: StepReport, eta: float, *, logged: bool) -> None:
        """After every step; ``logged`` rows stay."""
        row = self._row(report, eta)
        if self._live is not None:
            self._live.update(self._table([*self._rows[-self._KEEP :], row]), refresh=True)
            if logged:
                self._rows.append(row)
        elif logged:
            names = ("step", "loss", "lr", "grad", "tok/s", "EV mean/min", "ETA")
            cells = "  ".join(f"{name} {cell}" for name, cell in zip(names, row, strict=True) if cell)
            self.console.print(f"{report.phase}: {cells}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays above the table."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _row(self, report: StepReport, eta: float) -> list[str]:
        explained = ""
        if report.layers and self._relative:
            values = [1 - loss for loss in report.layers.values()]
            explained = f"{sum(values) / len(values):.4f}/{min(values):.4f}"
        speed = report.tokens / max(report.seconds, 1e-9)
        return [
            f"{report.step}/{report.steps}", _number(report.loss), f"{report.learning_rate:.2e}",
            _number(report.grad_norm), f"{speed:,.0f}", explained, clock(eta),
        ]  # fmt: skip

    def _table(self, rows: Sequence[Sequence[str]]) -> Table:
        table = Table(title="training", title_justify="left")
        for name in ("step", "loss", "learning rate", "grad norm", "tokens/s", "EV mean/min", "time left"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table


def results_table(base: EvalResult, converted: EvalResult, trained: EvalResult | None, title: str) -> Table:
    """Original, after conversion, after training; standard errors of the means behind ±."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    columns = [("original", base), ("after conversion", converted)]
    if trained is not None:
        columns.append(("after training", trained))
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    results = [result for _, result in columns]
    table.add_row("perplexity", *(f"{r.npt_perplexity:.3f}" for r in results))
    table.add_row(
        "ratio to original", "1", *(f"{r.perplexity_ratio:.4f} ± {r.perplexity_ratio_se:.4f}" for r in results[1:])
    )
    table.add_row("KL(original‖converted), nats/token", "0", *(f"{r.kl:.4f} ± {r.kl_se:.4f}" for r in results[1:]))
    table.add_row(
        "top-1 agreement", "100 %", *(f"{r.top1_agreement:.2%} ± {r.top1_agreement_se:.2%}" for r in results[1:])
    )
    return table


def samples_table(before: Sequence[Sample], after: Sequence[Sample] | None) -> Table:
    """Prompts with the continuations of the original, the converted and the trained model."""
    table = Table(title="samples (greedy)", title_justify="left", show_lines=True)
    names = ["prompt", "original", "after conversion", *(["after training"] if after is not None else [])]
    for name in names:
        table.add_column(name, overflow="fold", ratio=1)
    for position, sample in enumerate(before):
        cells = [sample.prompt, sample.base, sample.npt, *([after[position].npt] if after is not None else [])]
        table.add_row(*(escape(cell.strip()) for cell in cells))
    return table


def samples_markdown(title: str, samples: Sequence[Sample]) -> str:
    """One section of ``samples.md``."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = [f"## {title}", "", "| prompt | original | converted |", "|---|---|---|"]
    lines += [f"| {cell(s.prompt)} | {cell(s.base)} | {cell(s.npt)} |" for s in samples]
    return "\n".join([*lines, "", ""])


def describe(result: EvalResult) -> str:
    """One line for logs."""
    return (
        f"perplexity {result.npt_perplexity:.3f} (original {result.base_perplexity:.3f}), "
        f"ratio {result.perplexity_ratio:.4f} ± {result.perplexity_ratio_se:.4f}, "
        f"KL {result.kl:.4f} ± {result.kl_se:.4f}, top-1 {result.top1_agreement:.2%}"
    )
