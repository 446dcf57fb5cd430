"""accelerate's part of a run: device, precision, trackers."""

from __future__ import annotations

from typing import Any

from ..configs.schema import RunConfig
from ..training.loop import TrainingError
from ..training.precision import scale_losses
from .records import tracker_names

__all__ = ["make_accelerator"]


def make_accelerator(config: RunConfig) -> Any:
    """accelerate's, for device, precision and trackers. Raises :class:`TrainingError` for a precision that cannot be had here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    # accelerate keeps one precision per process and refuses another; a second run in one process may want one.
    if getattr(AcceleratorState, "_shared_state", None):
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.optimization.mixed_precision,
            log_with=tracker_names(config) or None,
            project_config=ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
        )
    except ValueError as error:
        raise TrainingError(f"optimization.mixed_precision={config.optimization.mixed_precision!r}: {error}") from None
    scale_losses(accelerator, config)
    return accelerator
