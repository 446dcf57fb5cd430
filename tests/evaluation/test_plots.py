"""Every figure is drawn, non-trivial, and leaves pyplot's global state alone."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from npt_kernels.evaluation.fidelity import LayerFidelity
from npt_kernels.evaluation.perplexity import EvalResult
from npt_kernels.evaluation.plots import write_plots

BASE = EvalResult(4096, 3.8, 3.8, 0.0, 1.0, 0.1, 0.1)
CONVERTED = EvalResult(4096, 3.8, 3.833, 0.108, 0.87, 0.1, 0.1, 0.006, 0.008, 0.006)
TRAINED = EvalResult(4096, 3.8, 3.818, 0.066, 0.9, 0.1, 0.1, 0.004, 0.008, 0.005)


def layers(shift, ranks=None, targets=("gate", "up", "down")):
    return [
        LayerFidelity(
            i, ranks[i] if ranks else 128, 1 - (0.03 - shift) * (1 + i % 4), 1.0,
            {t: 2.0 + j + i % 5 for j, t in enumerate(targets)}, dict.fromkeys(targets, 180.0),
        )
        for i in range(30)
    ]  # fmt: skip


def steps(phase, objective, count):
    return [
        {"phase": phase, "objective": objective, "step": 10 * i + 1, "loss": 0.15 / (1 + 0.1 * i)} for i in range(count)
    ]


def is_png_with_content(path):
    from matplotlib.image import imread

    image = imread(path)
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and image.shape[0] > 300 and image[..., :3].std() > 0.02


@pytest.mark.parametrize("phases", [[("end_to_end", "kl", 12)], [("local", "local", 60), ("polish", "kl", 8)], []])
def test_figures_of_a_run(tmp_path, phases):
    records = [record for phase in phases for record in steps(*phase)]
    ranks = [64 + 8 * (i % 9) for i in range(30)]
    paths = write_plots(
        tmp_path / "plots", steps=records, base=BASE, converted=CONVERTED, trained=TRAINED if phases else None,
        fidelity_converted=layers(0, ranks), fidelity_trained=layers(0.01, ranks) if phases else None,
    )  # fmt: skip
    expected = {"perplexity.png", "explained_variance.png", "delta_norms.png", "ranks.png"} | (
        {"loss.png"} if phases else set()
    )
    assert {path.name for path in paths} == expected
    assert all(is_png_with_content(path) for path in paths)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_equal_ranks_need_no_figure_and_bad_fits_still_draw(tmp_path):
    bad = [dataclasses.replace(entry, explained_variance=-3.0) for entry in layers(0, targets=("c_fc", "c_proj"))]
    exact = [dataclasses.replace(entry, explained_variance=1.0) for entry in bad]
    paths = write_plots(
        tmp_path, steps=[], base=BASE, converted=BASE, trained=None, fidelity_converted=bad, fidelity_trained=exact
    )
    assert "ranks.png" not in {path.name for path in paths}
    assert all(is_png_with_content(path) for path in paths)
