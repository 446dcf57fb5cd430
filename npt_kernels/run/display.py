"""A run on the console: a live table while it trains (plain lines off a terminal), then tables of results and samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..evaluation.perplexity import EvalResult
from ..evaluation.samples import Sample
from ..training.loop import StepReport
from .utilisation import Utilisation

__all__ = [
    "Pace",
    "TrainingDisplay",
    "clock",
    "describe",
    "results_table",
    "samples_markdown",
    "samples_table",
    "sparkline",
]


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


#: Explained variance → height; each step up about halves what is missing.
_HEIGHTS = (0.0, 0.5, 0.7, 0.84, 0.91, 0.95, 0.975, 0.99)
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-~=*#"


def sparkline(values: Sequence[float], width: int, *, unicode: bool = True) -> str:
    """Explained variances as bars on a fixed scale (lowest: below .5, highest: .99 and above; not finite: ``!``).

    More than ``width`` values are put together, the worst of its neighbours standing for them.
    """
    per_bar = max(1, -(-len(values) // max(1, width)))
    groups = [values[i : i + per_bar] for i in range(0, len(values), per_bar)]
    bars = _BARS if unicode else _ASCII_BARS
    cells = []
    for group in groups:
        if all(math.isfinite(value) for value in group):
            cells.append(bars[max(0, sum(min(group) >= height for height in _HEIGHTS) - 1)])
        else:
            cells.append("!")
    return "".join(cells)


def _share(value: float) -> str:
    """Explained variance with the digits that tell it from 1."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.0f}"


class TrainingDisplay:
    """A live table (the last few logged rows, the present step, the layers); one plain line per log off a terminal.

    Explained variance is 1 − the relative layer loss: worst, median and best layer, and a bar a layer. MFU is shown where the
    GPU's peak is known, memory (the highest so far) where there is a GPU.

    Args:
        console: Where to print.
        utilisation: For MFU; ``None``: none is shown.
    """

    _KEEP = 8
    #: Columns that a narrow terminal does without.
    _SPARE = ("learning rate", "grad norm")

    def __init__(self, console: Console, utilisation: Utilisation | None = None) -> None:
        self.console, self.utilisation = console, utilisation
        self._rows: list[dict[str, str]] = []
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
            shown = [self._table([*self._rows[-self._KEEP :], row])]
            layers = self._layers(report)
            self._live.update(Group(*shown, *([layers] if layers else [])), refresh=True)
            if logged:
                self._rows.append(row)
        elif logged:
            names = {"learning rate": "lr", "grad norm": "grad", "tokens/s": "tok/s", "time left": "ETA"}
            if report.layers and self._relative:
                row = {name: cell for name, cell in row.items() if name != "EV median"}
                worst, median, best = self._explained(report)
                row["EV worst/median/best"] = f"{_share(worst[0])}/{_share(median)}/{_share(best[0])}"
                row["time left"] = row.pop("time left")
            cells = "  ".join(f"{names.get(name, name)} {cell}" for name, cell in row.items())
            self.console.print(f"{report.phase}: {cells}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays above the table."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def mfu(self, report: StepReport) -> float | None:
        """Where the GPU's peak is known."""
        return None if self.utilisation is None else self.utilisation.mfu(report.tokens, report.seconds)

    @staticmethod
    def _explained(report: StepReport) -> tuple[tuple[float, int], float, tuple[float, int]]:
        """``(worst, its layer), median, (best, its layer)``; a loss that is not finite is the worst."""
        values = [(1 - loss if math.isfinite(loss) else -math.inf, index) for index, loss in report.layers.items()]
        return min(values), statistics.median(value for value, _ in values), max(values)

    def _row(self, report: StepReport, eta: float) -> dict[str, str]:
        row = {
            "step": f"{report.step}/{report.steps}",
            "loss": _number(report.loss),
            "learning rate": f"{report.learning_rate:.2e}",
            "grad norm": _number(report.grad_norm),
            "tokens/s": f"{report.tokens / max(report.seconds, 1e-9):,.0f}",
        }
        if report.layers and self._relative:
            row["EV median"] = _share(self._explained(report)[1])
        mfu = self.mfu(report)
        if mfu is not None:
            row["MFU"] = f"{mfu:.1%}"
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            row["GPU GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
        return row | {"time left": clock(eta)}

    def _table(self, rows: Sequence[dict[str, str]]) -> Table:
        names = list(rows[-1])
        needed = sum(max(len(name), *(len(row.get(name, "")) for row in rows)) + 3 for name in names) + 1
        if needed > self.console.width:
            names = [name for name in names if name not in self._SPARE]
        table = Table(title="training", title_justify="left")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(row.get(name, "") for name in names))
        return table

    def _layers(self, report: StepReport) -> Text | None:
        """The bars and the layers at both ends."""
        if not report.layers or not self._relative:
            return None
        order = sorted(report.layers)
        (worst, low), _, (best, high) = self._explained(report)
        unicode = "utf" in (self.console.encoding or "").lower()
        bars = sparkline([1 - report.layers[i] for i in order], self.console.width - 2, unicode=unicode)
        ends = f"layers {order[0]}…{order[-1]}: worst {_share(worst)} (layer {low}), best {_share(best)} (layer {high})"
        return Text(f"explained variance, {ends}\n{bars}", no_wrap=True, overflow="ellipsis")


class Pace:
    """Seconds a step takes."""

    def __init__(self) -> None:
        self.count, self.elapsed, self.slowest = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.elapsed += seconds
        self.slowest = max(self.slowest, seconds)

    def left(self, steps: int) -> float:
        # The first step allocates and warms up; one slow step must not scare with its ETA.
        if self.count > 2:
            return (self.elapsed - self.slowest) / (self.count - 1) * steps
        return self.elapsed / self.count * steps


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
