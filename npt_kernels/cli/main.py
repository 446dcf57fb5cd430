"""The ``npt`` command. Nothing heavy is imported before a command needs it; errors of ours are one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

try:
    import typer
except ImportError:
    raise SystemExit("the npt command needs typer, rich and transformers: pip install 'npt_kernels[train]'") from None

from . import bench, configs, env, eval, inspect, learn, plan, train, transfer

__all__ = ["app", "main"]

_HELP = """Neuro-Plastic Transformers: convert a language model so that attention acts through per-token weight changes.

[bold]First steps[/bold]

\b
npt train              the demo: a real model, real text, minutes
npt train --dry-run    what it would do, without downloading
npt plan --model meta-llama/Llama-3.1-8B --gpu-memory 24GiB    does it fit, and what would
npt eval runs/demo     original and converted side by side
npt configs            the configurations that ship
npt env                versions, hardware, backends
npt bench tune         the fastest tiles for this machine's GPU
"""

app = typer.Typer(
    name="npt",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("train", help=train.HELP)(train.train)
app.command("eval", help=eval.HELP)(eval.evaluate)
app.command("plan", help=plan.HELP)(plan.plan)
app.command("learn", help=learn.HELP)(learn.learn)
app.command("transfer", help=transfer.HELP)(transfer.transfer)
app.command("inspect", help=inspect.HELP)(inspect.inspect)
app.add_typer(bench.bench)
app.command("configs", help=configs.HELP)(configs.configs)
app.command("env", help=env.HELP)(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        typer.echo(f"npt_kernels {__version__}")
        raise typer.Exit


@app.callback()
def _npt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the ``npt`` script."""
    # Windows and LC_ALL=C terminals: a progress bar's character must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # transformers imports torchao where it is installed, and that warns of GPU parts a CPU build of torch cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(prog_name="npt")
    except KeyboardInterrupt:  # before a command began, which would have said so itself
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
