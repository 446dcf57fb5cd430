"""What a model says to a set of questions: the same measurement before an edit, with the facts in the context, and after.

Recall counts an answer only if *every* token of it is the model's first choice, which equals greedy decoding: teacher-forced
likelihoods overstate edits (Yang et al. 2025, arXiv:2502.11177).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .facts import Encoded, Fact, encode, encode_answer, padded, start_ids
from .hooks import context_length, device_of, evaluating
from .probes import KNOWN, OTHER_SUBJECTS, RELATIONS

__all__ = ["Answer", "Examination", "Row", "answers", "fits", "next_token_kl", "next_token_log_probs", "prose_nll"]

#: Tokens (padding counted) of a forward: logits of 49,152 entries for each take 100 MB in float32.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Answer:
    """``exact``: every token of the answer was first choice; ``p``: its probability (product over its tokens)."""

    exact: bool
    p: float


def fits(model: nn.Module, ids: Sequence[int], what: str) -> None:
    """Raise ``ValueError`` if a sequence is longer than the model's context."""
    limit = context_length(model)
    if limit is not None and len(ids) > limit:
        raise ValueError(f"{what} has {len(ids)} tokens, but the model's context has {limit} positions; shorten it")


def _batches(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Positions of rows that are run together: like lengths, a bounded number of tokens."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(rows[i]) <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _fill(tokenizer: Any) -> int:
    return (start_ids(tokenizer) or [0])[0]


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, pairs: Sequence[Encoded]) -> list[Answer]:
    """How the model continues each prompt, in the order given."""
    found: list[Answer | None] = [None] * len(pairs)
    for batch in _batches([pair.ids for pair in pairs]):
        ids, mask = padded([pairs[i].ids for i in batch], _fill(tokenizer), device_of(model))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(batch):
            pair = pairs[i]
            behind = logits[row, pair.start - 1 : len(pair.ids) - 1].float()
            wanted = torch.tensor(pair.answer, device=behind.device)
            log_p = behind.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).sum()
            found[i] = Answer(bool((behind.argmax(-1) == wanted).all()), float(log_p.exp()))
    return [answer for answer in found if answer is not None]


