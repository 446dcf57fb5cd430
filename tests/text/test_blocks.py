"""Text to blocks: what is held out is never trained on, the same seed gives the same blocks, bad files name their mend."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from npt_kernels.base_model.assets import default_cache_dir, demo_texts_cached
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.text import blocks as data_module
from npt_kernels.text.blocks import TokenBlocks, _scattered, check_sources, load_token_blocks, split_source
from npt_kernels.text.demo_text import unwrap
from npt_kernels.text.hub import joined_rows
from npt_kernels.text.packing import pack
from npt_kernels.text.sources import Source, text_entries
from tests.support.texts import Numbers, Words, numbered


def run_config(tmp_path: Path, **sections: dict[str, Any]) -> RunConfig:
    base = {"max_length": 8, "calibration_tokens": 64, "eval_fraction": 0.25}
    data = {**base, **sections.pop("data", {})}
    return RunConfig.from_mapping({"data": data, "evaluation": {"tokens": 70}, **sections})


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(numbered("w", 1000))
    return file


def load(tmp_path: Path, tokenizer: Any = None, **sections: dict[str, Any]) -> TokenBlocks:
    return load_token_blocks(run_config(tmp_path, **sections), tokenizer or Words())


def rows(blocks: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in blocks.tolist()}


def test_shapes_split_and_calibration(tmp_path: Path, book: Path) -> None:
    blocks = load(tmp_path, data={"train_files": [str(book)]})
    for part in (blocks.train, blocks.calibration, blocks.heldout):
        assert part.dtype == torch.int64 and part.shape[1] == 8
    assert 700 <= blocks.train.numel() <= 760
    assert blocks.calibration.shape == (8, 8)
    assert blocks.heldout.shape == (10, 8)  # 70 predicted positions, 7 in a row of 8
    trained = set(blocks.train.flatten().tolist()) - {1}
    assert not trained & (set(blocks.heldout.flatten().tolist()) - {1})
    assert rows(blocks.calibration) <= rows(blocks.train)
    assert any("book.txt" in line for line in blocks.sources)


def test_the_same_seed_gives_the_same_blocks(tmp_path: Path, book: Path) -> None:
    def train(seed: int) -> torch.Tensor:
        return load(tmp_path, data={"train_files": [str(book)]}, training={"seed": seed}).train

    assert torch.equal(train(3), train(3))
    assert not torch.equal(train(3), train(4))
    assert rows(train(3)) == rows(train(4))


def test_every_text_gives_its_share(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(numbered(name, 400))
    tokenizer = Words()
    blocks = load(tmp_path, tokenizer, data={"train_files": [str(tmp_path / "*.txt")]})
    words = {i: w for w, i in tokenizer.words.items()}
    for part in (blocks.train, blocks.calibration, blocks.heldout):
        assert {words[i][0] for i in part.flatten().tolist() if i != 1} == {"a", "b"}


def test_limits(tmp_path: Path, book: Path) -> None:
    blocks = load(tmp_path, data={"train_files": [str(book)], "num_train_samples": 5, "num_eval_samples": 2})
    assert len(blocks.train) == 5 and len(blocks.heldout) == 2
    assert len(blocks.calibration) == 8
    assert any("num_eval_samples=2 limits" in line for line in blocks.sources)


def test_too_little_is_said_and_used(tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text(numbered("w", 60))
    blocks = load(tmp_path, data={"train_files": [str(small)], "num_train_samples": 50})
    log = "\n".join(blocks.sources)
    assert len(blocks.heldout) == 1
    assert "evaluation.tokens=70 were wanted: all of them are used" in log
    assert "data.calibration_tokens=64 were wanted: all of it is used" in log
    assert "data.num_train_samples=50 were wanted" in log


def test_several_texts_are_mixed_by_weight(tmp_path: Path) -> None:
    for name, count in (("a", 800), ("b", 200), ("c", 400)):
        (tmp_path / f"{name}.txt").write_text(numbered(name, count))
    sources = [{"files": [str(tmp_path / f"{name}.txt")], "weight": w} for name, w in (("a", 2), ("b", 1), ("c", 1))]
    tokenizer = Words()
    blocks = load(tmp_path, tokenizer, data={"sources": sources})
    words = {i: w for w, i in tokenizer.words.items()}

    def texts(part: torch.Tensor) -> list[str]:
        letters = [{words[i][0] for i in row if i != 1} for row in part.tolist()]
        assert all(len(found) == 1 for found in letters)  # no sequence holds text of two
        return ["".join(found) for found in letters]

    train = texts(blocks.train)
    assert [train.count(name) for name in "abc"] == [76, 38, 38]  # b has 20
    assert len(rows(blocks.train)) == 76 + 20 + 38
    held = texts(blocks.heldout)
    assert len(held) == 10 and [held.count(name) for name in "abc"] == [5, 3, 2]
    assert not set(blocks.train.flatten().tolist()) & (set(blocks.heldout.flatten().tolist()) - {1})
    assert {*texts(blocks.calibration)} == {*"abc"} and rows(blocks.calibration) <= rows(blocks.train)
    log = "\n".join(blocks.sources)
    assert "b.txt: weight 1, 38 of 152 sequences (1.90 passes over it)" in log
    limited = load(tmp_path, tokenizer, data={"sources": sources, "num_train_samples": 20})
    assert [texts(limited.train).count(name) for name in "abc"] == [10, 5, 5]
    assert len({*texts(blocks.train)[:20]}) == 3  # shuffled, not one after the other


def test_a_mixture_that_would_not_fit_asks_for_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("a", 400), ("b", 80)):
        (tmp_path / f"{name}.txt").write_text(numbered(name, count))
    sources = [{"files": [str(tmp_path / "a.txt")], "weight": 1}, {"files": [str(tmp_path / "b.txt")], "weight": 50}]
    monkeypatch.setattr(data_module, "_MIXTURE_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"one pass over data\.sources is 1,938 sequences, made of 46 different"):
        load(tmp_path, data={"sources": sources})
    assert len(load(tmp_path, data={"sources": sources, "num_train_samples": 51}).train) == 51


def test_separate_held_out_files(tmp_path: Path, book: Path) -> None:
    (tmp_path / "new.txt").write_text(numbered("new", 200))
    blocks = load(tmp_path, data={"train_files": [str(book)], "eval_files": [str(tmp_path / "new.txt")]})
    assert blocks.train.numel() == 1000
    with pytest.raises(ConfigError, match=r"in data\.train_files and in data\.eval_files"):
        load(tmp_path, data={"train_files": [str(book)], "eval_files": [str(tmp_path / "*.txt")]})


@pytest.mark.parametrize(
    ("tokenizer", "framed"),
    [
        (Words(bos=None, eos=None), [10, 11, 12]),
        (Words(bos=2, eos=3, adds_bos=False), [10, 3, 11, 12, 3]),
        (Words(bos=2, eos=3, adds_bos=True), [2, 10, 3, 2, 11, 12, 3]),
    ],
)
def test_documents_are_framed_as_the_tokenizer_does(tokenizer: Words, framed: list[int]) -> None:
    tokenizer.words = {"x": 10, "y": 11, "z": 12, "a": 99}
    assert pack(["x", "  ", "y z"], tokenizer, 1, None).flatten().tolist() == framed


def test_packing_stops_reading_when_full() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "a b c"

    assert pack(endless(), Words(), 8, 5).shape == (5, 8)


def test_gpt2_and_llama_tokenizers_pack(tmp_path: Path, book: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", model_max_length=16)
    assert 0 not in pack(["abc"], plain, 1, None).flatten().tolist()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    framed = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    ids = pack(["abc", "d"], framed, 1, None).flatten().tolist()
    assert (ids[0], ids[4], ids[5], ids[-1], len(ids)) == (0, 1, 0, 1, 8)
    blocks = load(tmp_path, framed, data={"train_files": [str(book)]})
    assert int(blocks.train.max()) < len(vocabulary)


def test_the_cut_is_at_a_word_and_loses_nothing() -> None:
    documents = [numbered("a", 50), numbered("b", 100), numbered("c", 10)]
    for fraction in (0.05, 0.3, 0.6, 0.95):
        train, heldout = split_source(Source("s", "", documents), fraction)
        before, after = list(train.documents), list(heldout.documents)
        assert "".join(before + after) == "".join(documents)
        assert not set("".join(before).split()) & set("".join(after).split())
        assert abs(len("".join(after)) / len("".join(documents)) - fraction) < 0.05


def test_formats(tmp_path: Path) -> None:
    import pandas

    texts = [numbered(f"d{i}_", 40) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in texts) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps([{"text": t} for t in texts]))
    (tmp_path / "c.json").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "d.json").write_text(json.dumps(texts))
    pandas.DataFrame({"text": texts, "n": 1}).to_parquet(tmp_path / "e.parquet")
    reference = None
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.parquet"):
        blocks = load(tmp_path, data={"train_files": [str(tmp_path / name)]})
        reference = blocks.train if reference is None else reference
        assert torch.equal(blocks.train, reference), name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"body": "a", "id": 1}\n', r"line 1 has no field 'text'; it has: body, id; set data.text_field"),
        ("x.jsonl", '{"texts": "a"}\n', r"set data.text_field=texts"),
        ("x.jsonl", '{"text": "a"}\n{oops\n', r"line 2 is not JSON"),
        ("x.jsonl", '{"text": 3}\n', r"field 'text' is a int, expected text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"is not UTF-8 text \(.* at byte 24\)"),
        ("x.jsonl", "", r"has no text in it"),
        ("x.json", "[1]", r"entry 0 is a int"),
        ("x.json", "{", r"is not JSON"),
        ("x.txt", "", r"has no text in it"),
        ("x.txt", "  \n ", r"has no text in it"),
        ("x.txt", b"\xff\xfe\x00caf\xe9", r"is not UTF-8"),
        ("x.csv", "a,b", r"files end in .txt, .jsonl, .json or .parquet"),
        ("x.parquet", "no", r"is not a parquet file"),
        ("x.txt", "three words only", r"training text .x.txt. is shorter than one sequence of data.max_length=8"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, data={"train_files": [str(file)]})
    assert "\n" not in str(caught.value)


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_files: .*none\*\.txt' matches no file"):
        check_sources(run_config(tmp_path, data={"train_files": [str(tmp_path / "none*.txt")]}))
    with pytest.raises(ConfigError, match=r"is a directory; name its files, such as .*\*\.txt"):
        check_sources(run_config(tmp_path, data={"train_files": [str(tmp_path)]}))
    with pytest.raises(ConfigError, match="no training text is named"):
        check_sources(run_config(tmp_path))
    with pytest.raises(ConfigError, match="no training text is named"):
        load(tmp_path)


def test_held_out_text_too_short(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text(numbered("w", 40))
    with pytest.raises(ConfigError, match=r"held-out text .* raise data\.eval_fraction=0\.01"):
        load(tmp_path, data={"train_files": [str(file)], "eval_fraction": 0.01})


def test_an_unreachable_hub_dataset_fails_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match=r"data\.dataset_name='some/set' .* cannot be reached .*data\.train_files"):
        check_sources(run_config(tmp_path, data={"dataset_name": "some/set"}, paths={"cache_dir": str(tmp_path)}))


def test_a_file_given_as_a_dataset_is_told_apart_at_once(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("text")
    with pytest.raises(ConfigError, match=r"notes' is a file, .* use data\.train_files=\['.*notes'\]"):
        check_sources(run_config(tmp_path, data={"dataset_name": str(file)}))
    with pytest.raises(ConfigError, match=r"'book\.txt' does not exist; for local text use data\.train_files"):
        check_sources(run_config(tmp_path, data={"dataset_name": "book.txt"}))


def test_a_dataset_from_disk(tmp_path: Path) -> None:
    """A dataset folder goes the way of a hub dataset: splits, columns, rows."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"body": numbered(f"{split}{i}_", 30).strip()}) for i in range(20)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    chosen = {"dataset_name": str(folder), "text_field": "body"}
    paths = {"cache_dir": str(tmp_path / "cache")}
    tokenizer = Words()
    blocks = load(tmp_path, tokenizer, data=chosen, paths=paths)
    words = {i: w for w, i in tokenizer.words.items()}
    assert all(words[i].startswith("train") for i in blocks.train.flatten().tolist() if i != 1)
    assert all(words[i].startswith("validation") for i in blocks.heldout.flatten().tolist() if i != 1)
    with pytest.raises(ConfigError, match="no field 'text'; it has: body"):
        load(tmp_path, data={"dataset_name": str(folder)}, paths=paths)
    with pytest.raises(ConfigError, match=r"data\.dataset_split='all' is not in .*; it has: train, validation"):
        load(tmp_path, data={**chosen, "dataset_split": "all"}, paths=paths)
    with pytest.raises(ConfigError, match="held-out text must be unseen"):
        load(tmp_path, data={**chosen, "eval_split": "train"}, paths=paths)
    (folder / "validation.jsonl").unlink()
    blocks = load(tmp_path, data=chosen, paths={"cache_dir": str(tmp_path / "cache2")})
    assert any("end of train" in line for line in blocks.sources)


