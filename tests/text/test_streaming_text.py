"""Streamed text: the packing and the mixture of the text that is read whole, exact resume from anywhere, bounded memory."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.text import streaming as streaming_text
from npt_kernels.text.formats import Piece
from npt_kernels.text.packing import Frame, mixed_order, pack
from npt_kernels.text.readers import FileReader, ListReader
from npt_kernels.text.sources import text_entries
from npt_kernels.text.streaming import PackedStream, PackedText, StreamHead, open_stream
from npt_kernels.training.batching import step_batches
from tests.support.texts import Numbers, numbered

L = 5


def documents(first: int, count: int, length: int = 7) -> list[str]:
    """Of 0 … 2 · length words, numbered through from ``first``."""
    found, number = [], first
    for index in range(count):
        size = (index * 5) % (2 * length)
        found.append(" ".join(f"w{number + i}" for i in range(size)))
        number += size
    return found


def text_of(documents: list[str], weight: float = 1.0, name: str = "t") -> PackedText:
    return PackedText(name, ListReader(documents), Frame(Numbers()), L, weight)


def stream_of(*texts: PackedText, **settings: Any) -> PackedStream:
    return PackedStream(texts, **settings)


def whole(stream: PackedStream) -> Tensor:
    """One epoch."""
    return torch.stack(list(stream))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "npt-text"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not threads()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are left over from one batch to the next all the time."""
    monkeypatch.setattr(streaming_text, "DOCUMENTS_PER_CALL", 3)


def test_it_packs_as_the_text_that_is_read_whole() -> None:
    texts = documents(10, 200)
    assert torch.equal(whole(stream_of(text_of(texts))), pack(texts, Numbers(), L, None))


def test_files_are_packed_as_if_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npt_kernels.text import formats

    for name, first in (("a", 10), ("b", 2000)):
        (tmp_path / f"{name}.txt").write_text(numbered("w", 900, first=first))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    expected = pack([path.read_text() for path in paths], Numbers(), L, None)
    monkeypatch.setattr(formats, "_PIECE_BYTES", 500)
    reader = FileReader(paths, "text", "k")
    assert len(list(reader.read())) > 20
    assert torch.equal(whole(stream_of(PackedText("t", reader, Frame(Numbers()), L))), expected)


def test_a_mixture_is_that_of_the_text_that_is_read_whole() -> None:
    parts, weights = [documents(10, 90), documents(5000, 20), documents(7000, 40)], [2.0, 1.0, 0.5]
    packed = [pack(part, Numbers(), L, None) for part in parts]
    expected = [packed[text][row] for text, row in mixed_order([len(p) for p in packed], weights, None)]
    stream = stream_of(*(text_of(p, w) for p, w in zip(parts, weights, strict=True)))
    assert torch.equal(whole(stream), torch.stack(expected))
    assert torch.equal(whole(stream), torch.stack(expected))  # the next epoch


def test_shuffling_loses_nothing_and_differs_by_epoch_and_seed() -> None:
    texts = documents(10, 100)
    plain = whole(stream_of(text_of(texts)))
    stream = stream_of(text_of(texts), shuffle_buffer=16, seed=1)
    first, second = whole(stream), whole(stream)
    assert stream.epoch == 2
    for start in range(0, len(plain), 16):
        chunks = [part[start : start + 16].tolist() for part in (plain, first, second)]
        assert sorted(chunks[1]) == sorted(chunks[0]) == sorted(chunks[2])
        assert len(chunks[0]) < 8 or (chunks[0] != chunks[1] != chunks[2] != chunks[0])
    assert torch.equal(whole(stream_of(text_of(texts), shuffle_buffer=16, seed=1)), first)
    assert not torch.equal(whole(stream_of(text_of(texts), shuffle_buffer=16, seed=2)), first)


