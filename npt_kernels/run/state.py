"""The state of a run: the content of a checkpoint, and the start of a resumed run."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..configs.schema import RunConfig
from ..messages import first_line
from ..training.distributed import World
from ..training.loop import Phase, Progress, StepReport
from .checkpoints import Checkpoint, DamagedCheckpoint, save_checkpoint

__all__ = ["RunState"]

#: Fields that stand in a checkpoint's manifest, to be read without its tensors; the others are its ``state.pt``.
_IN_MANIFEST = ("run", "phase", "objective", "total_steps")


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        run: Name of the run; a resumed run keeps it.
        phase, objective: What is trained.
        total_steps: Optimizer steps done, over all phases.
        progress: Of the phase; the loop moves it on.
        window: Reports since the last logged one.
        pending: Whether evaluation and samples that are due at the last step are still to come.
        text: Fingerprint of the training text.
        before: What was measured before training: ``base``, ``converted``, ``fidelity``, ``samples``, as plain values.
        seconds: Part of the run → wall-clock seconds.
        trained_tokens, trained_seconds: Of all steps.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: str = ""
    objective: str = ""
    total_steps: int = 0
    progress: Progress = field(default_factory=Progress)
    window: list[StepReport] = field(default_factory=list)
    pending: bool = False
    text: str | None = None
    before: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trained_tokens: int = 0
    trained_seconds: float = 0.0

    # ---- on disk -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> RunState:
        """The state in a checkpoint. Raises ``DamagedCheckpoint``."""
        values = {**checkpoint.state(), **{name: getattr(checkpoint, name) for name in _IN_MANIFEST}}
        try:
            values["progress"] = Progress(**values["progress"])
            values["window"] = [StepReport(**report) for report in values["window"]]
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedCheckpoint(
                f"{checkpoint.path} does not hold the state of a run: {first_line(error)}; resume from another, or take the "
                f"components alone: --resume {Path(checkpoint.output_dir) / 'adapter'}"
            ) from error

    def save(self, config: RunConfig, model: nn.Module, accelerator: Any, world: World, files: list[Path]) -> Path:
        """A new checkpoint in ``config.checkpoint_dir``; its directory. Raises as :func:`save_checkpoint`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _IN_MANIFEST}
        values |= {"progress": self.progress.to_dict(), "window": [asdict(report) for report in self.window]}
        return save_checkpoint(
            config.checkpoint_dir, model, accelerator,
            run=self.run, phase=self.phase, objective=self.objective, step=self.progress.step,
            total_steps=self.total_steps, output_dir=config.output_dir, state=values,
            files=files, keep=config.training.save_total_limit, world=world,
        )  # fmt: skip

    # ---- as the run goes on ------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Start a phase, or go on with the one of the checkpoint, which may have another number of steps by now."""
        if (self.phase, self.objective) != (phase.name, phase.objective):
            self.phase, self.objective = phase.name, phase.objective
            # What fits into memory stays known.
            self.progress = Progress(rows=self.progress.rows)
            self.window, self.pending = [], False
        for report in self.window:
            report.steps = phase.steps

    def count(self, report: StepReport) -> None:
        """One more step. It cannot be saved before :meth:`settle`."""
        self.total_steps += 1
        self.trained_tokens += report.tokens
        self.trained_seconds += report.seconds
        self.window.append(report)

    def settle(self, *, pending: bool) -> None:
        """The step is counted and in the log: components, log and numbers are of one moment again."""
        self.progress.updating, self.pending = False, pending

    def mean_report(self) -> StepReport:
        """The last report with losses and gradient norm averaged, tokens and seconds summed, over the window."""
        window, last, count = self.window, self.window[-1], len(self.window)
        values = {
            name: sum(getattr(r, name) for r in window) / count
            for name in ("loss", "equivalence", "penalty", "grad_norm")
        }
        layers = {index: sum(r.layers[index] for r in window) / count for index in last.layers}
        totals = {"tokens": sum(r.tokens for r in window), "seconds": sum(r.seconds for r in window)}
        return StepReport(**{**vars(last), **values, **totals, "layers": layers})
