"""The records of a run: metrics.jsonl, trackers, samples, plots, the summary."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..configs.schema import ConfigError, RunConfig
from ..durable_files import AppendedFile, write_whole
from ..evaluation.fidelity import LayerFidelity
from ..evaluation.perplexity import EvalResult
from ..evaluation.samples import Sample
from ..model.apply_report import ApplyReport
from ..training.loop import Phase, StepReport
from .checkpoints import Checkpoint
from .display import clock, results_table, samples_markdown, samples_table

__all__ = ["Recorder", "RunSummary", "check_trackers", "peak_memory", "tracker_names"]

#: The samples of a run start with this.
_SAMPLES_HEAD = "# Samples\n\nGreedy continuations by the original and the converted model.\n\n"


@dataclass
class RunSummary:
    """What a run found.

    Attributes:
        base, converted, trained: Held-out results of the original, after conversion (or of the adapter it resumed from) and
            after training (``None`` with ``training.mode: none``).
        fidelity_converted, fidelity_trained: Per converted layer.
        samples_converted, samples_trained: Prompts with both continuations.
        report: What was converted.
        seconds: Phase of the run → wall-clock seconds, those before a resumed checkpoint included.
        steps: Optimizer steps done, over all phases.
        tokens_per_second: Training tokens per second of training time (evaluations left out).
        peak_memory: Bytes: ``rss`` of the process since it started, and ``cuda`` where there is one.
        paths: ``adapter``, ``metrics``, ``summary``, ``config``, ``samples``, ``plots``.
    """

    base: EvalResult
    converted: EvalResult
    trained: EvalResult | None
    fidelity_converted: list[LayerFidelity]
    fidelity_trained: list[LayerFidelity] | None
    samples_converted: list[Sample]
    samples_trained: list[Sample] | None
    report: ApplyReport
    seconds: dict[str, float]
    steps: int
    tokens_per_second: float
    peak_memory: dict[str, int]
    paths: dict[str, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in ``summary.json``."""

        def layers(entries: list[LayerFidelity] | None) -> list[dict[str, Any]] | None:
            return None if entries is None else [entry.to_dict() for entry in entries]

        def samples(entries: list[Sample] | None) -> list[dict[str, str]] | None:
            return None if entries is None else [vars(entry) for entry in entries]

        return {
            "base": self.base.to_dict(),
            "converted": self.converted.to_dict(),
            "trained": None if self.trained is None else self.trained.to_dict(),
            "fidelity_converted": layers(self.fidelity_converted),
            "fidelity_trained": layers(self.fidelity_trained),
            "samples_converted": samples(self.samples_converted),
            "samples_trained": samples(self.samples_trained),
            "layers": list(self.report.layers),
            "ranks": [layer.rank for layer in self.report.converted],
            "trainable_parameters": self.report.parameters,
            "base_parameters": self.report.base_parameters,
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "paths": {name: str(path) for name, path in self.paths.items()},
        }


def peak_memory() -> dict[str, int]:
    """Bytes: ``rss``, the peak of the process since it started; ``cuda``, the peak that torch allocated, where it is used."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    memory = {"rss": int(peak)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda"] = int(torch.cuda.max_memory_allocated())
    return memory


# ---- trackers --------------------------------------------------------------------------------------------------------


def tracker_names(config: RunConfig) -> list[str]:
    """``training.report_to``, and wandb where ``wandb.enabled`` asks for it."""
    names = [*config.training.report_to, *(["wandb"] if config.wandb.enabled else [])]
    return list(dict.fromkeys(names))


def check_trackers(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if accelerate does not find a tracker's package; it would go on without it, silently."""
    names = tracker_names(config)
    if not names:
        return
    from accelerate import tracking

    available = {tracker.value for tracker in tracking.get_available_trackers()}
    for name in names:
        if name in available:
            continue
        if name in config.training.report_to:
            key, mend = f"training.report_to names {name}", "leave it out"
        else:
            key, mend = "wandb.enabled is true", "set it to false"
        raise ConfigError(f"{key}, but the package {name} is missing: pip install {name}, or {mend}")


