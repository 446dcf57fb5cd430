"""What a context does to the residual stream, written into the weights in closed form: no gradients.

Teacher: the model with the fact in front of a question. Student: the question alone. At the tokens that predict the answer, layer
by layer upwards, the last MLP matrix is changed so that the layer returns what it returned with the context (token-independent
"thought matrices" by least squares: Mazzawi et al. 2025, arXiv:2510.08734). With ``R [n, d]`` what is missing behind the layer,
``K [n, in]`` the student's inputs of the matrix, ``C`` their second moments in ordinary text:

    ΔW = Rᵀ (I + K M⁻¹ Kᵀ)⁻¹ K M⁻¹,    M = λ C

which minimises ``‖K ΔWᵀ − R‖² + λ E‖ΔW k‖²``. Rows about *other* subjects, whose teacher is the unedited run, hold them in place.
``conditional`` is the same solve for one fact at a time, acting only once its subject has been mentioned; the other subjects are
held behind that mention.

Why the keys are at the last tokens and not at the subject, where ``rome`` has its key: at the subject's tokens there is nothing
to write. The states that the teacher has there, put into the student, leave the answer as unlikely as without (SmolLM2, 12 facts,
any layer: p .002, in context .624); what the context does, it does at the last tokens, above layer 22.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .changes import LayerChange, Trigger
from .conditional import Gate
from .edit import Edit
from .facts import Fact, encode, encode_answer, padded, start_ids, subject_variants
from .hooks import ReachedLayerError, Sites, decoder_of, device_of, evaluating
from .moments import SecondMoments
from .probes import HELD_SUBJECTS
from .recall import fits

__all__ = ["ContextSettings", "conditional", "context", "default_layers"]


@dataclass(frozen=True)
class ContextSettings:
    """How the context is written.

    Attributes:
        strength: λ: what ordinary text weighs against an answer's row; smaller writes harder, and damages more.
        hold_others: Also keep what the model says of other subjects and the facts' ``keep`` texts.
        plain_keys: ``C = I`` times the mean energy. For comparison only: it damages ordinary text.
        ridge: Share of the mean diagonal added to ``C``.
    """

    strength: float = 1000.0
    hold_others: bool = True
    plain_keys: bool = False
    ridge: float = 1e-3


def default_layers(num_layers: int) -> list[int]:
    """The upper fifth. What the context adds at the last token carries the answer from there on only (SmolLM2: put into the run
    without context, .02 of its probability .62 behind layer 22, .50 behind layer 24); changes below it cost leak and prose."""
    return list(range(num_layers - max(1, round(0.2 * num_layers)), num_layers))


@dataclass(frozen=True)
class _Pairs:
    """Student texts with the rows to be matched, and what the teacher had there behind every layer."""

    ids: Tensor  # [n, seq]
    mask: Tensor
    rows: Tensor  # [m]: row of ids
    columns: Tensor  # [m]: token
    fact: Tensor  # [m]: which fact
    target: dict[int, Tensor]  # layer → [m, d], float64


def _held(fact: Fact, number: int, count: int, beside: bool) -> list[str]:
    """Texts whose continuation ``fact``, the ``number``-th of ``count``, must leave alone.

    Several facts hold one another, and share the subjects; ``beside``: where each stands behind the fact's own.
    """
    share = max(2, len(HELD_SUBJECTS) // count)
    others = [HELD_SUBJECTS[(number * share + i) % len(HELD_SUBJECTS)] for i in range(share)]
    texts = [fact.beside(other) if beside else fact.about(other) for other in others if other != fact.subject]
    return [*texts, *fact.keep]


def _collect(
    model: nn.Module,
    tokenizer: Any,
    sites: Sites,
    facts: Sequence[Fact],
    layers: Sequence[int],
    hold: bool,
    beside: bool = False,
) -> _Pairs:
    students: list[tuple[int, ...]] = []
    teachers: list[tuple[int, ...]] = []
    spots: list[tuple[int, int, int, int]] = []  # (text, student token, teacher token, fact)
    for number, fact in enumerate(facts):
        for prompt in (fact.prompt, *fact.phrasings):
            student = encode_answer(tokenizer, prompt, fact.answer)
            teacher = encode_answer(tokenizer, f"{fact.fact}\n{prompt}", fact.answer)
            for offset in range(len(student.ids) - student.start):
                spots.append((len(students), student.start - 1 + offset, teacher.start - 1 + offset, number))
            students.append(student.ids)
            teachers.append(teacher.ids)
        if hold:
            for held in _held(fact, number, len(facts), beside):
                ids = tuple(encode(tokenizer, held))
                spots.append((len(students), len(ids) - 1, len(ids) - 1, number))
                students.append(ids)
                teachers.append(ids)
    for sequence in (*students, *teachers):
        fits(model, sequence, "a fact in front of its question")
    fill, device = (start_ids(tokenizer) or [0])[0], device_of(model)
    row, token, teacher_token, owner = (torch.tensor(column, device=device) for column in zip(*spots, strict=True))
    target: dict[int, Tensor] = {}
    tokens, mask = padded(teachers, fill, device)
    _run(
        model,
        sites,
        tokens,
        mask,
        layers,
        lambda layer, h: target.__setitem__(layer, h[row, teacher_token].double().cpu()),
    )
    tokens, mask = padded(students, fill, device)
    return _Pairs(tokens, mask, row, token, owner.cpu(), target)


@torch.no_grad()
def _run(
    model: nn.Module,
    sites: Sites,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[int],
    read: Callable[[int, Tensor], None],
) -> None:
    """One forward that ends behind the last of ``layers``; ``read(layer, h)`` gets each one's output."""
    last = max(layers)

    def read_and_stop(layer: int, h: Tensor) -> None:
        read(layer, h)
        if layer == last:
            raise ReachedLayerError

    with sites.reading_layer_outputs(list(layers), read_and_stop), contextlib.suppress(ReachedLayerError):
        decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)