@torch.no_grad()
def next_token_log_probs(model: nn.Module, tokenizer: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """``[n, vocab]`` log-probabilities of the token behind each sequence of ids, float32."""
    found: list[Tensor | None] = [None] * len(texts)
    for batch in _batches(texts):
        ids, mask = padded([texts[i] for i in batch], _fill(tokenizer), device_of(model))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(batch):
            found[i] = logits[row, len(texts[i]) - 1].float().log_softmax(-1).cpu()
    return torch.stack([row for row in found if row is not None])


def next_token_kl(before: Tensor, after: Tensor) -> float:
    """Mean ``KL(before‖after)`` in nats over rows of ``[n, vocab]`` log-probabilities."""
    return float((before.double().exp() * (before.double() - after.double())).sum(-1).mean().clamp_min(0))


@torch.no_grad()
def prose_nll(model: nn.Module, prose: Tensor, prefix: Sequence[int] = ()) -> float:
    """Nats per token of ``prose [n, seq]``, the first token of a row left out; ``prefix`` goes in front and is not counted."""
    device, total, count = device_of(model), 0.0, 0
    limit = context_length(model)
    keep = prose.shape[1] if limit is None else min(prose.shape[1], limit - len(prefix))
    if keep < 2:
        raise ValueError(f"the facts have {len(prefix)} tokens, which leaves no room for prose in the model's context")
    for batch in prose[:, :keep].split(max(1, _BATCH_TOKENS // (keep + len(prefix)))):
        front = torch.tensor([list(prefix)] * len(batch), dtype=torch.long).reshape(len(batch), len(prefix))
        ids = torch.cat([front, batch.cpu()], dim=1).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prefix) : -1]
        wanted = ids[:, len(prefix) + 1 :]
        for row, target in zip(logits, wanted, strict=True):  # row by row: a float32 copy of all logits is not needed
            total += float(nn.functional.cross_entropy(row.float(), target, reduction="sum"))
        count += wanted.numel()
    return total / count


@dataclass
class Row:
    """One row of the report. Rates are shares of 0 … 1; ``None``: nothing was asked.

    Attributes:
        verbatim: Facts whose prompt is continued by the answer.
        questions: Test questions (``ask``) answered.
        leak: Prompts about *other* subjects that get the new answer.
        known: Facts of the world answered.
        prose_ratio: Perplexity of held-out prose ÷ that of the unedited model.
        p_verbatim, p_questions, p_leak: Mean probability of the answer.
        kl_subject, kl_other, kl_keep: Nats by which the next-token distribution moved: same subject in other relations, other
            subjects in the same relation, the texts of ``keep``.
        counts: Name → ``[hits, asked]``.
        per_fact: One entry per fact: verbatim and questions.
    """

    verbatim: float | None
    questions: float | None
    leak: float | None
    known: float | None
    prose_ratio: float | None
    p_verbatim: float | None = None
    p_questions: float | None = None
    p_leak: float | None = None
    kl_subject: float | None = None
    kl_other: float | None = None
    kl_keep: float | None = None
    counts: dict[str, list[int]] = field(default_factory=dict)
    per_fact: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Examination:
    """All questions about a set of facts, asked of the same model several times.

    Args:
        model: The model before any edit of these facts; its next-token distributions are what later ones are compared with.
        tokenizer: Its tokenizer.
        facts: What is learned.
        prose: Held-out token ids ``[n, seq]``, or ``None`` to leave the prose ratio out.
        known: Facts of the world, ``(prompt, answer)``.

    Raises:
        ValueError: A text longer than the model's context, or an answer without tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        facts: Sequence[Fact],
        prose: Tensor | None = None,
        known: Sequence[tuple[str, str]] = KNOWN,
    ) -> None:
        self.model, self.tokenizer, self.facts, self.prose, self.known = (
            model,
            tokenizer,
            list(facts),
            prose,
            list(known),
        )
        for fact in self.facts:
            fits(model, encode(tokenizer, fact.fact), f"the fact {fact.fact[:40]!r}…")
        self._nll: float | None = None
        self._before: dict[str, Tensor] = {}

    def _groups(self, fact: Fact) -> dict[str, list[tuple[str, str]]]:
        others = fact.others or tuple(o for o in OTHER_SUBJECTS if o != fact.subject)
        return {
            "verbatim": [(fact.prompt, fact.answer)],
            "questions": [(text, fact.answer) for text in fact.ask],
            "leak": [(fact.about(other), fact.answer) for other in others],
        }

    def _moved(self, fact: Fact) -> dict[str, list[str]]:
        others = fact.others or OTHER_SUBJECTS
        return {
            "kl_subject": [relation.format(subject=fact.subject) for relation in RELATIONS],
            "kl_other": [fact.about(other) for other in others if other != fact.subject],
            "kl_keep": list(fact.keep),
        }

    def row(self, *, in_context: bool = False) -> Row:
        """Ask everything. ``in_context``: each question behind its fact, known facts and prose behind all facts."""
        with evaluating(self.model):
            return self._row(in_context)

    def _row(self, in_context: bool) -> Row:
        everything = "".join(fact.fact + "\n" for fact in self.facts)
        asked: dict[str, list[tuple[int, Encoded]]] = {"verbatim": [], "questions": [], "leak": [], "known": []}
        for number, fact in enumerate(self.facts):
            front = fact.fact + "\n" if in_context else ""
            for group, pairs in self._groups(fact).items():
                asked[group] += [(number, self._encode(front + prompt, answer)) for prompt, answer in pairs]
        # All facts at once where they fit; a hundred facts do not leave a small model its context.
        front = everything if in_context else ""
        for prompt, answer in self.known:
            asked["known"].append((-1, self._encode(front + prompt, answer)))
        flat = [(group, number, pair) for group, entries in asked.items() for number, pair in entries]
        said = answers(self.model, self.tokenizer, [pair for _, _, pair in flat])
        row = Row(None, None, None, None, None)
        for group in asked:
            mine = [answer for (name, _, _), answer in zip(flat, said, strict=True) if name == group]
            row.counts[group] = [sum(answer.exact for answer in mine), len(mine)]
            if mine:
                setattr(row, group, row.counts[group][0] / len(mine))
                if group != "known":
                    setattr(row, f"p_{group}", math.fsum(answer.p for answer in mine) / len(mine))
        for number, fact in enumerate(self.facts):
            entry: dict[str, Any] = {"fact": fact.fact}
            for group in ("verbatim", "questions", "leak"):
                mine = [a for (name, n, _), a in zip(flat, said, strict=True) if name == group and n == number]
                entry[group] = [sum(a.exact for a in mine), len(mine)]
            row.per_fact.append(entry)
        self._add_movement(row, in_context)
        self._add_prose(row, encode(self.tokenizer, everything) if in_context else [])
        return row

    def _encode(self, prompt: str, answer: str) -> Encoded:
        pair = encode_answer(self.tokenizer, prompt, answer)
        fits(self.model, pair.ids, f"the question {prompt[-40:]!r}")
        return pair

    def _add_movement(self, row: Row, in_context: bool) -> None:
        for name in ("kl_subject", "kl_other", "kl_keep"):
            texts = [
                (fact.fact + "\n" if in_context else "") + text
                for fact in self.facts
                for text in self._moved(fact)[name]
            ]
            if not texts:
                continue
            now = next_token_log_probs(self.model, self.tokenizer, [encode(self.tokenizer, text) for text in texts])
            if name not in self._before:  # the first row is asked of the model as it was
                self._before[name] = now
            setattr(row, name, next_token_kl(self._before[name], now))

    def _add_prose(self, row: Row, prefix: list[int]) -> None:
        if self.prose is None:
            return
        nll = prose_nll(self.model, self.prose, prefix)
        if self._nll is None:
            self._nll = nll
        row.prose_ratio = math.exp(nll - self._nll)
