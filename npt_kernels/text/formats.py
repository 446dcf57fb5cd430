"""Local .txt, .jsonl, .json and .parquet files, document by document, from any place in the file on.

Every document comes with the place behind it, so that a reader can stop there and a later one go on without reading what was
before: a byte offset in text and JSONL, a row group and row in parquet. (``datasets`` streams such files too, but resumes by
reading a file again from its start, and its errors do not name the line.)
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..configs.schema import ConfigError
from ..messages import first_line

__all__ = ["Piece", "check_text", "file_kind", "missing_field", "read_file", "read_pieces"]

#: Bytes of a text file that are in memory at a time.
_PIECE_BYTES = 2**16
_PARQUET_ROWS = 256
#: Bytes that plain text has next to none of: all below the space but tab, line ends, form feed, backspace and escape.
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\v\b\x1b")) + b"\x7f"
#: A byte order mark, as Windows' editors write it, is no text and no JSON.
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        text: Its text.
        starts, ends: Whether its document starts and ends here.
    """

    text: str
    starts: bool = True
    ends: bool = True


#: Where to go on in a file; plain JSON types. ``None``: at the start.
Place = Any


def file_kind(path: Path) -> str:
    """``text``, ``jsonl``, ``json`` or ``parquet``. Raises :class:`ConfigError` for another suffix."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: files end in .txt, .jsonl, .json or .parquet; rename it if it is plain text")
    return kind


def read_file(path: Path, field: str, field_key: str) -> list[str]:
    """All documents. ``field``: key or column of the text; ``field_key``: how the configuration calls that, for messages.

    Raises:
        ConfigError: Unreadable, not UTF-8, not of its format, or without the field; one line.
    """
    if file_kind(path) == "text":
        with _readable(path):
            data = path.read_bytes()
            text = _decode(data, 0)
            _check_plain(path, data, 0)
            return [text.replace("\r\n", "\n").replace("\r", "\n")]
    return [piece.text for piece, _ in read_pieces(path, field, field_key)]


def read_pieces(path: Path, field: str, field_key: str, place: Place = None) -> Iterator[tuple[Piece, Place]]:
    """Documents, or parts of at most 64 KiB of a text file, each with the place behind it, from ``place`` on.

    Arguments and errors as in :func:`read_file`. A .json file is one value and is read whole.
    """
    reader = _READERS[file_kind(path)]
    with _readable(path):
        yield from reader(path, field, field_key, place)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it with iconv"
        ) from error
    except OSError as error:
        # Arrow's say several lines.
        raise ConfigError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error


def _decode(data: bytes, offset: int) -> str:
    """UTF-8 text; an error names the byte in the file."""
    try:
        return data.removeprefix(_MARK if offset == 0 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        mark = len(_MARK) if offset == 0 and data.startswith(_MARK) else 0
        error.start += offset + mark
        raise


def _check_plain(path: Path, data: bytes, offset: int) -> None:
    """UTF-16 without a mark and most binaries are valid UTF-8, full of NULs: a model would be trained on ``T\\0h\\0e\\0``."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise ConfigError(
            f"{path} holds NUL characters (byte {offset + nul}) and is no plain text; if it is UTF-16, convert it: "
            f"iconv -f UTF-16LE -t UTF-8 {path.name}; if it is binary, leave it out"
        )
    control = len(data) - len(data.translate(None, _CONTROL))
    if control > 0.05 * len(data):
        raise ConfigError(
            f"{path} is no plain text: {control} of {len(data)} bytes are control characters; leave it out"
        )


# ---- text ------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, field: str, field_key: str, place: Place) -> Iterator[tuple[Piece, Place]]:
    offset = place or 0
    with path.open("rb") as stream:
        stream.seek(offset)
        data, ends = _fill(stream, b"")
        while data:
            cut = len(data) if ends else _cut(data)
            text = _decode(data[:cut], offset).replace("\r\n", "\n").replace("\r", "\n")
            _check_plain(path, data[:cut], offset)
            starts, offset, data = offset == 0, offset + cut, data[cut:]
            yield Piece(text, starts, ends), offset
            data, ends = _fill(stream, data)


def _fill(stream: BinaryIO, data: bytes) -> tuple[bytes, bool]:
    """``data`` with what follows, up to a piece, and whether it reaches the end of the file."""
    while len(data) < _PIECE_BYTES:
        more = stream.read(_PIECE_BYTES - len(data) + 1)
        if not more:
            return data, True
        data += more
    return data, False