def test_line_per_row_datasets_become_pages() -> None:
    rows = [
        "",
        " = Page = \n",
        "",
        " First line .\n",
        " = = Section = = \n",
        " More .\n",
        " = Next = \n",
        " Text .\n",
        "row",
    ]
    assert list(joined_rows(rows)) == [
        " = Page = \n First line .\n = = Section = = \n More .\n", " = Next = \n Text .\n", "row"
    ]  # fmt: skip


def test_hard_wrapped_prose_is_unwrapped() -> None:
    text = (
        "The Project Gutenberg Etext of X\n\n  Alice was  beginning\nto get sheep-\nbells--\nand `very\ntired'.\n\n"
        "     How doth the little\n       crocodile\n\n   *  *  *\n\nEnd\n"
    )
    assert (
        unwrap(text)
        == "Alice was beginning to get sheep-bells--and `very tired'.\n\nHow doth the little\ncrocodile\n\nEnd\n"
    )


@pytest.mark.skipif(
    not (os.environ.get("NPT_TEST_DOWNLOADS") or demo_texts_cached(default_cache_dir())),
    reason="the demo text (7 MB) is not cached; NPT_TEST_DOWNLOADS=1 fetches it",
)
def test_the_demo_text() -> None:
    config = RunConfig.from_mapping({"data": {"dataset_name": "demo", "max_length": 128}})
    plays = [source.documents[0] for source in data_module._open_sources(text_entries(config)[0], config)]  # type: ignore[index]
    assert len(plays) == 5 and all(play.lower().startswith("act ") for play in plays)
    assert "SLENDER. How does your fallow greyhound, sir? I heard say he was outrun on Cotsall." in plays[0]
    assert not any("gutenberg" in play.lower() or "DRAMATIS" in play for play in plays)
    blocks = load_token_blocks(config, Words())
    assert blocks.heldout.numel() >= 8192


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{}], r"data\.sources\.0 names no text; give files=\[…\] or dataset_name"),
        ([{"files": ["a.txt"], "dataset_name": "b"}], r"data\.sources\.0 gives both files and dataset_name='b'"),
        ([{"files": ["a.txt"]}, {"files": ["b.txt"], "weight": 0}], r"data\.sources\.1\.weight=0: .*greater than 0"),
        ([{"files": ["a.txt"], "weight": float("nan")}], r"data\.sources\.0\.weight=nan: .*finite"),
        ([{"files": ["a.txt"], "wieght": 1}], r"unknown key 'data\.sources\.0\.wieght'; did you mean 'weight'"),
        ([{"files": ["none.txt"]}], r"data\.sources\.0\.files: 'none\.txt' matches no file"),
        (
            [{"files": ["{book}"]}, {"files": ["{book}"]}],
            r"book\.txt is in data\.sources\.1\.files and in data\.sources\.0",
        ),
        (
            [{"dataset_name": "demo"}, {"dataset_name": "demo"}],
            r"demo .* is in data\.sources\.1 and in data\.sources\.0",
        ),
        (
            [{"files": ["{table}"]}],
            r"table\.parquet has no field 'text'; it has: body, id; set data\.sources\.0\.text_field",
        ),
        ([{"files": ["{table}"], "text_field": "id"}], r"table\.parquet row 0: field 'id' is a int"),
    ],
)
def test_bad_sources(tmp_path: Path, book: Path, sources: list[dict[str, Any]], message: str) -> None:
    import pandas

    table = tmp_path / "table.parquet"
    pandas.DataFrame({"body": ["x"], "id": [1]}).to_parquet(table)
    for source in sources:
        if "files" in source:
            source["files"] = [name.format(book=book, table=table) for name in source["files"]]
    for streaming in (False, True):
        with pytest.raises(ConfigError, match=message) as caught:
            check_sources(
                run_config(tmp_path, data={"sources": sources, "streaming": streaming}, training={"max_steps": 1})
            )
        assert "\n" not in str(caught.value)


