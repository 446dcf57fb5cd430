"""Text to blocks of token ids: the demo's books, local files, hub datasets; held-out text never overlaps the training text.

A *source* is an ordered list of documents (a book, the lines of a JSONL file, the rows of a dataset). Its held-out part is its
end (where it is streamed, its head); the rest is for training. Documents are joined with the tokenizer's end-of-text token and
cut into blocks of ``max_length`` without padding; what is left over at the very end is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configs.schema import ConfigError, RunConfig
from ..masked_ids import plain_ids
from .demo_text import demo_sources
from .hub import check_hub_dataset, hub_sources
from .packing import derived_seed, mixed_order, next_source, pack
from .prompts import check_prompts, load_prompts
from .readers import check_files
from .sources import Source, TextEntry, find_files, local_sources, text_entries
from .streaming import PackedStream, open_stream

__all__ = ["TokenBlocks", "check_sources", "document_separator", "load_token_blocks", "split_source"]

#: A mixture that repeats its small texts until it fills more bytes than this is asked for a number of sequences.
_MIXTURE_BYTES = 2**32


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids, int64, on the CPU.

    Attributes:
        train: ``[n, max_length]``, shuffled by ``training.seed``; with ``data.streaming`` a stream of ``[max_length]``; with
            ``data.prompt_field`` prompts are masked (:mod:`npt_kernels.masked_ids`), here and in ``heldout``.
        calibration: ``[m, max_length]``, ``data.calibration_tokens`` in all, taken evenly from the training part, or from
            what comes before the stream.
        heldout: ``[k, max_length]``, ``evaluation.tokens`` predicted positions if there are that many.
        sources: One line per source and per number that fell short, for the log.
    """

    train: Tensor | PackedStream
    calibration: Tensor
    heldout: Tensor
    sources: list[str]


def load_token_blocks(config: RunConfig, tokenizer: Any) -> TokenBlocks:
    """Read, split, tokenise and pack the text of a run. The same configuration gives the same blocks.

    Several ``data.sources`` are packed apart, so no sequence holds text of two, and mixed by weight.

    Args:
        config: Sections ``data``, ``evaluation``, ``training`` (seed) and ``paths`` (cache).
        tokenizer: A ``transformers`` tokenizer.

    Raises:
        ConfigError: No source named, a file or column that is missing (those that exist are listed), no network for a hub
            dataset, or too little text for one block.
        AssetError: The demo text could not be fetched.
    """
    entries = text_entries(config)
    document_separator(config, tokenizer)
    if config.data.prompt_field is not None:
        return _prompt_blocks(config, tokenizer)
    if config.data.streaming:
        return _stream_blocks(config, entries, tokenizer)
    _check_unseen(config, entries)
    shared, total = _eval_sources(config), sum(entry.weight for entry in entries)
    texts = [
        _read_entry(entry, config, tokenizer, entry.weight / total, shared=shared is not None) for entry in entries
    ]
    heldout_wanted = _heldout_wanted(config)
    train = _mixture(texts, config)
    heldout = _shares(
        [text.heldout for text in texts] if shared is None else [_eval_blocks(config, shared, tokenizer)],
        [entry.weight for entry in entries] if shared is None else [1.0],
        heldout_wanted,
    )
    calibration = train[_scattered(len(train), math.ceil(config.data.calibration_tokens / config.data.max_length))]
    generator = torch.Generator().manual_seed(config.training.seed)
    train_wanted = config.data.num_train_samples
    shuffled = train[torch.randperm(len(train), generator=generator)[:train_wanted]]
    notes = [note for text in texts for note in text.notes]
    notes += [f"{source.name}: {source.origin}" for source in shared or []] + _no_end(tokenizer)
    if len(texts) > 1:
        notes += _mixture_notes(texts, len(train))
    notes.append(
        f"{shuffled.numel():,} tokens for training, {calibration.numel():,} of the training text for calibration, "
        f"{heldout.numel():,} held out, in sequences of {config.data.max_length}"
    )
    notes += _shortfalls(config, len(shuffled), calibration.numel(), len(heldout), heldout_wanted)
    return TokenBlocks(shuffled, calibration, heldout, notes)


