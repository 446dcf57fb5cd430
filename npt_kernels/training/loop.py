"""The optimizer loop of one training phase. Loss, optimizer, parameter groups and schedule are chosen here and nowhere else."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from ..configs.schema import RunConfig
from ..model.install import npt_parameters
from ..text.packing import derived_seed
from .batching import StepBatch, step_batches, steps_per_epoch
from .distributed import World
from .kept_casts import kept_casts
from .objectives import KLObjective, LayerObjective, LocalObjective, Losses, Objective
from .precision import autocast, unscale_gradients
from .task import TaskObjective

if TYPE_CHECKING:
    from ..text.streaming import PackedStream

__all__ = [
    "Phase",
    "PhaseLoop",
    "Progress",
    "StepReport",
    "StopRequest",
    "TrainingError",
    "is_out_of_memory",
    "make_objective",
    "plan_phases",
]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is for users and needs no traceback."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text.lower())


@dataclass(frozen=True)
class Phase:
    """One objective for a number of optimizer steps."""

    name: str
    objective: str
    steps: int
    learning_rate: float
    warmup_steps: int


@dataclass
class StepReport:
    """What the loop tells after every optimizer step. ``layers``: equivalence loss per layer (empty under KL)."""

    phase: str
    step: int
    steps: int
    loss: float
    equivalence: float
    penalty: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    layers: dict[int, float] = field(default_factory=dict)
    #: Steps of the phase so far whose gradients overflowed float16 and that changed nothing.
    skipped: int = 0


def plan_phases(config: RunConfig, train: Tensor | PackedStream, world_size: int = 1) -> list[Phase]:
    """The phases of ``training.mode`` on that text; empty for ``none``.

    Raises:
        TrainingError: A stream, whose length nobody knows, without ``training.max_steps``.
    """
    t = config.training
    if t.mode == "none":
        return []
    per_epoch = steps_per_epoch(
        train,
        batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        world_size=world_size,
    )
    limits = [per_epoch * t.num_epochs] if per_epoch is not None else []
    limits += [t.max_steps] if t.max_steps is not None else []
    if not limits:
        raise TrainingError("data.streaming=true reads text of unknown length; set training.max_steps")
    steps = min(limits)
    first = "local" if t.mode != "end_to_end" else t.objective
    phases = [Phase(t.mode.partition("+")[0], first, steps, t.learning_rate, min(t.warmup_steps, steps))]
    if t.mode == "local+polish":
        # The polish starts from a trained adapter: a long warm-up made for the first phase would eat it up.
        warmup = min(t.warmup_steps, t.polish_steps // 10)
        phases.append(Phase("polish", "kl", t.polish_steps, t.polish_learning_rate, warmup))
    return phases


def make_objective(name: str, model: nn.Module, config: RunConfig, variances: dict[int, Tensor]) -> Objective:
    """``local``, ``kl``, ``layer`` or ``task`` with the weights of the configuration."""
    t = config.training
    weights = {"equivalence_weight": t.equivalence_weight, "regularization_weight": t.regularization_weight}
    if name == "kl":
        return KLObjective(model, **weights)
    if name == "task":
        return TaskObjective(model, **weights)
    if name == "local":
        per_visit = config.optimization.micro_batches_per_layer
        return LocalObjective(model, kind=t.loss, variances=variances, micro_batches_per_layer=per_visit, **weights)
    return LayerObjective(model, kind=t.loss, variances=variances, **weights)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """What AdamW gets."""
    return [{"params": npt_parameters(model), "weight_decay": config.training.weight_decay}]


def make_optimizer(model: nn.Module, config: RunConfig, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, config), lr=learning_rate, betas=config.training.adam_betas)


def make_scheduler(optimizer: torch.optim.Optimizer, kind: str, warmup: int, steps: int) -> LRScheduler:
    """Linear warm-up that starts above zero (no step is wasted), then ``cosine`` or ``linear`` to zero, or ``constant``."""
    rest = max(1, steps - warmup)
    if kind == "cosine":
        body: LRScheduler = CosineAnnealingLR(optimizer, T_max=rest)
    elif kind == "linear":
        body = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=rest)
    else:
        body = LambdaLR(optimizer, lambda step: 1.0)
    if not warmup:
        return body
    rise = LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, body], milestones=[warmup])


class StopRequest:
    """Ctrl-C, or a scheduler's SIGTERM, as a wish: the first one lets the step finish, the second one interrupts at once.

    Attributes:
        asked: Whether this process got one; it may come at any time.
        agreed: Whether the run stops. Several processes settle it at one place of every step, or one would stop while another
            waits for it in the next.
    """

    def __init__(self, world: World | None = None) -> None:
        self.asked, self.world, self._agreed = False, world or World(), False

    @property
    def agreed(self) -> bool:
        return self.asked if self.world.size == 1 else self._agreed

    def settle(self) -> None:
        """All processes call this; any one's wish counts for all."""
        (asked,) = self.world.agree(self.asked)
        self._agreed = bool(asked)

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Progress:
    """Where a phase stands; what a checkpoint keeps of the loop.

    Attributes:
        step: Optimizer steps done.
        schedule: Steps of the learning-rate schedule: fewer, where fp16 skipped a step whose gradients overflowed.
        data: ``StepBatches.state_dict`` after ``step``.
        rows: Sequences per micro-batch at most, once memory has run out.
        skipped: Steps that fp16 skipped.
        updating: From the start of ``optimizer.step()`` until whoever runs the loop has counted the step and says so: components,
            count and log are not of one moment then, and nothing may be saved.
    """

    step: int = 0
    schedule: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    skipped: int = 0
    updating: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "updating"}


