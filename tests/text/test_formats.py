"""Documents from files: from any place on the rest is the same, and bad bytes are named by their place in the file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npt_kernels.configs.schema import ConfigError
from npt_kernels.text import formats
from npt_kernels.text.formats import Piece, read_file, read_pieces


def pieces(path: Path, place: Any = None) -> list[tuple[Piece, Any]]:
    return list(read_pieces(path, "text", "data.text_field", place))


def write(tmp_path: Path, kind: str, texts: list[str]) -> Path:
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=4)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        path.write_text(
            "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8-sig"
        )
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_from_every_place_on_comes_the_rest(tmp_path: Path, kind: str) -> None:
    texts = [f"Größe {i}" for i in range(11)]
    path = write(tmp_path, kind, texts)
    whole = pieces(path)
    assert [piece.text for piece, _ in whole] == texts == read_file(path, "text", "data.text_field")
    assert all(piece.starts and piece.ends for piece, _ in whole)
    for done, (_, place) in enumerate(whole, 1):
        assert pieces(path, json.loads(json.dumps(place))) == whole[done:]


def test_parquet_reads_on_without_reading_what_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    path = write(tmp_path, "parquet", [str(i) for i in range(11)])
    groups: list[int] = []
    original = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches",
        lambda self, *a, **k: (groups.extend(k["row_groups"]), original(self, *a, **k))[1],
    )  # fmt: skip
    assert [piece.text for piece, _ in pieces(path, [1, 2])] == ["6", "7", "8", "9", "10"]
    assert groups == [1, 2]


def test_rows_without_a_value_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", ["a", None, None, "b", None, "c"])  # type: ignore[list-item]
    assert [piece.text for piece, _ in pieces(path)] == ["a", "b", "c"] == read_file(path, "text", "k")
    assert [piece.text for piece, _ in pieces(path, [0, 4])] == ["c"]


words = st.text(st.sampled_from("ab\n\r é🎵"), max_size=60)


@given(words, st.integers(6, 20))
def test_parts_of_a_text_are_the_text(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_PIECE_BYTES", size)
        found = pieces(path)
        assert "".join(piece.text for piece, _ in found) == text.replace("\r\n", "\n").replace("\r", "\n")
        assert [piece.starts for piece, _ in found] == [True, *[False] * (len(found) - 1)][: len(found)]
        assert [piece.ends for piece, _ in found] == [*[False] * (len(found) - 1), True][-len(found) :][: len(found)]
        for done, (_, place) in enumerate(found, 1):
            assert pieces(path, place) == found[done:]


def test_parts_end_at_lines_or_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_PIECE_BYTES", 12)
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\nthree four five six\n\nseven")
    assert [piece.text for piece, _ in pieces(path)] == ["one two\n", "three four", " five six\n\n", "seven"]


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"word " * 2_000_000)
    tracemalloc.start()
    try:
        total = sum(len(piece.text) for piece, _ in read_pieces(path, "text", "k"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 10_000_000 and peak < 2**20


@pytest.mark.parametrize("size", [8, 2**16])
def test_the_byte_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(formats, "_PIECE_BYTES", size)
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"abc " * 6 + b"caf\xe9 x" + b" abc" * 6)
    for read in (pieces, lambda p: read_file(p, "text", "k")):
        with pytest.raises(ConfigError, match=r"x\.txt is not UTF-8 text \(.*\); convert it with iconv") as caught:
            read(path)
        if read is pieces:
            assert "at byte 30)" in str(caught.value)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.txt cannot be read: No such file"):
        pieces(tmp_path / "gone.txt")


# ---- files that are read, and break later or poison the training -----------------------------------------------------------


def all_texts(path: Path) -> list[str]:
    found = [piece.text for piece, _ in pieces(path)]
    assert found == read_file(path, "text", "data.text_field")
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_half_a_surrogate_pair_becomes_a_character_with_a_note(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    rows = ['{"text": "a \\ud83d b"}', '{"text": "whole \\ud83d\\ude00"}', '{"text": "\\ude00\\ud83d"}']
    path.write_text("\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]")
    with pytest.warns(UserWarning, match=r"x\.\w+ (line 1|entry 0): half of a surrogate pair") as said:
        found = all_texts(path)
    assert found == ["a \ufffd b", "whole \U0001f600", "\ufffd\ufffd"] and len(said) == 1
    for text in found:
        text.encode("utf-8")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "The quick brown fox".encode("utf-16-le"), r"a.txt holds NUL characters \(byte 1\).*iconv"),
        ("b.txt", b"\x7fELF\x02\x01\x01" + bytes(9) + b"abc", "NUL characters"),
        ("c.md", b"fine text " * 9000 + b"\0", r"NUL characters \(byte 90000\)"),
        ("d.txt", bytes(range(1, 32)) * 5, "control characters"),
        ("e.jsonl", b"[" * 100_000, r"e.jsonl line 1 (is nested too deeply|is not JSON)"),
        ("f.json", b"[" * 100_000 + b"]" * 100_000, r"f.json is nested too deeply"),
        (
            "g.jsonl",
            b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b', "text": "b"}',
            r"g.jsonl line 2 holds a number with thousands",
        ),
        ("h.json", b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", r"h.json holds a number with thousands"),
        ("i.jsonl", b'{"text": 5}', "line 1: field 'text' is a int"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (lambda: pieces(path), lambda: read_file(path, "text", "data.text_field")):
        with pytest.raises(ConfigError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_text_with_tabs_and_escapes_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\x1b[1mbold\x1b[0m\ta\r\nb\x0c" * 3)
    assert all_texts(path) == ["\x1b[1mbold\x1b[0m\ta\nb\x0c" * 3]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_skipped_everywhere(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ["a", None, "b", None])  # type: ignore[list-item]
    assert all_texts(path) == ["a", "b"]
    (_, place), _ = pieces(path)
    assert [piece.text for piece, _ in pieces(path, place)] == ["b"]


# ---- found by tests/fuzz ------------------------------------------------------------------------------------------------


def one_line(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        pieces(path)
    message = str(caught.value)
    message.encode("utf-8")
    assert "\n" not in message and str(path) in message and len(message) < 1000 + len(str(path))
    return message


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", ["a" * 300, "b"])
    whole = path.read_bytes()
    # A footer that is no thrift; a page that is not what its header says; no file at all.
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:footer] + b"\xff" * 16 + whole[footer + 16 :])
    assert "cannot be read: " in one_line(path)
    seen = set()
    for at in range(4, footer):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            pieces(path)
        except ConfigError:
            seen.add(one_line(path))
    assert any("a damaged one" in message for message in seen)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a parquet file, or a damaged one" in one_line(path)


def test_names_of_fields_fit_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a\\nb\\ud83d": 1, "' + "c" * 5000 + '": 2, ' + ", ".join(f'"k{i}": 0' for i in range(500)) + "}")
    message = one_line(path)
    assert r"'a\nb\ud83d'" in message and "482 more" in message
