"""LiveBytes is exact: every case below has a number that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from npt_kernels.measure.live_bytes import LiveBytes, storages_of
from tests.support.helpers import mlp_problem

KIB = 1024


def kib(count: int = 1) -> torch.Tensor:
    return torch.zeros(count * 256)


def test_allocation_and_release():
    outside = kib(8)
    with LiveBytes() as live:
        a = kib(1)
        assert live.current == KIB
        b = kib(2)
        del a
        c = kib(1)
        assert live.current == 3 * KIB
        del b, c
        assert live.current == 0
        d = outside * 2
        assert live.current == 8 * KIB
    assert (live.peak, live.device_peaks) == (8 * KIB, {"cpu": 8 * KIB})
    del d
    assert live.current == 8 * KIB, "what happens after the block is not its business"


def test_views_count_once_and_keep_the_whole_storage():
    with LiveBytes() as live:
        a = kib(4)
        b, c = a.view(2, -1)[0], a[:1]
        d = a.detach()
        assert live.current == 4 * KIB
        del a, b, d
        assert live.current == 4 * KIB
        del c
        assert live.current == 0
    assert live.peak == 4 * KIB


def test_views_and_in_place_ops_of_what_was_there_before_are_free():
    weight = torch.zeros(16, 16)
    with LiveBytes() as live:
        weight.t().add_(1.0)
        weight[0].fill_(2.0)
        out = torch.zeros(16, 16)
        torch.mm(weight, weight.t(), out=out)
        assert live.current == KIB
    assert live.peak == KIB


def test_include_counts_from_the_start():
    model = nn.Linear(16, 16, bias=False)
    tied = nn.ModuleList([model, nn.Linear(16, 16, bias=False)])
    tied[1].weight = model.weight
    with LiveBytes(include=tied) as live:
        assert live.current == KIB
        model(torch.zeros(1, 16)).sum().backward()
        assert live.current == 2 * KIB, "the weight and its gradient"
        model.weight.grad = None
        assert live.current == KIB
    several = [model, [kib(2), kib(1)]]
    with LiveBytes(include=several) as live:
        assert live.current == 4 * KIB


def test_saved_tensors_live_until_the_backward():
    weight = torch.zeros(256, requires_grad=True)
    with LiveBytes() as live:
        with live.phase("forward"):
            y = (weight.exp() * 2).sum()
            # exp saves its output; the product is gone
            assert live.current == KIB + 4
        with live.phase("backward"):
            y.backward()
        assert live.current == KIB + 4, "the gradient, and y"
    assert live.peaks["forward"] == 2 * KIB + 4, "exp, its product and the sum"
    assert live.peaks["backward"] == live.peak
    assert weight.grad is not None


def test_checkpointing_shows():
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh(), nn.Tanh()) for _ in range(6)])
    x = torch.randn(128, 64, requires_grad=True)

    def run(kept: bool) -> int:
        with LiveBytes() as live:
            y = x
            for layer in layers:
                y = layer(y) if kept else checkpoint(layer, y, use_reentrant=False)
            y.sum().backward()
        layers.zero_grad()
        x.grad = None
        return live.peak

    activation = 128 * 64 * 4
    # Linear saves its input, tanh its output: three new tensors a layer, against one.
    assert run(True) >= 18 * activation
    assert run(False) <= 6 * activation + 8 * activation


def test_resizing_and_torch_tensor():
    with LiveBytes() as live:
        a = torch.empty(0)
        a.resize_(256)
        assert live.current == KIB
        b = torch.tensor([1.0] * 256)
        assert live.current == 2 * KIB
        del a, b
        assert live.current == 0


def test_phases_nest_and_recur():
    with LiveBytes() as live:
        with live.phase("outer"):
            kib(4)
            with live.phase("inner"):
                kib(8)
            kept = kib(1)
        with live.phase("outer"):
            kib(2)
    assert live.peaks == {"outer": 4 * KIB, "inner": 8 * KIB}
    assert len(kept) == 256


def test_what_was_alive_at_the_peak():
    with LiveBytes(include=kib(2), trace=True) as live:
        a, b = kib(1), kib(16)
        with live.phase("sum"):
            c = b + 1
        del a, b, c
        kib(8)
    entries = {(entry.bytes, entry.op, entry.phase) for entry in live.largest()}
    assert entries == {(16 * KIB, "aten::zeros", ""), (16 * KIB, "aten::add.Tensor", "sum"), (KIB, "aten::zeros", "")}
    assert [entry.bytes for entry in live.largest(2)] == [16 * KIB, 16 * KIB]
    with pytest.raises(RuntimeError, match="trace=True"):
        LiveBytes().largest()


def test_release_stops_counting():
    host = kib(4)
    with LiveBytes(include=host) as live:
        live.release(host)
        kib(1)
    assert live.peak == 4 * KIB
    assert live.current == 0


def test_npt_ops_count_like_the_allocator():
    """The autograd.Function's inner temporaries are seen: against the C++ allocator, which sees everything."""
    from tests.support.helpers import memory_meter

    problem = mlp_problem("self_key", 64, 32, 48, 32, 4, 2, dtype=torch.float32, normalise=True)

    def step() -> None:
        problem.run("op")

    step()
    with LiveBytes() as live:
        step()
    with memory_meter() as result:
        step()
    assert abs(live.peak - result[0].peak) <= 0.02 * result[0].peak


@torch.library.custom_op("npt_live_bytes_test::double", mutates_args=())
def _double(x: torch.Tensor) -> torch.Tensor:
    scratch = x.clone()
    return scratch * 2


def test_custom_ops_count_their_outputs():
    x = kib(1)
    with LiveBytes() as live:
        y = torch.ops.npt_live_bytes_test.double(x)
        assert live.current == KIB
    assert len(y) == 256


def test_wrapper_subclasses_count_their_parts():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Linear(64, 32, bias=False)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    parts = storages_of(model)
    assert 64 * 32 <= sum(t.untyped_storage().nbytes() for t in parts.values()) <= 64 * 32 + 32 * 8
    with LiveBytes(include=model) as live:
        start = live.current
        y = model(torch.randn(2, 64))
        assert live.peak > start
    assert y.shape == (2, 32)


@pytest.mark.parametrize("what", ["text", 3, [kib(1), "text"]])
def test_what_has_no_storage_is_refused(what):
    with pytest.raises(TypeError, match="expected modules, tensors or iterables of them, got"):
        storages_of(what)


def test_meta_tensors_are_nothing():
    with LiveBytes() as live:
        torch.zeros(1000, device="meta") + 1
    assert live.peak == 0
