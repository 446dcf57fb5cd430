"""``NPComponent``: parameters, tying, casts, vectors and penalties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from npt_kernels import AdapterTensors, NPComponent
from npt_kernels.component import as_adapter_tensors
from npt_kernels.kernels import cpu_layout
from npt_kernels.rules import get_rule
from tests.support.helpers import ALL_RULES, randn

D, F, R = 6, 10, 2
TARGETS = {"gate": (D, F), "up": (D, F), "down": (F, D)}
rules = pytest.mark.parametrize("rule", ALL_RULES)
ks = pytest.mark.parametrize("k", [1, 3])


def component(rule, k=1, dtype=torch.float64, scale=0.7):
    made = NPComponent(D, TARGETS, rank=R, rule=rule, num_ranks=k, scale=scale, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


@rules
@ks
def test_parameter_shapes(rule, k):
    shapes = {name: tuple(p.shape) for name, p in component(rule, k).named_parameters()}
    total = k * R
    expected = {"w_down": (D, total)} | {f"w_b_up.{t}": (total, out) for t, (_, out) in TARGETS.items()}
    if rule == "diagonal":
        expected |= {"w_a_up.down": (total, F)}  # gate and up are tied to w_down
    elif get_rule(rule).key == "matrix":
        expected |= {f"w_a_up.{t}": (total, d_in) for t, (d_in, _) in TARGETS.items()}
    elif get_rule(rule).key == "vector":
        expected |= {f"w_a_up.{t}": (d_in,) for t, (d_in, _) in TARGETS.items()}
    assert shapes == expected


def test_starts_at_zero_in_fp32_and_trains():
    made = NPComponent(D, TARGETS, rank=R)
    assert made.rule_name == "self_key" and made.enabled
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.any() for p in made.parameters())


@rules
@ks
@pytest.mark.parametrize("target", list(TARGETS))
def test_vectors_and_norms(rule, k, target):
    made = component(rule, k)
    a, u = randn(5, D), randn(5, TARGETS[target][0])
    v_a, v_b = made.vectors(a, u, target)
    z = made(a)
    assert torch.equal(z, a @ made.w_down)
    tensors = made.tensors()
    want = get_rule(rule).vectors(z, u, tensors.w_a_up.get(target), tensors.w_b_up[target], k, 0.7)
    assert torch.equal(v_a, want[0]) and torch.equal(v_b, want[1])
    norm_a, norm_b = made.vector_norms(z, u, target)
    torch.testing.assert_close(norm_a, v_a.square().sum((1, 2)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(norm_b, v_b.square().sum((1, 2)), rtol=1e-11, atol=1e-11)


def test_tied_key_gets_both_gradients():
    """diagonal: A is bottleneck and key at once, so its gradient is the sum of the two uses."""
    made = component("diagonal")
    tensors = made.tensors()
    assert tensors.w_a_up["gate"].data_ptr() == made.w_down.data_ptr()
    assert torch.equal(tensors.w_a_up["gate"], made.w_down.t())
    a, u = randn(5, D), randn(5, D)

    def loss(w_bottleneck, w_key):
        c = 0.7 * torch.tanh(a @ w_bottleneck) * (u @ w_key)
        return (c @ made.w_b_up["gate"].detach()).square().sum()

    first, second = (made.w_down.detach().clone().requires_grad_() for _ in range(2))
    want = sum(torch.autograd.grad(loss(first, second), (first, second)))
    c = get_rule("diagonal").coefficients(made(a), u @ made.tensors().w_a_up["gate"].t(), 1, 0.7)
    (got,) = torch.autograd.grad((c @ made.w_b_up["gate"].detach()).square().sum(), made.w_down)
    torch.testing.assert_close(got, want)


@rules
def test_tensors_cast_and_pass_gradients(rule):
    made = component(rule, dtype=torch.float32)
    tensors = made.tensors(torch.bfloat16)
    every = [tensors.w_down, *tensors.w_a_up.values(), *tensors.w_b_up.values()]
    assert all(t.dtype == torch.bfloat16 for t in every)
    sum(t.sum() for t in every).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters())
    assert (tensors.rule, tensors.num_ranks, tensors.scale) == (rule, 1, 0.7)
    same = made.tensors()
    assert same.w_down is made.w_down and all(same.w_b_up[t] is made.w_b_up[t] for t in TARGETS)


def test_state_dict_round_trip_and_deepcopy():
    made, other = component("rank1"), component("rank1")
    other.load_state_dict(made.state_dict())
    twin = copy.deepcopy(made)
    for name, parameter in made.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter)
        assert torch.equal(twin.get_parameter(name), parameter) and twin.get_parameter(name) is not parameter


def test_repr_says_what_it_is():
    assert "rule=rank1, rank=2, num_ranks=3" in repr(component("rank1", 3))
    assert "down 10->6" in repr(component("rank1", 3))


def test_as_adapter_tensors():
    made = component("anchored")
    from_component = as_adapter_tensors(made, torch.float64, tuple(TARGETS))
    assert isinstance(from_component, AdapterTensors)
    assert as_adapter_tensors(from_component, torch.float64, tuple(TARGETS)) is from_component
    mapping = as_adapter_tensors({"w_down": made.w_down, "rule": "self_key"}, torch.float64, ("gate",))
    assert mapping.rule == "self_key" and not mapping.w_b_up


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"hidden_size": 0}, ("hidden_size=0", "positive whole number")),
        ({"rank": -1}, ("rank=-1", "positive whole number")),
        ({"rank": 2.0}, ("rank=2.0", "positive whole number")),
        ({"rank": True}, ("rank=True", "positive whole number")),
        ({"num_ranks": 0}, ("num_ranks=0", "positive whole number")),
        ({"rule": "rank2"}, ("rule='rank2'", "choose one of rank1")),
        ({"targets": {}}, ("targets is empty", "down")),
        ({"targets": ["gate"]}, ("targets", "gate")),
        ({"scale": "big"}, ("scale='big'", "number")),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, parts):
    arguments = {"hidden_size": D, "targets": TARGETS, "rank": R} | kwargs
    with pytest.raises((ValueError, TypeError)) as error:
        NPComponent(arguments.pop("hidden_size"), arguments.pop("targets"), **arguments)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_unknown_target():
    made = component("rank1")
    for call in (
        lambda: made.vectors(randn(2, D), randn(2, D), "c_fc"),
        lambda: made.vector_norms(randn(2, R), randn(2, D), "c_fc"),
    ):
        with pytest.raises(ValueError, match=r"target='c_fc' is not one of this component: gate, up, down"):
            call()


@pytest.mark.parametrize("rule", ALL_RULES)
def test_kept_tensors_are_never_stale(rule):
    """What decoding reuses at every token follows optimizer steps, in-place writes, loading, moving and replacing."""
    made = component(rule, 1)
    for p in made.parameters():
        torch.nn.init.normal_(p)

    def check():
        for dtype in (torch.float32, torch.bfloat16, None):
            with torch.no_grad():
                got, again = made.tensors(dtype), made.tensors(dtype)
                fresh = made._tensors(dtype)
            assert got is again, "kept"
            assert torch.equal(got.w_down, fresh.w_down) and got.w_down.dtype == fresh.w_down.dtype
            for group in ("w_a_up", "w_b_up"):
                one, two = getattr(got, group), getattr(fresh, group)
                assert one.keys() == two.keys() and all(torch.equal(one[t], two[t]) for t in one)

    check()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()
    check()
    with torch.no_grad():
        made.w_b_up["down"].mul_(2)
    check()
    made.load_state_dict({name: torch.randn_like(p) for name, p in made.state_dict().items()})
    check()
    made.w_down = torch.nn.Parameter(torch.randn_like(made.w_down))
    check()
    made.w_b_up["down"].data = torch.randn_like(made.w_b_up["down"])
    check()
    made.double()
    check()
    made.scale = 0.25
    assert made.tensors(torch.float32).scale == 0.25
    again = copy.deepcopy(made)
    with torch.no_grad():
        again.w_down.add_(1)
        assert torch.equal(again.tensors().w_down, again.w_down) and not torch.equal(
            again.w_down, made.tensors().w_down
        )
    assert pickle.loads(pickle.dumps(made))._kept is None


def test_gradients_reach_cast_parameters_every_time():
    made = component("diagonal", 1)
    for _ in range(2):
        made.zero_grad()
        adapter = made.tensors(torch.bfloat16)
        (adapter.w_down.float().sum() + sum(v.float().sum() for v in adapter.w_b_up.values())).backward()
        assert torch.equal(made.w_down.grad, torch.ones_like(made.w_down))
    with torch.no_grad():
        assert not made.tensors(torch.bfloat16).w_down.requires_grad
    assert made.tensors(torch.bfloat16).w_down.requires_grad


def _written_in_inference_mode(made):
    with torch.inference_mode():
        made.w_down.mul_(2)


def _adamw(made):
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    with torch.enable_grad():
        sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()


def _assigned(made):
    made.load_state_dict({name: p + 1 for name, p in made.state_dict().items()}, assign=True)


def _through_data(made):
    made.w_down.data.add_(1)
    made.eval()


@pytest.mark.parametrize("change", [_written_in_inference_mode, _adamw, _assigned, _through_data])
def test_kept_casts_follow(change):
    made = component("self_key", dtype=torch.float32)
    with torch.no_grad():
        before = made.tensors(torch.bfloat16).w_down.clone()
        change(made)
        got = made.tensors(torch.bfloat16)
        assert torch.equal(got.w_down, made.w_down.bfloat16()) and not torch.equal(got.w_down, before)
        assert all(torch.equal(v, made.w_b_up[t].bfloat16()) for t, v in got.w_b_up.items())


def test_moving_a_component_leaves_no_casts_behind():
    made = component("self_key", dtype=torch.float32)
    with torch.no_grad():
        made.tensors(torch.bfloat16)
    assert made._kept is not None
    assert made.to("cpu")._kept is None


def test_no_fake_tensor_is_kept():
    made = component("self_key", dtype=torch.float32)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(made.tensors(torch.bfloat16).w_down) is FakeTensor
        assert type(made.tensors(torch.bfloat16).w_down) is torch.Tensor


def test_modes_see_the_casts():
    made = component("self_key", dtype=torch.float32)
    with torch.no_grad():
        made.tensors(torch.bfloat16)
        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Watch():
            made.tensors(torch.bfloat16)
        assert seen.count(torch.ops.aten._to_copy.default) == 1 + len(TARGETS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("by_torch", [True, False])
def test_kept_casts_have_the_layout_that_the_products_want(monkeypatch, dtype, by_torch):
    """On a CPU without instructions for the dtype no call copies them again."""
    monkeypatch.setattr(cpu_layout, "_multiplied_by_torch", lambda dtype: by_torch)
    made = component("self_key", dtype=torch.float32)
    with torch.no_grad():
        got = made.tensors(dtype)
        for name, matrix, parameter in [
            ("w_down", got.w_down, made.w_down),
            *((t, v, made.w_b_up[t]) for t, v in got.w_b_up.items()),
        ]:
            assert torch.equal(matrix, parameter.to(dtype)), name
            assert cpu_layout.k_contiguous(matrix) is matrix, name
            along_k = by_torch and dtype != torch.float32
            assert (matrix.stride(0) == 1) == along_k, name
