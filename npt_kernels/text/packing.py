"""Sequences from documents: framing, packing without padding, and mixing several texts by weight."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["DOCUMENTS_PER_CALL", "Frame", "derived_seed", "mixed_order", "next_source", "pack"]

#: Documents per call of the tokenizer: enough for its threads, little in memory.
DOCUMENTS_PER_CALL = 64


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from several numbers or names: (1, 2) and (2, 1) and (12,) are unrelated, on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Frame:
    """Documents as ``(bos) tokens (eos)``: ``bos`` where the tokenizer itself puts one, ``eos`` where it has one.

    ``special_tokens``: special tokens that are spelled out in a text (``<|im_end|>`` of a chat template) are these tokens; else
    they are the characters that they are written with, and no document ends in its middle.
    """

    def __init__(self, tokenizer: Any, special_tokens: bool = False) -> None:
        bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
        probe = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        self.start = [bos] if bos is not None and probe and probe[0] == bos else []
        self.end = [eos] if eos is not None else []

    def encode(self, texts: Sequence[str], ends: Sequence[tuple[bool, bool]] | None = None) -> list[Tensor]:
        """One int64 tensor a text. ``ends``: whether a text is the start and the end of its document; default: both."""
        found = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=not self.special_tokens,
        )
        whole = ends or [(True, True)] * len(texts)
        return [
            torch.tensor([*(self.start if first else ()), *ids, *(self.end if last else ())], dtype=torch.int64)
            for ids, (first, last) in zip(found["input_ids"], whole, strict=True)
        ]


def pack(
    documents: Iterable[str], tokenizer: Any, length: int, max_blocks: int | None, special_tokens: bool = False
) -> Tensor:
    """Blocks ``[n, length]``, int64: framed documents one after the other, without padding.

    ``special_tokens`` as for :class:`Frame`.

    Reading stops once ``max_blocks`` are full; what does not fill a block at the very end is dropped.
    """
    frame = Frame(tokenizer, special_tokens)
    limit = None if max_blocks is None else max_blocks * length
    pieces: list[Tensor] = []
    total = 0
    remaining = (document for document in documents if document.strip())
    while batch := list(itertools.islice(remaining, DOCUMENTS_PER_CALL)):
        pieces += frame.encode(batch)
        total = total + sum(len(piece) for piece in pieces[-len(batch) :])
        if limit is not None and total >= limit:
            break
    stream = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
    blocks = len(stream) // length
    blocks = blocks if max_blocks is None else min(blocks, max_blocks)
    return stream[: blocks * length].view(blocks, length)


def next_source(counts: Sequence[int], weights: Sequence[float]) -> int:
    """Which text gives the next sequence: the one that is furthest behind its weight; the first of equals.

    Webster's method of apportionment: no chance is involved, and the shares hold after any number of draws, to a sequence for
    two texts and to a few for many.
    """
    return min(range(len(counts)), key=lambda i: ((counts[i] + 0.5) / weights[i], i))


def mixed_order(lengths: Sequence[int], weights: Sequence[float], limit: int | None) -> list[tuple[int, int]]:
    """``(text, sequence)`` in the order of the mixture for texts of ``lengths`` ≥ 1 sequences.

    A text that ends starts over; the pass ends when every text has been read once, or after ``limit`` sequences.
    """
    counts = [0] * len(lengths)
    order: list[tuple[int, int]] = []
    while any(c < n for c, n in zip(counts, lengths, strict=True)) and (limit is None or len(order) < limit):
        chosen = next_source(counts, weights)
        order.append((chosen, counts[chosen] % lengths[chosen]))
        counts[chosen] += 1
    return order