@given(st.integers(1, 20), st.sampled_from([None, 1, 13, 16, 33, 1000]), st.booleans())
def test_resuming_anywhere_gives_the_rest(small_batches: None, buffer: int, limit: int | None, several: bool) -> None:
    def fresh() -> PackedStream:
        texts = [text_of(documents(10, 30))]
        texts += [text_of(documents(5000, 9), 0.7, "u")] if several else []
        return stream_of(*texts, shuffle_buffer=buffer, seed=3, num_sequences=limit)

    def two_epochs(stream: PackedStream) -> Iterator[Tensor]:
        while stream.epoch < 2:
            yield from stream

    stream = fresh()
    rows, states = [], [stream.state_dict()]
    for row in two_epochs(stream):
        rows.append(row)
        states.append(json.loads(json.dumps(stream.state_dict())))
    per_epoch = len(rows) // 2
    assert limit is None or per_epoch == min(limit, len(list(fresh())))
    for done in {
        0,
        1,
        buffer - 1,
        buffer,
        buffer + 1,
        per_epoch - 1,
        per_epoch,
        per_epoch + 1,
        len(rows) - 1,
        len(rows),
    }:
        if 0 <= done <= len(rows):
            resumed = fresh()
            resumed.load_state_dict(states[done])
            rest = list(two_epochs(resumed))
            assert len(rest) == len(rows) - done
            assert all(torch.equal(a, b) for a, b in zip(rest, rows[done:], strict=True))


def test_steps_of_a_stream_resume_on_any_rank(small_batches: None) -> None:
    def ranks(state: dict[str, Any] | None = None) -> list[Any]:
        made = []
        for rank in range(2):
            stream = stream_of(text_of(documents(10, 40)), shuffle_buffer=8)
            batches = step_batches(stream, batch_size=2, gradient_accumulation_steps=2, seed=0, rank=rank, world_size=2)
            if state is not None:
                batches.load_state_dict(state)
            made.append(batches)
        return made

    def step(parts: list[Any]) -> list[list[int]]:
        return [row.tolist() for part in parts for micro in next(part).micro_batches for row in micro]

    parts = ranks()
    seen = []
    states = []
    for _ in range(12):
        states.append(json.loads(json.dumps(parts[0].state_dict())))
        assert json.loads(json.dumps(parts[1].state_dict())) == states[-1]
        seen.append(step(parts))
    assert parts[0].epoch == 1
    for done in (0, 1, 5, 7, 8, 11):
        resumed = ranks(states[done])
        for expected in seen[done:]:
            assert step(resumed) == expected
        for part in resumed:
            part.close()
    for part in parts:
        part.close()


def test_reading_is_never_far_ahead() -> None:
    read = 0

    class Endless:
        fingerprint = ""

        def read(self, position: Any = None) -> Iterator[tuple[Piece, Any]]:
            nonlocal read
            for number in itertools.count(position or 0):
                read += 1
                yield Piece("w1 w2 w3 w4"), number + 1  # one sequence each, with its end

    stream = stream_of(PackedText("endless", Endless(), Frame(Numbers()), L), shuffle_buffer=32)
    rows = iter(stream)
    for taken in range(1, 400):
        next(rows)
        # The chunk handed out, one that waits, one in the making, one batch for the tokenizer.
        assert read <= taken + 3 * 32 + 64
    state = json.dumps(stream.state_dict())
    assert len(state) < 1000
    stream.close()


def test_errors_of_the_text_come_where_the_text_is(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"w{i} w{i} w{i} w{i}"}) for i in range(10, 210)]
    path.write_text("\n".join([*lines, '{"text": 5}']))
    stream = stream_of(PackedText("t", FileReader([path], "text", "data.text_field"), Frame(Numbers()), L))
    got = []
    with pytest.raises(ConfigError, match=r"x\.jsonl line 201: field 'text' is a int"):
        for row in stream:
            got.append(row)
    assert len(got) == 191  # whole batches for the tokenizer (64 · 3), and one sequence is looked ahead


