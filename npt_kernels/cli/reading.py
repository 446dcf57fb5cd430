"""What commands that look at a model have in common: its loading, and the folder that they write to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .eval import adapter_path

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["load_for_reading", "writable"]


def load_for_reading(console: Console, model_name: str, adapter: Path | None, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer of a command that only runs them; ``adapter`` makes it a converted model."""
    from ..base_model.loading import load_model
    from ..configs.schema import RunConfig
    from ..training.distributed import choose_device

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    path = None
    if adapter is not None:
        path = adapter_path(adapter)
    config = RunConfig()
    config.model.base_model_name = model_name
    device = choose_device()
    console.print(f"loading {model_name}{'' if path is None else f' and {path}'} on {device}", markup=False)
    model, tokenizer = load_model(config, device)
    if path is not None:
        from ..model.save import load_npt

        load_npt(model, path)
    return model, tokenizer


def writable(directory: Path) -> Path:
    """The folder, made. Known before anything slow."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {directory} cannot be made: {error.strerror}; name another folder") from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"--out {directory} cannot be written; name another folder")
    return directory
