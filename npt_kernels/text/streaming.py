"""Text that is read, tokenised and packed while training, for ``data.streaming``: any size, little memory, exact resume.

The order is a function of the text, the configuration and the seed. The position in it is a handful of numbers, never text:
where each text is read next, the tokens that were left over there (fewer than a sequence), which chunk of the shuffle is
being handed out and how far. Resuming reads that chunk once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configs.schema import ConfigError, RunConfig
from .background import Background
from .formats import Piece
from .packing import DOCUMENTS_PER_CALL, Frame, derived_seed, next_source
from .readers import Position, Reader, open_reader
from .sources import TextEntry

__all__ = ["PackedStream", "PackedText", "StreamHead", "open_stream"]

#: Characters per call of the tokenizer, at most (but for a single longer document).
_CHARACTERS_PER_CALL = 2**19


_START: dict[str, Any] = {"position": None, "remainder": [], "skip": 0}


class PackedText:
    """One text as sequences ``[length]``, int64: framed documents one after the other, without padding.

    A *place* in it is ``{"position": …, "remainder": [ids], "skip": n}``: where the reader starts, the tokens left over from
    before, and how many sequences to pass over.

    Args:
        name: For messages.
        reader: The documents.
        frame: The tokenizer and its begin and end tokens.
        length: Tokens per sequence.
        weight: Share in a mixture, relative to others.
    """

    def __init__(self, name: str, reader: Reader, frame: Frame, length: int, weight: float = 1.0) -> None:
        self.name, self.reader, self.frame, self.length, self.weight = name, reader, frame, length, weight

    def sequences(self, place: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """From ``place`` to the end of the text, each with the place behind it; what is left over there is dropped."""
        position, skip = place["position"], place["skip"]
        remainder = torch.tensor(place["remainder"], dtype=torch.int64)
        for batch, after in self._batches(position):
            ids = torch.cat(
                [remainder, *self.frame.encode([p.text for p in batch], [(p.starts, p.ends) for p in batch])]
            )
            full, kept = len(ids) // self.length, remainder.tolist()
            for number in range(skip, full):
                row = ids[number * self.length : (number + 1) * self.length]
                # A copy, else one sequence that waits would keep the whole batch.
                yield row.clone(), {"position": position, "remainder": kept, "skip": number + 1}
            remainder, position, skip = ids[full * self.length :].clone(), after, 0

    def _batches(self, position: Position) -> Iterator[tuple[list[Piece], Position]]:
        batch: list[Piece] = []
        characters = 0
        for piece, after in self.reader.read(position):
            if piece.starts and piece.ends and not piece.text.strip():
                continue
            batch.append(piece)
            characters += len(piece.text)
            if len(batch) == DOCUMENTS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
                yield batch, after
                batch, characters = [], 0
        if batch:
            yield batch, after


@dataclass(frozen=True)
class _Chunk:
    """Sequences that are shuffled together, ``[n, length]``, and the positions before and behind them."""

    rows: Tensor
    before: dict[str, Any]
    after: dict[str, Any]


class PackedStream:
    """Sequences ``[length]``, int64, of one text or a mixture of several, in an order that is the same on every rank.

    Iterating gives the rest of the present epoch, the next iteration the next epoch; :meth:`state_dict` is the position behind
    the last sequence. Reading and tokenising run ahead in a thread, by one chunk of ``shuffle_buffer`` sequences beside the one
    that is handed out and the one in the making. One iteration is alive at a time: a new one ends the one before.

    An epoch ends when every text has been read once (those that end earlier start over), or after ``num_sequences``.

    Args:
        texts: With their weights.
        shuffle_buffer: Sequences that are read and shuffled together; 1: none.
        seed: Of the shuffling.
        num_sequences: Sequences of an epoch at most; ``None``: no limit.
        starts: Where each text starts, in every epoch; default: at its beginning.
    """

    def __init__(
        self,
        texts: Sequence[PackedText],
        *,
        shuffle_buffer: int = 1,
        seed: int = 0,
        num_sequences: int | None = None,
        starts: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.texts, self.shuffle_buffer, self.seed, self.num_sequences = (
            list(texts),
            shuffle_buffer,
            seed,
            num_sequences,
        )
        self._starts = list(starts or [_START] * len(self.texts))
        self._position = self._first_position(0)
        self._offset = 0
        self._reading: Background[_Chunk] | None = None

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.texts[0].length

    @property
    def epoch(self) -> int:
        return int(self._position["epoch"])

    def _first_position(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch, "chunk": 0, "counts": [0] * len(self.texts), "ended": [False] * len(self.texts),
            "places": self._starts,
        }  # fmt: skip

    # ---- reading -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Tensor]:
        self.close()
        position = self._position
        reading = Background(lambda stopped: self._chunks(position, stopped))
        try:
            self._reading = reading
            for chunk in reading:
                self._position = chunk.before
                for offset in range(self._offset, len(chunk.rows)):
                    self._offset = offset + 1
                    if self._offset == len(chunk.rows):
                        self._position, self._offset = chunk.after, 0
                    yield chunk.rows[offset]
                    if self._reading is not reading:
                        return  # moved on by load_state_dict or another iteration
            self._position = self._first_position(self.epoch + 1)
        finally:
            reading.close()

    def close(self) -> None:
        """Stop reading ahead. The stream may be iterated again; it goes on where it was."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.close()

    def _chunks(self, position: dict[str, Any], stopped: Callable[[], bool]) -> Iterator[_Chunk]:
        """The rest of the epoch, in the thread."""
        mixture = _Mixture(self.texts, self._starts, position)
        chunk, epoch = position["chunk"], position["epoch"]
        while not stopped():
            wanted = self.shuffle_buffer
            if self.num_sequences is not None:
                wanted = min(wanted, self.num_sequences - chunk * self.shuffle_buffer)
            before = {"epoch": epoch, "chunk": chunk, **mixture.position()}
            rows: list[Tensor] = []
            while len(rows) < wanted and not stopped() and (row := mixture.draw()) is not None:
                rows.append(row)
            if not rows:
                return
            generator = torch.Generator().manual_seed(derived_seed("chunk", self.seed, epoch, chunk))
            order = torch.randperm(len(rows), generator=generator)
            chunk += 1
            yield _Chunk(torch.stack(rows)[order], before, {"epoch": epoch, "chunk": chunk, **mixture.position()})

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sequence; plain JSON types."""
        return {"text": self._text(), "offset": self._offset, **self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ``ValueError`` if the text or what decides about its order is not the same."""
        saved, now = state.get("text", {}), self._text()
        if different := [name for name, value in now.items() if saved.get(name) != value]:
            name = different[0]
            if isinstance(saved.get(name), list):
                raise ValueError(
                    f"the text is not the one of the saved data position: it was {saved[name]} ([name, sizes]), it is now "
                    f"{now[name]}; resume with the same files"
                )
            raise ValueError(
                f"the saved data position was made with {name}={saved.get(name)}, this run has {name}={now[name]}; resume "
                "with the same value"
            )
        self.close()
        self._offset = int(state["offset"])
        self._position = {name: state[name] for name in self._first_position(0)}

    def _text(self) -> dict[str, Any]:
        """What the order depends on."""
        return {
            "texts": [[text.name, text.reader.fingerprint] for text in self.texts],
            "weights": ":".join(f"{text.weight:g}" for text in self.texts),
            "data.max_length": self.length,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.num_train_samples": self.num_sequences,
            "training.seed": self.seed,
        }