def _prompt_blocks(config: RunConfig, tokenizer: Any) -> TokenBlocks:
    train, heldout, notes = load_prompts(config, tokenizer)
    wanted = math.ceil(config.data.calibration_tokens / config.data.max_length)
    calibration = plain_ids(train[_scattered(len(train), wanted)])
    generator = torch.Generator().manual_seed(config.training.seed)
    shuffled = train[torch.randperm(len(train), generator=generator)[: config.data.num_train_samples]]
    return TokenBlocks(shuffled, calibration, heldout[: config.data.num_eval_samples], notes + _no_end(tokenizer))


def _stream_blocks(config: RunConfig, entries: Sequence[TextEntry], tokenizer: Any) -> TokenBlocks:
    shared, wanted = _eval_sources(config), _heldout_wanted(config)
    _check_unseen(config, entries)
    calibration_wanted = math.ceil(config.data.calibration_tokens / config.data.max_length)
    head = open_stream(
        config, entries, tokenizer, heldout=0 if shared is not None else wanted, calibration=calibration_wanted
    )
    weights = [entry.weight for entry in entries]
    if shared is not None:
        heldout = _shares([_eval_blocks(config, shared, tokenizer)], [1.0], wanted)
    else:
        heldout = _shares(head.heldout, weights, wanted)
    if not len(heldout):
        raise ConfigError(_no_heldout(", ".join(entry.label for entry in entries), config))
    calibration = _shares(head.calibration, weights, calibration_wanted)
    notes = [*head.notes, *(f"{source.name}: {source.origin}" for source in shared or []), *_no_end(tokenizer)]
    where = "held out" if shared is not None else "held out, both from the head of the text and never trained on"
    notes.append(
        f"training text is read while training, in sequences of {config.data.max_length}, {config.data.shuffle_buffer:,} "
        f"shuffled together; {calibration.numel():,} tokens for calibration, {heldout.numel():,} {where}"
    )
    notes += _shortfalls(config, None, calibration.numel(), len(heldout), wanted)
    return TokenBlocks(head.stream, calibration, heldout, notes)


def _heldout_wanted(config: RunConfig) -> int:
    """Sequences: evaluation.tokens counts predicted positions, which the first token of a sequence is not."""
    wanted = math.ceil(config.evaluation.tokens / (config.data.max_length - 1))
    limit = config.data.num_eval_samples
    return wanted if limit is None else min(wanted, limit)


# ---- one text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """One entry of the configuration, read: ``[n, max_length]`` for training, ``[k, max_length]`` held out."""

    entry: TextEntry
    train: Tensor
    heldout: Tensor
    notes: list[str]


def _read_entry(entry: TextEntry, config: RunConfig, tokenizer: Any, share: float, *, shared: bool) -> _Text:
    """Read, split and pack. ``share`` of the training sequences; ``shared``: held-out text comes from data.eval_files."""
    length = config.data.max_length
    train_sources, heldout_sources = _split(_open_sources(entry, config), config, shared=shared)
    limit = _blocks_to_read(config, train_sources, share)
    train = pack(_documents(train_sources), tokenizer, length, limit, config.data.special_tokens)
    if not len(train):
        raise ConfigError(
            f"the training text ({_names(train_sources)}) is shorter than one sequence of data.max_length={length} tokens; "
            "give more text or a smaller data.max_length"
        )
    heldout = train[:0]
    if not shared:
        streamed = any(source.streamed for source in heldout_sources)
        limit = 4 * _heldout_wanted(config) if streamed else None
        heldout = pack(_documents(heldout_sources), tokenizer, length, limit, config.data.special_tokens)
        if not len(heldout):
            raise ConfigError(_no_heldout(_names(heldout_sources), config))
    notes = [f"{source.name}: {source.origin}" for source in train_sources]
    notes += [f"{source.name}: {source.origin}" for source in heldout_sources if source.separate]
    return _Text(entry, train, heldout, notes)


