"""``training.max_minutes``: calibration tokens and training steps that a run has time for, chosen from measured rates.

Both are chosen once, the tokens before the conversion and the steps before training, and put into the configuration in place of
``max_minutes``: ``config.yaml`` and every checkpoint hold what was chosen, so a repeated or resumed run measures nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..conversion.attention_moments import collect_moments
from ..conversion.calibrate import conversion_seconds
from ..model.select import plan_layers
from ..training.kept_casts import kept_casts
from ..training.loop import Phase, is_out_of_memory
from ..training.objectives import Objective
from ..training.precision import autocast

__all__ = ["Budget", "fit_into_time", "pass_seconds", "step_seconds"]

#: Of the time that is left before the conversion, what it may take; the rest is for training and two evaluations.
_CONVERSION_SHARE = 0.45
#: Fewer calibration tokens give a worse model than training makes up for (docs/method.md, section 8).
_LEAST_TOKENS = 8192
#: Tokens of the forward that is timed.
_PROBE_TOKENS = 512
#: A step takes longer than its probe: optimizer, logs, other work of the machine.
_RESERVE = 1.05


class Budget:
    """The time of one run, from its construction on; without ``max_minutes`` it changes nothing.

    Args:
        config: The run's; what is chosen is written into it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, minutes = config, config.training.max_minutes
        self.seconds: float | None = None if minutes is None else 60 * minutes
        self._started = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds. ``inf`` without a limit."""
        return math.inf if self.seconds is None else self.seconds - (time.perf_counter() - self._started)

    def calibration(self, model: nn.Module, tokens: Tensor) -> tuple[Tensor, str]:
        """The first of ``tokens [n, seq]`` that there is time for, and a line that says so.

        Under the run's autocast, with a model that is not converted.
        """
        config, length = self.config, tokens.shape[1]
        plain, fisher = pass_seconds(model, tokens[: max(1, _PROBE_TOKENS // length)], config)
        seconds = _CONVERSION_SHARE * self.left
        npt = config.npt_config()
        rows, least = len(tokens), min(len(tokens), -(-_LEAST_TOKENS // length))
        while rows > least and conversion_seconds(npt, rows * length, plain, fisher) > seconds:
            rows -= 1
        config.data.calibration_tokens = rows * length
        rates = f"{1 / plain:,.0f} tokens/s forward, {1 / fisher:,.0f} with a backward"
        chosen = f"{rows * length:,} of {tokens.numel():,} calibration tokens"
        return tokens[:rows], f"max_minutes: {chosen} ({rates}; {seconds:,.0f} s for the conversion)"

    def training(self, phases: Sequence[Phase], steps: Sequence[float], afterwards: float) -> tuple[list[Phase], str]:
        """The phases with as many steps as there is time for, and a line that says so. All are cut by one share.

        Args:
            phases: As configured.
            steps: Seconds of a step of each; empty for a resumed run, whose steps stay as they are.
            afterwards: Seconds that the run needs after training.
        """
        if phases and not steps:
            return list(phases), "note: training.max_minutes is not for a resumed run, which keeps its steps"
        seconds = max(self.left - afterwards, 0.0)
        planned = _RESERVE * sum(phase.steps * taken for phase, taken in zip(phases, steps, strict=True))
        share = min(1.0, seconds / planned) if planned else 1.0
        chosen = []
        for phase in phases:
            count = max(1, math.floor(phase.steps * share))
            chosen.append(replace(phase, steps=count, warmup_steps=min(phase.warmup_steps, count)))
        words = ", ".join(
            f"{new.steps} of {old.steps} steps of {new.name} ({taken:.2f} s each)"
            for old, new, taken in zip(phases, chosen, steps, strict=True)
        )
        return chosen, f"max_minutes: {words or 'no training'}; {seconds:,.0f} s were left for them"

    def settle(self, phases: Sequence[Phase], calibration_tokens: int) -> None:
        """Write what was chosen into the configuration, in place of the limit."""
        training = self.config.training
        if phases:
            training.max_steps = phases[0].steps
        if len(phases) > 1:
            training.polish_steps = phases[1].steps
        self.config.data.calibration_tokens = calibration_tokens
        training.max_minutes = None


def fit_into_time(run: Any) -> None:
    """As many steps as ``training.max_minutes`` leaves; from here on the configuration holds them, and the tokens."""
    config, seconds = run.config, run.state.seconds
    if run.budget.seconds is None:
        return
    again = sum(seconds.get(f"evaluate {stage}", 0.0) for stage in ("after conversion", "resumed adapter"))
    again += seconds.get("samples", 0.0) / 2 + 2.0  # the original's and the converted model's so far; plots
    text, device = run.blocks.heldout, run.accelerator.device
    retry, taken = config.optimization.oom_retry and not run.world.sharded, []
    for phase in run.phases if run.checkpoint is None else ():
        with autocast(run.accelerator, run.model, kept_casts(run.model, config, sharded=run.world.sharded)):
            taken.append(step_seconds(run._objective(phase), text, config, device, retry=retry))
    phases, line = run.budget.training(run.phases, taken, again)
    # One decision for all processes: that of the first.
    run.phases, tokens = run.world.broadcast((phases, config.data.calibration_tokens))
    run.budget.settle(run.phases, tokens)
    run.world.on_main(config.save)
    run.recorder.record("budget", calibration_tokens=tokens, steps={p.name: p.steps for p in run.phases})
    run.recorder.say(line)


def pass_seconds(model: nn.Module, ids: Tensor, config: RunConfig) -> tuple[float, float]:
    """Seconds a token of the closed form's first pass on ``ids [n, seq]``: forward only, and with the Fisher's backward.

    Timed, not counted: sums and softmax are in float32 whatever the products are in.
    """
    npt = config.npt_config()
    modules = [choice.plan.shape.attention_module(choice.layer) for choice in plan_layers(model, npt)[0]]

    def seconds(fisher: bool) -> float:
        def run() -> None:
            collect_moments(model, modules, ids, fisher=fisher)

        return _fastest(run, next(model.parameters()).device, runs=1) / ids.numel()

    plain = seconds(False)
    return plain, seconds(True) if npt.basis == "fisher" else plain


def step_seconds(objective: Objective, text: Tensor, config: RunConfig, device: torch.device, *, retry: bool) -> float:
    """Seconds of the gradients of one step, from one micro-batch of ``text [n, seq]``. The gradients are thrown away.

    ``retry``: with fewer sequences where memory does not suffice, as training itself would take.
    """
    t = config.training
    ids = text[: t.batch_size].to(device)

    def run() -> None:
        try:
            objective.accumulate(ids, 1.0, lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        finally:
            objective.model.zero_grad(set_to_none=True)

    while True:
        try:
            return _fastest(run, device, runs=1) * t.gradient_accumulation_steps * t.batch_size / len(ids)
        except Exception as error:
            if not is_out_of_memory(error) or len(ids) == 1 or not retry:
                raise
            ids = ids[: -(-len(ids) // 2)]


def _fastest(run: Callable[[], None], device: torch.device, runs: int) -> float:
    """Seconds of the fastest of ``runs`` calls, after one that warms up."""
    taken = []
    for _ in range(1 + runs):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
