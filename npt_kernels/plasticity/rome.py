"""Rank-one model editing (Meng et al. 2022, arXiv:2202.05262) in this package's terms: a value for a whitened key, one layer.

Key: the input of the layer's last MLP matrix at the subject's last token, averaged over the contexts that the fact is stated in.
Value: a vector δ added to that matrix's output there, found by gradient so that the answer follows. Several facts are fitted one
after another on the model that the earlier ones have changed, and solved together: with keys ``K [n, in]`` and changes
``V [n, out]``

    ΔW = Vᵀ (K C⁻¹ Kᵀ)⁻¹ K C⁻¹        v_a = (K C⁻¹ Kᵀ)⁻¹ K C⁻¹,  v_b = V

so every key gets its own value exactly (``⟨v_a,i, k_j⟩ = [i = j]``), and all other inputs as little as possible in the mean
square.
For one fact this is ROME's ``v_a = C⁻¹k/(kᵀC⁻¹k)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .changes import LayerChange
from .facts import Fact, encode, encode_answer, padded, start_ids, subject_span
from .hooks import OutputHead, Sites, decoder_of, device_of, evaluating
from .moments import SecondMoments, Whitener
from .probes import PREFIXES
from .recall import fits

__all__ = ["RomeSettings", "default_layer", "dual_keys", "rome"]


@dataclass(frozen=True)
class RomeSettings:
    """How the value is found.

    Attributes:
        steps: Gradient steps at most.
        learning_rate: Of Adam on δ, in units of ``‖h‖/√d``: the first step has length ``learning_rate · ‖h‖``. Larger steps end
            in longer values, which hurt ordinary text (SmolLM2, layer 9: .5 gave ‖δ‖ of .8 to 2.7 ‖h‖, .085 gives .4 to 1.1).
        stop: Mean loss (nats per answer token) at which it stops.
        limit: ``‖δ‖ ≤ limit · ‖h‖``, h the residual stream at the subject.
        essence: Weight of KL on "{subject} is a", which keeps what the subject is.
        plain_keys: ``v_a = k/‖k‖²`` instead of whitened keys. For comparison only: it damages ordinary text.
        ridge: Share of the mean diagonal added to ``C``.
    """

    steps: int = 40
    learning_rate: float = 0.085
    stop: float = 0.05
    limit: float = 4.0
    essence: float = 0.0625
    plain_keys: bool = False
    ridge: float = 1e-3


def default_layer(num_layers: int) -> int:
    """The layer that is edited: three tenths up, where subjects are looked up (measured on SmolLM2: 9 of 30)."""
    return min(num_layers - 1, round(0.3 * num_layers))


@dataclass(frozen=True)
class _Texts:
    """The contexts of one fact as a padded batch."""

    ids: Tensor  # [n, seq]
    mask: Tensor
    subject: Tensor  # [n]: position of the subject's last token
    answer: Tensor  # [n, seq] bool: positions whose next token is part of the answer
    essence: int  # rows at the end that have no answer


def _texts(model: nn.Module, tokenizer: Any, fact: Fact) -> _Texts:
    prompts = [fact.prompt, *(f"{prefix} {fact.prompt}" for prefix in PREFIXES), *fact.phrasings]
    pairs = [encode_answer(tokenizer, prompt, fact.answer) for prompt in prompts]
    essence = encode(tokenizer, f"{fact.subject} is a")
    rows = [pair.ids for pair in pairs] + [tuple(essence)]
    for row in rows:
        fits(model, row, f"the fact {fact.fact[:40]!r} behind a prefix")
    ids, mask = padded(rows, (start_ids(tokenizer) or [0])[0], device_of(model))
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for i, pair in enumerate(pairs):
        answer[i, pair.start - 1 : len(pair.ids) - 1] = True
    # Before the answer, which may repeat the subject.
    ends = [pair.start for pair in pairs] + [len(essence)]
    subject = [subject_span(tokenizer, row[:end], fact.subject)[1] for row, end in zip(rows, ends, strict=True)]
    return _Texts(ids, mask, torch.tensor(subject, device=ids.device), answer, 1)


@dataclass(frozen=True)
class _Read:
    """What the model does with the texts: ``k [in]`` and ``‖h‖`` at the subject's last token, averaged over contexts, and
    the residual stream ``[n, seq, d]`` in front of the layer."""

    key: Tensor
    norm: float
    below: Tensor


@torch.no_grad()
def _read(model: nn.Module, sites: Sites, texts: _Texts, layer: int) -> _Read:
    read: dict[str, Tensor] = {}
    rows = torch.arange(len(texts.ids) - texts.essence, device=texts.ids.device)
    at = (rows, texts.subject[: len(rows)])
    with (
        sites.reading_inputs([layer], lambda _, k: read.__setitem__("k", k[at])),
        sites.reading_layer_outputs([layer], lambda _, h: read.__setitem__("h", h[at])),
        _reading_input(sites.layers[layer], lambda h: read.__setitem__("below", h)),
    ):
        decoder_of(model)(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False)
    return _Read(read["k"].double().mean(0), float(read["h"].float().norm(dim=-1).mean()), read["below"])


@contextmanager
def _reading_input(module: nn.Module, read: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        read(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _fit_value(
    head: OutputHead, sites: Sites, texts: _Texts, layer: int, seen: _Read, settings: RomeSettings
) -> tuple[Tensor, dict[str, float]]:
    """``(δ [out] float64, notes)``. Layers below are not run again, and logits are made where they are read."""
    norm, width = seen.norm, sites.size(layer)[1]
    delta = torch.zeros(width, device=texts.ids.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate * norm / width**0.5)
    rows = torch.arange(len(texts.ids), device=texts.ids.device)
    wanted = texts.ids[:, 1:][texts.answer[:, :-1]].unsqueeze(-1)
    read = texts.answer.clone()
    read[-1, texts.subject[-1] + 2] = True  # the essence, in the last row
    reference: Tensor | None = None

    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[rows, texts.subject] += delta.to(y.dtype)
        return y

    loss_value, step = float("inf"), 0
    with sites.starting_at(layer, seen.below), sites.changing_output(layer, change):
        for step in range(settings.steps + 1):
            states = head.states(texts.ids, attention_mask=texts.mask)
            log_p = head.logits(states[read]).float().log_softmax(-1)
            loss, essence = -log_p[:-1].gather(-1, wanted).mean(), log_p[-1]
            if reference is None:
                reference = essence.detach()
            loss_value = float(loss.detach())
            if loss_value < settings.stop or step == settings.steps:
                break
            total = loss + settings.essence * (reference.exp() * (reference - essence)).sum()
            (delta.grad,) = torch.autograd.grad(total, [delta])
            optimizer.step()
            with torch.no_grad():
                delta *= (settings.limit * norm / delta.norm().clamp_min(1e-12)).clamp_max(1.0)
    if not bool(delta.isfinite().all()):
        raise ValueError("the value did not stay finite; lower the learning rate")
    return delta.detach().double(), {"loss": loss_value, "steps": step, "size": float(delta.detach().norm()) / norm}


def dual_keys(keys: Tensor, whitener: Whitener | None, tie: float = 1e-4) -> Tensor:
    """``(K C⁻¹ Kᵀ)⁻¹ K C⁻¹ [n, in]`` for keys ``K [n, in]``; ``whitener=None``: C = I.

    ``tie``: share of the mean diagonal added before the inversion; two facts about one subject have almost one key.
    """
    wide = keys.double()
    solved = wide if whitener is None else whitener.solve(wide)
    gram = solved @ wide.t()
    gram = (gram + gram.t()) / 2
    if len(gram) > 1:
        gram = gram + tie * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, solved)


@contextmanager
def _restored(weight: Tensor) -> Iterator[Tensor]:
    """The weight's present value; it is put back at the end, whatever happens."""
    before = weight.detach().clone()
    try:
        yield before
    finally:
        with torch.no_grad():
            weight.copy_(before)


