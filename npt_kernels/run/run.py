"""The order of a run: measure, convert, measure, train, measure, write down; and what a stop at any point of it leaves."""

from __future__ import annotations

import shlex
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ..configs.schema import ConfigError, RunConfig
from ..conversion.apply import apply_npt
from ..evaluation.fidelity import LayerFidelity
from ..evaluation.perplexity import EvalResult
from ..evaluation.samples import Sample
from ..model.apply_report import ApplyReport
from ..model.install import converted_layers, npt_disabled, remove_npt
from ..model.save import load_npt, save_npt
from ..model.shard_base import shard_base
from ..offload import stream_mode
from ..training.distributed import OtherRankError, World
from ..training.loop import Phase, PhaseLoop, StepReport, StopRequest, TrainingError, make_objective, plan_phases
from ..training.objectives import delta_variances, enable_checkpointing
from ..training.precision import autocast
from .accelerator import make_accelerator
from .checkpoints import Checkpoint, list_checkpoints, save_checkpoint
from .display import TrainingDisplay
from .evaluation import Measurer, timed
from .oom import base_fingerprint, peak_memory
from .records import Pace, Recorder, RunSummary, check_trackers, mean_report
from .resume import ResumePoint, changed_settings, find_resume, text_fingerprint
from .utilisation import utilisation_of

__all__ = ["Run"]

#: Tokens that measure Var(δ), the unit of the per-layer loss.
_VARIANCE_TOKENS = 2048


