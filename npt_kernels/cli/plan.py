"""``npt plan``: bytes and seconds of a run before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import reports_errors

if TYPE_CHECKING:
    from ..configs.schema import RunConfig

__all__ = ["HELP", "plan"]

HELP = """Memory and time of a run, from config.json alone: no weights, no download, seconds.

NAME, --config and section.key=value mean what they mean to `npt train`. With --model and neither NAME nor --config the
configuration is `optimized`, made for large models; for one narrower than 2048, `small` at a quarter of its hidden size.

Prints what lives where at the worst moment of every phase, the predicted time of a step, and, when it does not fit, the
cheapest changes that would. Bytes are counted tensors: within 10 % of what is measured on a CPU; on a GPU unverified, with a
reserve for what is not tensors. Times are predictions from data sheets.

[bold]Examples[/bold]

\b
npt plan                                                          (the demo, on this machine)
npt plan --model meta-llama/Llama-3.1-8B --gpu-memory 24GiB
npt plan --model meta-llama/Llama-3.1-8B --gpu 4090 --host-memory 64GiB training.mode=local
npt plan --model meta-llama/Llama-3.1-70B --gpu H200 --gpus 8 optimization.distributed=fsdp
npt plan --model ./llama --config mine.yaml --json > plan.json
"""


@reports_errors
def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME] [section.key=value]...", show_default=False, help="See above.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, as in `npt train`.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Local directory with config.json, or a known or cached hub id."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="H200, H100, A100, L40S, RTX4090, …")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Of each GPU: 24GiB, 80GB.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", metavar="SIZE", help="Of the machine.")] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", metavar="N", min=1, help="Processes with a GPU each (ddp, or fsdp if asked for).")
    ] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for the CPU even if there is a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    from ..configs.schema import ConfigError
    from ..estimate.devices import find_gpu, parse_size
    from ..estimate.parallel import Parallel
    from ..estimate.printing import print_plan
    from ..estimate.whole_run import make_plan

    if cpu and (gpu is not None or gpu_memory is not None):
        raise ConfigError("--cpu plans for the CPU; leave --gpu and --gpu-memory away")
    found = make_plan(
        _configuration(arguments or [], config, model),
        "cpu" if cpu else None,
        gpu=None if gpu is None else find_gpu(gpu),
        gpu_memory=None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory"),
        host_memory_bytes=None if host_memory is None else parse_size(host_memory, "--host-memory"),
        parallel=Parallel(data=gpus),
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    print_plan(found, Console())


def _configuration(arguments: list[str], file: Path | None, model: str | None) -> RunConfig:
    from ..configs import load_run_config, split_arguments

    name, overrides = split_arguments(arguments)
    if model is not None:
        if name is None and file is None:
            name, fitting = _usual(model, load_run_config(None, None, overrides))
            overrides[:0] = fitting
        overrides.insert(0, f"model.base_model_name={json.dumps(model)}")
    return load_run_config(name, file, overrides)


def _usual(model: str, given: RunConfig) -> tuple[str, list[str]]:
    """The named configuration for a model of this size, and what of it has to be smaller for this one."""
    from ..base_model.loading import load_model_config

    numbers = load_model_config(model, given.model.revision, given.cache_dir)
    width = next(
        (numbers[key] for key in ("hidden_size", "n_embd", "d_model") if isinstance(numbers.get(key), int)), None
    )
    if width is None or width >= 2048:
        return "optimized", []
    positions = [
        numbers[key] for key in ("max_position_embeddings", "n_positions") if isinstance(numbers.get(key), int)
    ]
    return "small", [f"model.rank=auto:{max(1, width // 4)}", f"data.max_length={min([256, *positions])}"]