#: A sequence and the place behind it.
_Found = tuple[Tensor, dict[str, Any]]


class _Mixture:
    """Sequences of several texts in turn, by weight; see :func:`npt_kernels.text.packing.next_source`."""

    def __init__(self, texts: Sequence[PackedText], starts: Sequence[dict[str, Any]], position: dict[str, Any]) -> None:
        self.texts, self.starts = texts, starts
        self.counts, self.ended, self.places = (list(position[name]) for name in ("counts", "ended", "places"))
        #: What each text gives next, so that its end is known with its last sequence, and the rest of it.
        self._ahead: list[_Found | None] = [None] * len(texts)
        self._rest: list[Iterator[_Found] | None] = [None] * len(texts)

    def position(self) -> dict[str, Any]:
        return {"counts": list(self.counts), "ended": list(self.ended), "places": list(self.places)}

    def draw(self) -> Tensor | None:
        """The next sequence; ``None`` once every text has been read."""
        if all(self.ended):
            return None
        chosen = next_source(self.counts, [text.weight for text in self.texts])
        rest = self._rest[chosen]
        if rest is None:
            rest = self._rest[chosen] = self.texts[chosen].sequences(self.places[chosen])
            self._ahead[chosen] = next(rest, None)
        found = self._ahead[chosen]
        if found is None:
            raise ConfigError(_too_short(self.texts[chosen]))
        row, self.places[chosen] = found
        self._ahead[chosen] = next(rest, None)
        if self._ahead[chosen] is None:
            self.ended[chosen], self.places[chosen], self._rest[chosen] = True, self.starts[chosen], None
        self.counts[chosen] += 1
        return row


