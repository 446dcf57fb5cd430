"""One run from a base model to a trained adapter: measure, convert, measure, train, measure, write everything down."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..evaluation.fidelity import LayerFidelity, layer_fidelity
from ..evaluation.perplexity import (
    EvalResult,
    Sample,
    TeacherStates,
    evaluate,
    evaluate_base,
    generate,
    generate_samples,
)
from ..inputs.blocks import document_separator
from ..models.checkpoints import load_npt, save_npt
from ..models.patching import ApplyReport, apply_npt, converted_layers, remove_npt
from ..models.running import isolated_documents
from ..progress import progress_bar
from .display import TrainingDisplay, clock, describe, results_table, samples_markdown, samples_table
from .loop import Phase, StepReport, StopRequest, TrainingError, make_objective, plan_phases, run_phase
from .objectives import delta_variances, enable_checkpointing
from .resources import base_fingerprint, is_out_of_memory, memory_advice, peak_memory

__all__ = ["RunSummary", "TrainingError", "run_training"]

#: The original's states of the evaluation text are kept if they fit in this many bytes, else it runs again every time.
_TEACHER_BYTES = 2**29
#: Tokens that measure Var(δ), the unit of the per-layer loss.
_VARIANCE_TOKENS = 2048


@dataclass
class RunSummary:
    """What a run found.

    Attributes:
        base, converted, trained: Held-out results of the original, after conversion (or of the adapter it resumed from) and
            after training (``None`` with ``training.mode: none``).
        fidelity_converted, fidelity_trained: Per converted layer.
        samples_converted, samples_trained: Prompts with both continuations.
        report: What was converted.
        seconds: Phase of the run → wall-clock seconds.
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


def run_training(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    blocks: Any,
    *,
    resume: Path | None = None,
    console: Console | None = None,
) -> RunSummary:
    """Convert ``model`` and train its NP components as the configuration says. The base stays frozen, bit for bit.

    Writes to ``config.output_dir``: ``adapter/`` (:func:`npt_kernels.save_npt`), ``metrics.jsonl``, ``summary.json``,
    ``config.yaml`` (resolved), ``samples.md``, ``plots/*.png``. The model is left converted and trained.

    Args:
        config: The whole run.
        model: A causal language model; a converted one is converted anew.
        tokenizer: Its tokenizer, for samples; ``None``: no samples.
        blocks: Token ids ``train [n, L]``, ``calibration [m, L]``, ``heldout [k, L]`` and ``sources`` (names of the texts).
        resume: An adapter to start from instead of the closed form. Its layers, rule and ranks win over ``config.model``; the
            optimizer and the schedule start anew.
        console: Where to print; default standard output.

    Returns:
        :class:`RunSummary`.

    Raises:
        TrainingError: Cannot start or go on: no training text, a missing package, a loss that is not finite, out of memory.
            What was learned by then is saved.
        KeyboardInterrupt: Ctrl-C; the step was finished and adapter and metrics were saved.
        ValueError, FileNotFoundError: Of ``apply_npt`` and ``load_npt``.
    """
    console = console or Console(highlight=False)
    threads = torch.get_num_threads()
    if config.optimization.num_threads:
        torch.set_num_threads(config.optimization.num_threads)
    run = _Run(config, model, tokenizer, blocks, console)
    try:
        with isolated_documents(model, document_separator(config, tokenizer)):
            return run.execute(resume)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(memory_advice(config, error) + run.rescue()) from error
    finally:
        torch.set_num_threads(threads)
        run.close()