def test_texts_named_in_two_ways_or_to_be_streamed_without_an_end(tmp_path: Path, book: Path) -> None:
    data = {"train_files": [str(book)], "sources": [{"files": [str(book)]}]}
    with pytest.raises(ConfigError, match=r"data\.train_files and data\.sources both name the training text"):
        check_sources(run_config(tmp_path, data=data))
    streamed = {"train_files": [str(book)], "streaming": True}
    with pytest.raises(ConfigError, match=r"streaming=true needs training\.max_steps or data\.num_train_samples"):
        check_sources(run_config(tmp_path, data=streamed))
    for more in ({"training": {"max_steps": 3}}, {"training": {"mode": "none"}}):
        check_sources(run_config(tmp_path, data=streamed, **more))


def test_isolated_documents_need_a_separator(tmp_path: Path, book: Path) -> None:
    data = {"train_files": [str(book)], "isolate_documents": True}
    with pytest.raises(ConfigError, match=r"isolate_documents=true .* this tokenizer \(Words\) has none"):
        load(tmp_path, Words(eos=None), data=data)
    assert len(load(tmp_path, Words(), data=data).train)


@pytest.mark.parametrize("separate", [False, True])
def test_streamed_blocks_have_their_evaluation_text_from_elsewhere(tmp_path: Path, book: Path, separate: bool) -> None:
    (tmp_path / "new.txt").write_text(numbered("w", 300, first=5000))
    data = {"train_files": [str(book)], "streaming": True, "shuffle_buffer": 4, "isolate_documents": True}
    if separate:
        data["eval_files"] = [str(tmp_path / "new.txt")]
    blocks = load(tmp_path, Numbers(), data=data)
    assert blocks.heldout.shape == (10, 8) and blocks.calibration.shape == (8, 8)
    trained = torch.stack(list(blocks.train))
    parts = [set(part.flatten().tolist()) - {1} for part in (trained, blocks.heldout, blocks.calibration)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert min(parts[1]) == (5000 if separate else 0)
    assert parts[0] | parts[2] | (set() if separate else parts[1]) >= set(range(2, 1000 - 8))
    assert torch.equal(torch.stack(list(blocks.train)).sort(0).values, trained.sort(0).values)  # the second epoch too


@pytest.mark.parametrize("available", [0, 1, 2, 7, 8, 152, 1000])
def test_the_order_of_the_calibration_is_spread_at_every_length(available: int) -> None:
    order = _scattered(available, available)
    assert sorted(order.tolist()) == list(range(available))
    for wanted in (1, 3, 8, 50):
        part = _scattered(available, wanted)
        assert torch.equal(part, order[:wanted])  # fewer are a part of more
        edges = [-1, *sorted(part.tolist()), available]
        widest = max(after - before for before, after in itertools.pairwise(edges))
        assert widest <= 2 * available / len(part) + 1 if len(part) else available == 0
