"""The ``npt`` command. Nothing heavy is imported before a command needs it; errors of ours are one line and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:
    raise SystemExit("the npt command needs typer, rich and transformers: pip install 'npt_kernels[train]'") from None

from .bench import bench
from .errors import reports_errors
from .eval import EVAL_HELP, evaluate
from .learn import learn_command
from .plan import plan_command
from .transfer import transfer_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..configs.schema import RunConfig
    from ..training.distributed import World

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

_TRAIN_HELP = """Convert a model and train its NP components to return what the original layers returned.

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

app = typer.Typer(
    name="npt",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench)
plan_command(app)
learn_command(app)
transfer_command(app)
app.command("eval", help=EVAL_HELP)(evaluate)


# ---- npt -------------------------------------------------------------------------------------------------------------


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


# ---- npt train -------------------------------------------------------------------------------------------------------


@app.command(help=_TRAIN_HELP)
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
    run_config = _run_config(arguments or [], config, output_dir, resume)
    if dry_run:
        from ..estimate.plan import make_plan
        from ..estimate.printing import print_configuration, print_plan

        plan = make_plan(run_config)
        if os.environ.get("RANK", "0") == "0":
            print_configuration(plan, console)
            print_plan(plan, console)
        return
    from ..training.distributed import World

    world = World.join(run_config)
    _train(run_config, world, resume, console if world.is_main else Console(quiet=True))
    # Not after an error: what the processes say of it goes through what this ends.
    world.leave()


def _train(run_config: RunConfig, world: World, resume: Path | None, console: Console) -> None:
    from ..base_model.loading import load_model, optimization_notes, resolve_dtype
    from ..run.records import check_trackers
    from ..text.blocks import check_sources, load_token_blocks

    check_sources(run_config)
    check_trackers(run_config)
    world.on_main(run_config.save)  # before anything slow: an output_dir that cannot be written is known at once
    _set_threads(run_config)
    device = world.device
    if world.sharded:
        # On the host until it is converted; then every process keeps its part, in the dtype that its device takes.
        run_config.model.dtype = str(resolve_dtype(run_config, device)).removeprefix("torch.")  # type: ignore[assignment]
    for note in optimization_notes(run_config, device):
        console.print(note, style="yellow", markup=False)
    where = (
        f"{device}"
        if world.size == 1
        else f"{world.size} processes ({'fsdp' if world.sharded else 'ddp'}, {device.type})"
    )
    console.print(f"loading {run_config.model.base_model_name} on {where}", markup=False)
    with world.main_first():  # which downloads and fills caches
        model, tokenizer = load_model(run_config, "cpu" if world.sharded else device)
        blocks = load_token_blocks(run_config, tokenizer)
    for line in blocks.sources:
        console.print(line, markup=False, highlight=False)
    from ..run.engine import run_training
    from ..run.oom import keep_freed_memory

    if device.type == "cpu":
        keep_freed_memory()
    run_training(run_config, model, tokenizer, blocks, resume=resume, console=console, world=world)


def _run_config(
    arguments: Sequence[str], file: Path | None, output_dir: Path | None, resume: Path | None = None
) -> RunConfig:
    """The configuration of ``npt train``; a checkpoint's own where neither NAME nor ``--config`` says another."""
    from ..configs import load_run_config
    from ..configs.schema import ConfigError

    name: str | None = None
    overrides = list(arguments)
    if overrides and "=" not in overrides[0]:
        name = overrides.pop(0)
    for text in overrides:
        if "=" not in text:
            raise ConfigError(
                f"{text!r}: only one NAME is taken, and it comes first; settings look like training.max_steps=10"
            )
    checkpoint = None
    if resume is not None:
        from ..run.resume import find_resume

        # Sizes only: the engine compares every byte, and must read all of it for that.
        checkpoint = find_resume(resume, thorough=False).checkpoint
    if checkpoint is not None and name is None and file is None:
        file = checkpoint.file("config.yaml")
        if checkpoint.path.parent.parent == resume and not any(text.startswith("paths.") for text in overrides):
            # A run's output that was moved goes on where it is now.
            overrides = [*overrides, f"paths.output_dir={json.dumps(str(resume))}"]
    run_config = load_run_config(name, file, overrides)
    if output_dir is not None:
        run_config.paths.output_dir = str(output_dir)
    if checkpoint is not None:
        from ..run.resume import changed_settings

        changed_settings(checkpoint, run_config)  # what cannot be changed is known before a model is loaded
    return run_config


def _set_threads(config: RunConfig) -> None:
    if config.optimization.num_threads is not None:
        import torch

        torch.set_num_threads(config.optimization.num_threads)


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


# ---- npt configs, npt env --------------------------------------------------------------------------------------------


@app.command(help="List the configurations that ship; with a NAME, print its YAML (a start for your own).")
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


@app.command(help="Versions, hardware, backends and caches: what a bug report needs. --json for machines.")
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


def main() -> None:
    """Entry point of the ``npt`` script."""
    # Windows and LC_ALL=C terminals: a progress bar's character must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # transformers imports torchao where it is installed, and that warns of GPU parts a CPU build of torch cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app(prog_name="npt")


if __name__ == "__main__":
    main()
