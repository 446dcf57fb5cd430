"""Hub datasets, and folders that look like one, through ``datasets``: whole, or streamed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..base_model.loading import check_hub_reachable
from ..configs.schema import ConfigError, RunConfig
from .formats import check_text, missing_field
from .sources import Source, TextEntry

__all__ = ["check_hub_dataset", "choose_splits", "hub_sources", "is_title", "joined_rows", "load_splits"]


#: What no dataset's name ends with.
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".md", ".csv")


class _Lazy:
    """An iterable that calls ``make`` anew for every pass."""

    def __init__(self, make: Callable[[], Iterator[str]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[str]:
        return self._make()


def hub_sources(entry: TextEntry, config: RunConfig) -> list[Source]:
    """The training split and, if the dataset has one, a held-out split. Raises :class:`ConfigError`."""
    data, name = config.data, str(entry.dataset_name)
    found = load_splits(entry, config, streaming=False)
    heldout = choose_splits(entry, config, list(found))
    train, end = found[entry.dataset_split], found[heldout] if heldout is not None else None
    if end is None and not data.eval_files:
        # By rows: cutting by characters would read the whole dataset first.
        heldout, cut = f"end of {entry.dataset_split}", math.ceil(len(train) * (1 - data.eval_fraction))
        train, end = train.select(range(cut)), train.select(range(cut, len(train)))
    sources = [_hub_source(train, name, entry.dataset_split, entry, separate=False)]
    if end is not None:
        sources.append(_hub_source(end, name, str(heldout), entry, separate=True))
    return sources


def load_splits(entry: TextEntry, config: RunConfig, *, streaming: bool) -> Any:
    """Split name → ``datasets.Dataset``, or ``IterableDataset`` with ``streaming``. Raises :class:`ConfigError`."""
    what = f"{entry.key}.dataset_name={entry.dataset_name!r}"
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{what} needs datasets; pip install 'npt_kernels[train]', or use local files") from error
    check_hub_dataset(entry, config)
    cache = str(_datasets_cache(config)) if config.paths.cache_dir else None
    try:
        return datasets.load_dataset(entry.dataset_name, entry.dataset_config, cache_dir=cache, streaming=streaming)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(f"{what} could not be loaded: {lines[0]}") from error


def choose_splits(entry: TextEntry, config: RunConfig, splits: list[str]) -> str | None:
    """The split for held-out text, if there is one. Raises :class:`ConfigError` for splits that cannot be."""
    data, name = config.data, entry.dataset_name
    if entry.dataset_split not in splits:
        raise ConfigError(
            f"{entry.key}.dataset_split={entry.dataset_split!r} is not in {name}; it has: {', '.join(splits)}"
        )
    if data.eval_split is not None and data.eval_split not in splits:
        raise ConfigError(f"data.eval_split={data.eval_split!r} is not in {name}; it has: {', '.join(splits)}")
    if data.eval_split == entry.dataset_split:
        raise ConfigError(
            f"data.eval_split and {entry.key}.dataset_split are both {data.eval_split!r}; held-out text must be unseen: "
            "leave data.eval_split out to hold out a part of the training split"
        )
    usual = (split for split in ("validation", "test") if split in splits and split != entry.dataset_split)
    return data.eval_split or next(usual, None)


def check_hub_dataset(entry: TextEntry, config: RunConfig) -> None:
    """Fail fast where ``datasets`` would retry: not in its cache and no network. Raises :class:`ConfigError`."""
    name = str(entry.dataset_name)
    # The folder names of the library's cache; importing it just to ask would take longer than the answer.
    cached = _datasets_cache(config) / name.replace("/", "___")
    if entry.dataset_config is not None:
        cached /= entry.dataset_config
    # A stream reads from the hub itself; the cache holds what was downloaded whole.
    path, what = Path(name).expanduser(), f"{entry.key}.dataset_name={name!r}"
    if path.is_file():
        # datasets would take its name for one of the hub's, and ask there for half a minute.
        raise ConfigError(
            f"{what} is a file, not a dataset of the hub; for local text use {entry.files_key}=[{name!r}]"
        )
    if path.exists() or (cached.is_dir() and not config.data.streaming):
        return
    if name.startswith((".", "/", "~")) or path.suffix.lower() in _TEXT_SUFFIXES:
        raise ConfigError(f"{what} does not exist; for local text use {entry.files_key}=[…]")
    check_hub_reachable(what, f"give local text with {entry.files_key}=[…], or use data.dataset_name=demo")


def _datasets_cache(config: RunConfig) -> Path:
    if config.paths.cache_dir:
        return Path(config.paths.cache_dir).expanduser() / "datasets"
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()


def _hub_source(split: Any, name: str, split_name: str, entry: TextEntry, *, separate: bool) -> Source:
    where, field, key = f"{name} ({split_name})", entry.text_field, entry.field_key
    if field not in split.column_names:
        raise ConfigError(missing_field(where, field, split.column_names, key))
    column = split.select_columns([field])
    documents = _Lazy(
        lambda: joined_rows(check_text(row[field], where, field, key) for row in column if row[field] is not None)
    )
    return Source(f"{name}/{split_name}", f"hub dataset, {len(split):,} rows", documents, None, separate)


def joined_rows(rows: Iterable[str]) -> Iterator[str]:
    """Rows as documents. Line-per-row sets (WikiText) end every row with a line break or leave it empty: a blank row or a new
    page title ends the document there, so that it is not cut to lines."""
    lines: list[str] = []
    for row in rows:
        if row.endswith("\n"):
            if lines and is_title(row):
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


def is_title(row: str) -> bool:
    """`` = Title = `` but not ``= = Section = =``."""
    stripped = row.strip()
    return stripped.startswith("= ") and stripped.endswith(" =") and not stripped.startswith("= =")
