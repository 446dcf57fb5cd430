"""All of an adapter's numbers at once, and the files."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch
from matplotlib.image import imread

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.evaluation.adapter import evaluate_adapter
from npt_kernels.evaluation.fidelity import LayerFidelity, NormStatistics
from npt_kernels.evaluation.perplexity import EvalResult, evaluate
from npt_kernels.evaluation.plots import plot_delta_distribution
from npt_kernels.evaluation.samples import generate_samples
from tests.support.helpers import Words, randomise, tiny_model, token_ids


def test_everything_is_measured_and_written(tmp_path):
    model = tiny_model("llama", layers=3)
    apply_npt(model, NPTConfig(layers=[0, 2], rank=8, init="small"))
    randomise(model)
    tokens, prompts = token_ids(4, 12), ["1 2 3", "4 5"]
    bars: dict[str, list[int]] = {}

    @contextmanager
    def bar(title, total, unit):
        done: list[int] = []
        yield done.append
        bars[f"{title} ({unit})"] = [total, sum(done)]

    found = evaluate_adapter(model, Words(), tokens, prompts, 3, bar)
    assert found.result == evaluate(model, tokens)
    assert found.samples == generate_samples(model, Words(), prompts, 3)
    assert [entry.index for entry in found.fidelity] == [0, 2]
    assert bars == {"perplexity and KL (tokens)": [48, 48], "layers (tokens)": [48, 48], "samples (prompts)": [2, 2]}
    paths = found.write(tmp_path / "a" / "b", {"adapter": "x"})
    assert [path.name for path in paths] == ["eval.json", "perplexity.png", "fidelity.png", "delta_norms.png"]
    payload = json.loads(paths[0].read_text())
    assert payload["adapter"] == "x" and payload["metrics"] == found.result.to_dict() and len(payload["samples"]) == 2
    assert set(payload["seconds"]) == {"perplexity", "fidelity", "samples"}
    assert all(imread(path)[..., :3].std() > 0.02 for path in paths[1:])


def test_a_model_that_cannot_generate_gives_no_samples():
    model = tiny_model("llama", layers=2)
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.config = model.base_model, model.config

    plain = Plain()
    plain.get_output_embeddings = model.get_output_embeddings  # type: ignore[assignment]
    plain.forward = model.forward  # type: ignore[assignment]

    @contextmanager
    def bar(title, total, unit):
        yield lambda n: None

    assert evaluate_adapter(plain, Words(), token_ids(2, 12), ["1"], 3, bar).samples == []


def test_the_original_side():
    result = EvalResult(100, 2.0, 2.5, 0.3, 0.8, 0.1, 0.2, 0.01, 0.02, 0.05)
    base = result.original()
    assert (base.base_nll, base.npt_nll, base.kl, base.top1_agreement, base.perplexity_ratio) == (
        2.0,
        2.0,
        0.0,
        1.0,
        1.0,
    )
    assert base.npt_nll_se == base.base_nll_se == 0.1 and base.log_ratio_se == 0.0


@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("c_fc",)])
@pytest.mark.parametrize("spread", [1.5, 100.0])
def test_the_figure_of_distributions(tmp_path, targets, spread):
    norms = torch.linspace(1.0, spread, 50)
    layers = [
        LayerFidelity(i, 8, 0.9, 1.0, dict.fromkeys(targets, 1.0), dict.fromkeys(targets, 40.0),
                      {t: NormStatistics.of(norms * (1 + i), 40.0) for t in targets})
        for i in range(5)
    ]  # fmt: skip
    path = plot_delta_distribution(layers, tmp_path / "d.png")
    assert imread(path)[..., :3].std() > 0.02
    zero = [
        dataclasses.replace(e, delta_statistics={t: NormStatistics.of(norms * 0, 40.0) for t in targets})
        for e in layers
    ]
    assert plot_delta_distribution(zero, tmp_path / "z.png").is_file()
