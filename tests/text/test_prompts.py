"""Prompt/response lines become whole examples in blocks, with all but the responses masked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.masked_ids import plain_ids, unmask
from npt_kernels.text.blocks import check_sources, load_token_blocks
from tests.support.texts import Numbers


def config_of(path: Path, **data) -> RunConfig:
    section = {
        "train_files": [str(path)],
        "prompt_field": "q",
        "response_field": "r",
        "max_length": 8,
        "eval_fraction": 0.25,
    }
    return RunConfig.from_mapping({"training": {"objective": "task"}, "data": section | data})


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"q": "10 11", "r": "12"},
    {"q": "13", "r": "14 15"},
    {"q": None, "r": "99"},
    {"q": "16 17", "r": "18 19"},
    {"q": "20", "r": "21"},
]


def test_blocks_hold_whole_examples_and_count_responses_alone(tmp_path):
    config = config_of(written(tmp_path / "a.jsonl", ROWS))
    check_sources(config)
    blocks = load_token_blocks(config, Numbers())
    rows = sorted(blocks.train.tolist(), key=lambda row: min(~i for i in row if i < 0))
    ids = [plain_ids(torch.tensor(row)).tolist() for row in rows]
    counted = [[i for i in row if i >= 0] for row in rows]
    # The last quarter of four examples is held out; the second example of four tokens does not fit behind the first.
    assert sorted(map(tuple, counted)) == [(12, 1, 14, 15, 1), (18, 19, 1)]
    assert [10, 11, 12, 1, 13, 14, 15, 1] in ids and [16, 17, 18, 19, 1, 1, 1, 1] in ids
    assert blocks.heldout.tolist() == [[~20, 21, 1, ~1, ~1, ~1, ~1, ~1]]
    assert blocks.calibration.min() >= 0 and unmask(blocks.train)[1] is not None
    assert "3 examples for training, 1 held out; 8 tokens of responses count" in blocks.sources[0]


def test_held_out_files(tmp_path):
    train, held = written(tmp_path / "a.jsonl", ROWS), written(tmp_path / "b.jsonl", [{"q": "30", "r": "31"}])
    blocks = load_token_blocks(config_of(train, eval_files=[str(held)]), Numbers())
    assert blocks.heldout[0, :3].tolist() == [~30, 31, 1]
    assert int((blocks.train >= 0).sum()) == 2 + 3 + 3 + 2
    with pytest.raises(ConfigError, match="must be unseen"):
        load_token_blocks(config_of(train, eval_files=[str(train)]), Numbers())


@pytest.mark.parametrize(
    "rows, data, part",
    [
        ([{"q": "1", "x": "2"}], {}, "has no field 'r'"),
        ([{"q": "1", "r": " "}], {}, "line 1: the response is empty"),
        ([{"q": "1", "r": 2}], {}, "is a int, expected text"),
        ([{"q": None, "r": "2"}], {}, "no line has a prompt and a response"),
        ([{"q": "1", "r": "2"}], {}, "one example, which is held out"),
        ([{"q": "1 2 3 4 5 6 7", "r": "2 3"}, {"q": "1", "r": "2"}], {}, "line 1 has 10 tokens, more than data.max_length=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_one_line(tmp_path, rows, data, part):
    config = config_of(written(tmp_path / "a.jsonl", rows), **data)
    with pytest.raises(ConfigError, match=part) as caught:
        check_sources(config)
        load_token_blocks(config, Numbers())
    assert "\n" not in str(caught.value)


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"are read from \.jsonl files"):
        check_sources(config_of(path))
