"""The ``npt`` command. Nothing heavy is imported before a command needs it; errors of ours are one line and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:
    raise SystemExit("the npt command needs typer, rich and transformers: pip install 'npt_kernels[train]'") from None

from .cli_bench import bench
from .cli_errors import reports_errors
from .cli_plan import plan_command

if TYPE_CHECKING:
    from rich.console import Console

    from .configs.schema import RunConfig
    from .training.distributed import World

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

_EVAL_HELP = """Measure a trained adapter: perplexity of original and converted model, KL, top-1 agreement, samples side by side.

Base model, text and prompts are those of the training run, if its config.yaml lies beside the adapter; any key can be set
as section.key=value.

[bold]Examples[/bold]

\b
npt eval runs/demo
npt eval runs/demo evaluation.tokens=32768
npt eval runs/demo --json > result.json
npt eval checkpoint.pt --model ./llama data.eval_files='[new.txt]'
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


# ---- npt -------------------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        from ._version import __version__

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
        from .planning.plan import make_plan
        from .planning.printing import print_configuration, print_plan

        plan = make_plan(run_config)
        if os.environ.get("RANK", "0") == "0":
            print_configuration(plan, console)
            print_plan(plan, console)
        return
    from .training.distributed import World

    world = World.join(run_config)
    _train(run_config, world, resume, console if world.is_main else Console(quiet=True))
    # Not after an error: what the processes say of it goes through what this ends.
    world.leave()


def _train(run_config: RunConfig, world: World, resume: Path | None, console: Console) -> None:
    from .inputs.blocks import check_sources, load_token_blocks
    from .inputs.loading import load_model, optimization_notes, resolve_dtype
    from .training.recording import check_trackers

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
    from .training.engine import run_training
    from .training.resources import keep_freed_memory

    if device.type == "cpu":
        keep_freed_memory()
    run_training(run_config, model, tokenizer, blocks, resume=resume, console=console, world=world)


def _run_config(
    arguments: Sequence[str], file: Path | None, output_dir: Path | None, resume: Path | None = None
) -> RunConfig:
    """The configuration of ``npt train``; a checkpoint's own where neither NAME nor ``--config`` says another."""
    from .configs import load_run_config
    from .configs.schema import ConfigError

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
        from .training.resuming import find_resume

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
        from .training.resuming import changed_settings

        changed_settings(checkpoint, run_config)  # what cannot be changed is known before a model is loaded
    return run_config


def _set_threads(config: RunConfig) -> None:
    if config.optimization.num_threads is not None:
        import torch

        torch.set_num_threads(config.optimization.num_threads)


def _adapter_path(path: Path, argument: str) -> Path:
    """The adapter in ``path``: itself, or the folder of a run's output that holds it."""
    from .configs.schema import ConfigError
    from .models.checkpoints import find_adapter

    path = path.expanduser()
    adapter = find_adapter(path)
    if adapter is None:
        what = "has no npt_config.json" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"{argument}: {path} {what}; give the output of `npt train` or of save_npt, or a published checkpoint"
        )
    return adapter


def _print_keys(console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from .configs.schema import RunConfig

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


# ---- npt eval --------------------------------------------------------------------------------------------------------


@app.command("eval", help=_EVAL_HELP)
@reports_errors
def evaluate(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="Output of `npt train` or of save_npt.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", show_default=False, help="As in `npt train`."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, where the adapter does not say or it moved.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    from rich.console import Console

    console = Console(stderr=as_json)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from .configs.schema import ConfigError

        raise ConfigError("npt eval runs in one process; start it without torchrun or accelerate launch")
    path = _adapter_path(adapter, "ADAPTER_DIR")
    config = _eval_config(path, overrides or [], model_name)
    from .evaluation.perplexity import evaluate as measure
    from .evaluation.perplexity import generate_samples
    from .inputs.blocks import load_token_blocks
    from .inputs.loading import choose_device, load_model
    from .models.checkpoints import load_npt
    from .streaming import streaming

    _set_threads(config)
    console.print(f"loading {config.model.base_model_name} and {path}", markup=False)
    device = choose_device()
    model, tokenizer = load_model(config, device)
    report = load_npt(model, path)
    console.print(str(report), markup=False, highlight=False)
    blocks = load_token_blocks(config, tokenizer)
    with streaming(config, model, device, lambda line: console.print(line, markup=False, highlight=False)):
        result = measure(model, blocks.heldout)
        samples = generate_samples(model, tokenizer, config.evaluation.prompts, config.evaluation.max_new_tokens)
    if as_json:
        from dataclasses import asdict

        payload = {
            "adapter": str(path),
            "base_model": config.model.base_model_name,
            "converted_layers": list(report.layers),
            "np_parameters": report.parameters,
            "metrics": result.to_dict(),
            "samples": [asdict(sample) for sample in samples],
        }
        typer.echo(json.dumps(payload, ensure_ascii=False, indent=2))
        return
    _print_evaluation(console, result, samples)


def _eval_config(path: Path, overrides: Sequence[str], model_name: str | None) -> RunConfig:
    """The training run's configuration if it lies beside the adapter, else the demo's text with the adapter's base model."""
    from .configs import load_run_config
    from .configs.schema import ConfigError

    folder = path if path.is_dir() else path.parent
    saved = next((f for f in (folder / "config.yaml", folder.parent / "config.yaml") if f.is_file()), None)
    base = _recorded_base(path)
    config = load_run_config(None, saved, overrides)
    if model_name is not None:
        config.model.base_model_name = model_name
    elif saved is None and not any(text.startswith("model.base_model_name=") for text in overrides):
        if base is None:
            raise ConfigError(f"{path} does not say which model it belongs to; add --model NAME")
        config.model.base_model_name = base
    return config


def _recorded_base(path: Path) -> str | None:
    try:
        return json.loads((path / "npt_config.json").read_text(encoding="utf-8")).get("base_model")
    except (OSError, ValueError, AttributeError):
        return None


def _print_evaluation(console: Console, result: Any, samples: Sequence[Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    title = f"\n{result.tokens:,} held-out tokens"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for label, value, error, form in (
        ("perplexity, original", result.base_perplexity, result.base_perplexity_se, ".3f"),
        ("perplexity, converted", result.npt_perplexity, result.npt_perplexity_se, ".3f"),
        ("ratio", result.perplexity_ratio, result.perplexity_ratio_se, ".4f"),
        ("KL(original‖converted), nats per token", result.kl, result.kl_se, ".4f"),
        ("top-1 agreement", result.top1_agreement, result.top1_agreement_se, ".2%"),
    ):
        table.add_row(label, format(value, form), format(error, form))
    console.print(table)
    side_by_side = Table(title="\ngreedy continuations", title_justify="left", title_style="bold", show_lines=True)
    for column in ("prompt", "original", "converted"):
        side_by_side.add_column(column, ratio=1)
    for sample in samples:
        side_by_side.add_row(*(escape(text.strip()) for text in (sample.prompt, sample.base, sample.npt)))
    console.print(side_by_side)


# ---- npt configs, npt env --------------------------------------------------------------------------------------------


@app.command(help="List the configurations that ship; with a NAME, print its YAML (a start for your own).")
@reports_errors
def configs(name: Annotated[str | None, typer.Argument(help="A configuration.", show_default=False)] = None) -> None:
    from .configs import named_configs, read_named

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
    from .environment import describe

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
    app(prog_name="npt")


if __name__ == "__main__":
    main()