def _flat_settings(config: RunConfig) -> dict[str, Any]:
    """``section.key`` → a number, a truth value or a text, which is all that TensorBoard's table of settings takes."""
    return {
        f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }


# ---- files -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Writes a run's files and tells its trackers; in a process that is not the main one it does nothing.

    Args:
        config: The run.
        console: Where to print.
        accelerator: Made with ``log_with=tracker_names(config)``.
    """

    def __init__(self, config: RunConfig, console: Console, accelerator: Any) -> None:
        self.config, self.console, self.accelerator = config, console, accelerator
        self.main: bool = accelerator.is_main_process
        output = config.output_dir
        self.paths = {
            "adapter": output / "adapter",
            "metrics": output / "metrics.jsonl",
            "summary": output / "summary.json",
            "config": output / "config.yaml",
            "samples": output / "samples.md",
            "plots": output / "plots",
        }
        #: Records of kind ``train``, for the plots.
        self.train_log: list[dict[str, Any]] = []
        self._metrics: AppendedFile | None = None
        self._samples: AppendedFile | None = None
        self._tracking = False
        #: Whether the user knows that the log waits for room on the disk.
        self._said_waiting = False

    def open(self, checkpoint: Checkpoint | None, *, append: bool = False) -> None:
        """Start the files, or put them back to where a checkpoint was written; ``append``: go on with what is there."""
        if not self.main:
            return
        self.config.save()
        if checkpoint is not None:
            self._restore(checkpoint.file("metrics.jsonl"))
        elif not append or not self.paths["samples"].exists():
            self.paths["samples"].write_text(_SAMPLES_HEAD)
        if checkpoint is None and not append:
            self.paths["metrics"].write_bytes(b"")
        self._metrics, self._samples = AppendedFile(self.paths["metrics"]), AppendedFile(self.paths["samples"])
        self._start_trackers(0 if checkpoint is None else checkpoint.total_steps)

    def _restore(self, log: Path) -> None:
        """The log as it was, for what came after it is done again; and what else was written from it."""
        metrics, text = self.paths["metrics"], log.read_text()
        present = metrics.read_text() if metrics.exists() else ""
        if re.search(r'"kind": "(train|eval|fidelity|samples)"', present.removeprefix(text)):
            # Of steps that are done again, with the same numbers unless something was changed: kept for that case.
            os.replace(metrics, metrics.with_name("metrics.before-resume.jsonl"))
        write_whole(metrics, text)
        records = [json.loads(line) for line in text.splitlines()]
        self.train_log = [
            {name: value for name, value in record.items() if name not in ("kind", "time")}
            for record in records
            if record["kind"] == "train"
        ]
        samples = [record for record in records if record["kind"] == "samples"]
        sections = [samples_markdown(r["stage"], [Sample(**sample) for sample in r["samples"]]) for r in samples]
        write_whole(self.paths["samples"], _SAMPLES_HEAD + "".join(sections))

    def _start_trackers(self, steps: int) -> None:
        names = tracker_names(self.config)
        if not names:
            return
        w = self.config.wandb
        settings: dict[str, dict[str, Any]] = {"wandb": {"entity": w.entity, "tags": w.tags}}
        # Hides what a crashed run had logged beyond its checkpoint, for those steps come again.
        settings["tensorboard"] = {"purge_step": steps + 1} if steps else {}
        self.accelerator.init_trackers(w.project, _flat_settings(self.config), settings)
        self._tracking = True
        where = f" (logs in {self.config.output_dir / 'logs'})" if "tensorboard" in names else ""
        self.say(f"metrics go to {', '.join(names)} too{where}")

    def close(self) -> None:
        if self._tracking:
            self._tracking = False
            self.accelerator.end_training()
        for file in (self._metrics, self._samples):
            if file is not None:
                file.close()
        self._metrics = self._samples = None

    # ---- while it runs -----------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self.main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            # Written line by line, so that a killed run leaves all it measured.
            self._metrics.add(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
            self._say_waiting()

    def _say_waiting(self) -> None:
        """A full disk must not cost the training: what it does not take waits for the next line."""
        problems = [file.problem for file in (self._metrics, self._samples) if file is not None and file.problem]
        if problems and not self._said_waiting:
            self.say(f"note: the log cannot be written ({problems[0]}); it is kept, and written when it can be")
        self._said_waiting = bool(problems)

    def complete(self) -> None:
        """Raise ``OSError`` unless all that was recorded is on the disk."""
        for file in (self._metrics, self._samples):
            if file is not None and not file.add(""):
                assert file.problem is not None
                raise file.problem

    def step(self, report: StepReport, phase: Phase, total_steps: int, *, mfu: float | None = None) -> None:
        """A logged step: means since the one before. ``mfu``: where it is known."""
        values = {**vars(report), "layers": {str(index): loss for index, loss in report.layers.items()}}
        if mfu is not None:
            values["mfu"] = mfu
        record = {"objective": phase.objective, "total_step": total_steps, **values}
        self.train_log.append(record)
        self.record("train", **record)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        numbers["tokens_per_second"] = report.tokens / max(report.seconds, 1e-9)
        if report.layers and self.config.training.loss == "relative_mse":
            numbers["explained_variance"] = 1 - sum(report.layers.values()) / len(report.layers)
        self._track(phase.name, numbers, total_steps)

    def result(self, stage: str, result: EvalResult, total_steps: int, **values: Any) -> None:
        """An evaluation."""
        self.record("eval", stage=stage, **values, **result.to_dict())
        self._track("eval", result.to_dict(), total_steps)

    def samples(self, title: str, samples: Sequence[Sample], total_steps: int) -> None:
        if self._samples is not None:
            self._samples.add(samples_markdown(title, samples))
        self.record("samples", stage=title, step=total_steps, samples=[vars(sample) for sample in samples])

    def _track(self, group: str, numbers: dict[str, float], step: int) -> None:
        if self._tracking:
            self.accelerator.log({f"{group}/{name}": value for name, value in numbers.items()}, step=step)

    # ---- at the end --------------------------------------------------------------------------------------------------

    def plots(self, summary: RunSummary) -> None:
        from ..evaluation.plots import write_plots

        if self.main:
            write_plots(
                self.paths["plots"], steps=self.train_log, base=summary.base, converted=summary.converted,
                trained=summary.trained, fidelity_converted=summary.fidelity_converted,
                fidelity_trained=summary.fidelity_trained,
            )  # fmt: skip

    def finish(self, summary: RunSummary) -> None:
        """summary.json, and the tables on the console."""
        if not self.main:
            return
        write_whole(self.paths["summary"], json.dumps(summary.to_dict(), indent=2) + "\n")
        self.record("end", seconds=summary.seconds, steps=summary.steps, peak_memory=summary.peak_memory)
        self.complete()
        if summary.samples_converted:
            self.console.print(samples_table(summary.samples_converted, summary.samples_trained))
        title = f"held-out text, {summary.base.tokens:,} tokens"
        self.console.print(results_table(summary.base, summary.converted, summary.trained, title))
        total = sum(summary.seconds.values())
        parts = ", ".join(f"{name} {clock(value)}" for name, value in summary.seconds.items() if value >= 1)
        self.say(f"time {clock(total)}" + (f" ({parts})" if parts else ""))
        memory = ", ".join(f"{value / 2**30:.2f} GiB {name}" for name, value in summary.peak_memory.items())
        speed = (
            f"; training {summary.tokens_per_second:,.0f} tokens/s over {summary.steps} steps" if summary.steps else ""
        )
        self.say(f"peak memory {memory}{speed}")
        self.say(f"adapter {self.paths['adapter']}, plots {self.paths['plots']}, summary {self.paths['summary']}")
