"""The compiled activation and its gradients: the definition in float64, any length, place, number of threads; its refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from npt_kernels import AdapterTensors, npt_gated_mlp, npt_mlp
from npt_kernels.activations import get_activation
from npt_kernels.kernels import native, native_activation
from npt_kernels.kernels.native_activation import activated, gradients
from npt_kernels.measure.against_truth import poisoned
from tests.support.helpers import assert_within_twice
from tests.support.instructions import run_again

pytestmark = pytest.mark.skipif(native.compiled is None, reason="npt_kernels._cpu is not built (no C++ compiler)")

ACTS = [name for name in native.ACTS if name != "gelu"]
DTYPES = [torch.float32, torch.bfloat16]
#: Around the lanes of every instruction set, the groups of a thread's part, and enough for several threads.
LENGTHS = [0, 1, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 127, 70_003]


def drawn(length, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    dinter, gate, up = (torch.randn(1, length, generator=g) for _ in range(3))
    return dinter.to(dtype), (4 * gate).to(dtype), up.to(dtype)


def reference(act, dinter, gate, up, dtype):
    """inter, dgate, dup by torch in ``dtype``; without ``up`` the last is ``None``."""
    f = get_activation(act)
    dinter, gate, up = (None if t is None else t.to(dtype) for t in (dinter, gate, up))
    if up is None:
        return f.forward(gate), f.backward(dinter, gate), None
    return f.forward(gate) * up, f.backward(dinter * up, gate), f.forward(gate) * dinter


@pytest.fixture
def nan_outputs():
    """What the calls write to is NaN before."""
    with poisoned():
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        yield


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_the_definition(act, dtype, length):
    dinter, gate, up = drawn(length, dtype)
    for beside in (up, None):
        theirs, truth = (reference(act, dinter, gate, beside, d) for d in (dtype, torch.float64))
        before = gate.clone()
        inter = activated(act, gate, beside, over_gate=False)
        assert torch.equal(gate, before)
        assert_within_twice(inter, theirs[0], truth[0])
        over = gate.clone()
        assert activated(act, over, beside, over_gate=True) is over
        assert torch.equal(over, inter)
        for want in ((True, True), (True, False), (False, True)):
            if beside is None and want != (True, False):
                continue
            dgate, dup = gradients(act, dinter.clone(), gate, beside, *want)
            assert (dgate is not None, dup is not None) == want
            for mine, plain, true in ((dgate, theirs[1], truth[1]), (dup, theirs[2], truth[2])):
                if mine is not None:
                    assert_within_twice(mine, plain, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_at_any_place_and_on_any_number_of_threads(dtype):
    dinter, gate, up = drawn(70_003, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(
                (activated("silu", gate, up, False), *gradients("silu", dinter.clone(), gate, up, True, True))
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    some = slice(5, 5 + 37)  # elsewhere, and in a tail
    part = [t[:, some].clone() for t in (dinter, gate, up)]
    again = (activated("silu", *part[1:], False), *gradients("silu", part[0], *part[1:], True, True))
    assert all(torch.equal(a[:, some], b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_the_ends_of_the_range_and_nan(act, dtype):
    gate = torch.tensor([[-1e30, -300.0, -88.5, -20.0, -0.0, 0.0, 20.0, 88.5, 300.0, 1e15, float("nan")]]).to(dtype)
    up, dinter = torch.ones_like(gate), torch.ones_like(gate)
    inter, dgate, dup = activated(act, gate, up, False), *gradients(act, dinter, gate, up, True, True)
    theirs = reference(act, torch.ones_like(gate), gate, up, torch.float64)
    for mine, true in zip((inter, dgate, dup), theirs, strict=True):
        assert torch.equal(mine.isnan(), true.isnan())
        torch.testing.assert_close(
            mine.double(), true, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-35, equal_nan=True
        )


def test_relu_stops_an_infinite_gradient_as_torch_does():
    gate, up = torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2)
    dgate, _ = gradients("relu", torch.full((1, 2), float("inf")), gate, up, True, False)
    assert dgate.tolist() == [[0.0, float("inf")]]


def test_what_it_leaves_to_torch():
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    assert activated("silu", gate, up, False) is not None
    assert activated("gelu", gate, up, False) is None  # a call of erf for every number
    assert activated("silu", gate.double(), up.double(), False) is None
    assert activated("silu", gate.half(), up.half(), False) is None
    assert activated("silu", gate, up.bfloat16(), False) is None
    assert activated("silu", gate.t(), up.t(), False) is None
    assert activated("silu", gate, up[:2], False) is None
    assert activated("silu", torch.nn.Parameter(gate), up, False) is None
    assert activated("silu", gate.to("meta"), up.to("meta"), False) is None
    assert gradients("silu", torch.randn(4, 12)[:, ::2], gate, up, True, True) is None
    with FlopCounterMode(display=False):
        assert activated("silu", gate, up, False) is None


def call(act, gated, dtype, learned, rounded_to=None):
    """Output and gradients of one MLP of 32 tokens; the truth: in float64, of numbers ``rounded_to`` what is compared."""
    g = torch.Generator().manual_seed(1)

    def some(*shape):
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(rounded_to or dtype).to(dtype)

    d, f, rank = 40, 4_100, 9
    names = ("gate", "up", "down") if gated else ("c_fc", "c_proj")
    x, a = some(32, d), some(32, d)
    values = {n: some(rank, d if n in ("down", "c_proj") else f) for n in names}
    weights = [some(f, d)] * gated + [some(f, d), some(d, f)]
    adapter = AdapterTensors(some(d, rank), {}, values, "self_key", 1, 1.0)
    leaves = [t.requires_grad_() for t in ([x] if learned == "x" else [a, *values.values(), adapter.w_down])]
    y = (npt_gated_mlp if gated else npt_mlp)(x, a, *weights, adapter, act=act)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("learned", ["x", "component"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_the_op_runs_on_it(act, dtype, gated, learned, monkeypatch):
    counted = []
    for name, made in (("activated", activated), ("gradients", gradients)):
        monkeypatch.setattr(
            native_activation,
            name,
            lambda *args, made=made, name=name: counted.append((name, made(*args))) or counted[-1][1],
        )
    mine = call(act, gated, dtype, learned)
    assert {name for name, result in counted if result is not None} == {"activated", "gradients"}
    monkeypatch.setattr(native, "compiled", None)
    theirs, truth = call(act, gated, dtype, learned), call(act, gated, torch.float64, learned, dtype)
    for one, other, true in zip(mine, theirs, truth, strict=True):
        assert_within_twice(one, other, true)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instructions(capability):
    """What this CPU would not choose by itself."""
    run_again(__file__, "definition or same_bits or range or relu", capability)
