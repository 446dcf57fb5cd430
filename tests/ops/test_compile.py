"""``torch.compile(fullgraph=True)``: one compile for every T, the same numbers as eager, no library op outside compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_factored_linear, npt_parameters
from npt_kernels.ops.factored_linear import factored_linear
from npt_kernels.ops.linear import linear
from npt_kernels.ops.mlp.op import OP as mlp
from tests.support.helpers import ALL_RULES, factored_problem, linear_problem, mlp_problem, tiny_model, token_ids

PER_TOKEN = {"x", "z", "v_a", "v_b", "a", "key_scale"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem_of(op: str, rule: str, tokens: int):
    if op == "linear":
        return linear_problem(tokens, 6, 7, 2, dtype=torch.float32)
    if op == "factored_linear":
        return factored_problem(rule, tokens, 6, 7, 2, 2, dtype=torch.float32)
    gated = op == "gated_mlp"
    targets = ("gate", "up", "down") if gated else ("up", "down")
    return mlp_problem(rule, tokens, 6, 9, 5, 2, 2, gated=gated, targets=targets, dtype=torch.float32, normalise=True)


CASES = [
    ("linear", "rank1"),
    *((op, rule) for op in ("factored_linear", "gated_mlp", "plain_mlp") for rule in ALL_RULES),
]
cases = pytest.mark.parametrize(("op", "rule"), CASES, ids=["-".join(c) for c in CASES])


def run(f, problem, leaves):
    y = f(**leaves)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves.values() if leaf is not None)]


@pytest.mark.parametrize(
    ("op", "rule", "frozen"),
    [(*case, False) for case in CASES] + [("factored_linear", "self_key", True), ("gated_mlp", "rank1", True)],
    ids=lambda v: {True: "frozen", False: "all gradients"}.get(v, v),
)
def test_one_compile_for_every_number_of_tokens(op, rule, frozen):
    """T = 1, 7, 128 (1 first, where specialising is most tempting), forward and backward equal eager."""
    problem = problem_of(op, rule, 3)
    needs = problem.present()
    if frozen:
        needs = [n for n in needs if n not in ("x", "a", "key_scale") and not n.endswith(("weight", "bias"))]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(problem.op, backend=counter, fullgraph=True, dynamic=True)
    frames = None
    with fx_config.patch(backed_size_oblivious=True):
        for tokens in (1, 7, 128):
            fresh = problem_of(op, rule, tokens)
            for name in set(problem.tensors) - PER_TOKEN:
                fresh.tensors[name] = problem.tensors[name]
            with torch._dynamo.config.patch(error_on_recompile=frames is not None):
                got = run(compiled, fresh, fresh.leaves(needs))
            assert frames in (None, counter.frame_count), f"compiled again for T = {tokens}"
            frames = counter.frame_count
            want = run(fresh.op, fresh, fresh.leaves(needs))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)
    assert frames > 0


@pytest.mark.parametrize("rule", ALL_RULES)
def test_unbacked_token_dimension(rule):
    """T may even be unknown at compile time (``mark_unbacked``): exactly one compile."""
    problem = problem_of("gated_mlp", rule, 3)
    rest = {n: t for n, t in problem.leaves().items() if n not in PER_TOKEN}
    w = torch.randn(6, 5)

    def block(h, key_scale):
        return problem.op(x=h, a=h @ w, key_scale=key_scale, **rest)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    trained = [t for t in rest.values() if t is not None]
    for tokens in (1, 7, 128):
        inputs = torch.randn(tokens, 6), torch.rand(tokens)
        for tensor in inputs:  # two unknown sizes that the op must take for one
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        y = compiled(*inputs)
        torch.testing.assert_close(y, block(*inputs), rtol=1e-6, atol=1e-6)
        for g, want in zip(
            torch.autograd.grad(y.sum(), trained), torch.autograd.grad(block(*inputs).sum(), trained), strict=True
        ):
            torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("rule", ["self_key", "rank1"])
def test_stack_whose_first_input_needs_no_gradient(rule):
    """Layer 1 has a frozen input, layer 2 a trained one: one compile, nothing again for a new T."""
    layers = [problem_of("gated_mlp", rule, 3) for _ in range(2)]
    parameters = [
        {
            n: t
            for n, t in p.leaves([n for n in p.present() if n.endswith(("_key", "_value")) or n == "w_down"]).items()
            if n not in PER_TOKEN
        }
        for p in layers
    ]

    def stack(h, a):
        for problem, tensors in zip(layers, parameters, strict=True):
            h = h + problem.op(x=h, a=a, key_scale=None, **tensors)
        return h

    trained = [t for tensors in parameters for t in tensors.values() if t is not None and t.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, backend=counter, fullgraph=True, dynamic=True)
    frames = None
    for tokens in (11, 31, 64):  # no other dimension has these sizes: equal ones would be tied by duck sizing
        h, a = torch.randn(tokens, 6), torch.randn(tokens, 5)
        with torch._dynamo.config.patch(error_on_recompile=frames is not None):
            y = compiled(h, a)
        assert frames in (None, counter.frame_count)
        frames = counter.frame_count
        torch.testing.assert_close(y, stack(h, a), rtol=1e-6, atol=1e-6)
        for g, want in zip(
            torch.autograd.grad(y.sum(), trained), torch.autograd.grad(stack(h, a).sum(), trained), strict=True
        ):
            torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-5)


def test_inductor():
    problem = problem_of("gated_mlp", "rank1", 8)
    compiled = torch.compile(lambda **t: problem.op(**t) * 2, backend="inductor", fullgraph=True)
    got = run(compiled, problem, problem.leaves())
    want = run(lambda **t: problem.op(**t) * 2, problem, problem.leaves())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_compiled_autocast_equals_eager():
    problem = problem_of("gated_mlp", "self_key", 9)

    def f(**t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return problem.op(**t)

    got = run(torch.compile(f, backend="aot_eager", fullgraph=True), problem, problem.leaves())
    want = run(f, problem, problem.leaves())
    assert got[0].dtype == torch.bfloat16
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


class LibraryOps(TorchDispatchMode):
    """Names of our ``torch.library`` ops that were dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npt_kernels":
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@cases
def test_eager_bypasses_the_library(op, rule):
    problem = problem_of(op, rule, 4)
    with LibraryOps() as mode:
        run(problem.op, problem, problem.leaves())
        with torch.no_grad():
            problem.op(**problem.leaves())
    assert mode.seen == set()


