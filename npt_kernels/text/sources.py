"""The texts that a configuration names, and local files read whole."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..configs.schema import ConfigError, RunConfig
from .formats import read_file

__all__ = ["Source", "TextEntry", "find_files", "local_sources", "text_entries"]

_NO_TEXT = "no training text is named; set data.train_files=[book.txt], or data.dataset_name to a hub dataset or demo"


@dataclass(frozen=True)
class TextEntry:
    """One text that the configuration names: by the plain keys of ``data``, or as one of ``data.sources``.

    Attributes:
        key: ``data`` or ``data.sources.0``, for messages.
        files, dataset_name, dataset_config, dataset_split, text_field, weight: As in ``DataSource``; ``files`` win.
    """

    key: str
    files: list[str]
    dataset_name: str | None
    dataset_config: str | None
    dataset_split: str
    text_field: str
    weight: float = 1.0

    @property
    def files_key(self) -> str:
        return "data.train_files" if self.key == "data" else f"{self.key}.files"

    @property
    def field_key(self) -> str:
        return f"{self.key}.text_field"

    @property
    def label(self) -> str:
        """For the log."""
        return self.dataset_name if not self.files else ", ".join(self.files)  # type: ignore[return-value]


def text_entries(config: RunConfig) -> list[TextEntry]:
    """The texts for training, in order. Raises :class:`ConfigError` if none is named, or in two ways at once."""
    data = config.data
    if data.sources and data.train_files:
        raise ConfigError(
            "data.train_files and data.sources both name the training text; put the files in a source of their own: "
            "{files: […], weight: 1}"
        )
    if data.sources:
        return [
            TextEntry(
                f"data.sources.{number}", s.files, s.dataset_name, s.dataset_config, s.dataset_split, s.text_field, s.weight
            )
            for number, s in enumerate(data.sources)
        ]  # fmt: skip
    if not data.train_files and not data.dataset_name:
        raise ConfigError(_NO_TEXT)
    name = None if data.train_files else data.dataset_name
    return [TextEntry("data", data.train_files, name, data.dataset_config, data.dataset_split, data.text_field)]


@dataclass(frozen=True)
class Source:
    """An ordered run of documents.

    Attributes:
        name: For messages.
        origin: What it is, for the log.
        documents: The texts; may be read lazily, and more than once.
        path: The file, for local ones.
        separate: Held-out by nature (an evaluation file, a validation split): not for training.
    """

    name: str
    origin: str
    documents: Iterable[str]
    path: Path | None = None
    separate: bool = False

    @property
    def streamed(self) -> bool:
        """Whether the documents are read as they are used, so that a reader should stop when it has enough."""
        return not isinstance(self.documents, list)

    def with_documents(self, documents: list[str]) -> Source:
        return replace(self, documents=documents)


# ---- local files -----------------------------------------------------------------------------------------------------


def local_sources(
    patterns: Sequence[str], field: str, key: str, *, separate: bool = False, field_key: str = "data.text_field"
) -> list[Source]:
    """One source per file; globs in sorted order, a file met twice counts once. Raises :class:`ConfigError`."""
    paths = find_files(patterns, key)
    sources = []
    for path in paths:
        documents = read_file(path, field, field_key)
        if not any(document.strip() for document in documents):
            raise ConfigError(f"{key}: {path} has no text in it")
        count = f"{len(documents):,} documents, " if len(documents) > 1 else ""
        characters = sum(len(document) for document in documents)
        sources.append(Source(path.name, f"{path} ({count}{characters:,} characters)", documents, path, separate))
    return sources


def find_files(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that names and globs stand for. Raises :class:`ConfigError` for one that matches nothing."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        matches = [str(expanded)] if expanded.is_file() else sorted(glob.glob(str(expanded), recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files and expanded.is_dir():
            raise ConfigError(
                f"{key}: {pattern!r} is a directory; name its files, such as {str(Path(pattern) / '*.txt')!r}"
            )
        if not files:
            raise ConfigError(f"{key}: {pattern!r} matches no file (looked from {Path.cwd()})")
        paths.update(dict.fromkeys(path.resolve() for path in files))
    return list(paths)