def _no_heldout(names: str, config: RunConfig) -> str:
    return (
        f"the held-out text ({names}) is shorter than one sequence of data.max_length={config.data.max_length} tokens; "
        f"raise data.eval_fraction={config.data.eval_fraction}, give data.eval_files, or lower data.max_length"
    )


def _blocks_to_read(config: RunConfig, sources: list[Source], share: float) -> int | None:
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
    calibration = math.ceil(config.data.calibration_tokens / config.data.max_length)
    return math.ceil(max(min(known), calibration) * share) if known else None


def _open_sources(entry: TextEntry, config: RunConfig) -> list[Source]:
    if entry.files:
        return local_sources(entry.files, entry.text_field, entry.files_key, field_key=entry.field_key)
    return demo_sources(config) if entry.dataset_name == "demo" else hub_sources(entry, config)


def _split(sources: list[Source], config: RunConfig, *, shared: bool) -> tuple[list[Source], list[Source]]:
    """``(training, held-out)``."""
    given = [source for source in sources if source.separate]
    train = [source for source in sources if not source.separate]
    if shared or given:
        return train, [] if shared else given
    pairs = [split_source(source, config.data.eval_fraction) for source in sources]
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


# ---- held-out files --------------------------------------------------------------------------------------------------


def _eval_sources(config: RunConfig) -> list[Source] | None:
    data = config.data
    return (
        local_sources(data.eval_files, data.text_field, "data.eval_files", separate=True) if data.eval_files else None
    )


def _eval_blocks(config: RunConfig, sources: list[Source], tokenizer: Any) -> Tensor:
    blocks = pack(_documents(sources), tokenizer, config.data.max_length, None, config.data.special_tokens)
    if not len(blocks):
        raise ConfigError(_no_heldout(_names(sources), config))
    return blocks


def _check_unseen(config: RunConfig, entries: Sequence[TextEntry]) -> None:
    """No text twice: it would be held out in one place and trained on in another."""
    seen: dict[Any, str] = {path: "data.eval_files" for path in find_files(config.data.eval_files, "data.eval_files")}
    for entry in entries:
        if entry.files:
            texts: list[Any] = list(find_files(entry.files, entry.files_key))
            key = entry.files_key
        else:
            texts = [f"{entry.dataset_name} ({entry.dataset_config or entry.dataset_split}, {entry.dataset_split})"]
            key = entry.key
        for text in texts:
            if text in seen:
                raise ConfigError(f"{text} is in {key} and in {seen[text]}; held-out text must be unseen, name it once")
            seen[text] = key


# ---- several texts ---------------------------------------------------------------------------------------------------


def _mixture(texts: list[_Text], config: RunConfig) -> Tensor:
    """``[n, max_length]``: one text as it is, several by weight, each shuffled, so that a limit does not cut off their ends."""
    if len(texts) == 1:
        return texts[0].train
    lengths, weights = [len(text.train) for text in texts], [text.entry.weight for text in texts]
    limit, length = config.data.num_train_samples, config.data.max_length
    wanted = max(n * sum(weights) / w for n, w in zip(lengths, weights, strict=True))
    if limit is None and wanted * length * 8 > _MIXTURE_BYTES and wanted > 2 * sum(lengths):
        raise ConfigError(
            f"with these weights one pass over data.sources is {wanted:,.0f} sequences, made of {sum(lengths):,} different "
            "ones; choose other weights, or set data.num_train_samples"
        )
    generator = torch.Generator().manual_seed(derived_seed("sources", config.training.seed))
    orders = [torch.randperm(n, generator=generator) for n in lengths]
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    order = [offsets[i] + int(orders[i][j]) for i, j in mixed_order(lengths, weights, limit)]
    return torch.cat([text.train for text in texts])[order]


def _mixture_notes(texts: list[_Text], total: int) -> list[str]:
    counts = [0] * len(texts)
    weights = [text.entry.weight for text in texts]
    for _ in range(total):
        counts[next_source(counts, weights)] += 1
    return [
        f"{text.entry.label}: weight {text.entry.weight:g}, {count:,} of {total:,} sequences ({count / len(text.train):.2f} "
        "passes over it)"
        for text, count in zip(texts, counts, strict=True)
    ]


