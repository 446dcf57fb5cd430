"""The yardsticks themselves: the 2× rule rejects what it must, the meters count what is there."""

from __future__ import annotations

import pytest
import torch

from tests.support.helpers import ROWS, GemmMeter, assert_within_twice, memory_meter


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    x, w = torch.randn(64, 48, dtype=torch.float64).bfloat16(), torch.randn(48, 40, dtype=torch.float64).bfloat16()
    return x @ w, x.double() @ w.double()


def test_twice_accepts_the_reference_itself_and_the_rounded_truth(case):
    reference, truth = case
    assert_within_twice(reference, reference, truth)
    assert_within_twice(truth.bfloat16(), reference, truth)


@pytest.mark.parametrize("damage", ["zeros", "one block zero", "one element", "nan", "scaled 5%", "shifted row"])
def test_twice_rejects_damage(case, damage):
    reference, truth = case
    bad = reference.clone()
    if damage == "zeros":
        bad.zero_()
    elif damage == "one block zero":
        bad[-ROWS:] = 0
    elif damage == "one element":
        bad[5, 7] += 0.2 * truth.abs().max()
    elif damage == "nan":
        bad[0, 0] = float("nan")
    elif damage == "scaled 5%":
        bad *= 1.05
    else:
        bad[3] = reference[4]
    with pytest.raises(AssertionError):
        assert_within_twice(bad, reference, truth)


def test_twice_is_local(case):
    """An error that hides below the largest error elsewhere is found in its own block."""
    reference, truth = case
    reference, truth = reference.clone(), truth.clone()
    truth[:ROWS] *= 1000
    reference[:ROWS] = truth[:ROWS].bfloat16()
    bad = reference.clone()
    bad[-1] = 0
    assert (bad.double() - truth).abs().max() < 2 * (reference.double() - truth).abs().max()  # a global rule passes it
    with pytest.raises(AssertionError, match="rows"):
        assert_within_twice(bad, reference, truth)


def test_twice_wants_the_dtype(case):
    reference, truth = case
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_twice(reference.float(), reference, truth)


def test_gemm_meter_counts_products():
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    with GemmMeter() as meter:
        y = torch.nn.functional.linear(x, w)
        y.addmm_(torch.randn(8, 2), torch.randn(2, 6))
        torch.bmm(torch.randn(3, 2, 4), torch.randn(3, 4, 5))
    assert meter.products == [(8, 6, 4), (8, 6, 2), (6, 5, 4)]
    assert meter.count(8 * 6 * 4) == 1


def test_memory_meter_sees_peak_and_sizes():
    with memory_meter() as result:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
    assert [size for size in result[0].allocations if size >= 4000] == [4000] * 3
    assert 8000 <= result[0].peak < 8100  # beside a few scalars
    assert c.sum() == 2000


def test_poison_reaches_new_empty_and_empty_like():
    x = torch.ones(2, 3)
    assert all(t.isnan().all() for t in (x.new_empty(4), torch.empty_like(x), torch.empty(2, dtype=torch.bfloat16)))
