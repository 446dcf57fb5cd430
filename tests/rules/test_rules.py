"""The rules: vectors, coefficients, ΔW and penalties are four views of one thing and must agree."""

from __future__ import annotations

import pytest
import torch

from npt_kernels.rules import RULES, get_rule, split_ranks
from npt_kernels.rules.base import gram_norm
from tests.support.helpers import ALL_RULES, key_shape, plain_coefficients, randn

rules = pytest.mark.parametrize("rule", ALL_RULES)
ks = pytest.mark.parametrize("k", [1, 3])
T, IN, OUT, R, SCALE = 5, 7, 6, 2, 0.7


def setting(rule, k):
    shape = key_shape(rule, k * R, IN)
    return randn(T, k * R), randn(T, IN), None if shape is None else randn(*shape), randn(k * R, OUT)


def key_product(rule, u, key):
    if key is None:
        return None
    return u @ key.t() if get_rule(rule).key == "matrix" else (u @ key).unsqueeze(-1)


@rules
@ks
def test_coefficients_equal_vectors_and_delta(rule, k):
    z, u, key, value = setting(rule, k)
    c = get_rule(rule).coefficients(z, key_product(rule, u, key), k, SCALE)
    assert c.shape == (T, k * R)
    v_a, v_b = get_rule(rule).vectors(z, u, key, value, k, SCALE)
    delta = torch.einsum("tno,tni->toi", v_b, v_a)
    through_delta = torch.einsum("toi,ti->to", delta, u)
    torch.testing.assert_close(c @ value, through_delta, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(c, plain_coefficients(rule, z, u, key, k, SCALE), rtol=1e-12, atol=1e-12)
    assert v_a.shape[1] == v_b.shape[1] == {"rank1": k, "anchored": k, "self_key": k}.get(rule, v_a.shape[1])
    rank = torch.linalg.matrix_rank(delta, rtol=1e-9)
    assert int(rank.max()) <= v_a.shape[1], "rank of the weight change"


@rules
@ks
def test_norms_equal_explicit(rule, k):
    z, u, key, value = setting(rule, k)
    v_a, v_b = get_rule(rule).vectors(z, u, key, value, k, SCALE)
    norm_a, norm_b = get_rule(rule).vector_norms(z, u, key, value, k, SCALE)
    torch.testing.assert_close(norm_a, v_a.square().sum((1, 2)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(norm_b, v_b.square().sum((1, 2)), rtol=1e-11, atol=1e-11)


@rules
@ks
def test_norms_are_differentiable(rule, k):
    tensors = [t for t in setting(rule, k) if t is not None]
    keyed = len(tensors) == 4

    def f(*t):
        z, u, key, value = t if keyed else (t[0], t[1], None, t[2])
        return get_rule(rule).vector_norms(z, u, key, value, k, SCALE)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in tensors])


@rules
@ks
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_backward_equals_autograd(rule, k, needs):
    z, u, key, _ = setting(rule, k)
    p = key_product(rule, u, key)
    if p is None and needs[1]:
        pytest.skip("no key product")
    dc = randn(T, k * R)
    z.requires_grad_()
    c = get_rule(rule).coefficients(z, None if p is None else p.requires_grad_(), k, SCALE)
    want = torch.autograd.grad(c, [z] if p is None else [z, p], dc)
    dz, dp = get_rule(rule).backward(dc, z.detach(), None if p is None else p.detach(), k, SCALE, *needs)
    for got, true, need in zip((dz, dp), (*want, None), needs, strict=False):
        if need:
            torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
        else:
            assert got is None


@rules
def test_coefficients_differentiable_in_p_alone(rule):
    """In-place shortcuts must not corrupt a gradient when only ``p`` asks for one."""
    z, u, key, _ = setting(rule, 1)
    p = key_product(rule, u, key)
    if p is None:
        pytest.skip("no key product")
    assert torch.autograd.gradcheck(lambda q: get_rule(rule).coefficients(z, q, 1, SCALE), p.requires_grad_())


@rules
def test_inputs_are_not_written(rule):
    z, u, key, _ = setting(rule, 1)
    p = key_product(rule, u, key)
    copies = [None if t is None else t.clone() for t in (z, p)]
    get_rule(rule).coefficients(z, p, 1, SCALE)
    get_rule(rule).backward(randn(T, R), z, p, 1, SCALE, True, p is not None)
    for tensor, copy in zip((z, p), copies, strict=True):
        assert tensor is None or torch.equal(tensor, copy)


def test_properties_that_tell_the_rules_apart():
    z, u, key, _ = setting("rank1", 1)
    p = key_product("rank1", u, key)
    rank1 = get_rule("rank1")
    torch.testing.assert_close(rank1.coefficients(-z, p, 1, 1.0), rank1.coefficients(z, p, 1, 1.0))  # even in a
    anchored = get_rule("anchored")
    q = p[:, :1]
    torch.testing.assert_close(anchored.coefficients(-z, q, 1, 1.0), -anchored.coefficients(z, q, 1, 1.0))  # odd
    diagonal = get_rule("diagonal")
    assert torch.equal(diagonal.coefficients(z, p, 1, 1.0), diagonal.coefficients(z, p, 2, 1.0))  # k changes nothing
    assert get_rule("self_key").coefficients(z, None, 1, 1.0) is z
    assert not torch.allclose(rank1.coefficients(z, p, 1, 1.0), rank1.coefficients(z, p, 2, 1.0))


def test_self_key_of_a_zero_input():
    z, u, _, value = setting("self_key", 1)
    u[0] = 0
    norm_a, norm_b = get_rule("self_key").vector_norms(z, u, None, value, 1, 1.0)
    assert norm_b.isfinite().all()
    assert norm_a.isfinite().all()


def test_split_ranks_and_gram_norm():
    z = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(split_ranks(z, 3)[0], torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    weight = torch.eye(6)
    assert torch.equal(gram_norm(z, weight, 3), z.square().sum(1))
    weight[2:] = 0  # only the first term of three is left
    assert torch.equal(gram_norm(z, weight, 3), z[:, :2].square().sum(1))


def test_registry():
    assert tuple(RULES)[:4] == ("rank1", "diagonal", "anchored", "self_key")
    assert all(rule.name == name and rule.summary for name, rule in RULES.items())
    for bad in ("rank-1", "", None, [], 3):
        with pytest.raises(ValueError, match="choose one of rank1, diagonal, anchored, self_key"):
            get_rule(bad)
