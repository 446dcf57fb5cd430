"""``npt transfer``: the weight changes of a run with a context, put into the run without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reports_errors
from .reading import load_for_reading, writable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "transfer"]

HELP = """Which layers and tokens carry a context? Replay its weight changes in a run without it, and see.

The model reads CONTEXT and PROMPT, and what attention gave to every MLP (the per-token weight change) is kept. Then it reads
PROMPT alone, with those changes put in. The table says how much of the context's effect comes over: probability of the answer,
KL divergence from the run with the context, and the share carried (1: all of it). All layers carry everything, exactly; a map
shows every token alone, from every layer upwards.

[bold]Examples[/bold]

\b
npt transfer --context "The capital of Zorvania is Marigold." --prompt "The capital of Zorvania is" --answer Marigold
npt transfer --context "…" --prompt "…" --layers 15:30 --tokens last --out runs/transfer
npt transfer --context "…" --prompt "…" --tokens -1,-3 --adapter runs/demo     (a converted model)

--out DIR gets transfer.json, transfer.png and transfer.html (one page, no network).
"""


@reports_errors
def transfer(
    context: Annotated[str, typer.Option("--context", help="What only the first run reads.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What both runs read.")],
    answer: Annotated[
        str | None, typer.Option("--answer", help="What should follow. Default: what the run with the context writes.")
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="all, upper_half, lower_half, 15:30 or 3,7,-1.")
    ] = "upper_half",
    tokens: Annotated[
        str, typer.Option("--tokens", help="last (those that predict the answer), all, or indices such as -1,-3.")
    ] = "last",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of the texts shown.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for JSON, figure and page.")
    ] = None,
    model_name: Annotated[str, typer.Option("--model", "-m", help="'demo', a folder or a hub id.")] = "demo",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="NP components: output of npt train or save_npt.")
    ] = None,
    no_map: Annotated[bool, typer.Option("--no-map", help="Leave the map out: one run for each of its cells.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    from rich.console import Console

    from ..plasticity import transfer as transfer_deltas
    from ..plasticity.transfer import write_transfer

    console = Console(stderr=as_json)
    places = _tokens(tokens)
    directory = None if out is None else writable(out.expanduser())
    model, tokenizer = load_for_reading(console, model_name, adapter, threads)
    transferred = transfer_deltas(
        model, tokenizer, context, prompt, answer=answer, layers=layers, tokens=places, max_new_tokens=new_tokens,
        with_map=not no_map, progress=sys.stderr.isatty(),
    )  # fmt: skip
    files = [] if directory is None else write_transfer(transferred, directory)
    if as_json:
        typer.echo(json.dumps(transferred.report, ensure_ascii=False, indent=2))
        return
    _print(console, transferred)
    if files:
        console.print(
            f"\n{', '.join(f.name for f in files)} in {directory}", markup=False, highlight=False, soft_wrap=True
        )


def _tokens(text: str) -> str | list[int]:
    if text in ("last", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--tokens {text!r} is not understood; use last, all or indices such as -1,-3") from None


def _print(console: Console, transferred: Any) -> None:
    from rich.table import Table

    from ..plasticity.transfer import HEADINGS, cells

    table = Table(box=None, padding=(0, 1))
    for i, heading in enumerate(HEADINGS):
        width = max(map(len, heading.split()))
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0, min_width=width)
    for row in transferred.rows:
        table.add_row(*cells(row))
    console.print(f"answer ({transferred.report['answer_from']}): {transferred.report['answer']!r}", markup=False)
    console.print(table)
    for who, text in transferred.texts.items():
        console.print(f"{who}: {text!r}", markup=False, highlight=False, soft_wrap=True)
