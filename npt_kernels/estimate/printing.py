"""A plan as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import parse_rank
from .devices import COMPUTE_EFFICIENCY, TRANSFER_EFFICIENCY
from .whole_run import Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .terms import Phase

__all__ = ["print_configuration", "print_plan", "size_text"]


def size_text(count: int) -> str:
    """Bytes for people."""
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**23 else f"{count / 2**10:,.0f} KiB"


def print_configuration(plan: Plan, console: Console) -> None:
    """The resolved configuration in the form that ``--config`` takes."""
    from ..configs.yaml12 import write_yaml

    console.print("# configuration: resolved; a file of these lines works with --config", style="bold", soft_wrap=True)
    # Block style and no wrapping: what is printed can be copied.
    text = write_yaml(plan.config.model_dump(mode="json"), width=10_000)
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_plan(plan: Plan, console: Console) -> None:
    """What runs where, memory at the peak and per phase, predicted times, and what would fit if it does not."""
    from rich.markup import escape

    table = _table("plan", header=False)
    for key, value in _rows(plan):
        table.add_row(key, escape(value))
    console.print(table)
    _print_memory(plan, console)
    _print_times(plan, console)
    _print_verdict(plan, console)
    for note in plan.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)


def _table(title: str, *, header: bool = True) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2), show_header=header)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    config, model, adapter = plan.config, plan.model, plan.adapter
    ranks = sorted(set(adapter.ranks))
    auto = parse_rank(config.model.rank)[0] == "auto"
    bounds = dict.fromkeys((ranks[0], ranks[-1]))
    rank = f"mean {ranks[0]}, allotted by the calibration" if auto else " to ".join(map(str, bounds))
    where = str(plan.device) if plan.gpu is None else f"{plan.gpu.name}"
    if plan.parallel.devices > 1:
        where = f"{plan.parallel.devices} × {where} ({plan.parallel})"
    rows = [
        (
            "model",
            f"{config.model.base_model_name}: {model.num_layers} {model.family} layers, hidden size {model.hidden_size}",
        ),
        ("device", f"{where}, frozen base in {str(plan.dtype).removeprefix('torch.')}"),
        (
            "converted",
            f"{len(adapter.layers)} layers ({config.model.npt_layers}), rule {config.model.rule}, rank {rank}",
        ),
    ]
    rows += [(f"  {name}", f"{shape[0]} → {shape[1]}") for name, shape in adapter.targets.items()]
    rows += [("skipped", f"layer {index}: {reason}") for index, reason in adapter.skipped.items()]
    share = adapter.total / max(model.parameters, 1)
    rows += [
        ("trainable", f"{adapter.total:,} parameters ({share:.1%} of the frozen ones)"),
        ("frozen", f"{model.parameters:,} parameters"),
        ("training", f"{config.training.mode}, {plan.tokens_per_step:,} tokens a step"),
        ("steps", f"{'?' if plan.steps is None else f'{plan.steps:,}'} ({plan.steps_from})"),
        ("evaluation", f"{config.evaluation.tokens:,} held-out tokens before and after"),
        ("output", str(config.output_dir)),
    ]
    return rows


def _print_memory(plan: Plan, console: Console) -> None:
    from rich.markup import escape

    cpu = plan.device.type == "cpu"
    worst = plan.worst
    table = _table(f"\nmemory at the peak: {worst.name}, {worst.moment}")
    table.add_column("term")
    table.add_column("memory" if cpu else "each GPU", justify="right")
    if not cpu:
        table.add_column("host", justify="right")
    table.add_column("from")
    for term in worst.terms:
        sizes = [size_text(term.bytes) if term.where == "device" or cpu else ""]
        if not cpu:
            sizes.append(size_text(term.bytes) if term.where == "host" else "")
        table.add_row(escape(term.name), *sizes, escape(term.why))
    if not cpu:
        table.add_row("reserve (assumed)", size_text(plan.reserve_bytes), "", "CUDA context, workspaces, fragmentation")
    total = [size_text(worst.device_bytes + plan.reserve_bytes + (worst.host_bytes if cpu else 0))]
    if not cpu:
        total.append(size_text(worst.host_bytes) if worst.host_bytes else "")
    table.add_row("[bold]sum[/bold]", *(f"[bold]{text}[/bold]" for text in total), "beside Python and torch themselves")
    console.print(table)
    phases = _table("\nby phase")
    for column in ("phase", "memory" if cpu else "each GPU", *(() if cpu else ("host",)), "at"):
        phases.add_column(column, justify="left" if column in {"phase", "at"} else "right")
    for phase in plan.phases:
        phases.add_row(phase.name, *_phase_sizes(phase, cpu), phase.moment)
    console.print(phases)


def _phase_sizes(phase: Phase, cpu: bool) -> list[str]:
    if cpu:
        return [size_text(phase.device_bytes + phase.host_bytes)]
    return [size_text(phase.device_bytes), size_text(phase.host_bytes) if phase.host_bytes else ""]


def _print_times(plan: Plan, console: Console) -> None:
    if plan.gpu is None or not plan.times:
        return
    table = _table("\none optimizer step, predicted (not measured)")
    for column in ("phase", "seconds", "compute", "transfer", "hidden", "tokens/s", "MFU"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for step in plan.times:
        table.add_row(
            step.phase, f"{step.seconds:.2f}", f"{step.compute:.2f}", f"{step.transfer:.2f}" if step.transfer else "–",
            f"{step.hidden:.0%}" if step.transfer else "–", f"{step.tokens_per_second:,.0f}", f"{step.mfu:.0%}",
        )  # fmt: skip
    console.print(table)
    gpu = plan.gpu
    console.print(
        f"assumed of {gpu.name}: {COMPUTE_EFFICIENCY:.0%} of {gpu.tflops:g} TFLOP/s bf16, {TRANSFER_EFFICIENCY:.0%} of "
        f"{gpu.memory_gbs:g} GB/s memory, {gpu.pcie_gbs:g} GB/s PCIe, {gpu.link_gbs:g} GB/s between GPUs ({gpu.source})",
        style="dim", soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    if plan.steps and plan.config.training.mode != "none":
        seconds = sum(step.seconds for step in plan.times[:1]) * plan.steps
        if len(plan.times) == 2:
            polish = min(plan.config.training.polish_steps, plan.steps)
            seconds = plan.times[0].seconds * (plan.steps - polish) + plan.times[1].seconds * polish
        console.print(f"all {plan.steps:,} steps: about {_clock(seconds)}, predicted", highlight=False)


def _clock(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h"


def _print_verdict(plan: Plan, console: Console) -> None:
    from rich.markup import escape

    if plan.fits is None:
        if plan.device.type != "cpu":
            console.print("\nname the GPU to see whether it fits: --gpu H100 or --gpu-memory 24GiB", style="dim")
        return
    limits = []
    if plan.device.type == "cpu":
        limits.append(f"{size_text(plan.budget.host or 0)} of memory")
        head = (plan.budget.host or 0) - plan.device_bytes - plan.host_bytes
    else:
        if plan.budget.device is not None:
            limits.append(f"{size_text(plan.budget.device)} on each GPU")
        if plan.budget.host is not None:
            limits.append(f"{size_text(plan.budget.host)} of host memory")
        head = (plan.budget.device or 0) - plan.device_bytes - plan.reserve_bytes
    there = " and ".join(limits)
    if plan.fits:
        batch = f"; the largest training.batch_size that fits is {plan.largest_batch}" if plan.largest_batch else ""
        console.print(f"\n[green]fits[/green] {escape(there)}, {size_text(head)} to spare{batch}", highlight=False)
        return
    console.print(f"\n[red]does not fit[/red] {escape(there)}", highlight=False)
    if not plan.suggestions:
        console.print(
            "no change of memory keys makes it fit; more or larger GPUs do (--gpus, --gpu-memory), or a smaller model"
        )
        return
    console.print("these changes do, cheapest first (append them to the command):")
    for entry in plan.suggestions:
        console.print(f"  {entry.line}", style="bold", soft_wrap=True, markup=False, highlight=False)
        need = size_text(entry.device_bytes if plan.device.type != "cpu" else entry.host_bytes)
        host = (
            f", {size_text(entry.host_bytes)} of host memory" if entry.host_bytes and plan.device.type != "cpu" else ""
        )
        speed = f", predicted {1 / entry.seconds_per_token:,.0f} tokens/s" if entry.seconds_per_token else ""
        console.print(f"    {entry.cost}; needs {need}{host}{speed}", style="dim", soft_wrap=True, highlight=False)
