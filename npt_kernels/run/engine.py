"""One run from a base model to a trained adapter, as a function call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..configs.schema import RunConfig
from ..model.documents import isolated_documents
from ..offload import streaming
from ..text.blocks import document_separator
from ..training.distributed import World
from ..training.loop import TrainingError
from .oom import is_out_of_memory, memory_advice
from .records import RunSummary
from .run import Run

__all__ = ["RunSummary", "TrainingError", "run_training"]


def run_training(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    blocks: Any,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    world: World | None = None,
) -> RunSummary:
    """Convert ``model`` and train its NP components as the configuration says. The base stays frozen, bit for bit.

    Writes to ``config.output_dir``: ``adapter/`` (:func:`npt_kernels.save_npt`), ``metrics.jsonl``, ``summary.json``,
    ``config.yaml`` (resolved), ``samples.md``, ``plots/*.png``; to ``config.checkpoint_dir``: checkpoints, of which
    ``training.save_total_limit`` are kept. The model is left converted and trained.

    Args:
        config: The whole run.
        model: A causal language model; a converted one is converted anew.
        tokenizer: Its tokenizer, for samples; ``None``: no samples.
        blocks: Token ids ``train [n, L]`` (or a stream), ``calibration [m, L]``, ``heldout [k, L]`` and ``sources`` (names of
            the texts).
        resume: A run's output or a checkpoint: go on from there; on a CPU with the bits that the run would have had without a
            stop. Or an adapter, to start from it instead of the closed form: its layers, rule and ranks win over
            ``config.model``, and the optimizer and the schedule start anew.
        console: Where to print; default standard output.
        world: The processes of the run; default: joined here, if a launcher started several. Each needs the model and the text;
            rank 0 writes and prints.

    Returns:
        :class:`RunSummary`.

    Raises:
        TrainingError: Cannot start or go on: no training text, a loss that is not finite, out of memory. What was learned by
            then is saved.
        ConfigError: A tracker whose package is missing; nothing to resume from in ``resume``, or a configuration that cannot.
        KeyboardInterrupt: Ctrl-C; the step was finished, and adapter, checkpoint and metrics were saved.
        ValueError, FileNotFoundError: Of ``apply_npt`` and ``load_npt``.
    """
    world = world or World.join(config)
    console = console or Console(highlight=False, quiet=not world.is_main)
    threads = torch.get_num_threads()
    if config.optimization.num_threads:
        torch.set_num_threads(config.optimization.num_threads)
    run: Run | None = None
    try:
        run = Run(config, model, tokenizer, blocks, console, resume, world)
        with (
            streaming(config, model, run.accelerator.device, run.recorder.say),
            isolated_documents(model, document_separator(config, tokenizer)),
        ):
            return run.execute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(memory_advice(config, error) + ("" if run is None else run.rescue())) from error
    finally:
        torch.set_num_threads(threads)
        if run is not None:
            run.close()
