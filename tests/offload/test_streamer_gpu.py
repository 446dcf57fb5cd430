"""Streaming on a GPU: pinned memory, the side stream and its events. **Never run yet**: no GPU was at hand."""

from __future__ import annotations

import pytest
import torch

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters
from npt_kernels.model.select import find_layers
from npt_kernels.offload import LayerStreamer
from npt_kernels.training.objectives import KLObjective, LocalObjective, enable_checkpointing
from tests.support.helpers import randomise, tiny_model, token_ids

pytestmark = pytest.mark.gpu


def converted(count=6):
    """Wide enough that a copy takes longer than enqueuing a layer: a missing wait would show."""
    model = tiny_model("llama", layers=count, hidden_size=512, intermediate_size=2048)
    apply_npt(model, NPTConfig(layers="all", rank=8, init="small"))
    randomise(model)
    return model


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_equals_resident(where, checkpointing, tmp_path):
    model, resident = converted(), converted().to("cuda")
    batches, shares = [token_ids(seed=s).cuda() for s in range(2)], [0.4, 0.6]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with LayerStreamer(model, "cuda", where=where, folder=tmp_path, timed=True) as streamer:
        if where == "host":
            assert not streamer.notes  # pinned
            assert all(p.is_pinned() for p in find_layers(model)[1][3].parameters() if p.device.type == "cpu")
        for _ in range(5):
            for m in (model, resident):
                LocalObjective(m, micro_batches_per_layer=2).accumulate_group(
                    batches, shares, lambda loss: loss.backward()
                )
                enable_checkpointing(m, checkpointing)
                KLObjective(m).accumulate(batches[0], 1.0, lambda loss: loss.backward())
                enable_checkpointing(m, False)
        for a, b in zip(npt_parameters(model), npt_parameters(resident), strict=True):
            assert a.device.type == "cuda" and torch.equal(a.grad, b.grad)
        with torch.no_grad(), npt_disabled(model), npt_disabled(resident):
            assert torch.equal(model(input_ids=batches[0]).logits, resident(input_ids=batches[0]).logits)
        model.zero_grad(set_to_none=True)
        assert streamer.measure().stall_seconds >= 0
    for name, t in model.state_dict().items():
        assert t.device.type == "cpu" and torch.equal(t, before[name])


def test_memory_holds_two_layers_and_not_the_model():
    counts = {}
    for count in (4, 12):
        model = converted(count)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        with LayerStreamer(model, "cuda"), torch.no_grad():
            model(input_ids=token_ids().cuda(), use_cache=False)
            counts[count] = torch.cuda.max_memory_allocated() - start
    layer = sum(p.numel() for p in find_layers(model)[1][0].parameters()) * 4
    assert counts[12] - counts[4] < 2 * layer  # eight layers more; their components are the difference