class PhaseLoop:
    """Optimizer, schedule, order of the text and the steps of one phase.

    Args:
        phase: What to do.
        model: A converted model.
        objective: Its loss.
        train: Token ids ``[n, L]``, or a stream.
        config: The run.
        accelerator: Of accelerate; anything it prepared before is forgotten.
        progress: Where to start, and from then on where the phase stands.
        note: Called with a line for the user.
        world: The processes; ``None``: this one alone.
    """

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        objective: Objective,
        train: Tensor | PackedStream,
        config: RunConfig,
        accelerator: Any,
        *,
        progress: Progress | None = None,
        note: Callable[[str], None] = lambda text: None,
        world: World | None = None,
    ) -> None:
        t = config.training
        self.world = world or World()
        self.phase, self.objective, self.note = phase, objective, note
        self.config, self.accelerator = config, accelerator
        self.parameters = npt_parameters(model)
        self._casts = kept_casts(model, config, sharded=self.world.sharded)
        optimizer = make_optimizer(model, config, phase.learning_rate)
        self.scheduler = make_scheduler(optimizer, t.lr_scheduler, phase.warmup_steps, phase.steps)
        # accelerate keeps all that it ever prepared, and a checkpoint must hold this phase's optimizer alone.
        accelerator.free_memory()
        # Not the schedule: accelerate would step it once for every process.
        self.optimizer = accelerator.prepare(optimizer)
        self.batches = step_batches(
            train,
            batch_size=t.batch_size,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            # By the phase's name too, so that a polish does not meet the sequences in the order of the first phase.
            seed=derived_seed("phase", t.seed, phase.name),
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.progress = progress or Progress()
        self.progress.data = self.progress.data or self.batches.state_dict()

    def resume(self, load_optimizer: Callable[[], list[str]]) -> None:
        """Go on after ``progress.step``.

        Position in the text and in the schedule are those of ``progress``; ``load_optimizer`` brings moments, loss scale and
        random numbers into what accelerate prepared, and returns notes. Learning rate, schedule and weight decay are this
        configuration's. Raises ``ValueError`` if text or precision do not fit.
        """
        with warnings.catch_warnings():
            # The steps that it counts were done in another process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(self.progress.schedule):
                self.scheduler.step()
        own = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        for note in load_optimizer():
            self.note(note)
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        self.batches.load_state_dict(self.progress.data)

    def steps(self, stop: StopRequest) -> Iterator[StepReport]:
        """The steps that are left, each done when its report comes, until a stop is agreed on.

        Raises:
            TrainingError: A loss or gradient that is not finite; the components then hold the last good step.
        """
        while self.progress.step < self.phase.steps:
            report = self._step(next(self.batches))
            stop.settle()
            yield report
            if stop.agreed:
                return

    def close(self) -> None:
        """Stop reading text ahead."""
        self.batches.close()

    def _step(self, batch: StepBatch) -> StepReport:
        started = time.perf_counter()
        accelerator, phase, progress = self.accelerator, self.phase, self.progress
        report = self._total(_weighted(*self._accumulate(batch)))
        self.world.reduce_gradients(self.parameters)
        limit = self.config.training.max_grad_norm
        unscale_gradients(accelerator, self.optimizer)
        norm = float(accelerator.clip_grad_norm_(self.parameters, limit or math.inf))
        # With fp16, the gradient scaler skips steps whose gradients overflow, by design.
        if not math.isfinite(report.loss) or (not math.isfinite(norm) and accelerator.scaler is None):
            self.optimizer.zero_grad(set_to_none=True)
            what = f"loss is {report.loss}" if not math.isfinite(report.loss) else f"gradient norm is {norm}"
            raise TrainingError(
                f"{what} at step {progress.step + 1} of phase {phase.name}; the components of step {progress.step} are kept. "
                f"Try a lower training.learning_rate (now {phase.learning_rate:g}), more warmup_steps (now "
                f"{phase.warmup_steps}) or max_grad_norm 1.0 (now {limit:g})"
                + ("; float16 ends at 65504, bfloat16 does not" if accelerator.scaler is not None else "")
            )
        rate = float(self.scheduler.get_last_lr()[0])
        progress.updating = True
        self.optimizer.step()
        skipped = accelerator.optimizer_step_was_skipped
        if not skipped:
            self.scheduler.step()
            progress.schedule += 1
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.data = self.batches.state_dict()
        if skipped:
            self._count_skipped()
        report.skipped = progress.skipped
        report.phase, report.step, report.steps = phase.name, progress.step, phase.steps
        report.learning_rate, report.grad_norm = rate, norm
        report.tokens, report.seconds = batch.tokens, time.perf_counter() - started
        return report

    def _count_skipped(self) -> None:
        progress, scale = self.progress, float(self.accelerator.scaler.get_scale())
        progress.skipped += 1
        if scale < 1:
            raise TrainingError(
                f"gradients overflow float16 even at a loss scale of {2 * scale:g}: {progress.skipped} steps up to step "
                f"{progress.step} of phase {self.phase.name} were skipped and changed nothing. Set {self._instead_of_fp16()}, or "
                f"a lower training.learning_rate (now {self.phase.learning_rate:g})"
            )
        if progress.skipped == 1:
            self.note(
                f"step {progress.step} of phase {self.phase.name} was skipped: its gradients overflowed float16; the loss scale "
                f"is {scale:g} now, further ones are counted in the metrics"
            )

    def _instead_of_fp16(self) -> str:
        if self.config.optimization.mixed_precision == "fp16":
            return "optimization.mixed_precision=bf16 or no"
        return "model.dtype=bfloat16 or float32"

    def _total(self, report: StepReport) -> StepReport:
        """Losses of the global step: shares are of it, so the ranks' weighted sums add up to its mean."""
        names = ("loss", "equivalence", "penalty")
        # A rank without rows has no losses per layer, but must sum as many numbers as the others.
        layers = [] if self.phase.objective in ("kl", "task") else list(self.objective.layers)
        values, report.layers = self.world.mean_losses({n: getattr(report, n) for n in names}, report.layers, layers)
        for name, value in values.items():
            setattr(report, name, value)
        return report

    # ---- out of memory -----------------------------------------------------------------------------------------------

    def _accumulate(self, batch: StepBatch) -> tuple[list[Losses], list[float]]:
        """Gradients of one step and the shares of its micro-batches, halved again and again while memory does not suffice."""
        while True:
            ids, shares = self.world.level(*regroup(batch, self.progress.rows))
            losses: list[Losses] = []
            failure: Exception | None = None
            try:
                with autocast(self.accelerator, self.objective.model, self._casts):
                    on_device = [rows.to(self.accelerator.device, non_blocking=True) for rows in ids]
                    losses = self.objective.accumulate_group(on_device, shares, self.accelerator.backward)
            except Exception as error:
                # Where layers are sharded, the others wait inside a forward that this process has left.
                if not is_out_of_memory(error) or self.world.sharded:
                    raise
                failure = error
            if not self.world.agree(failure is not None)[0]:
                return losses, shares
            rows = self.progress.rows or self.config.training.batch_size
            if rows == 1 or not self.config.optimization.oom_retry:
                raise self._common(failure)
            # The traceback holds the frames, and they the activations; so does what was computed elsewhere.
            failure, losses = None, []
            self._halve(rows)

    def _common(self, failure: Exception | None) -> Exception:
        """One process's error, on all of them."""
        if failure is not None and self.world.size == 1:
            return failure
        found = self.world.gather(failure and (isinstance(failure, torch.OutOfMemoryError), str(failure)))
        on_device, text = next(entry for entry in found if entry)
        return torch.OutOfMemoryError(text) if on_device else MemoryError(text)

    def _halve(self, rows: int) -> None:
        from accelerate.utils.memory import clear_device_cache

        self.optimizer.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        self.progress.rows = half = -(-rows // 2)
        self.note(
            f"out of memory at step {self.progress.step + 1} of phase {self.phase.name} with {rows} sequences at a time; "
            f"repeated with {half}, and so is the rest of the run (same step, same result up to rounding)"
        )


def regroup(batch: StepBatch, rows: int | None) -> tuple[list[Tensor], list[float]]:
    """``(micro_batches, shares)`` of the same sequences, at most ``rows`` at a time; the order is kept.

    Pieces are of even size, as ``step_batches`` makes them: one process then has the bits of a run with that ``batch_size``.
    """
    if rows is None or all(len(ids) <= rows for ids in batch.micro_batches):
        return batch.micro_batches, batch.shares
    ids = torch.cat(batch.micro_batches)
    everywhere = batch.tokens // ids.shape[1]
    count = math.ceil(len(ids) / rows)
    bounds = [piece * len(ids) // count for piece in range(count + 1)]
    pieces = [ids[start:end] for start, end in itertools.pairwise(bounds)]
    return pieces, [len(piece) / everywhere for piece in pieces]


def _weighted(losses: list[Losses], shares: list[float]) -> StepReport:
    """Means over the micro-batches of a step."""

    def mean(values: list[Tensor | float]) -> float:
        return sum(float(value) * share for value, share in zip(values, shares, strict=True))

    return StepReport(
        "", 0, 0,
        loss=mean([entry.loss for entry in losses]),
        equivalence=mean([entry.equivalence for entry in losses]),
        penalty=mean([entry.penalty for entry in losses]),
        learning_rate=0.0, grad_norm=0.0, tokens=0, seconds=0.0,
        layers={index: mean([entry.layers[index] for entry in losses]) for index in (losses[0].layers if losses else ())},
    )  # fmt: skip
