"""``npt bench``: what measures this machine. Options, messages and tables; the measuring is in ``npt_kernels/bench``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bench import help_texts
from .errors import reports_errors

if TYPE_CHECKING:
    import torch

    from ..bench.results import ResultFile

__all__ = ["bench"]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_RESULTS = Path("npt-bench")

bench = typer.Typer(name="bench", help=help_texts.BENCH, no_args_is_help=True, rich_markup_mode="rich")

_Names = list[str] | None
_Shape = Annotated[_Names, typer.Option("--shape", metavar="NAME,…", help="Models.", show_default=False)]
_Mode = Annotated[_Names, typer.Option("--mode", metavar="NAME,…", help="Modes.", show_default=False)]
_Op = Annotated[_Names, typer.Option("--op", metavar="NAME,…", help="Ops.", show_default=False)]
_Provider = Annotated[
    _Names, typer.Option("--provider", metavar="NAME,…", help="Providers; frozen is always there.", show_default=False)
]
_Tokens = Annotated[_Names, typer.Option("--tokens", metavar="N,…", help="Token counts.", show_default=False)]
_Rank = Annotated[_Names, typer.Option("--rank", metavar="N,…", help="Ranks.", show_default=False)]
_Rule = Annotated[str, typer.Option("--rule", metavar="NAME", help="Form of the weight change.")]
_Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="|".join(_DTYPES), help="Default: bf16 on a GPU, fp32 on a CPU.")
]
_Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="Default: a GPU if there is one.")]
_Small = Annotated[
    bool,
    typer.Option("--small", help="Widths ÷ 16 (train: 8): whether everything runs, not how fast.", show_default=False),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would run and how long it takes; run nothing.")]
_Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Results go to DIR/<device>/<suite>-<date>.json.")
]
_Part = Annotated[
    str | None,
    typer.Option("--part", metavar="I/N", help="The I-th of N parts of about equal time.", show_default=False),
]
_SlowLimit = Annotated[
    float, typer.Option("--slow-limit", metavar="SECONDS", help="Skip providers of which one call takes longer.")
]


@bench.callback()
def _bench() -> None: ...


# ---- kernels and memory ----------------------------------------------------------------------------------------------


@bench.command(help=help_texts.KERNELS)
@reports_errors
def kernels(
    op: _Op = None,
    shape: _Shape = None,
    provider: _Provider = None,
    mode: _Mode = None,
    tokens: _Tokens = None,
    rank: _Rank = None,
    rule: _Rule = "self_key",
    dtype: _Dtype = None,
    device: _Device = None,
    small: _Small = False,
    part: _Part = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="Default: 30 on a GPU, 5 on a CPU.")
    ] = None,
    slow_limit: _SlowLimit = 5.0,
    dry_run: _DryRun = False,
    out: _Out = _RESULTS,
) -> None:
    _quiet_torch()
    from ..bench import grid
    from ..bench import kernels as suite

    where, size = _where(device, small)
    filters = _filters(op, shape, provider, mode, tokens, rank, rule)
    settings = grid.plan_settings(filters, size, _dtype(dtype, where))
    count = rounds if rounds is not None else suite.ROUNDS[where.type]
    if count < 1:
        raise ValueError(f"--rounds {rounds} must be at least 1")
    _run_settings("kernels", settings, filters, where, size, part, dry_run, out, count, slow_limit)


@bench.command(help=help_texts.MEMORY)
@reports_errors
def memory(
    op: _Op = None,
    shape: _Shape = None,
    provider: _Provider = None,
    mode: _Mode = None,
    tokens: _Tokens = None,
    rank: _Rank = None,
    rule: _Rule = "self_key",
    dtype: _Dtype = None,
    device: _Device = None,
    small: _Small = False,
    part: _Part = None,
    slow_limit: _SlowLimit = 5.0,
    dry_run: _DryRun = False,
    out: _Out = _RESULTS,
) -> None:
    _quiet_torch()
    from ..bench import memory as suite

    where, size = _where(device, small)
    filters = _filters(op, shape, provider, mode, tokens, rank, rule)
    settings = suite.plan_memory(filters, size, _dtype(dtype, where))
    _run_settings("memory", settings, filters, where, size, part, dry_run, out, 1, slow_limit)


def _filters(op: _Names, shape: _Names, provider: _Names, mode: _Names, tokens: _Names, rank: _Names, rule: str) -> Any:
    from ..bench.grid import Filters

    return Filters(
        _words(op), _words(shape), _words(provider), _words(mode),
        _numbers("--tokens", tokens), _numbers("--rank", rank), rule,
    )  # fmt: skip


def _run_settings(
    suite: str,
    settings: list[Any],
    filters: Any,
    device: torch.device,
    size: str,
    part: str | None,
    dry_run: bool,
    out: Path,
    rounds: int,
    slow_limit: float,
) -> None:
    from ..bench import tables
    from ..bench.grid import estimate, settings_of_part
    from ..bench.kernels import run_kernels
    from ..bench.memory import run_memory

    seconds = [estimate(setting, device, rounds, slow_limit) for setting in settings]
    chosen = settings_of_part(settings, _part(part), seconds)
    if not chosen:
        raise ValueError(f"--part {part}: there are only {len(settings)} groups; ask for fewer parts")
    costs = {id(setting): cost for setting, cost in zip(settings, seconds, strict=True)}
    if dry_run:
        tables.print_plan(chosen, [costs[id(setting)] for setting in chosen], device, size)
        return
    result = _result(suite, device, size, part, out)
    with _kept(result), _progress(suite, len(chosen)) as tell:

        def done(setting: Any, rows: list[dict[str, Any]]) -> None:
            tell(tables.line(setting, rows))

        if suite == "kernels":
            run_kernels(chosen, device, result, rounds=rounds, slow_limit=slow_limit, done=done)
        else:
            run_memory(chosen, device, result, slow_limit=slow_limit, done=done)
    tables.print_rows(suite, result.rows)
    _finish(result)


# ---- train -----------------------------------------------------------------------------------------------------------


@bench.command(help=help_texts.TRAIN)
@reports_errors
def train(
    shape: _Shape = None,
    mode: _Mode = None,
    setting: Annotated[
        _Names, typer.Option("--setting", metavar="NAME,…", help="See above.", show_default=False)
    ] = None,
    converted: Annotated[
        _Names, typer.Option("--converted", metavar="all|4", help="Layers converted.", show_default=False)
    ] = None,
    tokens: Annotated[
        _Names, typer.Option("--tokens", metavar="N,…", help="Tokens per sequence.", show_default=False)
    ] = None,
    rank: _Rank = None,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", metavar="N", help="Sequences that go through the model at once.")
    ] = 1,
    dtype: _Dtype = None,
    device: _Device = None,
    small: _Small = False,
    part: _Part = None,
    dry_run: _DryRun = False,
    out: _Out = _RESULTS,
) -> None:
    _quiet_torch()
    from ..bench import tables
    from ..bench.grid import settings_of_part
    from ..bench.training import estimate_row, plan_rows, run_train

    where, size = _where(device, small)
    rows = plan_rows(
        size, _dtype(dtype, where), shapes=_words(shape), modes=_words(mode), settings=_words(setting),
        converted=_words(converted), tokens=_numbers("--tokens", tokens), ranks=_numbers("--rank", rank), micro_batch=micro_batch,
    )  # fmt: skip
    seconds = [estimate_row(row, where) for row in rows]
    chosen = settings_of_part(rows, _part(part), seconds)
    if not chosen:
        raise ValueError(f"--part {part}: there are only {len(rows)} rows; ask for fewer parts")
    if dry_run:
        costs = dict(zip(map(str, rows), seconds, strict=True))
        tables.print_train_plan(chosen, [costs[str(row)] for row in chosen], where, size)
        return
    result = _result("train", where, size, part, out)
    with _kept(result), _progress("train", len(chosen)) as tell:
        run_train(chosen, where, result, done=lambda row, measured: tell(tables.train_line(row, measured)))
    tables.print_train(result.rows)
    _finish(result)


# ---- check -----------------------------------------------------------------------------------------------------------


@bench.command(help=help_texts.CHECK)
@reports_errors
def check(
    backends: Annotated[
        _Names, typer.Option("--backends", metavar="NAME,…", help="Default: all that run here.", show_default=False)
    ] = None,
    only: Annotated[str, typer.Option("--only", metavar="TEXT", help="Cases whose text contains this.")] = "",
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="Default: the GPU.")] = None,
    small: _Small = False,
    budget: Annotated[float, typer.Option("--budget", metavar="SECONDS", help="Start nothing new after that.")] = 470.0,
    timings: Annotated[bool, typer.Option("--timings/--no-timings", help="Time kernels after the checks.")] = True,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    isolate: Annotated[bool, typer.Option("--isolate", help="Run cases in another process.")] = False,
    out: _Out = _RESULTS,
) -> None:
    _quiet_torch()
    import torch

    from ..bench import device_check, tables

    if device is None and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here; --device cpu --small runs the same code at tiny shapes")
    where, size = _where(device or "cuda", small)
    if where.type == "cpu" and size != "small":
        raise ValueError("real sizes need a GPU; on a CPU add --small")
    usable, unusable = device_check.usable_backends(where, _words(backends))
    result = _result("check", where, size, None, out)
    result.extra["unusable_backends"] = unusable
    typer.echo(f"{result.facts['device']}: backends {', '.join(usable)}")
    for name, why in unusable.items():
        typer.echo(f"  not {name}: {why}")
    options = device_check.CheckOptions(
        usable, size == "small", only, budget, timings, compiled and where.type == "cuda", isolate
    )
    with _kept(result):
        device_check.run_check(options, where, result, typer.echo)
    tables.print_check(result.rows, result.extra, result.not_run)
    typer.echo(f"written: {result.path}")
    raise typer.Exit(device_check.exit_code(result))


# ---- report and compare ----------------------------------------------------------------------------------------------


@bench.command(help=help_texts.REPORT)
@reports_errors
def report(
    source: Annotated[
        Path | None,
        typer.Option(
            "--in", "-i", metavar="DIR", help="Results; default: npt-bench, or this repository's.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Where report.html goes; default: as --in.", show_default=False
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Also write the documents' figures there.", show_default=False),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", metavar="FILE.md", help="Also renew the table of goals in a document.", show_default=False
        ),
    ] = None,
) -> None:
    from ..bench.report import collect, write_page, write_pngs
    from ..bench.report.goals import replace_table
    from ..bench.results import repository

    folder = source
    if folder is None:
        root = repository()
        folder = root / "benchmarks" / "results" if root is not None and not _RESULTS.is_dir() else _RESULTS
    collected = collect(folder)
    place = (out or (folder if folder.is_dir() else folder.parent)).expanduser()
    path = write_page(collected, place / "report.html")
    stale = [entry for entry in collected.sources if entry.stale]
    typer.echo(
        f"{path}: {len(collected.rows)} rows of {len(collected.sources)} files, {path.stat().st_size / 1e6:.1f} MB"
    )
    for entry in stale:
        typer.echo(f"stale: {entry.name}: {entry.stale}")
    if png is not None:
        for figure in write_pngs(collected, png.expanduser()):
            typer.echo(str(figure))
    if table is not None:
        replace_table(table.expanduser(), collected)
        typer.echo(f"{table}: table of goals renewed")


@bench.command(help=help_texts.COMPARE)
@reports_errors
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="File or folder.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="File or folder.")],
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="SHARE", help="Changes below this share are none.")
    ] = 0.03,
    force: Annotated[bool, typer.Option("--force", help="Compare results of different devices.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Missing rows count as regressions.")] = False,
) -> None:
    from ..bench.compare import compare_results
    from ..bench.results import load_results
    from ..bench.tables import print_comparison

    if threshold < 0:
        raise ValueError(f"--threshold {threshold} must not be negative")
    found = compare_results(load_results(before), load_results(after), threshold=threshold, force=force)
    print_comparison(found)
    if found.regressed or (strict and found.missing):
        raise typer.Exit(1)


# ---- what the suites share -------------------------------------------------------------------------------------------


def _quiet_torch() -> None:
    """The profiler's notes about blocks it did not see allocated are expected here; torch reads this when it is imported."""
    import os

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _words(values: _Names) -> list[str]:
    """Options may be repeated and hold commas."""
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


