"""Prompts and responses from .jsonl files: whole examples in every sequence, prompts and padding masked.

Which tokens do not count is part of the ids (:mod:`npt_kernels.masked_ids`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.schema import ConfigError, RunConfig
from .formats import file_kind, read_pieces
from .packing import Frame
from .sources import find_files

__all__ = ["Example", "check_prompts", "load_prompts", "pack_examples", "read_examples"]


@dataclass(frozen=True)
class Example:
    """One line of a file; ``where`` names it."""

    prompt: str
    response: str
    where: str


def read_examples(paths: Sequence[Path], config: RunConfig) -> list[Example]:
    """All examples, in order; lines whose prompt or response is ``null`` are left out.

    Raises:
        ConfigError: Not a .jsonl file, not JSON, a field that is missing or no text, an empty response, no example at all.
    """
    data, found = config.data, []
    assert data.prompt_field is not None and data.response_field is not None
    for path in paths:
        if file_kind(path) != "jsonl":
            raise ConfigError(f"{path}: prompts and responses are read from .jsonl files, one object a line")
        prompts, responses = (
            {place[1]: piece.text for piece, place in read_pieces(path, field, key)}
            for field, key in ((data.prompt_field, "data.prompt_field"), (data.response_field, "data.response_field"))
        )
        for line in sorted(prompts.keys() & responses.keys()):
            if not responses[line].strip():
                raise ConfigError(f"{path} line {line}: the response is empty, so there is nothing to learn from it")
            found.append(Example(prompts[line], responses[line], f"{path} line {line}"))
    if not found:
        raise ConfigError(f"{', '.join(map(str, paths))}: no line has a prompt and a response")
    return found


def pack_examples(examples: Sequence[Example], tokenizer: Any, config: RunConfig) -> Tensor:
    """Blocks ``[n, max_length]``: examples one after the other, none cut; the rest of a block is padding.

    Prompt and response are tokenised apart and joined as they are, so a space between them belongs to one of the two.

    Raises:
        ConfigError: An example longer than ``data.max_length``.
    """
    length, frame = config.data.max_length, Frame(tokenizer, config.data.special_tokens)
    fill = ~(frame.end[0] if frame.end else 0)
    blocks: list[list[int]] = []
    for example in examples:
        prompt, response = frame.encode([example.prompt, example.response], [(True, False), (False, True)])
        ids = [*(~prompt).tolist(), *response.tolist()]
        if len(ids) > length:
            raise ConfigError(
                f"{example.where} has {len(ids)} tokens, more than data.max_length={length}; raise it, or shorten the example"
            )
        if not blocks or len(blocks[-1]) + len(ids) > length:
            blocks.append([])
        blocks[-1] += ids
    rows = [block + [fill] * (length - len(block)) for block in blocks]
    return torch.tensor(rows, dtype=torch.int64).view(-1, length)


def load_prompts(config: RunConfig, tokenizer: Any) -> tuple[Tensor, Tensor, list[str]]:
    """``(training blocks, held-out blocks, notes)``; held out is the end of the text (``data.eval_fraction``) or ``eval_files``.

    Raises :class:`ConfigError` as :func:`read_examples` and :func:`pack_examples`, and if nothing is left for one of the two.
    """
    data = config.data
    paths = find_files(data.train_files, "data.train_files")
    examples = read_examples(paths, config)
    if data.eval_files:
        held_paths = find_files(data.eval_files, "data.eval_files")
        if both := set(paths) & set(held_paths):
            raise ConfigError(
                f"{min(both)} is in data.train_files and in data.eval_files; held-out text must be unseen"
            )
        train, heldout = examples, read_examples(held_paths, config)
    else:
        cut = len(examples) - max(1, math.ceil(len(examples) * data.eval_fraction))
        train, heldout = examples[:cut], examples[cut:]
    if not train:
        raise ConfigError(f"{paths[0]} has one example, which is held out; give more, or data.eval_files")
    packed = pack_examples(train, tokenizer, config), pack_examples(heldout, tokenizer, config)
    counted = sum(int((blocks >= 0).sum()) for blocks in packed[:1])
    notes = [
        f"{len(train):,} examples for training, {len(heldout):,} held out; {counted:,} tokens of responses count, prompts and "
        "padding do not"
    ]
    return (*packed, notes)


def check_prompts(config: RunConfig) -> None:
    """Whether the files can be read and have the fields. Raises :class:`ConfigError`."""
    read_examples(find_files(config.data.train_files, "data.train_files"), config)