def _shares(parts: list[Tensor], weights: list[float], wanted: int) -> Tensor:
    """``wanted`` sequences, or all there are: of each part its share by weight, taken evenly from it."""
    missing, counts = wanted, [0] * len(parts)
    # By turns, so that what a short part cannot give comes from the others.
    while missing and (open_ := [i for i in range(len(parts)) if counts[i] < len(parts[i])]):
        chosen = open_[next_source([counts[i] for i in open_], [weights[i] for i in open_])]
        counts[chosen] += 1
        missing -= 1
    return torch.cat(
        [part[_spread(len(part), count)] for part, count in zip(parts, counts, strict=True) if count] or parts
    )


def _spread(available: int, wanted: int) -> Tensor:
    """``min(available, wanted)`` indices, evenly over ``0 … available - 1``: every source gives its share."""
    count = min(available, wanted)
    return torch.arange(count) * available // count


def _scattered(available: int, wanted: int) -> Tensor:
    """``min(available, wanted)`` distinct indices of ``0 … available - 1`` whose every beginning is spread over all of them.

    So a conversion that uses the first tokens only (the Fisher and the refit do, and a run with little time) sees every source,
    and fewer tokens are a part of more. The order of van der Corput: 0, 1/2, 1/4, 3/4, 1/8 … of the whole.
    """
    bits = max(1, (available - 1).bit_length())
    reversed_bits = (int(f"{k:0{bits}b}"[::-1], 2) for k in range(2**bits))
    order = dict.fromkeys(value * available >> bits for value in reversed_bits) if available else {}
    return torch.tensor(list(order)[: min(available, wanted)], dtype=torch.long)


def _shortfalls(config: RunConfig, train: int | None, calibration: int, chosen: int, heldout_wanted: int) -> list[str]:
    length, notes = config.data.max_length, []
    if chosen < heldout_wanted:
        notes.append(
            f"held-out text has {chosen * (length - 1):,} predicted tokens, evaluation.tokens={config.evaluation.tokens:,} "
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
    if wanted is not None and train is not None and train < wanted:
        notes.append(
            f"the training text has {train:,} sequences, data.num_train_samples={wanted:,} were wanted: all are used"
        )
    return notes


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_sources(config: RunConfig) -> None:
    """What can be known to fail before a model is loaded: no text named, a file that is not there or not text, a hub out of
    reach.

    Raises :class:`ConfigError`.
    """
    if config.data.prompt_field is not None:
        return check_prompts(config)
    entries = text_entries(config)
    if config.data.streaming and config.training.mode != "none":
        _check_steps(config)
    for entry in entries:
        if entry.files:
            check_files(find_files(entry.files, entry.files_key), entry)
        elif entry.dataset_name != "demo":
            check_hub_dataset(entry, config)
    _check_unseen(config, entries)


def _check_steps(config: RunConfig) -> None:
    if config.training.max_steps is None and config.data.num_train_samples is None:
        raise ConfigError(
            "data.streaming=true needs training.max_steps or data.num_train_samples: how long a streamed text is shows when "
            "it ends, and the learning rate's schedule needs to know before"
        )


def _no_end(tokenizer: Any) -> list[str]:
    if getattr(tokenizer, "eos_token_id", None) is not None:
        return []
    return ["the tokenizer has no end-of-text token: documents follow each other without a mark between them"]


def document_separator(config: RunConfig, tokenizer: Any) -> int | None:
    """The token behind every document if ``data.isolate_documents``, else ``None``. Raises :class:`ConfigError` if there is
    none."""
    if not config.data.isolate_documents:
        return None
    separator: int | None = getattr(tokenizer, "eos_token_id", None)
    if separator is None:
        raise ConfigError(
            "data.isolate_documents=true finds documents by the tokenizer's end-of-text token, and this tokenizer "
            f"({type(tokenizer).__name__}) has none; set it to false"
        )
    return separator
