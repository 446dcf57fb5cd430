"""Text to blocks of token ids: the demo's books, local files, hub datasets; held-out text never overlaps the training text.

A *source* is an ordered list of documents (a book, the lines of a JSONL file, the rows of a dataset). Its held-out part is its
end; what is before it is for training. Documents are joined with the tokenizer's end-of-text token and cut into blocks of
``max_length`` without padding; what is left over at the very end is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configs.schema import ConfigError, RunConfig
from .prose import demo_sources
from .sources import Source, check_hub_dataset, find_files, hub_sources, local_sources

__all__ = ["TokenBlocks", "check_sources", "load_token_blocks", "pack", "split_source"]

_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids, int64, on the CPU.

    Attributes:
        train: ``[n, max_length]``, shuffled by ``training.seed``.
        calibration: ``[m, max_length]``, taken evenly from the training part, ``data.calibration_tokens`` in all.
        heldout: ``[k, max_length]``, ``evaluation.tokens`` predicted positions if there are that many.
        sources: One line per source and per number that fell short, for the log.
    """

    train: Tensor
    calibration: Tensor
    heldout: Tensor
    sources: list[str]


def load_token_blocks(config: RunConfig, tokenizer: Any) -> TokenBlocks:
    """Read, split, tokenise and pack the text of a run. The same configuration gives the same blocks.

    Args:
        config: Sections ``data``, ``evaluation``, ``training`` (seed) and ``paths`` (cache).
        tokenizer: A ``transformers`` tokenizer.

    Raises:
        ConfigError: No source named, a file or column that is missing (those that exist are listed), no network for a hub
            dataset, or too little text for one block.
        AssetError: The demo text could not be fetched.
    """
    length = config.data.max_length
    train_sources, heldout_sources = _split(_open_sources(config), config)
    calibration_blocks = math.ceil(config.data.calibration_tokens / length)
    heldout_wanted = math.ceil(config.evaluation.tokens / (length - 1))
    if config.data.num_eval_samples is not None:
        heldout_wanted = min(heldout_wanted, config.data.num_eval_samples)
    train_wanted = config.data.num_train_samples
    train = pack(
        _documents(train_sources), tokenizer, length, _blocks_to_read(config, train_sources, calibration_blocks)
    )
    if not len(train):
        raise ConfigError(
            f"the training text ({_names(train_sources)}) is shorter than one sequence of data.max_length={length} tokens; "
            "give more text or a smaller data.max_length"
        )
    streamed = any(source.streamed for source in heldout_sources)
    heldout = pack(_documents(heldout_sources), tokenizer, length, 4 * heldout_wanted if streamed else None)
    if not len(heldout):
        raise ConfigError(
            f"the held-out text ({_names(heldout_sources)}) is shorter than one sequence of data.max_length={length} tokens; "
            f"raise data.eval_fraction={config.data.eval_fraction}, give data.eval_files, or lower data.max_length"
        )
    calibration = train[_spread(len(train), calibration_blocks)]
    generator = torch.Generator().manual_seed(config.training.seed)
    order = torch.randperm(len(train), generator=generator)
    shuffled = train[order[:train_wanted] if train_wanted is not None else order]
    chosen = heldout[_spread(len(heldout), heldout_wanted)]
    notes = [f"{source.name}: {source.origin}" for source in train_sources]
    notes += [f"{source.name}: {source.origin}" for source in heldout_sources if source.separate]
    notes.append(
        f"{shuffled.numel():,} tokens for training, {calibration.numel():,} of the training text for calibration, "
        f"{chosen.numel():,} held out, in sequences of {length}"
    )
    notes += _shortfalls(config, len(shuffled), calibration.numel(), len(chosen), len(heldout), heldout_wanted)
    return TokenBlocks(shuffled, calibration, chosen, notes)


def _blocks_to_read(config: RunConfig, sources: list[Source], calibration_blocks: int) -> int | None:
    """Hub datasets can be far larger than a run needs: read what it uses. Local text is read whole, so that a short run sees
    all of it."""
    if not any(source.streamed for source in sources):
        return None
    limits = [config.data.num_train_samples]
    if config.training.max_steps is not None:
        limits.append(
            config.training.max_steps * config.training.batch_size * config.training.gradient_accumulation_steps
        )
    known = [limit for limit in limits if limit is not None]
    return max(min(known), calibration_blocks) if known else None