def test_the_probe_sees_library_ops():
    problem = problem_of("factored_linear", "rank1", 4)
    with LibraryOps() as mode:
        factored_linear.library_op(*problem.leaves().values(), "rank1", 2, 0.7, "eager")[0].sum().backward()
    assert mode.seen == {"factored_linear", "factored_linear_backward"}


def test_compiled_code_keeps_the_op_whole():
    """One opaque node a call: the compiler must not take the in-place GEMMs apart."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    problem = problem_of("factored_linear", "rank1", 4)
    torch.compile(problem.op, backend=backend, fullgraph=True)(**problem.leaves())
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("npt_kernels" in t for t in targets) == 1
    assert not any("addmm" in t for t in targets)


def test_library_names():
    assert [o.name for o in (linear, factored_linear, mlp)] == ["linear", "factored_linear", "mlp"]
    for name in ("linear", "factored_linear", "mlp"):
        assert hasattr(torch.ops.npt_kernels, name)
        assert hasattr(torch.ops.npt_kernels, f"{name}_backward")


def test_no_compile_for_bad_arguments():
    """A shape error inside compiled code is our message, not a puzzle from the tracer."""
    f = torch.compile(lambda *t: npt_factored_linear(*t, rule="self_key"), backend="eager")
    with pytest.raises(Exception, match="w_b_up has shape"):
        f(torch.randn(3, 4), torch.randn(3, 2), torch.randn(5, 4), None, torch.randn(3, 5))


# --------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whole_model(name):
    model = tiny_model(name, layers=2, **({"attn_implementation": "sdpa"} if name == "llama" else {}))
    apply_npt(model, NPTConfig(layers="all", rank=8, init="published"))

    def logits(ids):
        return model(input_ids=ids, use_cache=False).logits

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(logits, backend=counter, fullgraph=True, dynamic=True)
    frames, trained = None, npt_parameters(model)
    for length in (7, 20, 48):
        ids = token_ids(2, length)
        with torch._dynamo.config.patch(error_on_recompile=frames is not None):
            y = compiled(ids)
        assert frames in (None, counter.frame_count)
        frames = counter.frame_count
        torch.testing.assert_close(y, logits(ids), rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(y.square().sum(), trained)
        want = torch.autograd.grad(logits(ids).square().sum(), trained)
        for g, w in zip(got, want, strict=True):
            assert g.abs().max() > 0
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_disabling_a_compiled_model():
    model = tiny_model("llama", layers=1)
    ids = token_ids()
    original = model(ids, use_cache=False).logits
    apply_npt(model, NPTConfig(layers="all", rank=8, init="published"))
    compiled = torch.compile(lambda i: model(i, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    converted = compiled(ids)
    with npt_disabled(model):
        torch.testing.assert_close(compiled(ids), original, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(ids), converted, rtol=1e-6, atol=1e-6)
    assert (converted - original).abs().max() > 1e-3
