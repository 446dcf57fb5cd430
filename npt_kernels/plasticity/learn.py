"""``learn``: write facts into a model, and measure what that did with everything that usually goes unsaid."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..progress import progress_bar
from .context import ContextSettings, conditional, context
from .context import default_layers as context_layers
from .corpus import Corpus, fitting_length, windows
from .edit import Applied, Edit, active_edits, apply_edit, edits_suspended, undo_edit
from .facts import Fact, require_tokenizer
from .hooks import Sites, name_of
from .moments import SecondMoments, cached_second_moments
from .recall import Examination, Row
from .rome import RomeSettings, default_layer, rome

__all__ = ["METHODS", "Learned", "Limits", "learn", "verdict"]

METHODS = ("rome", "context", "conditional")

#: Rows × tokens of held-out prose.
_PROSE = (8, 256)


@dataclass(frozen=True)
class Limits:
    """What an edit may cost before it is not called learned.

    Attributes:
        verbatim: Share of facts that must be recalled, at least.
        leak: Share of prompts about other subjects that newly say the answer, at most.
        known: Share of known facts that may be lost.
        prose_ratio: Perplexity of held-out prose ÷ before, at most.
    """

    verbatim: float = 0.9
    leak: float = 0.1
    known: float = 0.1
    prose_ratio: float = 1.02


@dataclass(frozen=True)
class Learned:
    """What :func:`learn` returns.

    Attributes:
        edit: The change; it is applied to the model.
        applied: What the application did to each matrix.
        before, in_context, after: The rows of the report.
        refusals: Why it is not called learned; empty if it is.
        report: All of it as plain JSON types.
    """

    edit: Edit
    applied: Applied
    before: Row
    in_context: Row
    after: Row
    refusals: tuple[str, ...]
    report: dict[str, Any]

    @property
    def learned(self) -> bool:
        return not self.refusals


def learn(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact] | Fact,
    *,
    method: str = "rome",
    layers: Sequence[int] | int | None = None,
    moments: SecondMoments | Path | str | None = None,
    corpus: Corpus | None = None,
    cache_dir: Path | str | None = None,
    prose: Tensor | None = None,
    settings: RomeSettings | ContextSettings | None = None,
    limits: Limits | None = None,
    progress: bool = False,
) -> Learned:
    """Write ``facts`` into ``model``, apply the edit and measure before, in context and after.

    Args:
        model: Causal language model with llama-like or gpt2-like layers, not converted. Earlier edits may be applied.
        tokenizer: Its tokenizer.
        facts: What to learn.
        method: ``rome`` (one layer, gradient for the value), ``context`` (several layers, closed form) or ``conditional``
            (the same, per token, only once the subject has been mentioned).
        layers: Layer of ``rome`` (default: three tenths up), layers of the others (default: the upper fifth).
        moments: Second moments of the inputs, or their file. Default: collected from ``corpus``, and cached.
        corpus: Ordinary text. Default: the demo's plays. Not used where ``moments`` and ``prose`` are given.
        cache_dir: Where second moments are kept. Default: the package's cache.
        prose: Held-out token ids ``[n, seq]``. Default: from ``corpus``.
        settings: How the method works in detail.
        limits: From where on the result is not called learned.
        progress: Show bars.

    Returns:
        :class:`Learned`. The edit stays applied whatever the verdict; ``undo_edit(model)`` takes it back.

    Raises:
        ValueError: Facts, layers or a model that cannot work; one line. The model is then unchanged.
    """
    started = time.perf_counter()
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    limits = limits or Limits()
    require_tokenizer(tokenizer)
    if not facts:
        raise ValueError("there are no facts to learn")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    _check_settings(method, settings)
    sites = Sites(model)
    sites.refuse_unless_plain()
    chosen = _layers(method, layers, len(sites))
    for layer in chosen:
        sites.shape(layer)
        if method != "conditional" and sites.quantised(layer):
            raise ValueError(
                f"layer {layer} is quantised: its stored codes cannot hold a change smaller than their step; use "
                "method='conditional', which adds the change to the output, or edit the dense model and quantise that"
            )
    examination = Examination(model, tokenizer, facts)  # what does not fit is said before anything slow
    if prose is None or moments is None:
        corpus = corpus or _demo(cache_dir)
    if prose is None:
        assert corpus is not None
        prose = windows(tokenizer, corpus.heldout, _PROSE[0], fitting_length(model, _PROSE[1]))
    examination.prose = prose
    moments = _moments(model, tokenizer, moments, corpus, cache_dir, chosen, progress)
    with progress_bar("measuring", 3, "rows", enabled=progress) as advance:
        before = examination.row()
        advance(1)
        in_context = examination.row(in_context=True)
        advance(1)
    steps = len(facts) if method == "rome" else len(chosen) * (len(facts) if method == "conditional" else 1)
    triggers = None
    with progress_bar("writing", steps, "facts" if method == "rome" else "layers", enabled=progress) as advance:
        if method == "rome":
            changes, notes = rome(model, tokenizer, facts, moments, chosen[0], settings, advance)  # type: ignore[arg-type]
        elif method == "context":
            changes, notes = context(model, tokenizer, facts, moments, chosen, settings, advance)  # type: ignore[arg-type]
        else:
            changes, triggers, notes = conditional(model, tokenizer, facts, moments, chosen, settings, advance)  # type: ignore[arg-type]
    notes["moments"] = {"tokens": moments.tokens, "source": moments.source, "digest": moments.digest}
    edit = Edit.of(model, changes, method, facts, triggers, notes)
    applied = apply_edit(model, edit)
    try:
        after = examination.row()
    except BaseException:
        undo_edit(model, edit)
        raise
    refusals = verdict(before, after, limits)
    report = {
        "learned": not refusals,
        "refusals": list(refusals),
        "limits": asdict(limits),
        "before": before.to_dict(),
        "in_context": in_context.to_dict(),
        "after": after.to_dict(),
        "method": method,
        "settings": notes,
        "facts": [fact.to_dict() for fact in facts],
        "weights": {
            str(layer): {"relative": applied.relative[layer], "kept": applied.kept[layer], "noise": applied.noise[layer],
                         "rank": len(edit.layers[layer].v_a)}
            for layer in edit.layers
        },
        "warnings": list(applied.warnings),
        "edits_before": len(active_edits(model)) - 1,
        "model": name_of(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "seconds": round(time.perf_counter() - started, 2),
        "versions": {"npt_kernels": __version__, "torch": torch.__version__},
    }  # fmt: skip
    return Learned(edit, applied, before, in_context, after, refusals, report)


def verdict(before: Row, after: Row, limits: Limits) -> tuple[str, ...]:
    """Why an edit is not called learned, one reason each; empty if it is."""
    reasons = []
    if (after.verbatim or 0.0) < limits.verbatim:
        reasons.append(f"recall {after.verbatim or 0:.2f} is below {limits.verbatim:.2f}")
    leaked = (after.leak or 0.0) - (before.leak or 0.0)
    if leaked > limits.leak:
        reasons.append(f"leak {leaked:.2f} is above {limits.leak:.2f}: other subjects now get the answer")
    lost = (before.known or 0.0) - (after.known or 0.0)
    if lost > limits.known:
        reasons.append(f"known facts fell by {lost:.2f}, more than {limits.known:.2f}")
    if after.prose_ratio is not None and not after.prose_ratio <= limits.prose_ratio:
        reasons.append(f"prose perplexity ratio {after.prose_ratio:.3f} is above {limits.prose_ratio:.3f}")
    return tuple(reasons)


def _layers(method: str, layers: Sequence[int] | int | None, total: int) -> list[int]:
    if layers is None:
        return [default_layer(total)] if method == "rome" else context_layers(total)
    given = [layers] if isinstance(layers, int) else list(layers)
    if not given:
        raise ValueError("layers is empty; name at least one, or leave it out for the default")
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -total <= layer < total:
            raise ValueError(f"layer={layer!r} is out of range: the model has {total} layers (0 … {total - 1})")
    chosen = sorted({layer % total for layer in given})
    if method == "rome" and len(chosen) > 1:
        raise ValueError(f"method='rome' edits one layer, not {len(chosen)}; name one, or use method='context'")
    return chosen


def _check_settings(method: str, settings: Any) -> None:
    wanted = RomeSettings if method == "rome" else ContextSettings
    if settings is not None and not isinstance(settings, wanted):
        raise TypeError(f"method={method!r} takes {wanted.__name__}, got {type(settings).__name__}")


def _demo(cache_dir: Path | str | None) -> Corpus:
    from .corpus import demo_corpus

    return demo_corpus(None if cache_dir is None else Path(cache_dir))


def _moments(
    model: nn.Module,
    tokenizer: Any,
    moments: Any,
    corpus: Corpus | None,
    cache_dir: Any,
    layers: list[int],
    progress: bool,
) -> SecondMoments:
    if isinstance(moments, SecondMoments):
        found = moments
    elif moments is not None:
        found = SecondMoments.load(moments, layers)
    else:
        from ..base_model.assets import default_cache_dir

        assert corpus is not None
        with edits_suspended(model):  # one file a model, whatever is applied to it
            found = cached_second_moments(
                model, tokenizer, corpus, cache_dir or default_cache_dir(), layers, progress=progress
            )
    sites = Sites(model)
    for layer in layers:
        d_in = sites.size(layer)[0]
        if found.matrix(layer).shape != (d_in, d_in):
            raise ValueError(
                f"the second moments of layer {layer} are {list(found.matrix(layer).shape)}, the model needs [{d_in}, {d_in}]; "
                "they are of another model"
            )
    return found
