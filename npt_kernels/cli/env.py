"""``npt env``: what a bug report needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .errors import reports_errors

__all__ = ["HELP", "env"]

HELP = "Versions, hardware, backends and caches: what a bug report needs. --json for machines."


@reports_errors
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    from ..environment import describe

    facts = describe()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=False)
    for group, entries in facts.items():
        table.add_row(f"[bold]{group}[/bold]", "")
        for key, value in entries.items():
            table.add_row("  " + escape(key), escape(value))
    Console().print(table)
