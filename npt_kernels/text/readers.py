"""Texts too large for memory: documents one after the other, from any place on, with the place behind each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..configs.schema import ConfigError, RunConfig
from .demo_text import demo_sources
from .formats import Piece, check_text, missing_field, read_pieces
from .hub import choose_splits, is_title, load_splits
from .sources import TextEntry, find_files

__all__ = ["FileReader", "HubReader", "ListReader", "Position", "Reader", "check_files", "open_reader"]

#: Where to go on; plain JSON types. ``None``: at the start.
Position = Any

#: Characters of rows that belong to one document and are in memory at a time.
_JOINED_CHARACTERS = 2**16


class Reader(Protocol):
    """A text that can be read from any position on."""

    @property
    def fingerprint(self) -> str:
        """Changes when the text does, as far as that can be seen without reading it."""
        ...

    def read(self, position: Position = None) -> Iterator[tuple[Piece, Position]]:
        """Documents, or parts of long ones, each with the position behind it."""
        ...


def open_reader(entry: TextEntry, config: RunConfig) -> tuple[Reader, Reader | None, str]:
    """The text of one entry, its held-out text if it has one of its own, and a line for the log.

    Raises:
        ConfigError: A file, split or column that is not there, or a dataset out of reach.
    """
    if entry.files:
        paths = find_files(entry.files, entry.files_key)
        check_files(paths, entry)
        size = sum(path.stat().st_size for path in paths)
        what = f"{len(paths):,} files" if len(paths) > 1 else str(paths[0])
        return FileReader(paths, entry.text_field, entry.field_key), None, f"{what} ({size:,} bytes), streamed"
    if entry.dataset_name == "demo":
        plays = [str(document) for source in demo_sources(config) for document in source.documents]
        return ListReader(plays), None, f"demo ({len(plays)} plays), streamed"
    splits = load_splits(entry, config, streaming=True)
    heldout = choose_splits(entry, config, list(splits))
    readers = [
        HubReader(splits[split], f"{entry.dataset_name} ({split})", entry.text_field, entry.field_key)
        for split in (entry.dataset_split, heldout)
        if split is not None
    ]
    note = f"{entry.dataset_name}/{entry.dataset_split}: hub dataset, streamed"
    return readers[0], readers[1] if heldout is not None else None, note


def check_files(paths: Sequence[Path], entry: TextEntry) -> None:
    """Whether every file can be read and its first document is a text. Raises :class:`ConfigError`."""
    for path in paths:
        if next(read_pieces(path, entry.text_field, entry.field_key), None) is None:
            raise ConfigError(f"{entry.files_key}: {path} has no text in it")


class ListReader:
    """Documents that are in memory."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = documents

    @property
    def fingerprint(self) -> str:
        return _digest(str(len(document)) for document in self.documents)

    def read(self, position: Position = None) -> Iterator[tuple[Piece, Position]]:
        for index in range(position or 0, len(self.documents)):
            yield Piece(self.documents[index]), index + 1


class FileReader:
    """Local files, one after the other."""

    def __init__(self, paths: Sequence[Path], field: str, field_key: str) -> None:
        self.paths, self.field, self.field_key = paths, field, field_key

    @property
    def fingerprint(self) -> str:
        return _digest(f"{path.name} {path.stat().st_size}" for path in self.paths)

    def read(self, position: Position = None) -> Iterator[tuple[Piece, Position]]:
        first, place = position or (0, None)
        for index in range(first, len(self.paths)):
            for piece, after in read_pieces(self.paths[index], self.field, self.field_key, place):
                yield piece, [index, after]
            place = None


class HubReader:
    """A split of ``datasets`` in streaming mode; rows that are lines of one document are put together
    (:func:`npt_kernels.text.hub.joined_rows`, in parts where it is long)."""

    def __init__(self, dataset: Any, where: str, field: str, field_key: str) -> None:
        self.where, self.field, self.field_key = where, field, field_key
        self._start = dataset.state_dict()
        self._dataset = dataset
        if dataset.column_names is not None:
            if field not in dataset.column_names:
                raise ConfigError(missing_field(where, field, dataset.column_names, field_key))
            self._dataset = dataset.select_columns([field])
            self._start = self._dataset.state_dict()

    @property
    def fingerprint(self) -> str:
        return _digest([self.where, self.field])

    def read(self, position: Position = None) -> Iterator[tuple[Piece, Position]]:
        place, inside = position or (self._start, False)
        lines: list[str] = []
        characters = 0
        for row, after in self._rows(place):
            continues = row.endswith("\n") and not is_title(row)
            if row and not continues and (lines or inside):
                yield Piece("".join(lines), not inside, True), [place, False]
                lines, characters, inside = [], 0, False
            if row.endswith("\n"):
                lines.append(row)
                characters += len(row)
                if characters > _JOINED_CHARACTERS:
                    yield Piece("".join(lines), not inside, False), [after, True]
                    lines, characters, inside = [], 0, True
            elif row:
                yield Piece(row), [after, False]
            place = after
        if lines or inside:
            yield Piece("".join(lines), not inside, True), [place, False]

    def _rows(self, place: Any) -> Iterator[tuple[str, Any]]:
        self._dataset.load_state_dict(place)
        rows, count = iter(self._dataset), 0
        while True:
            try:
                row = next(rows, None)
                after = self._dataset.state_dict()
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                raise ConfigError(f"{self.where}: reading stopped after {count:,} rows: {lines[0]}") from error
            if row is None:
                return
            count += 1
            if self.field not in row:
                raise ConfigError(missing_field(self.where, self.field, list(row), self.field_key))
            if row[self.field] is not None:
                yield check_text(row[self.field], self.where, self.field, self.field_key), after


def _digest(parts: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()
