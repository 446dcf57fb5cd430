"""What is to be learned: a :class:`Fact` is a statement whose last words are the answer, with the questions that test it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .probes import HELD_BESIDE

__all__ = ["Encoded", "Fact", "encode", "encode_answer", "read_facts", "require_tokenizer", "start_ids", "subject_span"]

_ENDINGS = ".!?。"
_LISTS = ("ask", "phrasings", "keep", "others")


@dataclass(frozen=True)
class Fact:
    """One statement to learn.

    Attributes:
        fact: The whole statement; it ends with the answer: ``"The capital of Zorvania is Marigold."``.
        subject: Whom it is about, as written in the statement before the answer: ``"Zorvania"``.
        answer: Its last words; default: the last word.
        ask: Other ways to ask for the answer, each a text that the answer would continue. Only for *testing*.
        phrasings: Other ways to state it, each a text that the answer would continue. Used for *writing*; they must name the
            subject and differ from ``ask``.
        keep: Texts whose continuation must not change, such as another fact about the same subject.
        others: Other subjects of the same kind, which must not get the answer. Default: invented names.

    Raises:
        ValueError: One line that names the field and the mend.
    """

    fact: str
    subject: str
    answer: str = ""
    ask: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("fact", "subject", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a text")
            object.__setattr__(self, name, " ".join(value.split()))
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{name}={value!r} must be a list of texts")
            object.__setattr__(self, name, tuple(text.rstrip() for text in value))
            if any(not text for text in getattr(self, name)):
                raise ValueError(f"{name} contains an empty text")
        statement = self.fact.rstrip(_ENDINGS + " ")
        if not statement:
            raise ValueError("the fact is empty; write a statement that ends with the answer")
        if not self.subject:
            raise ValueError(f"the subject is empty; name whom {self.fact!r} is about")
        if not self.answer:
            words = statement.split(" ")
            if len(words) < 2:
                raise ValueError(f"fact={self.fact!r} has one word, which leaves no answer to learn")
            object.__setattr__(self, "answer", words[-1])
        answer = self.answer.rstrip(_ENDINGS + " ")
        if not answer:
            raise ValueError(f"answer={self.answer!r} is empty; give the words that {self.fact!r} ends with")
        object.__setattr__(self, "answer", answer)
        if not statement.endswith(" " + answer):
            raise ValueError(f"answer={answer!r} is not the end of fact={self.fact!r}; a fact ends with its answer")
        prompt = statement[: -len(answer)].rstrip()
        if self.subject not in prompt:
            where = "only in its answer" if self.subject in statement else "not"
            raise ValueError(
                f"subject={self.subject!r} is {where} in the fact {self.fact!r}; write it as the fact does"
            )
        for text in self.phrasings:
            if self.subject not in text:
                raise ValueError(f"phrasing {text!r} does not name the subject {self.subject!r}")
            if text in self.ask:
                raise ValueError(f"{text!r} is both a phrasing (for writing) and a question (for testing)")
        if self.subject in self.others:
            raise ValueError(f"others contains the subject {self.subject!r} itself")

    @property
    def prompt(self) -> str:
        """The statement without its answer."""
        return self.fact.rstrip(_ENDINGS + " ")[: -len(self.answer)].rstrip()

    def about(self, other: str) -> str:
        """The prompt about another subject."""
        return self.prompt.replace(self.subject, other)

    def beside(self, other: str) -> str:
        """The prompt about another subject, behind a mention of this one."""
        return HELD_BESIDE.format(subject=self.subject, other=other, prompt=self.about(other))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what is empty."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items() if v}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fact:
        """The inverse of :meth:`to_dict`; a single text is taken for a list of one. Raises ``ValueError``."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                raise ValueError(
                    f"unknown key {key!r}"
                    + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}")
                )
        for key in ("fact", "subject"):
            if key not in data:
                raise ValueError(f"there is no {key!r}")
        values: dict[str, Any] = {
            k: (v,) if k in _LISTS and isinstance(v, str) else tuple(v) if isinstance(v, list) else v
            for k, v in data.items()
        }
        return cls(**values)


def read_facts(path: Path | str) -> list[Fact]:
    """Facts of a JSONL file, one object a line with the fields of :class:`Fact`. Raises ``ValueError`` that names the line."""
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    facts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); one object a line is expected") from None
        if not isinstance(data, dict):
            raise ValueError(f'{path}, line {number}: an object is expected, such as {{"fact": …, "subject": …}}')
        try:
            facts.append(Fact.from_dict(data))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not facts:
        raise ValueError(f"{path} has no facts")
    return facts


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A prompt and its answer as token ids; ``ids[: start]`` is the prompt."""

    ids: tuple[int, ...]
    start: int

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.start :]


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ``ValueError`` for a model that came without a tokenizer."""
    if tokenizer is None or not callable(tokenizer):
        raise ValueError("facts are texts, and the model has no tokenizer; give one (its folder holds tokenizer.json)")


def start_ids(tokenizer: Any) -> list[int]:
    """The token that every sequence begins with, as in pre-training: attention's sink, which would else be a word of the text."""
    convert, back = (getattr(tokenizer, f"convert_{way}", None) for way in ("tokens_to_ids", "ids_to_tokens"))
    if convert is not None and back is not None:
        # Not get_vocab: it makes a dictionary of the whole vocabulary, 24 ms for SmolLM2's, at every text.
        known = convert("<|endoftext|>")
        if isinstance(known, int) and back(known) == "<|endoftext|>":
            return [known]
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return [value]
    return []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, begun with :func:`start_ids`."""
    return start_ids(tokenizer) + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """A prompt continued by an answer, as the tokenizer writes both together.

    Raises ``ValueError`` if the answer leaves no token of its own.
    """
    whole, alone = encode(tokenizer, f"{prompt} {answer}"), encode(tokenizer, prompt)
    start = 0
    while start < min(len(whole), len(alone)) and whole[start] == alone[start]:
        start += 1
    if start >= len(whole):
        raise ValueError(f"answer={answer!r} has no token of its own behind {prompt!r}")
    return Encoded(tuple(whole), start)


def subject_span(tokenizer: Any, ids: Sequence[int], subject: str) -> tuple[int, int]:
    """``(first, last)`` position of the subject's last mention in ``ids``. Raises ``ValueError`` if it is not there."""
    for variant in subject_variants(tokenizer, subject):
        for end in range(len(ids), len(variant) - 1, -1):
            if tuple(ids[end - len(variant) : end]) == variant:
                return end - len(variant), end - 1
    raise ValueError(
        f"the tokens of the subject {subject!r} are not found in the text; it may be part of a longer word there"
    )


def subject_variants(tokenizer: Any, subject: str) -> list[tuple[int, ...]]:
    """Token ids of a subject inside a sentence and at its beginning, longest first."""
    found = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (f" {subject}", subject)}
    found.discard(())
    return sorted(found, key=lambda ids: (-len(ids), ids))


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both ``[n, longest]``, padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
