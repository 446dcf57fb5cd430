"""``npt learn``: write facts into a model's weights and measure what that did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reports_errors
from .reading import writable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "learn"]

HELP = """Write a fact into the weights, and see what that did to everything else.

The fact is a statement that ends with its answer (--answer, default: the last word). The report has three rows: before, with
the fact in the context, and after; recall word for word and on your own questions, other subjects that now say it (leak), facts
of the world, perplexity of held-out prose. Exit code 1 if it cannot be called learned. The model's own files are never touched:
the edit is DIR/edit.safetensors, the report DIR/report.json and DIR/report.png.

[bold]Methods[/bold]

\b
rome         one layer, a gradient for the value (default)
context      upper fifth, closed form, no gradients
conditional  the same per token, only once the subject has been mentioned

[bold]Examples[/bold]

\b
npt learn --fact "The capital of Zorvania is Marigold." --subject Zorvania --out runs/zorvania
npt learn --fact "…" --subject … --ask "Zorvania is governed from" --phrase "The parliament of Zorvania sits in" -o runs/z
npt learn --facts facts.jsonl --method conditional --out runs/many     (fact, subject, answer, ask, phrasings, keep, others)
npt learn … --lora --out runs/zorvania                                 (also runs/zorvania/lora, for PEFT)
npt learn … --on runs/zorvania --out runs/second                       (on top of an earlier edit)
"""


@reports_errors
def learn(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for edit and report; must not hold one.")
    ],
    fact: Annotated[str | None, typer.Option("--fact", help="The statement; it ends with the answer.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Whom it is about, as written in it.")] = None,
    answer: Annotated[str, typer.Option("--answer", help="Its last words. Default: the last one.")] = "",
    ask: Annotated[
        list[str] | None, typer.Option("--ask", help="A test question that the answer would continue.")
    ] = None,
    phrase: Annotated[
        list[str] | None, typer.Option("--phrase", help="Another way to state it, for writing; names the subject.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="A text whose continuation must not change.")] = None,
    other: Annotated[
        list[str] | None, typer.Option("--other", help="Another subject that must not get the answer.")
    ] = None,
    facts_file: Annotated[
        Path | None, typer.Option("--facts", metavar="FILE", help="JSONL with one fact a line.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="rome, context or conditional.")] = "rome",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Layer to edit; several for context, conditional.")
    ] = None,
    model_name: Annotated[str, typer.Option("--model", "-m", help="'demo', a folder or a hub id.")] = "demo",
    on: Annotated[
        list[Path] | None, typer.Option("--on", metavar="DIR", help="An earlier edit, applied first.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="Ordinary text instead of the demo's plays.")
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option("--moments", metavar="FILE", help="Second moments instead of collecting or the cache."),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Also DIR/lora: the edit as a LoRA adapter that PEFT loads and merges.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    from rich.console import Console

    from ..base_model.loading import load_model
    from ..configs.schema import RunConfig
    from ..plasticity import Edit, apply_edit
    from ..plasticity import learn as learn_facts
    from ..plasticity.corpus import file_corpus
    from ..plasticity.learn import METHODS
    from ..plasticity.report import write_report
    from ..training.distributed import choose_device

    console = Console(stderr=as_json)
    facts = _facts(facts_file, fact, subject, answer, ask, phrase, keep, other)
    if method not in METHODS:
        raise ValueError(f"--method {method!r} is not known; choose one of {', '.join(METHODS)}")
    if lora and method == "conditional":
        raise ValueError("--lora: a conditional edit acts per token, which no LoRA can; use --method rome or context")
    directory = _fresh(out.expanduser())
    earlier = [Edit.load(path) for path in on or ()]
    corpus = file_corpus(text) if text else None
    for entry in facts:
        shown = entry.prompt if len(entry.prompt) <= 100 else f"… {entry.prompt[-100:]}"
        console.print(f"{shown!r} → {entry.answer!r}", markup=False, highlight=False)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    config = RunConfig()
    config.model.base_model_name = model_name
    device = choose_device()
    console.print(f"loading {model_name} on {device}", markup=False)
    model, tokenizer = load_model(config, device)
    for edit in earlier:
        apply_edit(model, edit)
    learned = learn_facts(
        model,
        tokenizer,
        facts,
        method=method,
        layers=layer,
        moments=moments,
        corpus=corpus,
        progress=sys.stderr.isatty(),
    )
    files = write_report(learned, directory)
    if lora:
        files.append(learned.edit.export_lora(directory / "lora", model))
    if as_json:
        typer.echo(json.dumps(learned.report, ensure_ascii=False, indent=2))
    else:
        _print(console, learned)
        console.print(
            f"\n{', '.join(f.name for f in files)} in {directory}", markup=False, highlight=False, soft_wrap=True
        )
    if not learned.learned:
        raise typer.Exit(1)


def _facts(
    file: Path | None, fact: str | None, subject: str | None, answer: str, *lists: list[str] | None
) -> list[Any]:
    from ..plasticity import Fact, read_facts

    if file is not None:
        if fact is not None or subject is not None:
            raise ValueError("--facts FILE and --fact are two ways to say it; give one")
        return read_facts(file)
    if fact is None or subject is None:
        raise ValueError('give --fact "…" and --subject, or --facts FILE')
    ask, phrase, keep, other = (tuple(entries or ()) for entries in lists)
    return [Fact(fact, subject, answer, ask=ask, phrasings=phrase, keep=keep, others=other)]


def _fresh(directory: Path) -> Path:
    """The folder, made; it must not hold an edit already. Known before anything slow."""
    if (directory / "edit.safetensors").exists() or (directory / "report.json").exists():
        raise ValueError(f"--out {directory} holds an edit already; name another folder")
    return writable(directory)


def _print(console: Console, learned: Any) -> None:
    from rich.table import Table

    from ..plasticity.report import COLUMNS

    # 80 columns where output is no terminal: headings break between words, and what was not asked has no column.
    columns = [(key, label) for key, label in COLUMNS if getattr(learned.after, key) is not None]
    table = Table(box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for _, label in columns:
        table.add_column(label, justify="right", min_width=max(map(len, label.split())))
    for label, row in (("before", learned.before), ("in context", learned.in_context), ("after", learned.after)):
        cells = [getattr(row, key) for key, _ in columns]
        table.add_row(label, *("–" if value is None else f"{value:.3f}" for value in cells))
    console.print(table)
    for layer, ratio in learned.applied.relative.items():
        kept = learned.applied.kept[layer]
        console.print(
            f"layer {layer}: ‖ΔW‖/‖W‖ {ratio:.3f}, kept after rounding {kept:.1%}", markup=False, highlight=False
        )
    for line in learned.applied.warnings:
        console.print(line, style="yellow", markup=False)
    if learned.learned:
        console.print("learned", style="green")
    else:
        console.print("not called learned: " + "; ".join(learned.refusals), style="red", markup=False)