def rome(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    moments: SecondMoments,
    layer: int,
    settings: RomeSettings | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[int, LayerChange], dict[str, Any]]:
    """The change that makes ``model`` state ``facts``; the model is as before when it returns.

    Args:
        model, tokenizer: The model to be edited.
        facts: What to learn, in order.
        moments: Of ``layer`` at least.
        layer: Which layer to edit.
        settings: How.
        advance: Called with 1 after every fact.

    Returns:
        ``({layer: change}, notes)``, notes with loss, steps and relative size of every fact's value.
    """
    settings = settings or RomeSettings()
    sites = Sites(model)
    sites.check(layer)
    whitener = None if settings.plain_keys else moments.whitener(layer, settings.ridge)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    notes: list[dict[str, float]] = []
    change: LayerChange | None = None
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model), _restored(sites.weight(layer)) as before:
            head = OutputHead(model)
            for fact in facts:
                texts = _texts(model, tokenizer, fact)
                seen = _read(model, sites, texts, layer)
                delta, note = _fit_value(head, sites, texts, layer, seen, settings)
                key, delta = seen.key.cpu(), delta.cpu()
                # In terms of the matrix before all of these facts: what they do at this key already is part of its value.
                if change is not None:
                    delta = delta + (change.v_a.double() @ key) @ change.v_b.double()
                keys.append(key)
                values.append(delta)
                notes.append(note)
                v_a = dual_keys(torch.stack(keys), whitener)
                change = LayerChange(v_a.float(), torch.stack(values).float(), torch.arange(len(keys)))
                with torch.no_grad():
                    sites.weight(layer).copy_(change.added_to(before))
                advance(1)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    assert change is not None, "no facts"
    return {layer: change}, {**asdict(settings), "layer": layer, "values": notes}
