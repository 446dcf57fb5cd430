"""Measurements of a run's model before, during and after training: perplexity, KL, layers, samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..configs.schema import RunConfig
from ..estimate.byte_count import TEACHER_BYTES
from ..evaluation.fidelity import LayerFidelity, layer_fidelity
from ..evaluation.perplexity import EvalResult, TeacherStates, evaluate, evaluate_base
from ..evaluation.samples import Sample, generate, generate_samples
from ..progress import Progress, progress_bar
from ..training.distributed import World
from .display import describe
from .records import Recorder

__all__ = ["Measured", "RunEvaluation", "timed"]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to ``seconds[name]``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


class Measured(NamedTuple):
    """What was found of a converted model: the whole, its layers, samples."""

    result: EvalResult
    fidelity: list[LayerFidelity]
    samples: list[Sample]

    def values(self, base: EvalResult) -> dict[str, Any]:
        """Plain values, with those of the original."""
        return {
            "base": asdict(base),
            "converted": asdict(self.result),
            "fidelity": [entry.to_dict() for entry in self.fidelity],
            "samples": [vars(sample) for sample in self.samples],
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Measured:
        """Back from :meth:`values`."""
        return cls(
            EvalResult(**values["converted"]),
            [LayerFidelity.from_dict(entry) for entry in values["fidelity"]],
            [Sample(**sample) for sample in values["samples"]],
        )


class RunEvaluation:
    """Measures one model on one held-out text and writes what it finds to the recorder.

    Args:
        config: The run.
        model: The base, later converted in place.
        tokenizer: For samples; ``None``: no samples.
        heldout: Token ids ``[k, L]``.
        world: The processes; evaluation is dealt out over them.
        recorder: Where results go.
        seconds: Name → seconds of the run, added to.
        bars: How progress is shown.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        tokenizer: Any,
        heldout: Tensor,
        world: World,
        recorder: Recorder,
        seconds: dict[str, float],
        bars: Progress,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.world, self.recorder, self.seconds, self.bars = world, recorder, seconds, bars
        # evaluation.tokens counts predicted positions: the first token of a sequence is not predicted.
        rows = -(-config.evaluation.tokens // (heldout.shape[1] - 1))
        self.heldout = heldout[:rows]
        self.teacher: TeacherStates | None = None
        self.base_texts: list[str] = []

    def original(self, *, record: bool) -> EvalResult:
        """The original; also after a checkpoint (``record`` false), as proof that model and text are the same."""
        with timed(self.seconds, "evaluate original"), self._bar("original") as advance:
            base, teacher = evaluate_base(self.model, self.heldout, advance=advance, ranks=self.world)
            # Without its states the original runs again at every evaluation, and on every process: one decision for all.
            (size,) = self.world.agree(teacher.states.numel() * teacher.states.element_size())
            self.teacher = teacher if size <= TEACHER_BYTES else None
        if record:
            self.recorder.result("original", base, 0)
        self.recorder.say(f"original: perplexity {base.base_perplexity:.3f} on {base.tokens:,} held-out tokens")
        if self._generates():
            e = self.config.evaluation
            with timed(self.seconds, "samples"):
                self.base_texts = generate(self.model, self.tokenizer, e.prompts, e.max_new_tokens)
        return base

    def converted(self, stage: str, steps: int) -> Measured:
        """The converted model: the whole, its layers, samples. ``steps``: optimizer steps done."""
        with timed(self.seconds, f"evaluate {stage}"), self._bar(stage) as advance:
            result = evaluate(self.model, self.heldout, advance=advance, teacher=self.teacher, ranks=self.world)
            fidelity = layer_fidelity(self.model, self.heldout)
        self.recorder.result(stage, result, steps, step=steps)
        self.recorder.record("fidelity", stage=stage, step=steps, layers=[entry.to_dict() for entry in fidelity])
        self.recorder.say(f"{stage}: {describe(result)}")
        return Measured(result, fidelity, self.samples(stage, steps))

    def in_between(self, phase: str, step: int, steps: int) -> str:
        """The whole alone, at a step of a phase; a line that says what was found."""
        result = evaluate(self.model, self.heldout, teacher=self.teacher, ranks=self.world)
        self.recorder.result("training", result, steps, phase=phase, step=step)
        return f"step {step}: {describe(result)}"

    def samples(self, title: str, steps: int) -> list[Sample]:
        """Continuations of the prompts by both models."""
        if not self._generates():
            return []
        with timed(self.seconds, "samples"):
            e = self.config.evaluation
            samples = generate_samples(self.model, self.tokenizer, e.prompts, e.max_new_tokens, base=self.base_texts)
        self.recorder.samples(title, samples, steps)
        return samples

    def _generates(self) -> bool:
        # Sharded layers need all processes in every forward.
        return self.tokenizer is not None and (self.world.is_main or self.world.sharded)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Any]:
        with progress_bar(f"evaluating {title}", self.heldout.numel(), "tokens", enabled=self.bars) as advance:
            yield advance