def test_leaving_ends_the_thread() -> None:
    stream = stream_of(text_of(documents(10, 300)))
    for _ in stream:
        assert len(threads()) == 1
        break
    gc.collect()
    assert not threads()
    rows = iter(stream)
    next(rows)
    second = iter(stream)  # ends the first
    following = next(second)
    assert len(threads()) == 1
    assert next(rows, None) is None
    assert torch.equal(following, whole(stream_of(text_of(documents(10, 300))))[2])
    stream.close()


def test_ctrl_c_while_waiting_for_text() -> None:
    # Tests started in the background of a shell inherit SIGINT as ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    waiting, release = threading.Event(), threading.Event()

    class Slow:
        fingerprint = ""

        def read(self, position: Any = None) -> Iterator[tuple[Piece, Any]]:
            waiting.set()
            release.wait(20)
            yield Piece("w1"), 1

    stream = stream_of(PackedText("slow", Slow(), Frame(Numbers()), L))

    main = threading.get_ident()

    def interrupt() -> None:
        waiting.wait(10)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.5)  # the end of the text must not come before the signal is handled
        release.set()

    killer = threading.Thread(target=interrupt)
    killer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
    finally:
        release.set()
        killer.join()
        signal.signal(signal.SIGINT, handler)
    assert not threads()


