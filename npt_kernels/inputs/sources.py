"""Where documents come from: local .txt, .jsonl, .json and .parquet files, and hub datasets through ``datasets``."""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..configs.schema import ConfigError, RunConfig
from .loading import check_hub_reachable

__all__ = ["Source", "check_hub_dataset", "find_files", "hub_sources", "local_sources"]


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


class _Lazy:
    """An iterable that calls ``make`` anew for every pass."""

    def __init__(self, make: Callable[[], Iterator[str]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[str]:
        return self._make()


# ---- local files -----------------------------------------------------------------------------------------------------


def local_sources(patterns: Sequence[str], field: str, key: str, *, separate: bool = False) -> list[Source]:
    """One source per file; globs in sorted order, a file met twice counts once. Raises :class:`ConfigError`."""
    paths = find_files(patterns, key)
    sources = []
    for path in paths:
        documents = _read_file(path, field)
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


def _read_file(path: Path, field: str) -> list[str]:
    readers: dict[str, Callable[[Path, str], list[str]]] = {
        ".txt": _read_text, ".md": _read_text, ".text": _read_text,
        ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: files end in .txt, .jsonl, .json or .parquet; rename it if it is plain text")
    try:
        return reader(path, field)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it with iconv"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, field: str) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_jsonl(path: Path, field: str) -> list[str]:
    documents = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    documents.append(_text_of(json.loads(line), field, f"{path} line {number}"))
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path} line {number} is not JSON: {error.msg}") from error
    return documents


def _read_json(path: Path, field: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path, field)
        raise ConfigError(f"{path} is not JSON: {error.msg} at line {error.lineno}") from error
    entries = data if isinstance(data, list) else [data]
    return [_text_of(entry, field, f"{path} entry {number}") for number, entry in enumerate(entries)]


def _read_parquet(path: Path, field: str) -> list[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow; pip install 'npt_kernels[train]'") from error
    try:
        names = parquet.read_schema(path).names
        if field not in names:
            raise ConfigError(_missing_field(str(path), field, names))
        column = parquet.read_table(path, columns=[field]).column(field)
    except ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file: {error}") from error
    return [
        _checked(value, field, f"{path} row {row}") for row, value in enumerate(column.to_pylist()) if value is not None
    ]


def _text_of(entry: Any, field: str, where: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is a {type(entry).__name__}; expected a text or an object with the field {field!r}")
    if field not in entry:
        raise ConfigError(_missing_field(where, field, list(entry)))
    return _checked(entry[field], field, where)


def _checked(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {field!r} is a {type(value).__name__}, expected text; choose another data.text_field"
        )
    return value


def _missing_field(where: str, field: str, available: Sequence[str]) -> str:
    close = difflib.get_close_matches(field, available, n=1)
    hint = f"set data.text_field={close[0]}" if close else "set data.text_field to one of them"
    return f"{where} has no field {field!r}; it has: {', '.join(map(str, available)) or 'none'}; {hint}"


# ---- hub -------------------------------------------------------------------------------------------------------------


def hub_sources(config: RunConfig) -> list[Source]:
    """The training split and, if the dataset has one, a held-out split. Raises :class:`ConfigError`."""
    data = config.data
    name = str(data.dataset_name)
    what = f"data.dataset_name={name!r}"
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{what} needs datasets; pip install 'npt_kernels[train]', or use data.train_files"
        ) from error
    check_hub_dataset(config)
    cache = str(_datasets_cache(config)) if config.paths.cache_dir else None
    try:
        found = datasets.load_dataset(name, data.dataset_config, cache_dir=cache)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(f"{what} could not be loaded: {lines[0]}") from error
    splits = list(found)
    if data.dataset_split not in splits:
        raise ConfigError(f"data.dataset_split={data.dataset_split!r} is not in {name}; it has: {', '.join(splits)}")
    if data.eval_split is not None and data.eval_split not in splits:
        raise ConfigError(f"data.eval_split={data.eval_split!r} is not in {name}; it has: {', '.join(splits)}")
    if data.eval_split == data.dataset_split:
        raise ConfigError(
            f"data.eval_split and data.dataset_split are both {data.eval_split!r}; held-out text must be unseen: leave "
            "data.eval_split out to hold out the end of the training split"
        )
    heldout = data.eval_split or next(
        (s for s in ("validation", "test") if s in splits and s != data.dataset_split), None
    )
    train, end = found[data.dataset_split], found[heldout] if heldout is not None else None
    if end is None and not data.eval_files:
        # By rows: cutting by characters would read the whole dataset first.
        heldout, cut = f"end of {data.dataset_split}", math.ceil(len(train) * (1 - data.eval_fraction))
        train, end = train.select(range(cut)), train.select(range(cut, len(train)))
    sources = [_hub_source(train, name, data.dataset_split, data.text_field, separate=False)]
    if end is not None:
        sources.append(_hub_source(end, name, str(heldout), data.text_field, separate=True))
    return sources


def check_hub_dataset(config: RunConfig) -> None:
    """Fail fast where ``datasets`` would retry: not in its cache and no network. Raises :class:`ConfigError`."""
    name = str(config.data.dataset_name)
    # The folder names of the library's cache; importing it just to ask would take longer than the answer.
    cached = _datasets_cache(config) / name.replace("/", "___")
    if config.data.dataset_config is not None:
        cached /= config.data.dataset_config
    if Path(name).expanduser().exists() or cached.is_dir():
        return
    what = f"data.dataset_name={name!r}"
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"{what} does not exist; for local text use data.train_files=[…]")
    check_hub_reachable(what, "give local text with data.train_files=[…], or use data.dataset_name=demo")


def _datasets_cache(config: RunConfig) -> Path:
    if config.paths.cache_dir:
        return Path(config.paths.cache_dir).expanduser() / "datasets"
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def _hub_source(split: Any, name: str, split_name: str, field: str, *, separate: bool) -> Source:
    where = f"{name} ({split_name})"
    if field not in split.column_names:
        raise ConfigError(_missing_field(where, field, split.column_names))
    column = split.select_columns([field])
    documents = _Lazy(
        lambda: _joined_rows(_checked(row[field], field, where) for row in column if row[field] is not None)
    )
    return Source(f"{name}/{split_name}", f"hub dataset, {len(split):,} rows", documents, None, separate)


def _joined_rows(rows: Iterable[str]) -> Iterator[str]:
    """Rows as documents. Line-per-row sets (WikiText) end every row with a line break or leave it empty: a blank row or a new
    page title ends the document there, so that it is not cut to lines."""
    lines: list[str] = []
    for row in rows:
        if row.endswith("\n"):
            if lines and _is_title(row):
                yield "".join(lines)
                lines = []
            lines.append(row)
        elif row:
            if lines:
                yield "".join(lines)
                lines = []
            yield row
    if lines:
        yield "".join(lines)


def _is_title(row: str) -> bool:
    """`` = Title = `` but not ``= = Section = =``."""
    stripped = row.strip()
    return stripped.startswith("= ") and stripped.endswith(" =") and not stripped.startswith("= =")
