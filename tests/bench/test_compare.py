"""``npt bench compare``: regressions beyond the spread and nothing else."""

from __future__ import annotations

import pytest

from npt_kernels.bench.compare import compare_results
from npt_kernels.bench.results import BenchError


def kernels(*rows, device="GPU"):
    defaults = {"op": "mlp", "shape": "Llama-3.1-8B", "mode": "forward", "tokens": 8192, "rank": 64, "rule": "self_key",
                "dtype": "bfloat16", "launch": "eager", "provider": "triton", "status": "ok"}  # fmt: skip
    return [result("kernels", [defaults | row for row in rows], device)]


def result(suite, rows, device="GPU"):
    return {"schema": 1, "suite": suite, "environment": {"device": device, "date": "2026"}, "rows": rows}


def ratio(value, low, high, us=100.0, **more):
    return {"ratio": value, "ratio_p10_p90": [low, high], "us": us, "us_p10_p90": [us, us], **more}


def train(rate, low, high, peak=1000, **more):
    row = {"model": "M", "converted": "all", "mode": "local", "setting": "resident", "rule": "self_key", "rank": 8,
           "batch": 1, "sequence": 64, "dtype": "float32", "status": "ok", "tokens_per_s": rate,
           "tokens_per_s_p10_p90": [low, high], "peak_bytes": peak, **more}  # fmt: skip
    return [result("train", [row])]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (ratio(1.0, 0.99, 1.01), ratio(1.10, 1.08, 1.12), "worse"),
        (ratio(1.0, 0.9, 1.1), ratio(1.10, 1.05, 1.15), "same"),  # within the spread
        (ratio(1.0, 0.999, 1.001), ratio(1.02, 1.019, 1.021), "same"),  # below the threshold
        (ratio(1.10, 1.08, 1.12), ratio(1.0, 0.99, 1.01), "better"),
        (ratio(1.0, 0.99, 1.01, us=100), ratio(1.0, 0.99, 1.01, us=150), "same"),  # a slower clock moves the floor too
    ],
)
def test_times(before, after, verdict):
    found = compare_results(kernels(before), kernels(after))
    (change,) = found.changes
    assert (change.verdict, change.figure) == (verdict, "ratio")
    assert found.regressed == (verdict == "worse")
    assert change.factor == pytest.approx(after["ratio"] / before["ratio"])


def test_the_floor_is_compared_as_it_is():
    before, after = (kernels(ratio(1, 1, 1, us=us, provider="frozen")) for us in (100, 120))
    (change,) = compare_results(before, after).changes
    assert (change.figure, change.verdict) == ("us", "worse")


@pytest.mark.parametrize(("rate", "verdict"), [(80, "worse"), (100, "same"), (130, "better")])
def test_training_speed(rate, verdict):
    found = compare_results(train(100, 99, 101), train(rate, rate - 1, rate + 1))
    assert [change.verdict for change in found.changes] == [verdict, "same"]


def test_bytes_have_no_spread():
    worse = compare_results(train(100, 90, 110), train(100, 90, 110, peak=1010))
    assert [change.verdict for change in worse.changes] == ["same", "worse"] and worse.regressed
    assert not compare_results(train(100, 90, 110), train(100, 90, 110, peak=1004)).regressed


def test_a_row_that_turned_wrong_is_a_regression():
    wrong = {"status": "wrong", "reason": "y is off by 7 times what it may be"}
    found = compare_results(kernels(ratio(1, 1, 1), ratio(1, 1, 1, tokens=1)), kernels(wrong, ratio(1, 1, 1, tokens=1)))
    assert found.regressed and "off by 7" in found.broken[0] and "triton" in found.broken[0]


def test_missing_and_added_rows_are_named():
    before = kernels(
        ratio(1, 1, 1),
        ratio(1, 1, 1, tokens=1),
        ratio(1, 1, 1, tokens=16),
        {"provider": "peft", "status": "skipped", "reason": ""},
    )
    after = kernels(
        ratio(1, 1, 1), {"tokens": 16, "status": "skipped", "reason": "no GPU"}, ratio(1, 1, 1, tokens=2048)
    )
    found = compare_results(before, after)
    assert len(found.missing) == 2 and "T=1 " in found.missing[0] and "no GPU" in found.missing[1]
    assert len(found.added) == 1 and "T=2048" in found.added[0]
    assert not found.regressed


def test_refusals():
    one = kernels(ratio(1, 1, 1))
    with pytest.raises(BenchError, match=r"different devices.*--force"):
        compare_results(one, kernels(ratio(2, 2, 2), device="other"))
    assert compare_results(one, kernels(ratio(2, 2, 2), device="other"), force=True).regressed
    with pytest.raises(BenchError, match="no measured row in common"):
        compare_results(one, kernels(ratio(1, 1, 1, tokens=3)))
    with pytest.raises(BenchError, match="several devices"):
        compare_results([*one, *kernels(ratio(1, 1, 1), device="B")], one)
