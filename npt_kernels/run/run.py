"""One run: measure, convert, measure, train, measure, write down; and what a stop at any point of it leaves."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ..base_model.mixed_precision import settle_mixed_precision
from ..configs.schema import ConfigError, RunConfig
from ..conversion.apply import apply_npt
from ..durable_files import is_disk_error
from ..evaluation.perplexity import EvalResult
from ..model.apply_report import ApplyReport
from ..model.install import converted_layers, npt_disabled, remove_npt
from ..model.save import load_npt, save_npt
from ..model.shard_base import shard_base
from ..offload import stream_mode
from ..training.distributed import OtherRankError, World
from ..training.kept_casts import kept_casts
from ..training.loop import (
    Phase,
    PhaseLoop,
    StopRequest,
    TrainingError,
    is_out_of_memory,
    make_objective,
    plan_phases,
)
from ..training.objectives import Objective, delta_variances, enable_checkpointing
from ..training.precision import autocast
from .checkpoints import Checkpoint, list_checkpoints, load_optimizer
from .display import Pace, TrainingDisplay
from .evaluation import Measured, RunEvaluation, timed
from .extra import settle_extra
from .fingerprint import base_fingerprint, text_fingerprint
from .oom import memory_advice
from .open import computing, make_accelerator, threads
from .records import Recorder, RunSummary, check_trackers, peak_memory
from .resume import ResumePoint, changed_settings, find_resume
from .state import RunState
from .time_limit import Budget, fit_into_time
from .utilisation import utilisation_of

__all__ = ["RunSummary", "TrainingError", "run_training"]

#: Tokens that measure Var(δ), the unit of the per-layer loss.
_VARIANCE_TOKENS = 2048


def run_training(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    blocks: Any,
    *,
    resume: Path | ResumePoint | None = None,
    console: Console | None = None,
    world: World | None = None,
) -> RunSummary:
    """Convert ``model`` and train its NP components as the configuration says. The base stays frozen, bit for bit.

    Writes to ``config.output_dir``: ``adapter/`` (:func:`npt_kernels.save_npt`), ``metrics.jsonl``, ``summary.json``,
    ``config.yaml`` (resolved), ``samples.md``, ``plots/*.png``; to ``config.checkpoint_dir``: checkpoints, of which
    ``training.save_total_limit`` are kept. The model is left converted and trained.

    Args:
        config: The whole run.
        model: A causal language model (:func:`npt_kernels.run.open.open_run` loads the configuration's); a converted one is
            converted anew.
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
    if config.optimization.mixed_precision == "auto":  # open_run has settled it already
        console.print(settle_mixed_precision(config, world.device), markup=False, highlight=False, soft_wrap=True)
    with threads(config), _started(config, model, tokenizer, blocks, resume, console, world) as run:
        fingerprint = base_fingerprint(model)
        if world.sharded:
            # Measured after the conversion: only then is the model where it computes.
            report = run.convert()
            run.shard()
            with npt_disabled(model):
                base = run.evaluation.original(record=run.checkpoint is None)
        else:
            base = run.evaluation.original(record=run.checkpoint is None)
            report = run.convert()
        before, after = run.measure_before(base), None
        fit_into_time(run)
        if run.phases:
            with run.stoppable() as stop:
                for phase in run.phases:
                    run.train(phase, stop)
            run.save_adapter()
            after = run.evaluation.converted("after training", run.state.total_steps)
        if base_fingerprint(model) != fingerprint:
            raise RuntimeError(
                "the frozen base changed during training; this is a bug in npt_kernels, please report it"
            )
        return run.finish(base, before, after, report)


@contextmanager
def _started(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    blocks: Any,
    resume: Path | ResumePoint | None,
    console: Console,
    world: World,
) -> Iterator[Run]:
    """A run with open files and an unconverted model that can compute. Where memory or disk run out: one line, after a save."""
    run: Run | None = None
    try:
        run = Run(config, model, tokenizer, blocks, resume, console, world)
        with computing(config, model, tokenizer, run.accelerator.device, run.recorder.say):
            run.start()
            yield run
    except Exception as error:
        if is_disk_error(error):
            raise TrainingError(f"{error}" + ("" if run is None else run.rescue())) from error
        if not is_out_of_memory(error):
            raise
        raise TrainingError(memory_advice(config, error) + ("" if run is None else run.rescue())) from error
    finally:
        if run is not None:
            run.recorder.close()


class Run:
    """The parts of one run and what it does with them; :func:`run_training` is the order."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        tokenizer: Any,
        blocks: Any,
        resume: Path | ResumePoint | None,
        console: Console,
        world: World,
    ) -> None:
        self.config, self.model, self.blocks, self.console, self.world = config, model, blocks, console, world
        self.budget = Budget(config)
        self._check()
        self.resume = find_resume(resume) if isinstance(resume, Path) else resume
        self.checkpoint: Checkpoint | None = None if self.resume is None else self.resume.checkpoint
        self.accelerator = make_accelerator(config)
        #: What the user should know of the point to start from.
        self.notes: list[str] = []
        #: Phases that are left.
        self.phases = plan_phases(config, blocks.train, world.size)
        self.state = self._first_state()
        # What is streamed stays on the host; what is to be sharded may be larger than a device and is converted where it is.
        streamed = stream_mode(config, self.accelerator.device) != "off"
        if not getattr(model, "hf_device_map", None) and not streamed and not world.sharded:
            model.to(self.accelerator.device)
        model.eval()
        self.recorder = Recorder(config, console, self.accelerator)
        writer = tokenizer if config.evaluation.prompts and hasattr(model, "generate") else None
        self.evaluation = RunEvaluation(
            config,
            model,
            writer,
            blocks.heldout,
            world,
            self.recorder,
            self.state.seconds,
            console.is_terminal or self.recorder.say,
        )
        self.last_checkpoint: Path | None = None if self.checkpoint is None else self.checkpoint.path
        #: ``state.total_steps`` when the last checkpoint was written.
        self.saved_steps = self.state.total_steps
        #: Whether the optimizer of the checkpoint has still to be loaded.
        self._going_on = self.checkpoint is not None

    def _check(self) -> None:
        config, blocks = self.config, self.blocks
        if config.training.mode != "none" and isinstance(blocks.train, Tensor):
            if len(blocks.train) == 0:
                raise TrainingError(
                    "there is no training text: blocks.train is empty; add data or set training.mode: none"
                )
            self.world.check_sequences(len(blocks.train))
        if len(blocks.heldout) == 0:
            raise TrainingError(
                "there is no held-out text: blocks.heldout is empty; add data or raise data.eval_fraction"
            )
        check_trackers(config)

    def _first_state(self) -> RunState:
        """Where to start; ``notes`` and ``phases`` follow it. Raises :class:`ConfigError` if this run cannot go on from there."""
        text = text_fingerprint(self.blocks.train)
        if self.resume is None:
            return RunState(text=text)
        self.notes += self.resume.notes
        if self.checkpoint is None:
            what = "a plain adapter: its components are taken, optimizer, schedule and text start anew"
            self.notes.append(f"--resume: {self.resume.adapter} is {what}")
            return RunState(text=text)
        if changed := changed_settings(self.checkpoint, self.config):
            self.notes.append(f"changed since the checkpoint was written: {', '.join(changed)}")
        state = RunState.load(self.checkpoint)
        names = [(phase.name, phase.objective) for phase in self.phases]
        if (state.phase, state.objective) not in names:
            raise ConfigError(
                f"{self.checkpoint.path} was written in phase {state.phase} (objective {state.objective}), which training.mode="
                f"{self.config.training.mode} does not have; resume with the training.mode and training.objective it had"
            )
        self.phases = self.phases[names.index((state.phase, state.objective)) :]
        if state.text != text:
            self.notes.append(
                "the training text is not the one of the checkpoint; the run goes on at the same place of this one"
            )
        state.text = text
        return state

    # ---- before training ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Seed, files, what the user should know; an adapter that the model had is taken off."""
        from accelerate.utils import set_seed

        set_seed(self.config.training.seed)
        self.recorder.open(self.checkpoint, append=self.resume is not None)
        if self.checkpoint is None:
            path = None if self.resume is None else str(self.resume.adapter)
            self.recorder.record("start", resume=path, sources=list(self.blocks.sources))
            folder, output = self.config.checkpoint_dir, str(self.config.output_dir.resolve())
            if earlier := [c for c in list_checkpoints(folder)[0] if c.output_dir == output]:
                self.notes.append(
                    f"{len(earlier)} checkpoint(s) of an earlier run stay in {folder}; to go on with it "
                    f"instead: --resume {earlier[0].path}"
                )
        else:
            steps = self.state.total_steps
            self.recorder.record("resume", checkpoint=str(self.checkpoint.path), step=steps, notes=self.notes)
            self.recorder.say(f"resumed from {self.checkpoint}")
        for note in self.notes:
            self.recorder.say(f"note: {note}")
        if converted_layers(self.model):
            remove_npt(self.model)

    def convert(self) -> ApplyReport:
        """On rank 0; the others get what it made."""
        with timed(self.state.seconds, "conversion"):
            report = self.world.on_main(self._convert_here)
            self.world.copy_adapter(self.model)
            report = self.world.broadcast(report)
            settle_extra(self.model, self.config, self.world.size)
        assert report is not None
        self.recorder.say(str(report))
        return report

    def _convert_here(self) -> ApplyReport:
        if self.resume is not None:
            return load_npt(self.model, self.resume.adapter)
        npt = self.config.npt_config()
        # In the precision of the training: three times as fast on a CPU with bf16 instructions.
        with autocast(self.accelerator, self.model, kept_casts(self.model, self.config)):
            tokens = self.blocks.calibration if npt.uses_closed_form else None
            if tokens is not None and self.budget.seconds is not None:
                tokens, line = self.budget.calibration(self.model, tokens)
                self.recorder.say(line)
            return apply_npt(self.model, npt, tokens, progress=self.console.is_terminal or self.recorder.say)

    def shard(self) -> None:
        with timed(self.state.seconds, "sharding"):
            held = shard_base(self.model, self.accelerator.device)
        whole = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        self.recorder.say(
            f"frozen base sharded over {self.world.size} processes: each holds {held / 2**20:,.1f} of "
            f"{whole / 2**20:,.1f} MiB"
        )

    def measure_before(self, base: EvalResult) -> Measured:
        """The converted model before training: measured, or as the process that wrote the checkpoint measured it."""
        state = self.state
        if self.checkpoint is not None:
            then = EvalResult(**state.before["base"])
            if then.tokens != base.tokens or abs(then.base_nll - base.base_nll) > 1e-3 * then.base_nll:
                self.recorder.say(
                    f"note: the original's perplexity is {base.base_perplexity:.3f} here and was {then.base_perplexity:.3f} "
                    "when the checkpoint was written: other weights, precision or held-out text; before and after do not compare"
                )
            measured = Measured.from_values(state.before)
        else:
            self._write_adapter()
            stage = "after conversion" if self.resume is None else "resumed adapter"
            measured = self.evaluation.converted(stage, state.total_steps)
        state.before = measured.values(base)
        return measured

    # ---- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def stoppable(self) -> Iterator[StopRequest]:
        """Around training: whatever stops it, what was learned is saved, and the message says where it is."""
        stop, before = StopRequest(self.world), self.state.total_steps
        with stop.listen():
            try:
                yield stop
            except KeyboardInterrupt:
                self.recorder.say(f"interrupted after {self.state.total_steps} steps{self.rescue()}")
                raise
            except (TrainingError, ConfigError, OSError) as error:
                if isinstance(error, ConfigError) and self.state.total_steps == before:
                    raise  # a setting or a checkpoint that does not fit; later it is streamed text that breaks
                raise TrainingError(f"{error}{self.rescue()}") from None

    def train(self, phase: Phase, stop: StopRequest) -> None:
        """One phase, or what is left of it. Raises ``KeyboardInterrupt`` after the step in which a stop was asked for."""
        state, t, pace = self.state, self.config.training, Pace()
        with timed(state.seconds, f"train {phase.name}"):
            with self._entered(phase) as (loop, display):
                if state.pending:
                    self._periodic(display)
                for report in loop.steps(stop):
                    state.count(report)
                    pace.add(report.seconds)
                    due = report.step % t.logging_steps == 0 or report.step in (1, phase.steps)
                    shown = state.mean_report() if due or stop.agreed else report
                    display.step(shown, pace.left(phase.steps - report.step), logged=due or stop.agreed)
                    if due:
                        # Not because of a stop: the log of a resumed run is that of one that never stopped.
                        self.recorder.step(shown, phase, state.total_steps, mfu=display.mfu(shown))
                        state.window.clear()
                    state.settle(pending=report.step < phase.steps)
                    if state.pending and not stop.agreed:
                        self._periodic(display)
                        # Last, so that what it holds of the log is complete.
                        if t.save_steps and report.step % t.save_steps == 0:
                            self._try_checkpoint(display)
            if not stop.agreed and self.saved_steps != state.total_steps:
                self._save_checkpoint()
        if stop.agreed:
            raise KeyboardInterrupt

    @contextmanager
    def _entered(self, phase: Phase) -> Iterator[tuple[PhaseLoop, TrainingDisplay]]:
        """The loop of a phase, where the state says that it stands, and the open display."""
        config, state = self.config, self.state
        objective = self._objective(phase)
        utilisation = utilisation_of(
            self.model, self.blocks.heldout.shape[1], phase.objective, batch=config.training.batch_size,
            devices=self.accelerator.num_processes,
        )  # fmt: skip
        display = TrainingDisplay(self.console, utilisation)

        def note(text: str) -> None:
            display.note(text)
            self.recorder.record("note", text=text)

        state.enter(phase)
        loop = PhaseLoop(
            phase, self.model, objective, self.blocks.train, config, self.accelerator,
            progress=state.progress, note=note, world=self.world,
        )  # fmt: skip
        try:
            self._go_on(loop)
            enable_checkpointing(self.model, config.optimization.gradient_checkpointing and phase.objective != "local")
            with display.open(relative=config.training.loss == "relative_mse"):
                yield loop, display
        finally:
            loop.close()
            enable_checkpointing(self.model, False)
            self.model.eval()

    def _objective(self, phase: Phase) -> Objective:
        variances: dict[int, Tensor] = {}
        if phase.objective not in ("kl", "task"):
            text = self.blocks.calibration if len(self.blocks.calibration) else self.blocks.train
            rows = max(1, _VARIANCE_TOKENS // text.shape[1])
            variances = delta_variances(self.model, text[:rows].to(self.accelerator.device))
        return make_objective(phase.objective, self.model, self.config, variances)

    def _go_on(self, loop: PhaseLoop) -> None:
        """Optimizer, schedule and text of the checkpoint, once."""
        if not self._going_on:
            return
        assert self.checkpoint is not None
        self._going_on, checkpoint = False, self.checkpoint
        try:
            loop.resume(lambda: load_optimizer(checkpoint, self.accelerator))
        except ValueError as error:
            raise ConfigError(f"--resume {checkpoint.path}: {error}") from None
        phase, done = loop.phase, loop.progress.step
        if done > phase.steps:
            loop.note(f"phase {phase.name} has {phase.steps} steps now, and {done} are done: it is over")

    def _periodic(self, display: TrainingDisplay) -> None:
        """Evaluation and samples, where they are due after this step."""
        t, state = self.config.training, self.state
        phase, step = state.phase, state.progress.step
        if t.eval_steps and step % t.eval_steps == 0:
            display.note(self.evaluation.in_between(phase, step, state.total_steps))
        if t.prediction_logging_steps and step % t.prediction_logging_steps == 0:
            self.evaluation.samples(f"{phase}, step {step}", state.total_steps)
        state.pending = False

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_adapter(self) -> None:
        self._write_adapter()
        self.recorder.record("save", step=self.state.total_steps, path=str(self.recorder.paths["adapter"]))

    def _write_adapter(self) -> None:
        path = self.recorder.paths["adapter"]
        self.world.check_replicas(self.model)
        try:
            self.world.on_main(lambda: save_npt(self.model, path))
        except OtherRankError as error:
            raise OSError(f"no adapter in {path}: {error}") from None

    def _try_checkpoint(self, display: TrainingDisplay) -> None:
        try:
            self._save_checkpoint()
        except OSError as error:
            # A full disk must not cost the training; the user may make room before the next one.
            step = self.state.progress.step
            display.note(f"step {step}: no checkpoint, it could not be written: {error}")

    def _save_checkpoint(self) -> None:
        state, files = self.state, [self.recorder.paths["metrics"], self.recorder.paths["config"]]
        try:
            # A log with a gap would be the log of the run that goes on from here.
            self.world.on_main(self.recorder.complete)
        except OtherRankError as error:
            raise OSError(f"no checkpoint: {error}") from None
        self.last_checkpoint = state.save(self.config, self.model, self.accelerator, self.world, files)
        self.saved_steps = state.total_steps
        self.recorder.record("save", phase=state.phase, step=state.progress.step, path=str(self.last_checkpoint))

    def rescue(self) -> str:
        """Save what there is after a stop; a clause for the message that says where it is and how to go on."""
        adapter, steps = self.recorder.paths["adapter"], self.state.total_steps
        if not converted_layers(self.model):
            return ""
        if not steps:
            return f"; the converted, untrained adapter is in {adapter}" if adapter.exists() else ""
        go_on = f"Go on with: npt train --resume {shlex.quote(str(self.config.output_dir))}"
        last = f"the last checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint"
        updating, together = self.state.progress.updating, self.world.all_here()
        updating = bool(self.world.agree(updating)[0]) if together else updating
        if updating:
            return f"; it stopped in the middle of an update, which cannot be saved, and {last}. {go_on}"
        if not together:
            # A checkpoint takes all of them: each has random numbers of its own.
            if self.world.is_main:
                save_npt(self.model, adapter)
                last = f"the adapter of step {steps} is in {adapter}, {last}"
            return f"; other processes do not answer: {last}. {go_on}"
        try:
            self._write_adapter()
            if self.saved_steps != steps:
                self._save_checkpoint()
        except OSError as error:
            return f"; and saving failed ({error}): {last}. {go_on}"
        self.recorder.record("save", step=steps, path=str(adapter), stopped=True)
        return (
            f"; adapter of step {steps} saved in {adapter}, checkpoint in {self.last_checkpoint}, metrics in "
            f"{self.recorder.paths['metrics']}. {go_on}"
        )

    def finish(self, base: EvalResult, before: Measured, after: Measured | None, report: ApplyReport) -> RunSummary:
        """Plots, ``summary.json``, the tables on the console."""
        state = self.state
        trained, fidelity, samples = after or (None, None, None)
        summary = RunSummary(
            base, before.result, trained, before.fidelity, fidelity, before.samples, samples, report, state.seconds,
            state.total_steps, state.trained_tokens / max(state.trained_seconds, 1e-9), peak_memory(), self.recorder.paths,
        )  # fmt: skip
        with timed(state.seconds, "plots"):
            self.recorder.plots(summary)
        self.recorder.finish(summary)
        return summary