def _shortfalls(
    config: RunConfig, train: int, calibration: int, chosen: int, available: int, heldout_wanted: int
) -> list[str]:
    length, notes = config.data.max_length, []
    if available < heldout_wanted:
        notes.append(
            f"held-out text has {available * (length - 1):,} predicted tokens, evaluation.tokens={config.evaluation.tokens:,} "
            "were wanted: all of them are used"
        )
    elif chosen * (length - 1) < config.evaluation.tokens:
        notes.append(
            f"data.num_eval_samples={config.data.num_eval_samples} limits the evaluation to {chosen * (length - 1):,} tokens "
            f"(evaluation.tokens={config.evaluation.tokens:,})"
        )
    if calibration < config.data.calibration_tokens:
        notes.append(
            f"the training text has {calibration:,} tokens, data.calibration_tokens={config.data.calibration_tokens:,} were "
            "wanted: all of it is used"
        )
    wanted = config.data.num_train_samples
    if wanted is not None and train < wanted:
        notes.append(
            f"the training text has {train:,} sequences, data.num_train_samples={wanted:,} were wanted: all are used"
        )
    return notes


# ---- sources ---------------------------------------------------------------------------------------------------------


def check_sources(config: RunConfig) -> None:
    """What can be known to fail before a model is loaded: no text named, a file that is not there, a hub out of reach.

    Raises :class:`ConfigError`.
    """
    data = config.data
    if data.train_files:
        find_files(data.train_files, "data.train_files")
    elif data.dataset_name is None:
        raise ConfigError(_NO_TEXT)
    elif data.dataset_name != "demo":
        check_hub_dataset(config)
    find_files(data.eval_files, "data.eval_files")


_NO_TEXT = "no training text is named; set data.train_files=[book.txt], or data.dataset_name to a hub dataset or demo"


def _open_sources(config: RunConfig) -> list[Source]:
    data = config.data
    if data.train_files:
        return local_sources(data.train_files, data.text_field, "data.train_files")
    if data.dataset_name == "demo":
        return demo_sources(config)
    if data.dataset_name:
        return hub_sources(config)
    raise ConfigError(_NO_TEXT)


def _split(sources: list[Source], config: RunConfig) -> tuple[list[Source], list[Source]]:
    """``(training, held-out)``."""
    data = config.data
    if data.eval_files:
        heldout = local_sources(data.eval_files, data.text_field, "data.eval_files", separate=True)
        paths = {source.path for source in sources if source.path is not None}
        for source in heldout:
            if source.path in paths:
                raise ConfigError(
                    f"{source.path} is in data.train_files and in data.eval_files; held-out text must be unseen"
                )
        return [source for source in sources if not source.separate], heldout
    given = [source for source in sources if source.separate]
    if given:
        return [source for source in sources if not source.separate], given
    pairs = [split_source(source, data.eval_fraction) for source in sources]
    return [train for train, _ in pairs], [heldout for _, heldout in pairs]


def split_source(source: Source, fraction: float) -> tuple[Source, Source]:
    """Cut off the last ``fraction`` of a source, by characters: whole documents, and the one at the cut at a line or word."""
    documents = list(source.documents)
    total = sum(len(document) for document in documents)
    target, seen = total * (1 - fraction), 0
    for index, document in enumerate(documents):
        if seen + len(document) >= target:
            cut = _boundary(document, round(target - seen))
            head, tail = document[:cut], document[cut:]
            before = [*documents[:index], *([head] if head.strip() else [])]
            after = [*([tail] if tail.strip() else []), *documents[index + 1 :]]
            return source.with_documents(before), source.with_documents(after)
        seen += len(document)
    return source, source.with_documents([])


def _boundary(text: str, position: int) -> int:
    """The first end of a paragraph, line or word at or after ``position``; within 2,000 characters, else exactly there."""
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, position, position + 2000)
        if found >= 0:
            return found + len(mark)
    return position


def _documents(sources: Iterable[Source]) -> Iterator[str]:
    return itertools.chain.from_iterable(source.documents for source in sources)


def _names(sources: list[Source]) -> str:
    names = [source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(documents: Iterable[str], tokenizer: Any, length: int, max_blocks: int | None) -> Tensor:
    """Blocks ``[n, length]``, int64: documents as ``(bos) tokens (eos)``, one after the other, without padding.

    ``bos`` is put where the tokenizer itself puts one, ``eos`` where it has one. Reading stops once ``max_blocks`` are full.
    """
    start, end = _frame(tokenizer)
    limit = None if max_blocks is None else max_blocks * length
    pieces: list[Tensor] = []
    total = 0
    remaining = (document for document in documents if document.strip())
    while batch := list(itertools.islice(remaining, _DOCUMENTS_PER_CALL)):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor([*start, *ids, *end], dtype=torch.int64))
            total += len(pieces[-1])
        if limit is not None and total >= limit:
            break
    stream = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
    blocks = len(stream) // length
    blocks = blocks if max_blocks is None else min(blocks, max_blocks)
    return stream[: blocks * length].view(blocks, length)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What goes before and after a document."""
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    probe = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [bos] if bos is not None and probe and probe[0] == bos else [], [eos] if eos is not None else []


def _spread(available: int, wanted: int) -> Tensor:
    """``min(available, wanted)`` indices, evenly over ``0 … available - 1``: every source gives its share."""
    count = min(available, wanted)
    return torch.arange(count) * available // count
