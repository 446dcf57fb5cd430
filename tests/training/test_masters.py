"""What training moves, and by how much: fp32 masters over many tiny steps, and nothing else of a model or of the process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from npt_kernels import NPTConfig, apply_npt, npt_factored_linear, npt_parameters
from npt_kernels.component import NPComponent
from npt_kernels.training.objectives import KLObjective, LayerObjective, LocalObjective
from npt_kernels.training.task import TaskObjective
from tests.support.helpers import randomise, snapshot, tiny_model, token_ids

STEPS, RATE = 10_000, 1e-6


def moved(masters: torch.dtype, steps: int = STEPS) -> list[torch.Tensor]:
    """By how far every parameter is somewhere else after AdamW steps of about ``RATE``, computed with in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, a, weight, target = draw(16, 8), draw(16, 8), draw(8, 8), draw(16, 8)
    component = NPComponent(8, {"down": (8, 8)}, rank=4, dtype=masters)
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.copy_(draw(*parameter.shape) / 4)
    start = [p.detach().clone().double() for p in component.parameters()]
    optimizer = torch.optim.AdamW(component.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(steps):
        adapter = component.tensors(torch.bfloat16)
        y = npt_factored_linear(x, a @ adapter.w_down, weight, None, adapter.w_b_up["down"], rule="self_key")
        F.mse_loss(y.float(), target.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().double() - before for p, before in zip(component.parameters(), start, strict=True)]


def test_ten_thousand_tiny_steps_in_fp32_masters_go_where_fp64_goes():
    """Each is a thousandth of what a bfloat16 next to the weight is away, so bfloat16 parameters do not move at all."""
    found, wanted = moved(torch.float32), moved(torch.float64)
    for ours, exact in zip(found, wanted, strict=True):
        # The largest moved by nearly all steps; what rounding lost of 10,000 is below a hundredth of it.
        assert float(exact.abs().max()) > 0.8 * STEPS * RATE
        assert float((ours - exact).norm()) < 0.01 * float(exact.norm())
    assert not any(bool(part.any()) for part in moved(torch.bfloat16, 200))


OBJECTIVES = {"local": LocalObjective, "layer": LayerObjective, "kl": KLObjective, "task": TaskObjective}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_moves_the_components_and_nothing_else(objective, name, dtype):
    model = tiny_model(name, layers=2).to(dtype)
    apply_npt(model, NPTConfig(layers="all", rank=4, init="small"))
    randomise(model)
    components = [p.clone() for p in npt_parameters(model)]
    before = snapshot(model)
    numbers = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-3)
    for seed in range(3):
        OBJECTIVES[objective](model).accumulate(token_ids(2, 10, seed), 1.0, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert np.random.get_state()[1].tolist() == numbers[1] and random.getstate() == numbers[2]
    after = snapshot(model)
    frozen = [key for key in before["state"] if "np_component" not in key]
    assert len(frozen) > 10 and all(torch.equal(before["state"][key], after["state"][key]) for key in frozen)
    assert all(before[part] == after[part] for part in ("requires_grad", "classes", "hooks", "training", "attributes"))
    assert not any(torch.equal(p, old) for p, old in zip(npt_parameters(model), components, strict=True))