def solve(keys: Tensor, missing: Tensor, moments: SecondMoments, layer: int, settings: ContextSettings) -> Tensor:
    """``(I + K M⁻¹ Kᵀ)⁻¹ K M⁻¹ [m, in]``, float64: the v_a whose v_b are the rows of ``missing``."""
    wide = keys.double()
    if settings.plain_keys:
        energy = moments.matrix(layer).double().diagonal().mean()
        solved = wide / (settings.strength * energy)
    else:
        solved = moments.whitener(layer, settings.ridge).solve(wide) / settings.strength
    gram = torch.eye(len(wide), dtype=wide.dtype) + solved @ wide.t()
    return torch.linalg.solve(gram, solved)


class _Climb:
    """The student texts on their way up the layers, written or acted on one by one: none below the one at work is run again
    (each is run twice, with the same bits).
    """

    def __init__(self, model: nn.Module, sites: Sites, pairs: _Pairs) -> None:
        self.model, self.sites, self.pairs = model, sites, pairs
        self.layer, self.h = 0, torch.empty(0)

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(K [m, in], R [m, d])`` of a layer not below the last one asked for, on the model as it is now."""
        read: dict[str, Tensor] = {}
        spots, pairs = (self.pairs.rows, self.pairs.columns), self.pairs
        if layer > self.layer:
            self._run(layer - 1, lambda h: read.__setitem__("below", h))
            self.layer, self.h = layer, read["below"]
        with self.sites.reading_inputs([layer], lambda _, k: read.__setitem__("k", k[spots].double().cpu())):
            self._run(layer, lambda h: read.__setitem__("h", h[spots].double().cpu()))
        return read["k"], pairs.target[layer] - read["h"]

    def _run(self, last: int, read: Callable[[Tensor], None]) -> None:
        with self.sites.starting_at(self.layer, self.h):
            _run(self.model, self.sites, self.pairs.ids, self.pairs.mask, [last], lambda _, h: read(h))


def _norm_left(model: nn.Module, sites: Sites, pairs: _Pairs, layer: int) -> float:
    """‖R‖ of a layer."""
    return float(_Climb(model, sites, pairs).at(layer)[1].norm())


@contextmanager
def _restored(sites: Sites, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The matrices' present values; they are put back at the end, whatever happens."""
    before = {layer: sites.weight(layer).detach().clone() for layer in layers}
    try:
        yield before
    finally:
        with torch.no_grad():
            for layer, weight in before.items():
                sites.weight(layer).copy_(weight)


