"""Texts and a tokenizer for the tests of this folder."""

from __future__ import annotations

from typing import Any


class Words:
    """A tokenizer of whitespace-separated words, with the parts of the transformers interface that packing uses."""

    def __init__(self, bos: int | None = None, eos: int | None = 1, adds_bos: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self._adds_bos = bos, eos, adds_bos
        self.words: dict[str, int] = {}

    def _ids(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words) + 10) for word in text.split()]

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self._ids(t) for t in text]}
        start = [self.bos_token_id] if add_special_tokens and self._adds_bos else []
        return {"input_ids": start + self._ids(text)}


class Numbers(Words):
    """Words that end in their token: "a12" is 12. Unlike :class:`Words` it does not depend on what it saw before."""

    def _ids(self, text: str) -> list[int]:
        return [int(word.lstrip("abcdefghijklmnopqrstuvwxyz")) for word in text.split()]

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, str):
            start = [self.bos_token_id] if add_special_tokens and self._adds_bos else []
            return {"input_ids": [*start, 0]}
        return super().__call__(text)


def numbered(prefix: str, count: int, per_line: int = 7, first: int = 0) -> str:
    words = [f"{prefix}{i}" for i in range(first, first + count)]
    return "\n".join(" ".join(words[i : i + per_line]) for i in range(0, count, per_line)) + "\n"