def test_a_state_of_another_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(numbered("w", 100))

    def fresh(**settings: Any) -> PackedStream:
        return stream_of(PackedText("x", FileReader([path], "text", "k"), Frame(Numbers()), L), **settings)

    state = fresh(shuffle_buffer=4, seed=2).state_dict()
    for settings, message in (
        ({"shuffle_buffer": 5, "seed": 2}, r"made with data\.shuffle_buffer=4, this run has data\.shuffle_buffer=5"),
        ({"shuffle_buffer": 4, "seed": 3}, r"made with training\.seed=2, this run has training\.seed=3"),
        ({"shuffle_buffer": 4, "seed": 2, "num_sequences": 9}, r"data\.num_train_samples=None"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh(**settings).load_state_dict(state)
    path.write_text(numbered("w", 101))
    with pytest.raises(ValueError, match=r"the text is not the one of the saved data position"):
        fresh(shuffle_buffer=4, seed=2).load_state_dict(state)


# ---- from a configuration --------------------------------------------------------------------------------------------


def opened(data: dict[str, Any], heldout: int = 4, calibration: int = 3, **sections: Any) -> StreamHead:
    config = RunConfig.from_mapping({"data": {"max_length": L, "streaming": True, **data}, **sections})
    return open_stream(config, text_entries(config), Numbers(), heldout=heldout, calibration=calibration)


def test_evaluation_text_is_the_head_and_never_trained_on(tmp_path: Path) -> None:
    for name, first in (("a", 10), ("b", 3000)):
        lines = [json.dumps({"text": text}) for text in documents(first, 60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [{"files": [str(tmp_path / "a.jsonl")], "weight": 3}, {"files": [str(tmp_path / "b.jsonl")], "weight": 1}]
    head = opened({"sources": sources, "shuffle_buffer": 8}, heldout=8, calibration=4)
    assert [len(part) for part in head.heldout] == [6, 2] and [len(part) for part in head.calibration] == [3, 1]
    first, second = set(), set()
    for seen in (first, second):
        seen |= {token for row in head.stream for token in row.tolist()} - {1}
    assert first == second
    apart = {token for part in (*head.heldout, *head.calibration) for token in part.flatten().tolist()} - {1}
    assert len(apart) > 40 and not apart & first
    assert {*range(10, 300), *range(3000, 3300)} <= apart | first


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(numbered("w", 30))
    with pytest.raises(
        ConfigError,
        match=r"too little text to be streamed: .* \(4 for evaluation, 2 for calibration\).*streaming=false",
    ):
        opened({"train_files": [str(path)]})
    path.write_text("w1 w2")
    with pytest.raises(ConfigError, match=r"x\.txt is shorter than one sequence of data\.max_length=5 tokens"):
        opened({"train_files": [str(path)]})
    path.write_text("")
    with pytest.raises(ConfigError, match=r"data\.train_files: .*x\.txt has no text in it"):
        opened({"train_files": [str(path)]})


def dataset_folder(tmp_path: Path, splits: dict[str, list[str]], kind: str) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in splits.items():
        if kind == "parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.table({"body": rows}), folder / f"{split}.parquet", row_group_size=30)
        else:
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_streamed_dataset_resumes_anywhere(tmp_path: Path, small_batches: None, kind: str) -> None:
    rows = [text for text in documents(10, 100) if text]
    # Lines of pages, as in WikiText, after plain rows.
    pages = [f" = w{i} = \n" if i % 9 == 0 else "" if i % 4 == 0 else f"w{i} w{i}\n" for i in range(5000, 5060)]
    folder = dataset_folder(tmp_path, {"train": rows + pages, "validation": documents(9000, 20)}, kind)

    class Tokens(Numbers):
        def _ids(self, text: str) -> list[int]:
            return super()._ids(text.replace("=", "w2"))

    def fresh() -> PackedStream:
        config = RunConfig.from_mapping({
            "data": {"max_length": L, "streaming": True, "dataset_name": str(folder), "text_field": "body", "shuffle_buffer": 7},
            "paths": {"cache_dir": str(tmp_path / "cache")},
        })  # fmt: skip
        head = open_stream(config, text_entries(config), Tokens(), heldout=5, calibration=0)
        assert min(set(head.heldout[0].flatten().tolist()) - {1}) >= 9000
        return head.stream

    stream = fresh()
    states, got = [json.loads(json.dumps(stream.state_dict()))], []
    for row in stream:
        got.append(row)
        states.append(json.loads(json.dumps(stream.state_dict())))
    from npt_kernels.text.hub import joined_rows

    expected = pack(joined_rows(rows + pages), Tokens(), L, None)
    assert sorted(torch.stack(got).tolist()) == sorted(expected.tolist())
    for done in range(0, len(got), 11):
        stream.load_state_dict(states[done])
        assert torch.equal(torch.stack(list(stream)), torch.stack(got[done:]))
        if stream.epoch:
            stream = fresh()


def test_long_documents_of_lines_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npt_kernels.text import readers

    rows = [f"w{i}\n" for i in range(10, 210)]
    folder = dataset_folder(tmp_path, {"train": [*rows, " = w7 = \n", "w8\n"]}, "jsonl")
    monkeypatch.setattr(readers, "_JOINED_CHARACTERS", 50)
    import datasets

    loaded = datasets.load_dataset(str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    reader = readers.HubReader(loaded["train"], "set", "body", "k")
    found = list(reader.read())
    assert "".join(piece.text for piece, _ in found[:-1]) == "".join(rows)
    assert found[-1][0] == Piece(" = w7 = \nw8\n")
    assert [piece.starts for piece, _ in found] == [True, *[False] * (len(found) - 2), True]
    assert [piece.ends for piece, _ in found] == [*[False] * (len(found) - 2), True, True]
    for done, (_, place) in enumerate(found, 1):
        assert list(reader.read(json.loads(json.dumps(place)))) == found[done:]


def test_a_column_that_a_streamed_dataset_does_not_have(tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path, {"train": documents(10, 20)}, "jsonl")
    with pytest.raises(ConfigError, match=r"has no field 'text'; it has: body; set data\.text_field to one of them"):
        opened({"dataset_name": str(folder)}, paths={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(ConfigError, match=r"data\.dataset_split='all' is not in .*; it has: train"):
        opened({"dataset_name": str(folder), "dataset_split": "all"}, paths={"cache_dir": str(tmp_path / "cache")})
