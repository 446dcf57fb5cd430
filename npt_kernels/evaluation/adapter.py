"""All that is measured of a trained adapter, and the files that hold it: ``eval.json`` and the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .fidelity import LayerFidelity, layer_fidelity
from .perplexity import EvalResult, evaluate
from .samples import Sample, generate_samples

__all__ = ["AdapterEvaluation", "evaluate_adapter"]

#: Tokens for fidelity and for ‖ΔW‖: more than after training, since here they are what is asked for.
_FIDELITY_TOKENS, _NORM_TOKENS = 4096, 1024

#: ``bar(title, total, unit)`` yields ``advance(n)``; see :func:`npt_kernels.progress.progress_bar`.
Bar = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class AdapterEvaluation:
    """Of one adapter on one held-out text.

    Attributes:
        result: Perplexity of original and converted model, KL, top-1 agreement.
        fidelity: Per converted layer: explained variance and ‖ΔW‖, on the original's inputs.
        samples: Prompts with both continuations.
        seconds: Part → wall-clock seconds.
    """

    result: EvalResult
    fidelity: list[LayerFidelity]
    samples: list[Sample]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``metrics``, ``fidelity``, ``samples``, ``seconds``."""
        return {
            "metrics": self.result.to_dict(),
            "fidelity": [entry.to_dict() for entry in self.fidelity],
            "samples": [asdict(sample) for sample in self.samples],
            "seconds": self.seconds,
        }

    def write(self, directory: Path, facts: dict[str, Any]) -> list[Path]:
        """Write ``eval.json`` (``facts`` and :meth:`to_dict`) and the figures; returns their paths, the JSON first."""
        from .plots import plot_delta_distribution, plot_explained_variance, plot_perplexity

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "eval.json"
        path.write_text(json.dumps({**facts, **self.to_dict()}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return [
            path,
            plot_perplexity(self.result.original(), self.result, None, directory / "perplexity.png", "converted"),
            plot_explained_variance(self.fidelity, None, directory / "fidelity.png", "adapter"),
            plot_delta_distribution(self.fidelity, directory / "delta_norms.png"),
        ]


def evaluate_adapter(
    model: nn.Module, tokenizer: Any, heldout: Tensor, prompts: Sequence[str], max_new_tokens: int, bar: Bar
) -> AdapterEvaluation:
    """Measure a converted model.

    Args:
        model: A converted causal language model.
        tokenizer: Its tokenizer, for the samples.
        heldout: Token ids ``[n, seq]``; the first 4,096 tokens are those of fidelity and ‖ΔW‖.
        prompts, max_new_tokens: For the samples; models without ``generate`` give none.
        bar: Shows progress.

    Raises:
        TypeError, ValueError: As :func:`npt_kernels.evaluation.perplexity.evaluate`.
    """
    seconds: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        seconds[name] = time.perf_counter() - started

    started = time.perf_counter()
    with bar("perplexity and KL", heldout.numel(), "tokens") as advance:
        result = evaluate(model, heldout, advance=advance)
    timed("perplexity", started)
    started = time.perf_counter()
    rows = min(len(heldout), max(1, _FIDELITY_TOKENS // heldout.shape[1]))
    with bar("layers", rows * heldout.shape[1], "tokens") as advance:
        fidelity = layer_fidelity(
            model, heldout, max_tokens=_FIDELITY_TOKENS, norm_tokens=_NORM_TOKENS, advance=advance
        )
    timed("fidelity", started)
    started = time.perf_counter()
    samples: list[Sample] = []
    if hasattr(model, "generate"):
        with bar("samples", len(prompts), "prompts") as advance:
            for prompt in prompts:
                samples += generate_samples(model, tokenizer, [prompt], max_new_tokens)
                advance(1)
    timed("samples", started)
    return AdapterEvaluation(result, fidelity, samples, seconds)