def _cut(data: bytes) -> int:
    """Where to end a piece: behind its last line, else in front of its last space, else between two characters."""
    line = data.rfind(b"\n", 0, -1) + 1
    if line:
        return line
    space = data.rfind(b" ", 1)
    if space > 0:
        return space
    end = len(data) - 1
    while end > len(data) - 5 and (data[end] & 0xC0) == 0x80:  # inside a character
        end -= 1
    return end - 1 if data[end - 1 : end] == b"\r" else end


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, field: str, field_key: str, place: Place) -> Iterator[tuple[Piece, Place]]:
    offset, number = place or (0, 0)
    with path.open("rb") as stream:
        stream.seek(offset)
        for data in stream:
            line = _decode(data, offset)
            offset, number = offset + len(data), number + 1
            if line.strip():
                text = _parse(line, path, f"line {number}", field, field_key)
                if text is not None:
                    yield Piece(text), [offset, number]


def _parse(line: str, path: Path, place: str, field: str, field_key: str) -> str | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} {place} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} {place} {_beyond(error)}") from None
    return _text_of(entry, path, place, field, field_key)


def _beyond(error: Exception) -> str:
    """JSON that is valid, and that Python's parser refuses."""
    what = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number with thousands of digits"
    return f"{what} to be read; leave it out"


def _read_json(path: Path, field: str, field_key: str, place: Place) -> Iterator[tuple[Piece, Place]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value a line
            yield from _read_jsonl(path, field, field_key, place)
            return
        raise ConfigError(f"{path} is not JSON: {error.msg} at line {error.lineno}") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} {_beyond(error)}") from None
    entries = data if isinstance(data, list) else [data]
    for number in range(place or 0, len(entries)):
        text = _text_of(entries[number], path, f"entry {number}", field, field_key)
        if text is not None:
            yield Piece(text), number + 1


# ---- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, field: str, field_key: str, place: Place) -> Iterator[tuple[Piece, Place]]:
    first, skip = place or (0, 0)
    with _arrow_errors(path), _open_parquet(path, field, field_key) as file:
        before = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, file.num_row_groups):
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if row > skip and value is not None:
                        text = check_text(value, f"{path} row {before + row - 1}", field, field_key)
                        yield Piece(text), [group, row]
            before, skip = before + row, 0


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Damage shows when a file is opened, or at the page that has it."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow; pip install 'npt_kernels[train]'") from error
    try:
        yield
    except ArrowException as error:
        raise ConfigError(f"{path} is not a parquet file, or a damaged one: {first_line(error)}") from error


def _open_parquet(path: Path, field: str, field_key: str) -> Any:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if field not in names:
        raise ConfigError(missing_field(str(path), field, names, field_key))
    return file


_KINDS = {
    ".txt": "text", ".md": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
_READERS: dict[str, Callable[[Path, str, str, Place], Iterator[tuple[Piece, Place]]]] = {
    "text": _read_text, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet,
}  # fmt: skip


# ---- fields ----------------------------------------------------------------------------------------------------------


#: Files of which it was said that characters were replaced.
_said: set[Path] = set()


def _text_of(entry: Any, path: Path, place: str, field: str, field_key: str) -> str | None:
    """The text of a JSON value; ``None`` where the field is ``null``: skipped, as in parquet."""
    where = f"{path} {place}"
    if isinstance(entry, dict) and entry.get(field, "") is None:
        return None
    text = _json_text(entry, where, field, field_key)
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    # JSON can write half of a surrogate pair, which is no character and which no tokenizer takes.
    if path not in _said:
        _said.add(path)
        warnings.warn(
            f"{where}: half of a surrogate pair is replaced by U+FFFD, here and further on in the file", stacklevel=2
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json_text(entry: Any, where: str, field: str, field_key: str) -> str:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is a {type(entry).__name__}; expected a text or an object with the field {field!r}")
    if field not in entry:
        raise ConfigError(missing_field(where, field, list(entry), field_key))
    return check_text(entry[field], where, field, field_key)


def check_text(value: Any, where: str, field: str, field_key: str) -> str:
    """``value`` if it is a text. Raises :class:`ConfigError`."""
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: field {field!r} is a {type(value).__name__}, expected text; choose another {field_key}"
        )
    return value


def missing_field(where: str, field: str, available: Sequence[str], field_key: str) -> str:
    """The message for a column that is not there: those that are, and the likely one."""
    close = difflib.get_close_matches(field, available, n=1)
    hint = f"set {field_key}={_name(close[0])}" if close else f"set {field_key} to one of them"
    return f"{where} has no field {field!r}; it has: {_listed(available)}; {hint}"


def _listed(names: Sequence[str]) -> str:
    """Of a broken or a wide table only some."""
    some = ", ".join(map(_name, names[:20])) or "none"
    return some if len(names) <= 20 else f"{some}, … {len(names) - 20:,} more"


def _name(name: str) -> str:
    """A key as a line can hold it: JSON allows line ends and half surrogate pairs in one."""
    short = str(name)[:40]
    return short if short.isprintable() else ascii(short)
