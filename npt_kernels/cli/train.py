"""``npt train``: a configuration, or a run that goes on; ``--dry-run`` shows what it would do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reports_errors

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "train"]

HELP = """Convert a model and train its NP components to return what the original layers returned.

NAME is a configuration that ships (`npt configs`; default: demo), --config a YAML file of yours; after them any key of any
section can be set as section.key=value. Later wins: NAME, then --config, then key=value.

[bold]Examples[/bold]

\b
npt train
npt train demo model.rank=auto:64 training.max_steps=10
npt train small --dry-run
npt train --config mine.yaml paths.output_dir=runs/second
npt train model.base_model_name=./llama data.train_files='["*.txt"]'
npt train --resume runs/demo            (go on, same configuration)
npt train --resume runs/demo training.max_steps=100
npt train --resume runs/demo/adapter    (components, new optimizer)
npt train --help-config                 (every key and its meaning)
torchrun --nproc-per-node 2 -m npt_kernels train demo

Ctrl-C saves what has been trained and stops. A run that goes on from a checkpoint (training.save_steps=N writes them) gives
the numbers that it would have given without the stop.
"""


@reports_errors
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME] [section.key=value]...", show_default=False, help="See above.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with the keys of --help-config.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Short for paths.output_dir=…")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration and plan; load and fetch nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="PATH",
            help="Go on with a run (its output, or one checkpoint); or start from a saved adapter instead of converting.",
        ),
    ] = None,
    help_config: Annotated[bool, typer.Option("--help-config", help="Print every configuration key and exit.")] = False,
) -> None:
    from rich.console import Console

    console = Console()
    if help_config:
        _print_keys(console)
        return
    from ..configs import load_run_config, split_arguments

    name, overrides = split_arguments(arguments or [])
    point = None
    if resume is None:
        run_config = load_run_config(name, config, overrides)
    else:
        from ..run.resume import find_resume, resumed_config

        # A plan needs no more than the sizes of the files; a run compares every byte.
        point = find_resume(resume, thorough=not dry_run)
        run_config = resumed_config(point, resume, name, config, overrides)
    if output_dir is not None:
        run_config.paths.output_dir = str(output_dir)
    if dry_run:
        from ..estimate.plan import make_plan
        from ..estimate.printing import print_configuration, print_plan

        plan = make_plan(run_config)
        if os.environ.get("RANK", "0") == "0":
            print_configuration(plan, console)
            print_plan(plan, console)
        return
    from ..run.open import keep_freed_memory, open_run
    from ..run.run import run_training
    from ..training.distributed import World

    world = World.join(run_config)
    if not world.is_main:
        console = Console(quiet=True)
    if world.device.type == "cpu":
        keep_freed_memory()
    with open_run(run_config, training=True, console=console, world=world) as opened:
        run_training(
            run_config, opened.model, opened.tokenizer, opened.blocks, resume=point, console=console, world=world
        )
    # Not after an error: what the processes say of it goes through what this ends.
    world.leave()


def _print_keys(console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..configs.schema import RunConfig

    for section, info in RunConfig.model_fields.items():
        model: Any = info.annotation
        table = Table(title=section, title_justify="left", title_style="bold", caption=None, box=None, padding=(0, 2))
        table.add_column("key", no_wrap=True)
        table.add_column("default")
        table.add_column("meaning")
        for key, field in model.model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)
            table.add_row(key, escape(default), escape(field.description or _type_name(field.annotation)))
        console.print(table)
        console.print()


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)).replace("typing.", "").replace("NoneType", "null")
