"""``npt configs``: the configurations that ship."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import reports_errors

__all__ = ["HELP", "configs"]

HELP = "List the configurations that ship; with a NAME, print its YAML (a start for your own)."


@reports_errors
def configs(name: Annotated[str | None, typer.Argument(help="A configuration.", show_default=False)] = None) -> None:
    from ..configs import named_configs, read_named

    if name is not None:
        typer.echo(read_named(name), nl=False)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=False)
    for known, summary in named_configs().items():
        table.add_row(f"[bold]{known}[/bold]", escape(summary))
    Console().print(table)