class Run:
    """State of one run. :meth:`execute` does it; :meth:`rescue` saves what there is; :meth:`close` closes files."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        tokenizer: Any,
        blocks: Any,
        console: Console,
        resume: Path | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.model, self.blocks, self.console = config, model, blocks, console
        self.world = world or World()
        self.tokenizer = tokenizer if config.evaluation.prompts and hasattr(model, "generate") else None
        self._check()
        self.resume: ResumePoint | None = None if resume is None else find_resume(resume)
        self.checkpoint: Checkpoint | None = None if self.resume is None else self.resume.checkpoint
        self.accelerator = make_accelerator(config)
        self.phases = plan_phases(config, blocks.train, self.world.size)
        #: What the checkpoint holds of this class.
        self.saved: dict[str, Any] = {}
        self.notes = self._compare()
        # What is streamed stays on the host; what is to be sharded may be larger than a device and is converted where it is.
        streamed = stream_mode(config, self.accelerator.device) != "off"
        if not getattr(model, "hf_device_map", None) and not streamed and not self.world.sharded:
            model.to(self.accelerator.device)
        model.eval()
        self.recorder = Recorder(config, console, self.accelerator)
        self.name = uuid.uuid4().hex if self.checkpoint is None else self.checkpoint.run
        self.seconds: dict[str, float] = dict(self.saved.get("seconds", {}))
        self.trained_tokens: int = self.saved.get("trained_tokens", 0)
        self.trained_seconds: float = self.saved.get("trained_seconds", 0.0)
        self.steps = 0 if self.checkpoint is None else self.checkpoint.total_steps
        self.measure = Measurer(
            config, model, self.tokenizer, blocks.heldout, self.world, self.recorder, self.seconds, console.is_terminal
        )
        #: Results before training, for the checkpoints.
        self.before: dict[str, Any] = {}
        self.loop: PhaseLoop | None = None
        self.rows: int | None = None
        #: Reports since the last logged one.
        self.window: list[StepReport] = []
        #: Steps of this phase that are in the log; behind the loop's own count for an instant of every step.
        self.logged = 0
        #: Whether evaluation and samples that are due at the last step are still to come.
        self.pending = False
        self.last_checkpoint: Path | None = None if self.checkpoint is None else self.checkpoint.path
        self.checkpointed = self.steps

    def _check(self) -> None:
        config, blocks = self.config, self.blocks
        if config.training.mode != "none" and isinstance(blocks.train, Tensor) and len(blocks.train) == 0:
            raise TrainingError("there is no training text: blocks.train is empty; add data or set training.mode: none")
        if config.training.mode != "none" and isinstance(blocks.train, Tensor):
            self.world.check_sequences(len(blocks.train))
        if len(blocks.heldout) == 0:
            raise TrainingError(
                "there is no held-out text: blocks.heldout is empty; add data or raise data.eval_fraction"
            )
        check_trackers(config)

    def _compare(self) -> list[str]:
        """What the user should know of the point to resume from; raises :class:`ConfigError` if this run cannot."""
        if self.resume is None:
            return []
        notes = list(self.resume.notes)
        checkpoint = self.checkpoint
        if checkpoint is None:
            what = "a plain adapter: its components are taken, optimizer, schedule and text start anew"
            return [*notes, f"--resume: {self.resume.adapter} is {what}"]
        changed = changed_settings(checkpoint, self.config)
        if changed:
            notes.append(f"changed since the checkpoint was written: {', '.join(changed)}")
        self.saved = checkpoint.state()
        self._start_index()
        if self.saved["text"] != text_fingerprint(self.blocks.train):
            notes.append(
                "the training text is not the one of the checkpoint; the run goes on at the same place of this one"
            )
        return notes

    def _start_index(self) -> int:
        """Index of the phase to go on in."""
        if self.checkpoint is None:
            return 0
        at = self.checkpoint.phase, self.checkpoint.objective
        for index, phase in enumerate(self.phases):
            if (phase.name, phase.objective) == at:
                return index
        raise ConfigError(
            f"{self.checkpoint.path} was written in phase {at[0]} (objective {at[1]}), which training.mode="
            f"{self.config.training.mode} does not have; resume with the training.mode and training.objective it had"
        )

    # ---- the run, in order -------------------------------------------------------------------------------------------

    def execute(self) -> RunSummary:
        model, recorder = self.model, self.recorder
        self._open()
        if converted_layers(model):
            remove_npt(model)
        fingerprint = base_fingerprint(model)
        # Sharded, the original is measured after the conversion: only then is the model where it computes.
        base = None if self.world.sharded else self.measure.base(self.checkpoint is None)
        with timed(self.seconds, "conversion"):
            report = self._convert()
        recorder.say(str(report))
        if base is None:
            self._shard()
            with npt_disabled(model):
                base = self.measure.base(self.checkpoint is None)
        if self.checkpoint is None:
            self._save_adapter()
            start = "resumed adapter" if self.resume else "after conversion"
            converted, fidelity, samples = self.measure.converted(start, self.steps)
        else:
            converted, fidelity, samples = self._measured_before(base)
        self.before = {
            "base": asdict(base),
            "converted": asdict(converted),
            "fidelity": [entry.to_dict() for entry in fidelity],
            "samples": [vars(sample) for sample in samples],
        }
        trained, fidelity_trained, samples_trained = None, None, None
        if self.phases:
            self._train()
            trained, fidelity_trained, samples_trained = self.measure.converted("after training", self.steps)
        if base_fingerprint(model) != fingerprint:
            raise RuntimeError(
                "the frozen base changed during training; this is a bug in npt_kernels, please report it"
            )
        summary = RunSummary(
            base, converted, trained, fidelity, fidelity_trained, samples, samples_trained, report, self.seconds,
            self.steps, self.trained_tokens / max(self.trained_seconds, 1e-9), peak_memory(), recorder.paths,
        )  # fmt: skip
        with timed(self.seconds, "plots"):
            recorder.plots(summary)
        recorder.finish(summary)
        return summary

    def _open(self) -> None:
        from accelerate.utils import set_seed

        set_seed(self.config.training.seed)
        self.recorder.open(self.checkpoint, append=self.resume is not None)
        if self.checkpoint is None:
            path = None if self.resume is None else str(self.resume.adapter)
            self.recorder.record("start", resume=path, sources=list(self.blocks.sources))
            earlier = [
                c
                for c in list_checkpoints(self.config.checkpoint_dir)[0]
                if c.output_dir == str(self.config.output_dir.resolve())
            ]
            if earlier:
                self.notes.append(
                    f"{len(earlier)} checkpoint(s) of an earlier run stay in {self.config.checkpoint_dir}; to go on with it "
                    f"instead: --resume {earlier[0].path}"
                )
        else:
            self.recorder.record("resume", checkpoint=str(self.checkpoint.path), step=self.steps, notes=self.notes)
            self.recorder.say(f"resumed from {self.checkpoint}")
        for note in self.notes:
            self.recorder.say(f"note: {note}")

    def _shard(self) -> None:
        with timed(self.seconds, "sharding"):
            held = shard_base(self.model, self.accelerator.device)
        whole = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        self.recorder.say(
            f"frozen base sharded over {self.world.size} processes: each holds {held / 2**20:,.1f} of "
            f"{whole / 2**20:,.1f} MiB"
        )

    def _convert(self) -> ApplyReport:
        """On rank 0; the others get what it made."""
        report = self.world.on_main(self._convert_here)
        self.world.copy_adapter(self.model)
        report = self.world.broadcast(report)
        assert report is not None
        return report

    def _convert_here(self) -> ApplyReport:
        if self.resume is not None:
            return load_npt(self.model, self.resume.adapter)
        npt = self.config.npt_config()
        # In the precision of the training: three times as fast on a CPU with bf16 instructions.
        with autocast(self.accelerator, self.model):
            return apply_npt(
                self.model,
                npt,
                self.blocks.calibration if npt.uses_closed_form else None,
                progress=self.console.is_terminal,
            )

    def _measured_before(self, base: EvalResult) -> tuple[EvalResult, list[LayerFidelity], list[Sample]]:
        """Results before training, of the process that wrote the checkpoint."""
        before = self.saved["before"]
        then = EvalResult(**before["base"])
        if then.tokens != base.tokens or abs(then.base_nll - base.base_nll) > 1e-3 * then.base_nll:
            self.recorder.say(
                f"note: the original's perplexity is {base.base_perplexity:.3f} here and was {then.base_perplexity:.3f} when "
                "the checkpoint was written: other weights, precision or held-out text; before and after do not compare"
            )
        return (
            EvalResult(**before["converted"]),
            [LayerFidelity.from_dict(entry) for entry in before["fidelity"]],
            [Sample(**sample) for sample in before["samples"]],
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        stop, before = StopRequest(self.world), self.steps
        with stop.listen():
            try:
                for phase in self.phases[self._start_index() :]:
                    with timed(self.seconds, f"train {phase.name}"):
                        finished = self._phase(phase, stop)
                    if not finished:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                self.recorder.say(f"interrupted after {self.steps} steps{self.rescue()}")
                raise
            except (TrainingError, ConfigError, OSError) as error:
                if isinstance(error, ConfigError) and self.steps == before:
                    raise  # a setting or a checkpoint that does not fit; later it is streamed text that breaks
                raise TrainingError(f"{error}{self.rescue()}") from None
        self._save_adapter()
        self.recorder.record("save", step=self.steps, path=str(self.recorder.paths["adapter"]))

    def _phase(self, phase: Phase, stop: StopRequest) -> bool:
        config = self.config
        variances: dict[int, Tensor] = {}
        if phase.objective != "kl":
            text = self.blocks.calibration if len(self.blocks.calibration) else self.blocks.train
            rows = max(1, _VARIANCE_TOKENS // text.shape[1])
            variances = delta_variances(self.model, text[:rows].to(self.accelerator.device))
        objective = make_objective(phase.objective, self.model, config, variances)
        length = self.blocks.heldout.shape[1]
        display = TrainingDisplay(
            self.console,
            utilisation_of(self.model, length, phase.objective, devices=self.accelerator.num_processes),
        )

        def note(text: str) -> None:
            display.note(text)
            self.recorder.record("note", text=text)

        self.window, self.logged, self.pending = [], 0, False
        self.loop = loop = PhaseLoop(
            phase,
            self.model,
            objective,
            self.blocks.train,
            config,
            self.accelerator,
            note=note,
            rows=self.rows,
            world=self.world,
        )
        if self.saved:
            self._restore(loop)
        pace = Pace()

        def after_step(report: StepReport) -> None:
            self._after_step(report, phase, stop, display, pace)

        enable_checkpointing(self.model, config.optimization.gradient_checkpointing and phase.objective != "local")
        try:
            with display.open(relative=config.training.loss == "relative_mse"):
                if self.pending:
                    self._periodic(phase, loop.progress.step, display)
                finished = loop.run(stop, after_step)
        finally:
            loop.close()
            enable_checkpointing(self.model, False)
            self.model.eval()
        if finished:
            if self.checkpointed != self.steps:
                self._save_checkpoint()
            self.rows, self.loop = loop.progress.rows, None
        return finished

    def _restore(self, loop: PhaseLoop) -> None:
        assert self.checkpoint is not None
        saved, self.saved = self.saved, {}
        try:
            loop.resume(self.checkpoint, saved["progress"])
        except ValueError as error:
            raise ConfigError(f"--resume {self.checkpoint.path}: {error}") from None
        self.window = [StepReport(**{**report, "steps": loop.phase.steps}) for report in saved["window"]]
        self.logged, self.pending = loop.progress.step, saved["pending"]
        if loop.progress.step > loop.phase.steps:
            loop.note(
                f"phase {loop.phase.name} has {loop.phase.steps} steps now, and {loop.progress.step} are done: it is over"
            )

    def _after_step(
        self,
        report: StepReport,
        phase: Phase,
        stop: StopRequest,
        display: TrainingDisplay,
        pace: Pace,
    ) -> None:
        t = self.config.training
        self.steps += 1
        self.trained_tokens += report.tokens
        self.trained_seconds += report.seconds
        pace.add(report.seconds)
        self.window.append(report)
        due = report.step % t.logging_steps == 0 or report.step in (1, phase.steps)
        shown = mean_report(self.window) if due or stop.agreed else report
        display.step(shown, pace.left(phase.steps - report.step), logged=due or stop.agreed)
        if due:
            # Not because of a stop: the log of a resumed run is that of one that never stopped.
            self.recorder.step(shown, phase, self.steps)
            self.window.clear()
        self.logged, self.pending = report.step, report.step < phase.steps
        if stop.agreed or not self.pending:
            return
        self._periodic(phase, report.step, display)
        # Last, so that what it holds of the log is complete.
        if t.save_steps and report.step % t.save_steps == 0:
            try:
                self._save_checkpoint()
            except OSError as error:
                # A full disk must not cost the training; the user may make room before the next one.
                display.note(f"step {report.step}: no checkpoint, it could not be written: {error}")

    def _periodic(self, phase: Phase, step: int, display: TrainingDisplay) -> None:
        """Evaluation and samples, where they are due after this step."""
        t = self.config.training
        if t.eval_steps and step % t.eval_steps == 0:
            display.note(self.measure.in_between(phase.name, step, self.steps))
        if t.prediction_logging_steps and step % t.prediction_logging_steps == 0:
            self.measure.samples(f"{phase.name}, step {step}", self.steps)
        self.pending = False

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save_adapter(self) -> None:
        self.world.check_replicas(self.model)
        try:
            self.world.on_main(lambda: save_npt(self.model, self.recorder.paths["adapter"]))
        except OtherRankError as error:
            raise OSError(f"no adapter in {self.recorder.paths['adapter']}: {error}") from None

    def _save_checkpoint(self) -> None:
        loop, config = self.loop, self.config
        assert loop is not None
        state = {
            "progress": loop.progress.to_dict(),
            "window": [vars(report) for report in self.window],
            "pending": self.pending,
            "text": text_fingerprint(self.blocks.train),
            "before": self.before,
            "seconds": self.seconds,
            "trained_tokens": self.trained_tokens,
            "trained_seconds": self.trained_seconds,
        }
        path = save_checkpoint(
            config.checkpoint_dir, self.model, self.accelerator,
            run=self.name, phase=loop.phase.name, objective=loop.phase.objective, step=loop.progress.step,
            total_steps=self.steps, output_dir=config.output_dir, state=state,
            files=[self.recorder.paths["metrics"], self.recorder.paths["config"]], keep=config.training.save_total_limit,
            world=self.world,
        )  # fmt: skip
        self.last_checkpoint, self.checkpointed = path, self.steps
        self.recorder.record("save", phase=loop.phase.name, step=loop.progress.step, path=str(path))

    def rescue(self) -> str:
        """Save what there is after a stop; a clause for the message that says where it is and how to go on."""
        adapter = self.recorder.paths["adapter"]
        if not converted_layers(self.model):
            return ""
        if not self.steps:
            return f"; the converted, untrained adapter is in {adapter}" if adapter.exists() else ""
        go_on = f"Go on with: npt train --resume {shlex.quote(str(self.config.output_dir))}"
        last = f"the last checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint"
        loop, together = self.loop, self.world.all_here()
        updating = loop is not None and (loop.progress.updating or loop.progress.step != self.logged)
        if together:
            updating = bool(self.world.agree(updating)[0])
        if updating:
            return f"; it stopped in the middle of an update, which cannot be saved, and {last}. {go_on}"
        if not together:
            # A checkpoint takes all of them: each has random numbers of its own.
            if self.world.is_main:
                save_npt(self.model, adapter)
                last = f"the adapter of step {self.steps} is in {adapter}, {last}"
            return f"; other processes do not answer: {last}. {go_on}"
        try:
            self._save_adapter()
            if self.loop is not None and self.checkpointed != self.steps:
                self._save_checkpoint()
        except OSError as error:
            return f"; and saving failed ({error}): {last}. {go_on}"
        self.recorder.record("save", step=self.steps, path=str(adapter), stopped=True)
        return (
            f"; adapter of step {self.steps} saved in {adapter}, checkpoint in {self.last_checkpoint}, metrics in "
            f"{self.recorder.paths['metrics']}. {go_on}"
        )

    def close(self) -> None:
        if self.loop is not None:
            self.loop.close()
        self.recorder.close()
