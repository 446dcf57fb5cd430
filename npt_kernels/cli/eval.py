"""``npt eval``: what an adapter is worth, on the terminal, as JSON and as figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reports_errors

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..configs.schema import RunConfig
    from ..evaluation.fidelity import LayerFidelity
    from ..evaluation.perplexity import EvalResult
    from ..evaluation.samples import Sample

__all__ = ["HELP", "adapter_path", "evaluate"]

HELP = """Measure a trained adapter: perplexity of original and converted model, KL, top-1 agreement, how well each layer
does the original's work, how large its weight change is, samples side by side.

Base model, text and prompts are those of the training run, if its config.yaml lies beside the adapter; any key can be set
as section.key=value. eval.json and the figures go to the folder eval of the run, or to --out.

[bold]Examples[/bold]

\b
npt eval runs/demo
npt eval runs/demo evaluation.tokens=32768 --out long
npt eval runs/demo --json > result.json
npt eval checkpoint.pt --model ./llama data.eval_files='[new.txt]'
"""


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
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder for eval.json and figures. Default: eval, beside the adapter or the checkpoints.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    from rich.console import Console

    console = Console(stderr=as_json)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from ..configs.schema import ConfigError

        raise ConfigError("npt eval runs in one process; start it without torchrun or accelerate launch")
    path = adapter_path(adapter)
    config = _eval_config(path, overrides or [], model_name)
    directory = _writable(out.expanduser() if out is not None else _default_directory(path))
    from ..evaluation.adapter import evaluate_adapter
    from ..model.save import load_npt
    from ..progress import progress_bar
    from ..run.open import computing, open_run

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with open_run(config, training=False, console=console) as opened:
        model, tokenizer, blocks, device = opened.model, opened.tokenizer, opened.blocks, opened.world.device
        report = load_npt(model, path)
        say(f"{path}: {report}")
        with computing(config, model, tokenizer, device, say):
            measured = evaluate_adapter(
                model, tokenizer, blocks.heldout, config.evaluation.prompts, config.evaluation.max_new_tokens,
                lambda title, total, unit: progress_bar(title, total, unit, enabled=sys.stderr.isatty() or say),
            )  # fmt: skip
    facts = {
        "adapter": str(path),
        "base_model": config.model.base_model_name,
        "converted_layers": list(report.layers),
        "np_parameters": report.parameters,
        "device": str(device),
        "text": list(blocks.sources),
    }
    files = measured.write(directory, facts)
    if as_json:
        typer.echo(json.dumps({**facts, **measured.to_dict()}, ensure_ascii=False, indent=2))
        return
    _print(console, measured.result, measured.fidelity, measured.samples)
    names = ", ".join(file.name for file in files)
    console.print(f"\n{names} in {directory}", markup=False, highlight=False, soft_wrap=True)


# ---- what to measure, where to write ---------------------------------------------------------------------------------


def adapter_path(path: Path) -> Path:
    """The adapter in ``path``: itself, or the folder of a run's output that holds it."""
    from ..configs.schema import ConfigError
    from ..model.save import find_adapter

    path = path.expanduser()
    adapter = find_adapter(path)
    if adapter is None:
        what = "has no npt_config.json" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"ADAPTER_DIR: {path} {what}; give the output of `npt train` or of save_npt, or a published checkpoint"
        )
    return adapter


def _eval_config(path: Path, overrides: Sequence[str], model_name: str | None) -> RunConfig:
    """The training run's configuration if it lies beside the adapter, else the demo's text with the adapter's base model."""
    from ..configs import load_run_config
    from ..configs.schema import ConfigError

    saved = _saved_config(path)
    base = _recorded_base(path)
    config = load_run_config(None, saved, overrides)
    if model_name is not None:
        config.model.base_model_name = model_name
    elif saved is None and not any(text.startswith("model.base_model_name=") for text in overrides):
        if base is None:
            raise ConfigError(f"{path} does not say which model it belongs to; add --model NAME")
        config.model.base_model_name = base
    return config


def _saved_config(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent
    return next((f for f in (folder / "config.yaml", folder.parent / "config.yaml") if f.is_file()), None)


def _recorded_base(path: Path) -> str | None:
    try:
        return json.loads((path / "npt_config.json").read_text(encoding="utf-8")).get("base_model")
    except (OSError, ValueError, AttributeError):
        return None


def _default_directory(path: Path) -> Path:
    """``eval`` in the run's output; where no run is recognised, in the adapter's own folder. Never inside a checkpoint."""
    from ..run.checkpoints import MANIFEST

    if (path / MANIFEST).is_file():
        checkpoint = path.resolve()
        folder = checkpoint.parent
        return (folder.parent if folder.name == "checkpoints" else folder) / "eval" / checkpoint.name
    saved = _saved_config(path)
    folder = saved.parent if saved is not None else path if path.is_dir() else path.parent
    return folder / "eval"


def _writable(directory: Path) -> Path:
    """``directory``, made. Raises :class:`ConfigError` before anything slow has run."""
    from ..configs.schema import ConfigError

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}; name another folder with --out") from error
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"{directory} cannot be written; name another folder with --out")
    return directory


# ---- tables ----------------------------------------------------------------------------------------------------------


def _print(console: Console, result: EvalResult, fidelity: Sequence[LayerFidelity], samples: Sequence[Sample]) -> None:
    console.print(_metrics_table(result))
    console.print(_layers_table(fidelity))
    if samples:
        console.print(_samples_table(samples))


def _plain_table(title: str, **settings: Any) -> Table:
    from rich.table import Table

    return Table(title=f"\n{title}", title_justify="left", title_style="bold", **settings)


def _metrics_table(result: EvalResult) -> Table:
    table = _plain_table(f"{result.tokens:,} held-out tokens", box=None, padding=(0, 2))
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
    return table


def _layers_table(fidelity: Sequence[LayerFidelity]) -> Table:
    """Explained variance and ‖ΔW‖ ÷ ‖W‖ per layer."""
    targets = list(dict.fromkeys(target for entry in fidelity for target in entry.delta_statistics))
    tokens = next(iter(fidelity[0].delta_statistics.values())).tokens
    title = f"layers; ‖ΔW‖/‖W‖ of {tokens:,} tokens in %: median/p95/max"
    table = _plain_table(title, box=None, padding=(0, 1))
    for name in ("layer", "rank", "explained", *targets):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in fidelity:
        cells = []
        for target in targets:
            found = entry.delta_statistics.get(target)
            shares = [] if found is None else [found.relative[name] for name in ("p50", "p95", "max")]
            cells.append("/".join(_percent(share) for share in shares))
        table.add_row(str(entry.index), str(entry.rank), f"{entry.explained_variance:.4f}", *cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 1 else f"{100 * share:.0f}"


def _samples_table(samples: Sequence[Sample]) -> Table:
    from rich.markup import escape

    table = _plain_table("greedy continuations", show_lines=True)
    for column in ("prompt", "original", "converted"):
        table.add_column(column, ratio=1)
    for sample in samples:
        table.add_row(*(escape(text.strip()) for text in (sample.prompt, sample.base, sample.npt)))
    return table
