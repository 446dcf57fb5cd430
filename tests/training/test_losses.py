"""Losses against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.model.install import converted_layers
from npt_kernels.training.losses import delta_variance, kl_divergence, layer_loss, vector_penalty
from tests.support.helpers import memory_meter, tiny_model


def reference_kl(student, teacher):
    return F.kl_div(
        student.log_softmax(-1).flatten(0, -2),
        teacher.log_softmax(-1).flatten(0, -2),
        reduction="batchmean",
        log_target=True,
    )


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("headed", [False, True])
def test_kl_value_and_gradient_equal_autograd(chunk, headed):
    torch.manual_seed(1)
    d, vocabulary = 6, 11
    weight = torch.randn(vocabulary, d, dtype=torch.float64) if headed else None
    bias = torch.randn(vocabulary, dtype=torch.float64) if headed else None
    width = d if headed else vocabulary
    student = torch.randn(2, 7, width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 7, width, dtype=torch.float64)
    twin = student.detach().clone().requires_grad_()
    expected = (
        reference_kl(F.linear(twin, weight, bias), F.linear(teacher, weight, bias))
        if headed
        else reference_kl(twin, teacher)
    )
    (expected * 3).backward()
    actual = kl_divergence(student, teacher, weight, bias, chunk=chunk)
    (actual * 3).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-10, atol=1e-12)


def test_kl_of_equal_distributions_is_zero_and_of_others_positive():
    logits = torch.randn(5, 9)
    assert kl_divergence(logits, logits).item() == 0.0
    shifted = kl_divergence(logits + 7.0, logits)  # a softmax does not see a constant
    assert abs(shifted.item()) < 1e-6
    assert kl_divergence(torch.randn(5, 9), logits) > 0


def test_kl_without_gradient_and_with_no_tokens():
    with torch.no_grad():
        assert kl_divergence(torch.randn(4, 5), torch.randn(4, 5)).requires_grad is False
    empty = torch.zeros(0, 5, requires_grad=True)
    assert kl_divergence(empty, empty.detach()).item() == 0.0


def test_kl_with_a_head_never_makes_all_logits():
    tokens, d, vocabulary, chunk = 256, 8, 4096, 16
    student, teacher = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    weight = torch.randn(vocabulary, d)
    with memory_meter() as traces:
        kl_divergence(student, teacher, weight, chunk=chunk).backward()
    peak = traces[0].peak
    # A handful of [chunk, vocab] tensors; one [T, vocab] would be 4.2 MB.
    assert peak < 8 * chunk * vocabulary * 4


def test_kl_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"student has shape \[2, 3\] and teacher \[2, 4\]"):
        kl_divergence(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"weight has shape \[9, 4\], expected \[vocab, d\] with d = 3"):
        kl_divergence(torch.randn(2, 3), torch.randn(2, 3), torch.randn(9, 4))


def test_relative_mse_is_one_for_the_best_constant_and_zero_for_the_teacher():
    h, teacher = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    constant = h + (teacher - h).mean((0, 1))
    torch.testing.assert_close(layer_loss(constant, teacher, h), torch.ones((), dtype=torch.float64))
    assert layer_loss(teacher, teacher, h).item() == 0.0
    mse = layer_loss(constant, teacher, h, kind="mse")
    torch.testing.assert_close(mse, (constant - teacher).square().mean())
    torch.testing.assert_close(mse, delta_variance(teacher, h))
    torch.testing.assert_close(layer_loss(constant, teacher, h, variance=2.0), mse / 2)


def test_layer_loss_refuses_an_unknown_kind():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="loss='l1' is not known; choose relative_mse or mse"):
        layer_loss(x, x, x, kind="l1")


@pytest.mark.parametrize("rule", ["self_key", "rank1", "diagonal", "anchored"])
@pytest.mark.parametrize("norm_match", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_penalty_equals_the_explicit_vectors(rule, norm_match, family):
    model = tiny_model(family, layers=2)
    apply_npt(model, NPTConfig(layers="all", rule=rule, rank=4, num_ranks=2, init="published", norm_match=norm_match))
    layer = converted_layers(model)[1]
    component = layer.np_component
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.normal_()
    h, a = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    _, key_scale = layer.npt_mlp_input(h, a)
    z = component(a).flatten(0, -2)
    expected = torch.zeros(())
    for target in component.target_shapes:
        down = target in ("down", "c_proj")
        scaled = z if key_scale is None or down else z * key_scale.reshape(-1, 1)
        adapter = component.tensors()
        key = adapter.w_a_up.get(target)
        u_any = torch.randn(len(z), component.target_shapes[target][0])
        v_a, v_b = component.rule.vectors(scaled, u_any, key, adapter.w_b_up[target], component.num_ranks, 1.0)
        expected = expected + v_b.square().sum((1, 2)).mean()
        if rule != "self_key":
            expected = expected + v_a.square().sum((1, 2)).mean()
    actual = vector_penalty(layer, h, a)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.backward()
    assert component.w_down.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_under_autocast_stays_near_fp32(dtype):
    student = torch.randn(600, 16, requires_grad=True)
    teacher, weight = student.detach() + 0.1 * torch.randn(600, 16), torch.randn(50, 16)
    expected = kl_divergence(student, teacher, weight)
    expected.backward()
    reference, student.grad = student.grad, None
    with torch.autocast("cpu", dtype):
        actual = kl_divergence(student, teacher, weight)
    actual.backward()
    assert actual.dtype == student.grad.dtype == torch.float32
    # Logits rounded to 8 (bf16) or 11 bits, of differences that are 10 % of the logits.
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)
    assert float((student.grad - reference).norm() / reference.norm()) < 0.1