def _numbers(option: str, values: _Names) -> list[int]:
    numbers = []
    for word in _words(values):
        if not word.isdecimal():
            raise ValueError(f"{option} {word!r} is not a whole number above 0")
        numbers.append(int(word))
    return numbers


def _where(name: str | None, small: bool) -> tuple[torch.device, str]:
    """``(device, size)``; says so where it falls back to the CPU or to small sizes."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            sizes = "at small sizes" if small else "at real sizes of small models (--small: seconds)"
            typer.echo(f"no CUDA GPU here: using the CPU, {sizes}", err=True)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not a device; use cuda, cuda:1 or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name!r} is not supported; use cuda, cuda:1 or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA GPU here; leave --device out to use the CPU")
    if device.type == "cuda":
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    size = "small" if small else "cpu" if device.type == "cpu" else "full"
    if size == "small" and device.type == "cpu":
        torch.set_num_threads(
            1
        )  # tiny products: a pool of threads only waits for itself, for milliseconds on a busy machine
    return device, size


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    if name is None:
        from ..bench.grid import default_dtype

        return default_dtype(device)
    if name not in _DTYPES:
        raise ValueError(f"--dtype {name!r} is not one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part {text!r} must look like 2/5: the second of five parts")
    return int(index), int(count)


def _result(suite: str, device: torch.device, size: str, part: str | None, out: Path) -> ResultFile:
    from ..bench.results import ResultFile, environment

    result = ResultFile(suite, environment(device), ["npt", *sys.argv[1:]], size, out.expanduser(), _part(part))
    result.save()  # a folder that cannot be written is known before anything slow
    return result


@contextmanager
def _kept(result: ResultFile) -> Iterator[None]:
    """Ctrl-C ends a run with a word on what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        left = len(result.not_run)
        typer.echo(f"stopped: {len(result.rows)} rows kept in {result.path}, {left} groups not run", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yield ``tell(line)``, once per finished group: a bar on a terminal, a line elsewhere."""
    from ..progress import progress_bar

    terminal = sys.stderr.isatty()
    with progress_bar(title, total, "groups", enabled=terminal) as advance:

        def tell(line: str) -> None:
            advance(1)
            if not terminal:
                typer.echo(line)

        yield tell


def _finish(result: ResultFile) -> None:
    typer.echo(f"written: {result.path}")
    bad: Sequence[dict[str, Any]] = [row for row in result.rows if row["status"] in ("wrong", "failed")]
    for row in bad:
        who = row.get("provider", row.get("setting"))
        what = " ".join(str(row[name]) for name in ("op", "model", "mode", "shape", "tokens", "rank") if row.get(name))
        typer.echo(f"{row['status']}: {who}, {what}: {row['reason']}", err=True)
    if bad:
        raise typer.Exit(1)


# ---- tune ------------------------------------------------------------------------------------------------------------


@bench.command(help=help_texts.TUNE)
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

    from ..bench.tune import tune as measure

    target = None if out is None else out.expanduser()
    path = measure(
        kernels or None, None, target, dtype=getattr(torch, _DTYPES[dtype]), rounds=rounds, report=typer.echo
    )
    typer.echo(f"written: {path}; tables are read from $NPT_TUNING_DIR under the GPU's name")