def _too_short(text: PackedText) -> str:
    return (
        f"{text.name} is shorter than one sequence of data.max_length={text.length} tokens, or all of it is held out; give "
        "more text or a smaller data.max_length"
    )


# ---- opening ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamHead:
    """A stream and the text in front of it.

    Attributes:
        stream: The training text.
        calibration, heldout: Per text, ``[n, length]``; no sequence of them is in the stream.
        notes: For the log.
    """

    stream: PackedStream
    calibration: list[Tensor]
    heldout: list[Tensor]
    notes: list[str]


def open_stream(
    config: RunConfig, entries: Sequence[TextEntry], tokenizer: Any, *, heldout: int, calibration: int
) -> StreamHead:
    """Open the texts, take held-out and calibration sequences from their heads, and start the stream behind them.

    Args:
        config: Sections ``data`` and ``training`` (seed).
        entries: The texts.
        tokenizer: A ``transformers`` tokenizer.
        heldout, calibration: Sequences wanted in all; each text gives its share by weight. Held-out text comes from the
            validation or test split of a dataset that has one.

    Raises:
        ConfigError: As for :func:`npt_kernels.text.readers.open_reader`, or if a text ends before training begins.
    """
    length, frame = config.data.max_length, Frame(tokenizer, config.data.special_tokens)
    total = sum(entry.weight for entry in entries)
    texts: list[PackedText] = []
    starts: list[dict[str, Any]] = []
    found: dict[str, list[Tensor]] = {"evaluation": [], "calibration": []}
    notes = []
    for entry in entries:
        reader, separate, note = open_reader(entry, config)
        text = PackedText(entry.label, reader, frame, length, entry.weight)
        place = _START
        for part, wanted in (("evaluation", heldout), ("calibration", calibration)):
            source, count = text, math.ceil(wanted * entry.weight / total)
            if part == "evaluation" and separate is not None:
                source = PackedText(f"{entry.label} (held out)", separate, frame, length)
                rows, _ = _take(source, _START, count)
            else:
                rows, place = _take(source, place, count)
            found[part].append(rows)
        if next(text.sequences(place), None) is None:
            if place is _START:
                raise ConfigError(_too_short(text))
            taken = ", ".join(f"{len(rows[-1]):,} for {part}" for part, rows in found.items())
            raise ConfigError(
                f"{text.name} has too little text to be streamed: its first sequences of data.max_length={length} tokens are "
                f"set apart ({taken}), and none is left for training; set data.streaming=false, or lower evaluation.tokens, "
                "data.calibration_tokens or data.max_length"
            )
        texts.append(text)
        starts.append(place)
        weight = f" (weight {entry.weight:g})" if len(entries) > 1 else ""
        notes.append(f"{note}{weight}")
    stream = PackedStream(
        texts, shuffle_buffer=config.data.shuffle_buffer, seed=config.training.seed,
        num_sequences=config.data.num_train_samples, starts=starts,
    )  # fmt: skip
    return StreamHead(stream, found["calibration"], found["evaluation"], notes)


def _take(text: PackedText, place: dict[str, Any], count: int) -> tuple[Tensor, dict[str, Any]]:
    """The next ``count`` sequences, fewer if the text ends, and the place behind them."""
    rows = []
    if count:
        for row, behind in text.sequences(place):
            rows.append(row)
            place = behind
            if len(rows) == count:
                break
    return torch.stack(rows) if rows else torch.zeros(0, text.length, dtype=torch.int64), place
