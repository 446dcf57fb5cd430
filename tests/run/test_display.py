"""The live table, the plain lines, the bars over layers; and MFU."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
import torch
from rich.console import Console

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.estimate.devices import find_gpu
from npt_kernels.run.display import TrainingDisplay, clock, sparkline
from npt_kernels.run.utilisation import Utilisation, utilisation_of
from npt_kernels.training.loop import StepReport
from npt_kernels.training.objectives import KLObjective, LocalObjective
from tests.support.helpers import GemmMeter, tiny_model

LAYERS = {3: 0.2, 5: 0.1, 4: 0.4, 6: 0.001}


def report(step=10, layers=LAYERS, **changes) -> StepReport:
    base = StepReport("local", step, 100, 0.0123, 0.0123, 0.0, 1e-4, 0.5, 4096, 2.0, dict(layers))
    return dataclasses.replace(base, **changes)


def shown(reports, *, width=120, terminal=True, relative=True, utilisation=None, encoding="utf-8", notes=()) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    display = TrainingDisplay(console, utilisation)
    with display.open(relative=relative):
        for number, entry in enumerate(reports):
            display.step(entry, 75.0, logged=number % 2 == 0)
            for note in notes:
                display.note(note)
    stream.flush()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]


def last_frame(text: str) -> str:
    return text[text.rindex("training\n") if "training\n" in text else text.rindex("training") :]


def test_a_live_table_with_bars() -> None:
    frame = last_frame(shown([report(step) for step in range(1, 40)]))
    assert "explained variance, layers 3…6: worst 0.6000 (layer 4), best 0.9990 (layer 6)" in frame
    assert "▃▂▄█" in frame  # .8 .6 .9 .999, in the order of layers
    for cell in ("39/100", "0.0123", "1.00e-04", "0.5000", "2,048", "0.8500", "1:15", "learning rate"):
        assert cell in frame
    rows = re.findall(r"(\d+)/100", frame)
    assert rows == ["23", "25", "27", "29", "31", "33", "35", "37", "39"]  # eight logged ones and the present one


def test_a_narrow_terminal_leaves_out_what_is_least_missed() -> None:
    frame = last_frame(shown([report()], width=70, utilisation=Utilisation(10, 1e12)))
    assert "learning rate" not in frame and "grad norm" not in frame
    for name in ("step", "loss", "tokens/s", "EV median", "MFU", "time left"):
        assert name in frame
    assert max(len(line.rstrip()) for line in frame.splitlines()) <= 70


def test_plain_lines_off_a_terminal() -> None:
    text = shown([report(1), report(2), report(3)], terminal=False, utilisation=Utilisation(5_000_000, 1e11))
    lines = text.splitlines()
    assert len(lines) == 2  # logged ones
    assert lines[0] == (
        "local: step 1/100  loss 0.0123  lr 1.00e-04  grad 0.5000  tok/s 2,048  MFU 10.2%  "
        "EV worst/median/best 0.6000/0.8500/0.9990  ETA 1:15"
    )


def test_losses_that_are_no_explained_variance_show_none() -> None:
    for relative, layers in ((False, LAYERS), (True, {})):
        for terminal in (True, False):
            text = shown([report(layers=layers)], relative=relative, terminal=terminal)
            assert "EV" not in text and "explained" not in text and "MFU" not in text and "0.0123" in text


def test_what_is_not_finite_or_very_bad_is_shown() -> None:
    frame = last_frame(shown([report(layers={0: math.nan, 1: 0.5, 2: 250.0}, loss=math.inf)]))
    assert "worst -inf (layer 0)" in frame and "!▂▁" in frame and "inf" in frame


def test_terminals_without_unicode() -> None:
    text = shown([report()], terminal=False, encoding="ascii")
    assert "0.6000" in text
    assert sparkline([0.8, 0.6, 0.9, 0.999], 10, unicode=False) == ",.-#"


def test_bars() -> None:
    assert sparkline([-3, 0, 0.49, 0.5, 0.98, 0.99, 1], 10) == "▁▁▁▂▇██"
    assert sparkline([1, 0.5, 1, 1, 1], 3) == "▂██"  # the worst of two neighbours
    assert len(sparkline([1.0] * 126, 80)) == 63
    assert sparkline([], 10) == ""


def test_notes_with_brackets_stay_as_they_are() -> None:
    assert "step 5: [bold] saved" in shown([report()], notes=["step 5: [bold] saved"])


def test_clock() -> None:
    assert [clock(s) for s in (0, 75, 3600, -3)] == ["0:00", "1:15", "1:00:00", "0:00"]


# ---- MFU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", ["all", "upper_half"])
@pytest.mark.parametrize("name", ["local", "kl"])
def test_needed_operations_are_those_that_run(family, layers, name) -> None:
    """Counted product by product in the eager step. The formula also sends the gradient through the first converted layer's
    attention, which nothing below asks for: a part of one layer in twelve."""
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    model = tiny_model(family, layers=12, attn_implementation="eager", **sizes)
    apply_npt(model, NPTConfig(rank=8, layers=layers, init="small"))
    ids = torch.randint(0, 90, (8, 8), generator=torch.Generator().manual_seed(0))
    objective = {"local": LocalObjective, "kl": KLObjective}[name](model)
    found = utilisation_of(model, 8, name, batch=8, gpu=find_gpu("H100"))
    assert found is not None and found.peak == 989e12
    with GemmMeter() as meter:
        objective.accumulate(ids, 1.0, lambda loss: loss.backward())
    ran = sum(2 * m * n * k for m, n, k in meter.products)
    assert found.flops_per_token * ids.numel() == pytest.approx(ran, rel=0.02)


def test_mfu() -> None:
    assert Utilisation(2_000_000, 1e12).mfu(1000, 0.01) == pytest.approx(0.2)
    model = tiny_model("llama")
    apply_npt(model, NPTConfig(rank=4, init="small"))
    one, four = (utilisation_of(model, 16, "local", devices=n, gpu=find_gpu("A100")) for n in (1, 4))
    assert one is not None and four is not None and four.peak == 4 * one.peak == 4 * 312e12
    kl, layer = (utilisation_of(model, 16, name, gpu=find_gpu("A100")) for name in ("kl", "layer"))
    assert kl is not None and layer is not None
    assert kl.flops_per_token - layer.flops_per_token == 6 * 32 * 97 and one.flops_per_token < layer.flops_per_token
    if not torch.cuda.is_available():
        assert utilisation_of(model, 16, "local") is None
