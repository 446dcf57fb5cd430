"""``npt learn``, ``npt transfer`` and ``npt inspect`` as users type them, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from npt_kernels.base_model import loading
from npt_kernels.cli import main as cli
from npt_kernels.plasticity import Edit, active_edits, apply_edit, undo_edit
from tests.plasticity.test_transfer import Texts
from tests.support.helpers import assert_unchanged, snapshot, tiny_model, token_ids


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny_model("llama"), Texts()
    monkeypatch.setattr(loading, "load_model", lambda config, device: (model, tokenizer))
    return model


def npt(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def error_of(*arguments: str) -> str:
    result = npt(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    return line


FACT = ("learn", "--fact", "the capital of Zorvania is Marigold", "--subject")
TRANSFER = (
    "transfer",
    "--context",
    "the capital of Zorvania is Marigold",
    "--prompt",
    "we say it is",
    "--answer",
    "Marigold",
)


def test_transfer(model, tmp_path: Path) -> None:
    before = snapshot(model)
    result = npt(*TRANSFER, "--layers", "2:4", "--new-tokens", "2", "--out", str(tmp_path / "t"))
    assert result.exit_code == 0, result.output
    for part in ("nothing", "in context", "all layers, last token", "chosen: layers 2–3", "layer 2 alone", "replayed:"):
        assert part in result.output
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["transfer.html", "transfer.json", "transfer.png"]
    report = json.loads(npt(*TRANSFER, "--tokens", "-1,-2", "--no-map", "--json").stdout)
    assert report["tokens"] == [-1, -2] and report["map"]["carried"] is None
    assert report["rows"][1]["carried"] == 1
    assert_unchanged(model, before)


def test_inspect(model, tmp_path: Path) -> None:
    before = snapshot(model)
    text = tmp_path / "text.txt"
    text.write_text("the capital [of] Zorvania is\nMarigold")
    result = npt("inspect", "--file", str(text), "--layers", "1:", "--out", str(tmp_path / "i"))
    assert result.exit_code == 0, result.output
    assert "7 tokens" in result.output and "share: output" in result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[0] for row in rows if row and row[0] in {"1", "2", "3"}] == ["3", "2", "1"]
    assert sorted(p.name for p in (tmp_path / "i").iterdir()) == ["inspect.html", "inspect.json", "inspect.png"]
    report = json.loads(npt("inspect", "--text", "we say it is", "--json").stdout)
    assert report["layers"] == [0, 1, 2, 3] and len(report["share"][0]) == 5
    assert_unchanged(model, before)


def test_learn_writes_an_edit_that_another_copy_takes(model, tmp_path: Path) -> None:
    moments = tmp_path / "moments.safetensors"
    from npt_kernels.plasticity import collect_second_moments

    collect_second_moments(model, token_ids(16, 32)).save(moments)
    text = tmp_path / "text.txt"
    text.write_text("the capital of Zorvania is a city that we say it is " * 200)
    before = snapshot(model)
    result = npt(*FACT, "Zorvania", "--layer", "1", "--lora",
                 "--moments", str(moments), "--text", str(text), "--out", str(tmp_path / "e"))  # fmt: skip
    assert result.exit_code in (0, 1), (result.output, result.exception)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "edit.safetensors",
        "lora",
        "report.json",
        "report.png",
    ]
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert set(report) >= {"before", "in_context", "after", "learned", "refusals"}
    for row in ("before", "in_context", "after"):
        assert set(report[row]) >= {"verbatim", "questions", "leak", "known", "prose_ratio"}
    assert (result.exit_code == 0) == report["learned"]
    ids = token_ids(1, 12)
    edited = model(ids).logits
    other = tiny_model("llama")
    apply_edit(other, Edit.load(tmp_path / "e"))
    assert torch.equal(other(ids).logits, edited)
    peft = pytest.importorskip("peft")
    lora = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "e" / "lora")).eval()
    assert torch.allclose(lora(ids).logits, edited, atol=1e-5)
    undo_edit(model)
    assert not active_edits(model)
    assert_unchanged(model, before)
    assert "holds an edit already" in error_of(
        "learn", "--fact", "a is b", "--subject", "a", "--out", str(tmp_path / "e")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRANSFER, "--tokens", "some"), "--tokens 'some' is not understood"),
        ((*TRANSFER, "--layers", "9:"), "selects no layer"),
        (("transfer", "--context", " ", "--prompt", "it is"), "the context is empty"),
        ((*FACT, "Kelmora"), "Kelmora"),
        ((*FACT, "Zorvania", "--layer", "7"), "layer=7 is out of range"),
        ((*FACT, "Zorvania", "--method", "conditional", "--lora"), "no LoRA can"),
        ((*FACT, "Zorvania", "--method", "pray"), "--method 'pray' is not known"),
        (("learn", "--subject", "Zorvania"), "--fact"),
        (("inspect",), "give either --text or --file"),
        (("inspect", "--text", " "), "the text is empty"),
        (("inspect", "--text", "a b", "--layers", "9:"), "selects no layer"),
        (("inspect", "--file", "/nowhere.txt"), "--file /nowhere.txt cannot be read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(model, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out = () if arguments[0] in ("transfer", "inspect") else ("--out", str(tmp_path / "o"))
    assert message in error_of(*arguments, *out)
