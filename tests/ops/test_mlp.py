"""``npt_gated_mlp`` and ``npt_mlp``: sixteen tensors, four rules, every set of targets."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from npt_kernels import AdapterTensors, NPComponent, npt_gated_mlp, npt_mlp
from npt_kernels.kernels import native
from npt_kernels.ops.mlp.op import OP as op
from tests.support.helpers import (
    ALL_RULES,
    MLP_TENSORS,
    assert_within_twice,
    check_twice,
    integers,
    mlp_problem,
    randn,
    subsets,
)
from tests.support.mlp_calls import mlp_operands

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = [s for s in subsets(("gate", "up", "down")) if s]
PLAIN_TARGETS = [s for s in subsets(("up", "down")) if s]
rules = pytest.mark.parametrize("rule", ALL_RULES)


def problem_of(rule, targets, gated=True, **kwargs):
    return mlp_problem(rule, targets=targets, gated=gated, **kwargs)


FORMS = [(True, t) for t in TARGETS] + [(False, t) for t in PLAIN_TARGETS]
forms = pytest.mark.parametrize(
    ("gated", "targets"), FORMS, ids=[f"{'gated' if g else 'plain'}-{'+'.join(t)}" for g, t in FORMS]
)


def grad_inputs(problem):
    names, leaves = problem.present(), problem.leaves()
    return (lambda *t: problem.op(**(leaves | dict(zip(names, t, strict=True))))), tuple(leaves[n] for n in names)


@rules
@forms
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(rule, gated, targets, k):
    f, leaves = grad_inputs(
        problem_of(rule, targets, gated, tokens=2, d=3, f=4, d_a=2, r=1 if k == 3 else 2, k=k, d_out=2)
    )
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu", "relu2", "quick_gelu"])
def test_gradcheck_of_every_activation(act, gated):
    f, leaves = grad_inputs(
        problem_of("rank1", ("gate", "up", "down") if gated else ("up", "down"), gated, tokens=2, act=act)
    )
    assert torch.autograd.gradcheck(f, leaves)


@rules
@forms
@pytest.mark.parametrize("key_scale", [True, False])
def test_equals_definition(rule, gated, targets, key_scale):
    for tokens, d, f, d_a, r, k, bias in (
        (0, 4, 6, 3, 2, 1, True),
        (1, 5, 3, 5, 1, 1, False),
        (19, 9, 13, 7, 3, 2, True),
    ):
        problem = problem_of(
            rule,
            targets,
            gated,
            tokens=tokens,
            d=d,
            f=f,
            d_a=d_a,
            r=r,
            k=k,
            bias=bias,
            key_scale=key_scale,
            normalise=True,
        )
        (y, grads), (y_true, grads_true) = problem.run("op"), problem.run("naive")
        torch.testing.assert_close(y, y_true, rtol=1e-10, atol=1e-10)
        for name in problem.present():
            got, want = grads[name], grads_true[name]
            if want is None:  # the definition does not use it; the op says so with zeros
                assert got is None or not got.any(), name
                continue
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d {n}: {m}")


@rules
@given(data=st.data())
def test_any_shape_equals_definition(rule, data):
    tokens, d, f, d_a, r, k, d_out = (data.draw(st.integers(low, 6)) for low in (0, 1, 1, 1, 1, 1, 1))
    gated, targets = data.draw(st.sampled_from(FORMS))
    problem = problem_of(
        rule, targets, gated, tokens=tokens, d=d, f=f, d_a=d_a, r=r, k=k, d_out=d_out, bias=data.draw(st.booleans()),
        key_scale=data.draw(st.booleans()), normalise=True,
    )  # fmt: skip
    (y, grads), (y_true, grads_true) = problem.run("op"), problem.run("naive")
    torch.testing.assert_close(y, y_true, rtol=1e-9, atol=1e-9)
    for name in problem.present():
        if grads_true[name] is not None:
            torch.testing.assert_close(grads[name], grads_true[name], rtol=1e-9, atol=1e-9)


@rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gated", "targets"), [(True, ("gate", "up", "down")), (True, ("gate",)), (False, ("up", "down"))], ids=str
)
@pytest.mark.parametrize(("tokens", "k"), [(32, 1), (70, 2)])
def test_twice(rule, dtype, gated, targets, tokens, k):
    problem = problem_of(rule, targets, gated, tokens=tokens, d=48, f=80, d_a=48, r=8, k=k, dtype=dtype, normalise=True)
    check_twice(problem, f"{rule} {dtype}")


@pytest.mark.parametrize("rule", ["rank1", "anchored", "self_key"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_small_integers_are_exact(rule, gated, dtype, tokens):
    """ReLU keeps integers integers. fp32 holds every sum here (below 2²⁴) exactly, so equality is strict."""

    def make(*shape, dtype):
        return integers(*shape, dtype=dtype, density=0.4)

    problem = problem_of(
        rule,
        ("gate", "up", "down") if gated else ("up", "down"),
        gated,
        tokens=tokens,
        d=6,
        f=7,
        act="relu",
        make=make,
        dtype=dtype,
    )
    grad = integers(tokens, 6)
    y, grads = problem.run("op", grad=grad)
    y_true, grads_true = problem.run("reference", grad=grad, dtype=torch.float64)  # naive divides for self_key
    assert 0 < y_true.abs().max() < 2**24
    assert torch.equal(y.double(), y_true)
    for name in problem.present():
        assert torch.equal(grads[name].double(), grads_true[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_integers_are_exact_in_low_precision(dtype):
    """The linear rule on sparse integers stays below 256, where bf16 is exact in every intermediate."""

    def make(*shape, dtype):
        return integers(*shape, dtype=dtype, density=0.25)

    problem = problem_of("self_key", ("gate", "up", "down"), tokens=8, d=6, f=5, act="relu", make=make, dtype=dtype)
    grad = integers(8, 6, density=0.25)
    y, grads = problem.run("op", grad=grad)
    y_true, grads_true = problem.run("reference", grad=grad, dtype=torch.float64)  # naive divides for self_key
    assert 2 < max(y_true.abs().max(), *(g.abs().max() for g in grads_true.values() if g is not None)) <= 256
    assert torch.equal(y.double(), y_true)
    for name in problem.present():
        assert torch.equal(grads[name].double(), grads_true[name]), name


def raw_args(problem, needs, rule, k=1, act="silu"):
    return (*mlp_operands(problem.leaves(needs).values()).flat(), act, rule, k, 0.7, True, "eager")


@rules
@pytest.mark.parametrize(
    ("gated", "targets"), [(True, ("gate", "up", "down")), (True, ("down",)), (False, ("up",))], ids=str
)
@pytest.mark.parametrize("k", [1, 3])
def test_opcheck(rule, gated, targets, k):
    problem = problem_of(rule, targets, gated, k=k, dtype=torch.float32)
    trained = [n for n in problem.present() if n.endswith(("_key", "_value")) or n == "w_down"]
    opcheck(op.library_op, raw_args(problem, problem.present(), rule, k))
    opcheck(
        op.library_op, raw_args(problem, trained, rule, k), test_utils=("test_faketensor", "test_aot_dispatch_dynamic")
    )


def check_needs(problem, needs, full):
    y_all, grads_all = full
    y, grads = problem.run("op", needs)
    assert torch.equal(y, y_all)
    for name in problem.present():
        if name in needs:
            assert grads[name] is not None, (needs, name)
            torch.testing.assert_close(
                grads[name], grads_all[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{needs} d {n}: {m}"
            )
        else:
            assert grads[name] is None, (needs, name)


@rules
@forms
def test_every_single_gradient_and_every_pair(rule, gated, targets):
    problem = problem_of(rule, targets, gated, k=2)
    full = problem.run("op")
    names = problem.present()
    for needs in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2), [()]):
        check_needs(problem, needs, full)


@rules
@given(data=st.data())
def test_drawn_subsets_of_gradients(rule, data):
    gated, targets = data.draw(st.sampled_from(FORMS))
    problem = problem_of(rule, targets, gated)
    needs = data.draw(st.lists(st.sampled_from(problem.present()), unique=True))
    check_needs(problem, tuple(needs), problem.run("op"))


@rules
def test_drawn_subsets_of_gradients_through_the_library_op(rule):
    """The opaque backward returns a list without gaps: order and length must follow ``needs`` there too."""
    problem = problem_of(rule, ("gate", "up", "down"))
    names = problem.present()
    _, grads_all = problem.run("op")
    upstream = torch.randn(5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for needs in itertools.combinations(names, 2):
        leaves = problem.leaves(needs)
        operands = mlp_operands(leaves.values()).flat()
        op.library_op(*operands, "silu", rule, 1, 0.7, True, "eager")[0].backward(upstream)
        for name in names:
            if name in needs:
                torch.testing.assert_close(leaves[name].grad, grads_all[name], rtol=1e-12, atol=1e-12)
            else:
                assert leaves[name].grad is None


# -------------------------------------------------------------------------------------- the other invariants


@rules
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_zero_adapter_is_bitwise_the_plain_mlp(rule, dtype, compiled, monkeypatch):
    """``w_b_up = 0`` gives the very bits of the same backend without a delta; without compiled loops those of plain PyTorch."""
    if not compiled:
        monkeypatch.setattr(native, "compiled", None)
    for gated in (True, False):
        targets = ("gate", "up", "down") if gated else ("up", "down")
        problem = problem_of(rule, targets, gated, tokens=11, d=32, f=24, r=4, dtype=dtype, normalise=True)
        t = {
            n: torch.zeros_like(v) if n.endswith("_value") and v is not None else v for n, v in problem.tensors.items()
        }
        bare = {n: None if n.endswith(("_key", "_value")) else v for n, v in t.items()}
        y = problem.op(**t)
        assert torch.equal(y, problem.op(**bare))
        plain = problem.reference(**bare)
        if native.compiled is None:
            assert torch.equal(y, plain)
        else:
            assert_within_twice(
                y, plain, problem.reference(**{n: None if v is None else v.double() for n, v in bare.items()})
            )
        assert y.abs().max() > 0.01


@rules
def test_two_runs_are_bitwise_equal(rule):
    problem = problem_of(rule, ("gate", "up", "down"), tokens=33, d=32, f=48, r=8, dtype=torch.bfloat16, normalise=True)
    (y1, g1), (y2, g2) = problem.run("op"), problem.run("op")
    assert torch.equal(y1, y2)
    assert all(torch.equal(g1[n], g2[n]) for n in problem.present())


@rules
@pytest.mark.parametrize("gated", [True, False])
def test_inputs_are_not_written(rule, gated):
    problem = problem_of(rule, ("gate", "up", "down") if gated else ("up", "down"), gated, k=2)
    leaves = problem.leaves()
    problem.op(**leaves).sum().backward()
    with torch.no_grad():
        problem.op(**leaves)
    for name, leaf in leaves.items():
        assert leaf is None or torch.equal(leaf.detach(), problem.tensors[name]), name


@rules
def test_backward_twice_with_retain_graph(rule):
    """The backward works in place on its own buffers only: what was saved is intact for the second pass."""
    problem = problem_of(rule, ("gate", "up", "down"))
    leaves = problem.leaves()
    y = problem.op(**leaves).square().sum()
    y.backward(retain_graph=True)
    first = {n: leaves[n].grad.clone() for n in problem.present()}
    y.backward()
    for name in problem.present():
        assert torch.equal(leaves[name].grad, 2 * first[name]), name


@rules
@pytest.mark.parametrize("leading", [(), (2, 3), (0, 3)], ids=str)
def test_leading_dimensions(rule, leading):
    t = problem_of(rule, ("gate", "up", "down")).tensors
    problem = problem_of(rule, ("gate", "up", "down"))
    shaped = {"x": randn(*leading, 4), "a": randn(*leading, 3), "key_scale": randn(*leading)}
    flat = {
        "x": shaped["x"].reshape(-1, 4),
        "a": shaped["a"].reshape(-1, 3),
        "key_scale": shaped["key_scale"].reshape(-1),
    }
    flat = {n: v.clone() for n, v in flat.items()}
    for group in (shaped, flat):
        for tensor in group.values():
            tensor.requires_grad_()
    y, y_flat = problem.op(**(t | shaped)), problem.op(**(t | flat))
    assert y.shape == (*leading, 4)
    assert torch.equal(y.reshape(-1, 4), y_flat)
    y.square().sum().backward()
    y_flat.square().sum().backward()
    for name in shaped:
        assert torch.equal(shaped[name].grad.reshape(flat[name].shape), flat[name].grad), name


@rules
@pytest.mark.parametrize("gated", [True, False])
def test_strides(rule, gated):
    """Everything transposed (as Conv1D stores weights), sliced or expanded; the zero-stride gradient of ``sum()``."""
    problem = problem_of(rule, ("gate", "up", "down") if gated else ("up", "down"), gated, k=2)

    def strided(name, tensor):
        if tensor is None:
            return None
        if name in ("up_bias", "w_down"):
            return tensor[:1].expand_as(tensor)
        return tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, tensor], -1)[..., 0]

    views = {n: strided(n, t) for n, t in problem.tensors.items()}
    assert not any(v.is_contiguous() for v in views.values() if v is not None)
    results = []
    for dense in (False, True):
        leaves = {
            n: None
            if v is None
            else (v.clone(memory_format=torch.contiguous_format) if dense else v).detach().requires_grad_()
            for n, v in views.items()
        }
        y = problem.op(**leaves)
        y.backward(torch.ones_like(y)) if dense else y.sum().backward()
        results.append([y, *(v.grad for v in leaves.values() if v is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_x_and_a_may_be_one_tensor():
    problem = problem_of("rank1", ("gate", "up", "down"), d_a=4)
    grads = []
    for f in (problem.op, problem.naive):
        leaves = problem.leaves()
        f(**(leaves | {"a": leaves["x"]})).square().sum().backward()
        grads.append(leaves["x"].grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_one_weight_in_two_places():
    """Tied gate and up, tied values: gradients add up."""
    problem = problem_of("self_key", ("gate", "up"))
    results = []
    for f in (problem.op, problem.naive):
        leaves = problem.leaves()
        tied = leaves | {"up_weight": leaves["gate_weight"], "up_value": leaves["gate_value"]}
        f(**tied).square().sum().backward()
        results.append((leaves["gate_weight"].grad, leaves["gate_value"].grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@rules
def test_functional_grad(rule):
    problem = problem_of(rule, ("gate", "up", "down"))
    names = problem.present()
    tensors, absent = tuple(problem.tensors[n] for n in names), {n: None for n in MLP_TENSORS if n not in names}

    def loss(f):
        return lambda *t: f(**absent, **dict(zip(names, t, strict=True))).square().sum()

    argnums = tuple(range(len(names)))
    got, want = (torch.func.grad(loss(f), argnums)(*tensors) for f in (problem.op, problem.naive))
    for name, g, w in zip(names, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d {n}: {m}")


@rules
def test_autocast_with_fp32_component(rule):
    """fp32 activations and master parameters: compute in bf16, fp32 gradients, bitwise those of a bf16 call."""
    component = NPComponent(16, {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}, rank=4, rule=rule, scale=0.7)
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    x, a = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    weights = [torch.randn(24, 16) / 4, torch.randn(24, 16) / 4, torch.randn(16, 24) / 5]
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = npt_gated_mlp(x, a, *weights, component)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    grads = {n: p.grad.clone() for n, p in component.named_parameters()}
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads.values())
    assert x.grad.dtype == torch.float32
    component.zero_grad()
    low = npt_gated_mlp(x.detach().bfloat16(), a.bfloat16(), *(w.bfloat16() for w in weights), component)
    low.sum().backward()
    assert torch.equal(y, low)
    for name, parameter in component.named_parameters():
        assert torch.equal(parameter.grad, grads[name]), name


@pytest.mark.parametrize("form", ["component", "tensors", "mapping"])
def test_adapter_forms_agree(form):
    component = NPComponent(
        6, {"c_fc": (6, 8), "c_proj": (8, 6)}, rank=2, rule="rank1", num_ranks=2, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tensors = component.tensors()
    mapping = {
        "w_down": tensors.w_down,
        "w_a_up": tensors.w_a_up,
        "w_b_up": tensors.w_b_up,
        "rule": "rank1",
        "num_ranks": 2,
    }
    adapter = {"component": component, "tensors": tensors, "mapping": mapping}[form]
    args = randn(3, 6), randn(3, 6), randn(8, 6), randn(6, 8)
    keys, values = tensors.w_a_up, tensors.w_b_up
    operands = mlp_operands(
        (*args[:2], None, None, *args[2:], None, None, None, tensors.w_down, None, None,
         keys["c_fc"], values["c_fc"], keys["c_proj"], values["c_proj"])
    )  # fmt: skip
    direct = op(*operands.flat(), "gelu_new", "rank1", 2, 1.0, False, "eager")[0]
    y = npt_mlp(*args, adapter)
    assert torch.equal(y, direct)
    assert not torch.equal(y, npt_mlp(*args, AdapterTensors(tensors.w_down)))


@rules
def test_a_call_that_was_right_does_not_hide_a_wrong_one(rule):
    """Checks are remembered by shapes, dtypes and devices; every way to be wrong must be among what is remembered."""
    problem = problem_of(rule, ("gate", "up", "down"), tokens=4, bias=True, dtype=torch.float32)
    problem.run("op")
    for name, bad in (
        ("gate_bias", [1.0]), ("up_weight", torch.ones(3, 3)), ("down_value", torch.ones(1, 1)), ("w_down", torch.ones(2, 2)),
        ("up_bias", torch.ones(6, dtype=torch.float64)), ("down_weight", problem.tensors["down_weight"].double()),
        ("key_scale", torch.ones(3)), ("a", problem.tensors["a"][:3]),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises((ValueError, TypeError)) as caught:
                problem.op(**(problem.leaves() | {name: bad}))
            assert "\n" not in str(caught.value)
    adapter = {"w_down": randn(5, 2), "w_b_up": {"down": randn(2, 3)}}
    arguments = (randn(4, 3), randn(4, 5), randn(6, 3), randn(6, 3), randn(3, 6))
    npt_gated_mlp(*arguments, adapter | {"num_ranks": 1})
    for ranks in (True, [1], 0, 1.0):
        with pytest.raises((ValueError, TypeError), match="num_ranks"):
            npt_gated_mlp(*arguments, adapter | {"num_ranks": ranks})


# ---- the bottleneck given, and a factor on the normed input -------------------------------------------------------------


@rules
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_given_bottleneck(rule, gated, tokens):
    """``w_down=None``: ``a`` is z. Values and gradients are those of the same op with z computed before it."""
    problem = problem_of(
        rule, ("gate", "up", "down") if gated else ("up", "down"), gated, tokens=tokens, d_a=4, r=2, k=2
    )
    problem.tensors["w_down"] = None
    (y, grads), (truth, wanted) = problem.run("op"), problem.run("naive")
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    for name in problem.present():
        torch.testing.assert_close(
            grads[name], wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d {n}: {m}"
        )
    torch.testing.assert_close(problem.run("op", needs=["a"])[1]["a"], wanted["a"], rtol=1e-10, atol=1e-10)
    names = problem.present()
    present = dict(zip(names, (problem.tensors[n] for n in names), strict=True))
    flat = mlp_operands([present.get(n) for n in MLP_TENSORS]).flat()
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in flat]
    opcheck(
        op.library_op, (*leaves, "silu", rule, 2, 0.7, True, "eager"), test_utils=("test_schema", "test_faketensor")
    )


def test_given_bottleneck_of_another_width_is_named():
    problem = problem_of("self_key", ("gate",), tokens=3, d_a=5, r=2, k=1)
    problem.tensors["w_down"] = None
    with pytest.raises(ValueError, match=r"w_b_up\[gate\] has shape \[2, 6\], expected \[R, out\] = \[5, 6\]"):
        problem.run("op")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_row_scale(dtype, gated, bias):
    """Its gradient is that of a factor on x and key_scale, taken without a product of the input's width."""
    targets = ("gate", "up", "down") if gated else ("up", "down")
    problem = problem_of(
        "self_key", targets, gated, tokens=9, d=16, f=24, d_a=16, r=4, dtype=dtype, bias=bias, normalise=True
    )
    truth = dict.fromkeys(MLP_TENSORS) | {n: problem.tensors[n].double() for n in problem.present()}
    ones = torch.ones(9, dtype=torch.float64, requires_grad=True)
    wanted_y = problem.naive(**truth, row_scale=ones)
    upstream = randn(*wanted_y.shape, dtype=dtype)
    (wanted,) = torch.autograd.grad(wanted_y, ones, upstream.double())

    def run(call):
        rows = torch.ones(9, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        y = call(rows)
        return y.detach(), torch.autograd.grad(y, rows, upstream)[0]

    t = problem.tensors
    names = {"gate": "gate", "up": "up", "down": "down"} if gated else {"up": "c_fc", "down": "c_proj"}
    adapter = AdapterTensors(
        t["w_down"], {}, {name: t[f"{slot}_value"] for slot, name in names.items()}, "self_key", 1, 0.7
    )
    if gated:
        y, got = run(lambda rows: npt_gated_mlp(
            t["x"], t["a"], t["gate_weight"], t["up_weight"], t["down_weight"], adapter, key_scale=t["key_scale"],
            row_scale=rows, gate_bias=t["gate_bias"], up_bias=t["up_bias"], down_bias=t["down_bias"],
        ))  # fmt: skip
    else:
        y, got = run(lambda rows: npt_mlp(
            t["x"], t["a"], t["up_weight"], t["down_weight"], adapter, act="silu", key_scale=t["key_scale"],
            row_scale=rows, c_fc_bias=t["up_bias"], c_proj_bias=t["down_bias"],
        ))  # fmt: skip

    def plain(rows):
        own = rows.to(dtype)
        scaled = dict(t) | {"x": t["x"] * own.unsqueeze(1), "key_scale": t["key_scale"] * own}
        return problem.reference(**scaled)

    reference_y, reference = run(plain)
    if dtype == torch.float64:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(y, wanted_y.detach(), rtol=1e-10, atol=1e-10)
        return
    assert_within_twice(y, reference_y, wanted_y.detach())
    assert_within_twice(got, reference, wanted)


def test_row_scale_is_refused_for_a_change_that_is_not_linear_in_x():
    problem = problem_of("rank1", ("gate",), tokens=3)
    t = problem.tensors
    adapter = AdapterTensors(t["w_down"], {"gate": t["gate_key"]}, {"gate": t["gate_value"]}, "rank1", 1, 0.7)
    with pytest.raises(ValueError, match="row_scale has no gradient under rule='rank1'"):
        npt_gated_mlp(
            t["x"],
            t["a"],
            t["gate_weight"],
            t["up_weight"],
            t["down_weight"],
            adapter,
            row_scale=torch.ones(3).double(),
        )
