"""``npt bench``: what measures this machine. So far: ``tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_errors import reports_errors

__all__ = ["bench"]

_TUNE_HELP = """Time every candidate tile of the Triton kernels on this GPU and write the fastest to a table.

KERNEL is any of segmented_gemm, gemm_act, pair_forward, pair_backward, decode, coefficients, skinny; all by default.
Nothing tunes itself: without a table for your GPU the kernels use tiles that are known to compile well, and this command
replaces them by measured ones. It needs a CUDA GPU that is otherwise idle, and minutes per kernel.

[bold]Examples[/bold]

\b
npt bench tune
npt bench tune coefficients skinny
npt bench tune pair_forward --dtype fp16 --rounds 30
NPT_TUNING_DIR=~/tiles npt bench tune    (written there, and found there by every run with that variable)

A table of another dtype or kernel in the same file is kept.
"""

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

bench = typer.Typer(name="bench", help="Measure this machine: `npt bench tune`.", no_args_is_help=True)


@bench.callback()
def _bench() -> None: ...


@bench.command(help=_TUNE_HELP)
@reports_errors
def tune(
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="[KERNEL]...", show_default=False, help="See above.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: $NPT_TUNING_DIR/<gpu>.json, or tuning/<gpu>.json."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="|".join(_DTYPES), help="Of the operands.")] = "bf16",
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Timed launches per candidate.")] = 15,
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} must be at least 1")
    import torch

    from .tuning import tune as measure

    target = None if out is None else out.expanduser()
    path = measure(
        kernels or None, None, target, dtype=getattr(torch, _DTYPES[dtype]), rounds=rounds, report=typer.echo
    )
    typer.echo(f"written: {path}; tables are read from $NPT_TUNING_DIR under the GPU's name")
