"""Whole training runs on a GPU: every precision, every quantised base, a stop and a resume."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt, npt_parameters
from npt_kernels.conversion.quantise import quantise_base
from npt_kernels.ops.dense_on_use import release_scratch
from npt_kernels.quantised.linear import QuantisedLinear
from npt_kernels.quantised.names import FORMATS
from npt_kernels.run.resume import find_resume
from npt_kernels.training.objectives import KLObjective, LocalObjective
from tests.support.helpers import randomise, tiny_model, token_ids
from tests.support.runs import FAR, PowerCut, records, start, stop_at

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SIZE = dict(hidden_size=128, intermediate_size=264, num_attention_heads=4)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PAIRS = [
    pytest.param(format, library, marks=pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"{library} is not installed"))
    for format, libraries in FORMATS.items() for library in libraries
]  # fmt: skip


def trained_values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in npt_parameters(model)])


def run(path, precision: str, dtype: str = "float32", **more):
    model = tiny_model("llama", layers=3, **SIZE).to(DTYPES[dtype])
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    sections = {"model": FAR, "optimization": {"mixed_precision": precision}, "evaluation": {"prompts": []}}
    mode = {"mode": "local+polish", "max_steps": 6, "polish_steps": 4, "learning_rate": 1e-3} | more
    summary, model = start(path, model=model, sections=sections, **mode)
    now = dict(model.named_parameters())
    assert next(iter(now.values())).device.type == "cuda"
    for name, before in base.items():
        assert torch.equal(now[name].detach().cpu(), before), name
    return summary, model


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("no", "float32"), ("bf16", "float32"), ("fp16", "float32"), ("no", "bfloat16"), ("fp16", "float16"), ("auto", "float32")],
)  # fmt: skip
def test_a_run_learns_and_stays_near_float32(tmp_path, precision: str, dtype: str) -> None:
    summary, model = run(tmp_path / "own", precision, dtype)
    assert summary.trained.kl < summary.converted.kl
    assert all(line["skipped"] == 0 for line in records(tmp_path / "own", "train") if "skipped" in line)
    _, reference = run(tmp_path / "float32", "no")
    a, b = trained_values(model), trained_values(reference)
    assert (a - b).norm() < 0.05 * b.norm()
    if precision in ("bf16", "fp16"):
        assert not torch.equal(a, b), "the precision was a word that did nothing"


def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch) -> None:
    _, whole = run(tmp_path / "whole", "bf16", save_steps=2)
    with monkeypatch.context() as patch:
        stop_at(patch, 7, "crash")
        with pytest.raises(PowerCut):
            run(tmp_path / "cut", "bf16", save_steps=2)
    _, resumed = run(tmp_path / "cut", "bf16", save_steps=2, resume=find_resume(tmp_path / "cut"))
    torch.testing.assert_close(trained_values(resumed), trained_values(whole), rtol=1e-4, atol=1e-6)


def as_dense(model: nn.Module) -> nn.Module:
    """The same model with plain linears that hold the dequantised weights, in float64 on the CPU."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                plain = nn.Linear(
                    child.in_features, child.out_features, bias=child.bias is not None, dtype=torch.float64
                )
                with torch.no_grad():
                    plain.weight.copy_(child.weight.to_dense())
                    if child.bias is not None:
                        plain.bias.copy_(child.bias)
                setattr(parent, name, plain.requires_grad_(False))
    return model.double().cpu()


@pytest.mark.parametrize(("format", "library"), PAIRS)
@pytest.mark.parametrize("objective", [LocalObjective, KLObjective])
def test_a_quantised_base_has_the_gradients_of_its_dense_twin(format: str, library: str, objective) -> None:
    model = tiny_model("llama", layers=2, **SIZE).to(DEVICE)
    quantise_base(model, format, library)
    apply_npt(model, NPTConfig(layers="all", rule="rank1", rank=16, init="small"))
    randomise(model, 0.15)

    def gradients() -> tuple[float, Tensor]:
        for p in npt_parameters(model):
            p.grad = None
        tokens = token_ids(4, 32).to(next(iter(npt_parameters(model))).device)
        loss = objective(model).accumulate(tokens, 1.0, lambda loss: loss.backward()).loss
        return float(loss), torch.cat([p.grad.flatten().double().cpu() for p in npt_parameters(model)])

    loss, ours = gradients()
    release_scratch()
    as_dense(model)
    expected_loss, expected = gradients()
    assert expected.norm() > 0
    assert abs(loss - expected_loss) < 1e-3 * abs(expected_loss)
    assert (ours - expected).norm() < 1e-3 * expected.norm()
