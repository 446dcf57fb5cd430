"""The compiled second half of a layer for one token: the definition, any layout, any number of threads, its refusals."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from npt_kernels import AdapterTensors, npt_gated_mlp, npt_mlp
from npt_kernels.activations import get_activation
from npt_kernels.kernels import native, native_row
from npt_kernels.kernels.steps import Projection
from npt_kernels.measure.against_truth import poisoned
from tests.support.helpers import assert_within_twice
from tests.support.instructions import ROOT, run_again

pytestmark = pytest.mark.skipif(native.compiled is None, reason="npt_kernels._cpu is not built (no C++ compiler)")

#: d, f, width of what is heard, R: SmolLM2's, odd ones, one of everything, and more columns than a tile of the loops.
SIZES = {"real": (576, 1536, 576, 78), "odd": (35, 51, 35, 7), "ones": (1, 1, 1, 1), "wide": (64, 4099, 64, 5)}


def drawn(size, dtype, *, gated=True, in_out=False, bias=True, component=torch.float32, seed=0):
    """Everything a call reads, each linear ``[out, in]`` or, ``in_out``, a view of ``[in, out]``."""
    d, f, heard, rank = SIZES[size]
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(shape, generator=g)

    def linear(out, fan_in):
        weight = (
            (some(fan_in, out) * fan_in**-0.5).to(dtype).t() if in_out else (some(out, fan_in) * fan_in**-0.5).to(dtype)
        )
        return Projection(weight, some(out).to(dtype) * 0.1 if bias else None)

    return {
        "bottleneck": ((some(rank, heard) * heard**-0.5).to(component), (some(rank) * 0.1).to(component)),
        "projections": [linear(f, d) if gated else Projection(), linear(f, d), linear(d, f)],
        "values": {n: (some(rank, w) * rank**-0.5).to(component) for n, w in (("gate", f), ("up", f), ("down", d))},
        "rows": (some(1, d).to(dtype), some(1, heard).to(dtype), some(1, d).to(dtype)),
        "weight": some(d).to(dtype), "bias": some(d).to(dtype) * 0.1,
    }  # fmt: skip


def plain(t, act, norm, change, dtype, eps=1e-5):
    """The same by torch, all of it in ``dtype``."""

    def cast(x):
        return None if x is None else x.to(dtype)

    (h, heard, u), values = map(cast, t["rows"]), {n: cast(v) for n, v in t["values"].items()}
    z = F.linear(heard, *map(cast, t["bottleneck"]))
    scale = torch.ones(1, 1, dtype=dtype)
    if norm != "given":
        total, x = h + (z @ values["down"] if change else heard), h
        if norm.startswith("layer"):
            total, x = total - total.mean(), x - x.mean()
        scale = 1 / torch.sqrt(total.square().mean(-1, keepdim=True) + eps)
        weight = cast(t["weight"]) + (1 if norm.endswith("1") else 0)
        u = x * scale * weight + cast(t["bias"])
    gate, up, down = (Projection(cast(p.weight), cast(p.bias)) for p in t["projections"])

    def project(p, x, c, name):
        y = F.linear(x, p.weight, p.bias)
        return y + c @ values[name] if name in values else y

    inter, activation = project(up, u, z * scale, "up"), get_activation(act).forward
    inter = activation(inter) if gate.weight is None else activation(project(gate, u, z * scale, "gate")) * inter
    return project(down, inter, z, "down")


def row_of(t, act, norm, change, dtype, **more):
    return native_row.native_row(
        t["bottleneck"], t["projections"], t["values"], act, dtype, norm=norm, norm_weight=t["weight"], norm_bias=t["bias"],
        eps=1e-5, matches_change=change, **more,
    )  # fmt: skip


def called(row, t, norm):
    h, heard, u = t["rows"]
    with poisoned():
        return row(None, heard, u) if norm == "given" else row(h, heard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("norm", "change"), [("given", False), ("rms", True), ("rms1", True), ("layer", True), ("layer1", False)]
)
def test_is_the_definition(dtype, size, norm, change):
    for act, gated, in_out in itertools.product(("silu", "gelu_tanh", "gelu"), (True, False), (True, False)):
        if size == "real" and (act, gated) == ("gelu", True):
            continue
        t = drawn(size, dtype, gated=gated, in_out=in_out)
        row = row_of(t, act, norm, change, dtype)
        assert row is not None
        actual = called(row, t, norm)
        # What plain torch makes of a bfloat16 layer rounds the component too; that is the bound, as for the op.
        assert_within_twice(
            actual, plain(t, act, norm, change, dtype), plain(t, act, norm, change, torch.float64), f"{act} {gated} {in_out}",
            factor=2.0 if size in ("real", "wide") else 8.0,
        )  # fmt: skip


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"])
def test_activations_to_the_ends_of_float32(act):
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e15, -1e15])])
    n = len(values)
    up, down = Projection(torch.zeros(n, 1), values), Projection(torch.eye(n))
    row = native_row.native_row((None, None), [Projection(), up, down], {}, act, torch.float32, norm="given")
    error = row(None, torch.zeros(1, 0), torch.zeros(1, 1))[0].double()
    wanted = get_activation(act).forward(values.double())
    error = (error - wanted).abs()
    # 1 + erf loses what it cancels, and e^t an eps for each unit of t, in torch as here; e^x of less than -87 is taken as e^-87.
    own = values.abs().double() if "gelu" in act else wanted.abs()
    assert bool((error <= 8 * 2**-23 * own + 1e-20).all()), float((error / own.clamp_min(1e-30)).max())
    assert float(wanted.abs().max()) > 100  # it compared something


def test_nan_and_infinity_come_out():
    t = drawn("odd", torch.float32)
    for bad in (float("nan"), float("inf")):
        t["rows"][2][0, 3] = bad
        assert bool(called(row_of(t, "silu", "given", False, torch.float32), t, "given").isnan().all())
    t = drawn("odd", torch.bfloat16)
    t["rows"][1][0, 0] = float("nan")
    assert bool(called(row_of(t, "silu", "rms", True, torch.bfloat16), t, "rms").isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_out", [False, True])
def test_the_same_bits_on_any_number_of_threads(dtype, in_out):
    assert native.available().partition(", ")[2] != "one thread"  # torch's runtime was found
    t = drawn("real", dtype, in_out=in_out)
    row, before = row_of(t, "silu", "rms", True, dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found += [called(row, t, "rms") for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("targets", [(), ("gate",), ("up", "down")])
@pytest.mark.parametrize("component", [torch.float32, torch.bfloat16])
def test_targets_that_do_not_change(targets, component):
    t = drawn("real", torch.bfloat16, component=component)
    t["values"] = {name: value for name, value in t["values"].items() if name in targets}
    actual = called(row_of(t, "silu", "given", False, torch.bfloat16), t, "given")
    assert_within_twice(
        actual, plain(t, "silu", "given", False, torch.bfloat16), plain(t, "silu", "given", False, torch.float64)
    )


def test_what_it_cannot_read_is_refused():
    def refused(**change):
        t = drawn("odd", torch.float32) | change
        return row_of(t, "silu", "rms", True, torch.float32) is None

    good = drawn("odd", torch.float32)
    assert not refused()
    gate, up, down = good["projections"]
    assert refused(projections=[gate, up._replace(weight=torch.randn(102, 70)[::2, ::2]), down])  # neither stride is 1
    assert refused(projections=[gate, up._replace(weight=up.weight.double()), down])
    assert refused(projections=[gate, up._replace(bias=torch.randn(102)[::2]), down])
    assert refused(weight=good["weight"].to(torch.bfloat16))
    assert refused(values=good["values"] | {"up": torch.randn(7, 50)})  # another width
    assert refused(projections=[gate, up, down._replace(weight=torch.randn(35, 50))])
    narrow = down._replace(weight=torch.randn(20, 51), bias=torch.randn(20))
    assert refused(projections=[gate, up, narrow], values={"up": good["values"]["up"]})  # h + m has no meaning
    assert refused(values=good["values"] | {"down": good["values"]["down"].to("meta")})
    assert row_of(good, "tanh", "rms", True, torch.float32) is None
    assert row_of(drawn("odd", torch.float16), "silu", "rms", True, torch.float16) is None


def test_a_weight_that_moved_is_noticed():
    t = drawn("odd", torch.float32)
    weight = torch.nn.Parameter(t["projections"][1].weight.clone(), requires_grad=False)
    t["projections"][1] = t["projections"][1]._replace(weight=weight)
    row = row_of(t, "silu", "rms", True, torch.float32, watched=[weight])
    assert not row.moved()
    weight.data = weight.data.clone()
    assert row.moved()


# ---- as the op ---------------------------------------------------------------------------------------------------------------


def op_arguments(dtype, component=None, gated=True, rank=9):
    d, f = 40, 56
    g = torch.Generator().manual_seed(1)

    def some(*shape):
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    targets = ("gate", "up", "down") if gated else ("c_fc", "c_proj")
    values = {t: some(rank, d if t in ("down", "c_proj") else f) for t in targets}
    adapter = AdapterTensors(some(d, rank), {}, values, "self_key", 1, 1.0)
    weights = [some(f, d)] * gated + [some(f, d), some(d, f)]
    return some(1, d) * d**0.5, some(1, d) * d**0.5, weights, adapter, {"key_scale": torch.tensor([0.7]).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_the_op_runs_on_it(dtype, gated, monkeypatch):
    x, a, weights, adapter, more = op_arguments(dtype, gated=gated)
    op = npt_gated_mlp if gated else npt_mlp
    counted = []
    monkeypatch.setattr(native_row, "native_row", lambda *args, **kw: counted.append(1) or made(*args, **kw))
    made = _native_row
    with torch.no_grad():
        mine = op(x, a, *weights, adapter, **more)
        assert counted
        monkeypatch.setattr(native, "compiled", None)
        theirs = op(x, a, *weights, adapter, **more)
        wide = AdapterTensors(
            adapter.w_down.double(), {}, {n: v.double() for n, v in adapter.w_b_up.items()}, "self_key", 1, 1.0
        )
        more = {"key_scale": more["key_scale"].double()}
        truth = op(x.double(), a.double(), *(w.double() for w in weights), wide, **more)
    assert_within_twice(mine, theirs, truth, factor=4.0)


_native_row = native_row.native_row


def test_the_op_keeps_to_torch_where_numbers_are_not_there(monkeypatch):
    x, a, weights, adapter, _ = op_arguments(torch.float32)
    monkeypatch.setattr(native_row, "native_row", lambda *_, **__: pytest.fail("it read addresses"))
    with torch.no_grad():
        many = torch.func.vmap(lambda x, a: npt_gated_mlp(x[None], a[None], *weights, adapter)[0])(
            torch.randn(3, 40), torch.randn(3, 40)
        )
        assert many.shape == (3, 40)
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            assert npt_gated_mlp(x, a, *weights, adapter).shape == (1, 40)
        traced = torch.jit.trace(lambda x, a: npt_gated_mlp(x, a, *weights, adapter), (x, a), check_trace=False)
        other = torch.randn(1, 40), torch.randn(1, 40)
        assert torch.equal(traced(*other), traced(*other)) and not torch.equal(traced(*other), traced(x, a))
        npt_gated_mlp(torch.randn(2, 40), torch.randn(2, 40), *weights, adapter)  # two tokens
    npt_gated_mlp(x.requires_grad_(), a, *weights, adapter)  # with gradients
    monkeypatch.undo()
    rank1 = AdapterTensors(
        adapter.w_down,
        {t: torch.randn(9, 40 if t != "down" else 56) for t in adapter.w_b_up},
        adapter.w_b_up,
        "rank1",
        1,
        1.0,
    )
    with torch.no_grad():
        monkeypatch.setattr(native_row, "native_row", lambda *_, **__: pytest.fail("a rule with a key"))
        npt_gated_mlp(x, a, *weights, rank1)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instructions(capability):
    """What this CPU would not choose by itself, for the tests above that compare numbers."""
    run_again(__file__, "definition or ends_of_float32 or threads or nan", capability)
    code = "from npt_kernels.kernels import native; print(native.available())"
    name = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    ).stdout
    if platform.machine() == "x86_64":
        assert name.startswith("avx2" if capability == "avx2" else "generic")


def test_threads_of_a_forked_process():
    """OpenMP's threads do not survive a fork: the child must not wait for them."""
    code = """
import os, sys, torch
sys.path.insert(0, {root!r})
from tests.ops.test_native_row import drawn, row_of, called
torch.set_num_threads(1)
t = drawn("real", torch.float32)
row = row_of(t, "silu", "rms", True, torch.float32)
y = called(row, t, "rms")
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(called(row, t, "rms"), y) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(root=ROOT)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout == "same\n", done.stderr
