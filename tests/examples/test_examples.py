"""The programs of ``examples/`` as a user runs them: offline, on the tiny model, and what they print is what they claim."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Example → pattern of its output; the groups are numbers that must fall from left to right.
PROGRAMS = {
    "convert_your_model": r"converted 2 of 2 llama-like layers.*KL\(original‖converted\) .*: 0\.\d*[1-9].*the same text$",
    "train_conversion": r"held out: KL ([\d.]+) → ([\d.]+)$",
    "evaluate_conversion": r"half of every change: KL ([\d.]+)$.*captured: 64 tokens, z of layer 0 \[1, 64, \d+\]",
    "with_peft": r"loss ([\d.]+) → ([\d.]+)$.*largest difference of a logit 0\.0e\+00$",
    "ops_in_your_network": r"correlation with the value 0\.\d\d$.*error 0\.\d\d of the variance; without: 1\.0",
}


def test_every_example_is_run():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*PROGRAMS, "tiny_base"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example(name, capsys, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"{host} was asked"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(PROGRAMS[name], printed, flags=re.DOTALL | re.MULTILINE)
    assert found is not None, printed
    numbers = [float(group) for group in found.groups()]
    assert numbers == sorted(numbers, reverse=True) and all(number > 0 for number in numbers), printed
    assert len(set(numbers)) == len(numbers)


def test_a_model_of_ones_own_needs_text(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["convert_your_model.py", "--model", "somewhere"])
    with pytest.raises(SystemExit, match="--model needs --text FILE"):
        runpy.run_path(str(EXAMPLES / "convert_your_model.py"), run_name="__main__")