class _Run:
    """State of one run."""

    def __init__(self, config: RunConfig, model: nn.Module, tokenizer: Any, blocks: Any, console: Console) -> None:
        self.config, self.model, self.blocks, self.console = config, model, blocks, console
        self.tokenizer = tokenizer if config.evaluation.prompts and hasattr(model, "generate") else None
        self.phases = plan_phases(config, len(blocks.train))
        self._check()
        self.accelerator = _make_accelerator(config)
        if not getattr(model, "hf_device_map", None):
            model.to(self.accelerator.device)
        model.eval()
        output = config.output_dir
        self.paths = {
            "adapter": output / "adapter",
            "metrics": output / "metrics.jsonl",
            "summary": output / "summary.json",
            "config": output / "config.yaml",
            "samples": output / "samples.md",
            "plots": output / "plots",
        }
        self.seconds: dict[str, float] = {}
        self.train_log: list[dict[str, Any]] = []
        self.trained_tokens, self.trained_seconds, self.steps = 0, 0.0, 0
        self.teacher: TeacherStates | None = None
        self.base_texts: list[str] = []
        self._metrics: Any = None

    def _check(self) -> None:
        config, blocks = self.config, self.blocks
        if self.phases and len(blocks.train) == 0:
            raise TrainingError("there is no training text: blocks.train is empty; add data or set training.mode: none")
        if len(blocks.heldout) == 0:
            raise TrainingError(
                "there is no held-out text: blocks.heldout is empty; add data or raise data.eval_fraction"
            )
        if config.wandb.enabled and importlib.util.find_spec("wandb") is None:
            raise TrainingError(
                "wandb.enabled is true, but the package wandb is missing: pip install wandb, or set it to false"
            )

    # ---- the run, in order -------------------------------------------------------------------------------------------

    def execute(self, resume: Path | None) -> RunSummary:
        config, model = self.config, self.model
        self._open(resume)
        if converted_layers(model):
            remove_npt(model)
        fingerprint = base_fingerprint(model)
        heldout = self._heldout()
        with self._timed("evaluate original"), self._bar("original", heldout.numel()) as advance:
            base, teacher = evaluate_base(model, heldout, advance=advance)
            keep = teacher.states.numel() * teacher.states.element_size() <= _TEACHER_BYTES
            self.teacher = teacher if keep else None
            del teacher
        self._record("eval", stage="original", **base.to_dict())
        self._say(f"original: perplexity {base.base_perplexity:.3f} on {base.tokens:,} held-out tokens")
        if self.tokenizer is not None:
            with self._timed("samples"):
                self.base_texts = generate(
                    model, self.tokenizer, config.evaluation.prompts, config.evaluation.max_new_tokens
                )

        with self._timed("conversion"):
            report = self._convert(resume)
        self._say(str(report))
        save_npt(model, self.paths["adapter"])
        start = "resumed adapter" if resume else "after conversion"
        converted, fidelity, samples = self._measure(start, heldout)

        trained, fidelity_trained, samples_trained = None, None, None
        if self.phases:
            self._train(heldout)
            trained, fidelity_trained, samples_trained = self._measure("after training", heldout)
        if base_fingerprint(model) != fingerprint:
            raise RuntimeError(
                "the frozen base changed during training; this is a bug in npt_kernels, please report it"
            )
        summary = RunSummary(
            base, converted, trained, fidelity, fidelity_trained, samples, samples_trained, report, self.seconds,
            self.steps, self.trained_tokens / max(self.trained_seconds, 1e-9), peak_memory(), self.paths,
        )  # fmt: skip
        self._finish(summary)
        return summary

    def _open(self, resume: Path | None) -> None:
        from accelerate.utils import set_seed

        set_seed(self.config.training.seed)
        self.config.save()
        self._metrics = self.paths["metrics"].open("a" if resume else "w")
        self.paths["samples"].write_text(
            "# Samples\n\nGreedy continuations by the original and the converted model.\n\n"
        )
        self._record("start", resume=None if resume is None else str(resume), sources=list(self.blocks.sources))
        if self.config.wandb.enabled:
            w = self.config.wandb
            self.accelerator.init_trackers(
                w.project, self.config.model_dump(mode="json"), {"wandb": {"entity": w.entity, "tags": w.tags}}
            )

    def _heldout(self) -> Tensor:
        heldout: Tensor = self.blocks.heldout
        # evaluation.tokens counts predicted positions: the first token of a sequence is not predicted.
        rows = -(-self.config.evaluation.tokens // (heldout.shape[1] - 1))
        return heldout[:rows]

    def _convert(self, resume: Path | None) -> ApplyReport:
        if resume is not None:
            return load_npt(self.model, resume)
        npt = self.config.npt_config()
        calibrate = npt.rule == "self_key" and npt.init in ("auto", "closed_form")
        # In the precision of the training: three times as fast on a CPU with bf16 instructions.
        with self.accelerator.autocast():
            return apply_npt(
                self.model, npt, self.blocks.calibration if calibrate else None, progress=self.console.is_terminal
            )

    def _train(self, heldout: Tensor) -> None:
        stop = StopRequest()
        with stop.listen():
            try:
                for phase in self.phases:
                    with self._timed(f"train {phase.name}"):
                        finished = self._phase(phase, heldout, stop)
                    if not finished:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                self._say(f"interrupted after {self.steps} steps{self.rescue()}")
                raise
            except TrainingError as error:
                raise TrainingError(f"{error}{self.rescue()}") from None
        save_npt(self.model, self.paths["adapter"])
        self._record("save", step=self.steps, path=str(self.paths["adapter"]))

    def _phase(self, phase: Phase, heldout: Tensor, stop: StopRequest) -> bool:
        t = self.config.training
        variances: dict[int, Tensor] = {}
        if phase.objective != "kl":
            text = self.blocks.calibration if len(self.blocks.calibration) else self.blocks.train
            rows = max(1, _VARIANCE_TOKENS // text.shape[1])
            variances = delta_variances(self.model, text[:rows].to(self.accelerator.device))
        objective = make_objective(phase.objective, self.model, self.config, variances)
        checkpointing = self.config.optimization.gradient_checkpointing and phase.objective != "local"
        display = TrainingDisplay(self.console)
        window: list[StepReport] = []
        elapsed, slowest = 0.0, 0.0

        def after_step(report: StepReport) -> None:
            nonlocal elapsed, slowest
            self.steps += 1
            self.trained_tokens += report.tokens
            self.trained_seconds += report.seconds
            # The first step allocates and warms up; one slow step must not scare with its ETA.
            elapsed += report.seconds
            slowest = max(slowest, report.seconds)
            steady = (elapsed - slowest) / (report.step - 1) if report.step > 2 else elapsed / report.step
            window.append(report)
            logged = report.step % t.logging_steps == 0 or report.step in (1, phase.steps) or stop.asked
            shown = _mean_report(window) if logged else report
            display.step(shown, steady * (phase.steps - report.step), logged=logged)
            if logged:
                self._log_step(shown, phase)
                window.clear()
            if stop.asked or report.step == phase.steps:
                return
            if t.save_steps and report.step % t.save_steps == 0:
                path = save_npt(self.model, self.config.checkpoint_dir / f"{phase.name}-{report.step:06d}")
                self._record("save", phase=phase.name, step=report.step, path=str(path))
            if t.eval_steps and report.step % t.eval_steps == 0:
                result = evaluate(self.model, heldout, teacher=self.teacher)
                self._record("eval", stage="training", phase=phase.name, step=report.step, **result.to_dict())
                display.note(f"step {report.step}: {describe(result)}")
            if t.prediction_logging_steps and report.step % t.prediction_logging_steps == 0:
                self._samples(f"{phase.name}, step {report.step}")

        enable_checkpointing(self.model, checkpointing)
        try:
            with display.open(relative=t.loss == "relative_mse"):
                return run_phase(
                    phase, self.model, objective, self.blocks.train, self.config, self.accelerator, stop, after_step
                )
        finally:
            enable_checkpointing(self.model, False)
            self.model.eval()

    def _measure(self, stage: str, heldout: Tensor) -> tuple[EvalResult, list[LayerFidelity], list[Sample]]:
        with self._timed(f"evaluate {stage}"), self._bar(stage, heldout.numel()) as advance:
            result = evaluate(self.model, heldout, advance=advance, teacher=self.teacher)
            fidelity = layer_fidelity(self.model, heldout)
        self._record("eval", stage=stage, step=self.steps, **result.to_dict())
        self._record("fidelity", stage=stage, step=self.steps, layers=[entry.to_dict() for entry in fidelity])
        self._say(f"{stage}: {describe(result)}")
        return result, fidelity, self._samples(stage)

    def _samples(self, title: str) -> list[Sample]:
        if self.tokenizer is None:
            return []
        started = time.perf_counter()
        e = self.config.evaluation
        samples = generate_samples(self.model, self.tokenizer, e.prompts, e.max_new_tokens, base=self.base_texts)
        self.seconds["samples"] = self.seconds.get("samples", 0.0) + time.perf_counter() - started
        with self.paths["samples"].open("a") as stream:
            stream.write(samples_markdown(title, samples))
        self._record("samples", stage=title, step=self.steps, samples=[vars(sample) for sample in samples])
        return samples

    def _finish(self, summary: RunSummary) -> None:
        from ..evaluation.plots import write_plots

        with self._timed("plots"):
            write_plots(
                self.paths["plots"], steps=self.train_log, base=summary.base, converted=summary.converted,
                trained=summary.trained, fidelity_converted=summary.fidelity_converted,
                fidelity_trained=summary.fidelity_trained,
            )  # fmt: skip
        self.paths["summary"].write_text(json.dumps(summary.to_dict(), indent=2) + "\n")
        self._record("end", seconds=self.seconds, steps=self.steps, peak_memory=summary.peak_memory)
        if self.config.wandb.enabled:
            self.accelerator.end_training()
        if summary.samples_converted:
            self.console.print(samples_table(summary.samples_converted, summary.samples_trained))
        title = f"held-out text, {summary.base.tokens:,} tokens"
        self.console.print(results_table(summary.base, summary.converted, summary.trained, title))
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {clock(value)}" for name, value in self.seconds.items() if value >= 1)
        self._say(f"time {clock(total)}" + (f" ({parts})" if parts else ""))
        memory = ", ".join(f"{value / 2**30:.2f} GiB {name}" for name, value in summary.peak_memory.items())
        speed = f"; training {summary.tokens_per_second:,.0f} tokens/s over {self.steps} steps" if self.steps else ""
        self._say(f"peak memory {memory}{speed}")
        self._say(f"adapter {self.paths['adapter']}, plots {self.paths['plots']}, summary {self.paths['summary']}")

    # ---- small things ------------------------------------------------------------------------------------------------

    def rescue(self) -> str:
        """Save what there is after a stop; a clause for the message that says where it is and how to go on."""
        if not converted_layers(self.model):
            return ""
        if not self.steps:
            return (
                ""
                if not self.paths["adapter"].exists()
                else f"; the converted, untrained adapter is in {self.paths['adapter']}"
            )
        save_npt(self.model, self.paths["adapter"])
        self._record("save", step=self.steps, path=str(self.paths["adapter"]), stopped=True)
        return (
            f"; adapter of step {self.steps} saved in {self.paths['adapter']}, metrics in {self.paths['metrics']}. "
            f"Go on from it with: npt train --config {self.paths['config']} --resume {self.paths['adapter']}"
        )

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _record(self, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            # Flushed line by line, so that a killed run leaves all it measured.
            self._metrics.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
            self._metrics.flush()

    def _log_step(self, report: StepReport, phase: Phase) -> None:
        values = {**vars(report), "layers": {str(index): loss for index, loss in report.layers.items()}}
        record = {"objective": phase.objective, "total_step": self.steps, **values}
        self.train_log.append(record)
        self._record("train", **record)
        if self.config.wandb.enabled:
            numbers = {name: value for name, value in values.items() if isinstance(value, float)}
            self.accelerator.log({f"{phase.name}/{name}": value for name, value in numbers.items()}, step=self.steps)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def _bar(self, title: str, tokens: int) -> Iterator[Any]:
        with progress_bar(f"evaluating {title}", tokens, "tokens", enabled=self.console.is_terminal) as advance:
            yield advance


def _mean_report(window: Sequence[StepReport]) -> StepReport:
    """The last report with losses and gradient norm averaged, tokens and seconds summed, over the window."""
    last, count = window[-1], len(window)
    values = {
        name: sum(getattr(r, name) for r in window) / count for name in ("loss", "equivalence", "penalty", "grad_norm")
    }
    layers = {index: sum(r.layers[index] for r in window) / count for index in last.layers}
    totals = {"tokens": sum(r.tokens for r in window), "seconds": sum(r.seconds for r in window)}
    return StepReport(**{**vars(last), **values, **totals, "layers": layers})


def _make_accelerator(config: RunConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision per process and refuses another; a second run in one process may want one.
    if getattr(AcceleratorState, "_shared_state", None):
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.optimization.mixed_precision, log_with="wandb" if config.wandb.enabled else None
        )
    except ValueError as error:
        raise TrainingError(f"optimization.mixed_precision={config.optimization.mixed_precision!r}: {error}") from None
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"training runs in one process, but {accelerator.num_processes} were started; start it with python or npt, "
            "not with accelerate launch or torchrun"
        )
    return accelerator