@torch.no_grad()
def context(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    moments: SecondMoments,
    layers: Sequence[int],
    settings: ContextSettings | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[int, LayerChange], dict[str, Any]]:
    """The change that gives ``model`` the effect of having ``facts`` in its context; the model is as before when it returns.

    Args:
        model, tokenizer: The model to be edited.
        facts: All written in one solve per layer.
        moments: Of ``layers`` at least.
        layers: Which layers, written upwards.
        settings: How.
        advance: Called with 1 after every layer.

    Returns:
        ``({layer: change}, notes)``, notes with the share of the missing effect that was left behind the last layer.
    """
    settings = settings or ContextSettings()
    sites, layers = Sites(model), sorted(layers)
    for layer in layers:
        sites.check(layer)
    changes: dict[int, LayerChange] = {}
    with evaluating(model), _restored(sites, layers) as before:
        pairs = _collect(model, tokenizer, sites, facts, layers, settings.hold_others)
        start, climb = _norm_left(model, sites, pairs, layers[-1]), _Climb(model, sites, pairs)
        for layer in layers:
            keys, missing = climb.at(layer)
            v_a = solve(keys, missing, moments, layer, settings)
            changes[layer] = LayerChange(v_a.float(), missing.float(), pairs.fact)
            sites.weight(layer).copy_(changes[layer].added_to(before[layer]))
            advance(1)
        left = _norm_left(model, sites, pairs, layers[-1])
    return changes, {
        **asdict(settings),
        "layers": list(layers),
        "rows": len(pairs.fact),
        "effect_left": left / max(start, 1e-30),
    }


@torch.no_grad()
def conditional(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    moments: SecondMoments,
    layers: Sequence[int],
    settings: ContextSettings | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[int, LayerChange], list[Trigger], dict[str, Any]]:
    """As :func:`context`, one fact at a time, acting from the subject's first mention on; no matrix is written to.

    Where it is not mentioned nothing acts, so other subjects are held where it is. Returns ``({layer: change}, triggers,
    notes)``, one trigger a fact.
    """
    settings = settings or ContextSettings()
    sites, layers = Sites(model), sorted(layers)
    for layer in layers:
        sites.check(layer)
    parts: dict[int, list[tuple[Tensor, Tensor, int]]] = {layer: [] for layer in layers}
    triggers: list[Trigger] = []
    left = []
    with evaluating(model):
        for number, fact in enumerate(facts):
            trigger: Trigger = tuple(subject_variants(tokenizer, fact.subject))
            pairs = _collect(model, tokenizer, sites, [fact], layers, settings.hold_others, beside=True)
            start, climb = _norm_left(model, sites, pairs, layers[-1]), _Climb(model, sites, pairs)
            own: dict[int, LayerChange] = {}
            for layer in layers:
                with _acting(sites, own, trigger):
                    keys, missing = climb.at(layer)
                v_a = solve(keys, missing, moments, layer, settings)
                own[layer] = LayerChange(v_a.float(), missing.float(), torch.zeros(len(v_a), dtype=torch.long))
                parts[layer].append((own[layer].v_a, own[layer].v_b, number))
                advance(1)
            with _acting(sites, own, trigger):
                left.append(_norm_left(model, sites, pairs, layers[-1]) / max(start, 1e-30))
            triggers.append(trigger)
    changes = {
        layer: LayerChange(
            torch.cat([v_a for v_a, _, _ in found]),
            torch.cat([v_b for _, v_b, _ in found]),
            torch.cat([torch.full((len(v_a),), number) for v_a, _, number in found]),
        )
        for layer, found in parts.items()
    }
    return changes, triggers, {**asdict(settings), "layers": list(layers), "effect_left": left}


@contextmanager
def _acting(sites: Sites, changes: dict[int, LayerChange], trigger: Trigger) -> Iterator[None]:
    """Inside the block a conditional edit of these changes acts on the model."""
    if not changes:
        yield
        return
    gate = Gate(sites, [Edit(dict(changes), "conditional", triggers=(trigger,))])
    try:
        yield
    finally:
        gate.remove()
