"""``npt inspect``: the weight change of every token of a text in every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import reports_errors
from .reading import load_for_reading, writable

if TYPE_CHECKING:
    from rich.console import Console

    from ..plasticity import Inspected

__all__ = ["HELP", "inspect"]

HELP = """What attention changes in the MLPs, token by token: how much, in which neurons, and from which earlier tokens.

Every token of TEXT has weights of its own in every layer, W + ΔW. The table has one row a layer: the size of ΔW against W,
and its share of what the MLP's first matrices (gate and up) and the whole layer return. The page shows all layers and tokens:
click, or use the arrow keys; the tokens that a change came from are underlined.

[bold]Examples[/bold]

\b
npt inspect --text "The capital of France is Paris." --out runs/inspect
npt inspect --file page.txt --layers 15:30 --adapter runs/demo     (a converted model)

--out DIR gets inspect.json, inspect.png and inspect.html (one page, no network).
"""


@reports_errors
def inspect(
    text: Annotated[str | None, typer.Option("--text", help="What the model reads.")] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="PATH", help="The same from a text file.")] = None,
    layers: Annotated[str, typer.Option("--layers", help="all, upper_half, lower_half, 15:30 or 3,7,-1.")] = "all",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for JSON, figure and page.")
    ] = None,
    model_name: Annotated[str, typer.Option("--model", "-m", help="'demo', a folder or a hub id.")] = "demo",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="NP components: output of npt train or save_npt.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    from rich.console import Console

    from ..plasticity import inspect as inspect_text
    from ..plasticity.inspection import write_inspection

    console = Console(stderr=as_json)
    read = _read(text, file)
    directory = None if out is None else writable(out.expanduser())
    model, tokenizer = load_for_reading(console, model_name, adapter, threads)
    found = inspect_text(model, tokenizer, read, layers=layers)
    files = [] if directory is None else write_inspection(found, directory)
    if as_json:
        typer.echo(json.dumps(found.report, ensure_ascii=False, indent=2))
        return
    _print(console, found)
    if files:
        console.print(
            f"\n{', '.join(f.name for f in files)} in {directory}", markup=False, highlight=False, soft_wrap=True
        )


def _read(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise ValueError("give either --text or --file")
    if file is None:
        assert text is not None
        return text
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--file {file} cannot be read as text: {getattr(error, 'strerror', None) or error}"
        ) from error


def _print(console: Console, found: Inspected) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..plasticity.inspection import HEADINGS, table

    shown = Table(box=None, padding=(0, 2))
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == HEADINGS[-1] else "right")
    for row in table(found):
        shown.add_row(*map(Text, row))  # a token may look like markup
    console.print(f"{len(found.tokens)} tokens, means over all but the start token", markup=False)
    console.print(shown)
