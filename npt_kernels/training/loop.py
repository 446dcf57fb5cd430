"""The optimizer loop of one training phase. Loss, optimizer, parameter groups and schedule are chosen here and nowhere else."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from ..configs.schema import RunConfig
from ..models.patching import npt_parameters
from .objectives import KLObjective, LayerObjective, LocalObjective, Losses, Objective

__all__ = ["Phase", "StepReport", "StopRequest", "TrainingError", "make_objective", "plan_phases", "run_phase"]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is for users and needs no traceback."""


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


def plan_phases(config: RunConfig, num_sequences: int) -> list[Phase]:
    """The phases of ``training.mode`` for that many training sequences; empty for ``none``."""
    t = config.training
    if t.mode == "none":
        return []
    per_epoch = math.ceil(math.ceil(num_sequences / t.batch_size) / t.gradient_accumulation_steps)
    steps = per_epoch * t.num_epochs
    steps = min(steps, t.max_steps) if t.max_steps else steps
    first = "local" if t.mode != "end_to_end" else t.objective
    phases = [Phase(t.mode.partition("+")[0], first, steps, t.learning_rate, min(t.warmup_steps, steps))]
    if t.mode == "local+polish":
        # The polish starts from a trained adapter: a long warm-up made for the first phase would eat it up.
        warmup = min(t.warmup_steps, t.polish_steps // 10)
        phases.append(Phase("polish", "kl", t.polish_steps, t.polish_learning_rate, warmup))
    return phases


def make_objective(name: str, model: nn.Module, config: RunConfig, variances: dict[int, Tensor]) -> Objective:
    """``local``, ``kl`` or ``layer`` with the weights of the configuration."""
    t = config.training
    weights = {"equivalence_weight": t.equivalence_weight, "regularization_weight": t.regularization_weight}
    if name == "kl":
        return KLObjective(model, **weights)
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
    """Ctrl-C as a wish: the first one lets the current step finish, the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        signal.signal(signal.SIGINT, handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


def _step_batches(loader: DataLoader[Any], accumulation: int) -> Iterator[list[Tensor]]:
    """Micro-batches of one optimizer step at a time, epoch after epoch; the last step of an epoch may have fewer."""
    while True:
        group: list[Tensor] = []
        for (ids,) in loader:
            group.append(ids)
            if len(group) == accumulation:
                yield group
                group = []
        if group:
            yield group


def run_phase(
    phase: Phase,
    model: nn.Module,
    objective: Objective,
    train: Tensor,
    config: RunConfig,
    accelerator: Any,
    stop: StopRequest,
    after_step: Callable[[StepReport], None],
) -> bool:
    """Train for ``phase.steps`` optimizer steps on ``train [n, L]``; ``True`` unless a stop was asked for.

    Raises:
        TrainingError: A loss or gradient that is not finite; the components then hold the last good step.
    """
    t = config.training
    optimizer = make_optimizer(model, config, phase.learning_rate)
    scheduler = make_scheduler(optimizer, t.lr_scheduler, phase.warmup_steps, phase.steps)
    # Seeded by the phase's name too, so that a polish does not meet the sequences in the order of the first phase.
    generator = torch.Generator().manual_seed(t.seed + sum(phase.name.encode()))
    loader = DataLoader(TensorDataset(train), batch_size=t.batch_size, shuffle=True, generator=generator)
    optimizer, scheduler, loader = accelerator.prepare(optimizer, scheduler, loader)
    parameters = npt_parameters(model)
    for step, group in enumerate(_step_batches(loader, t.gradient_accumulation_steps), start=1):
        started = time.perf_counter()
        tokens = sum(ids.numel() for ids in group)
        shares = [ids.numel() / tokens for ids in group]
        losses: list[Losses] = []
        for ids, share in zip(group, shares, strict=True):
            with accelerator.autocast():
                losses.append(objective.accumulate(ids, share, accelerator.backward))
        mean = _weighted(losses, shares)
        norm = float(accelerator.clip_grad_norm_(parameters, t.max_grad_norm or math.inf))
        # With fp16, the gradient scaler skips steps whose gradients overflow, by design.
        if not math.isfinite(mean.loss) or (not math.isfinite(norm) and accelerator.scaler is None):
            optimizer.zero_grad(set_to_none=True)
            what = f"loss is {mean.loss}" if not math.isfinite(mean.loss) else f"gradient norm is {norm}"
            raise TrainingError(
                f"{what} at step {step} of phase {phase.name}; the components of step {step - 1} are kept. Try a lower "
                f"training.learning_rate (now {phase.learning_rate:g}), more warmup_steps (now {phase.warmup_steps}) or "
                f"max_grad_norm 1.0 (now {t.max_grad_norm:g})"
            )
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        mean.phase, mean.step, mean.steps, mean.learning_rate, mean.grad_norm = (
            phase.name,
            step,
            phase.steps,
            rate,
            norm,
        )
        mean.tokens, mean.seconds = tokens, time.perf_counter() - started
        after_step(mean)
        if stop.asked:
            return False
        if step == phase.steps:
            break
    return True


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
        layers={index: mean([entry.layers[index] for entry in losses]) for index in losses[0].layers},
    )  # fmt: skip
