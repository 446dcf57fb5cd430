"""Transfer against work: the numbers of a known model, and the sentence that names the mend."""

from __future__ import annotations

import pytest

from npt_kernels.offload.copy_speed import RATES, Rates, flops_per_token, plan_transfer

#: Llama-3.1-8B: d, f, grouped-query attention of 8 × 128.
LLAMA_8B = dict(hidden=4096, intermediate=14336, attention_weights=2 * 4096 * 4096 + 2 * 4096 * 1024)
LAYER_BYTES = 2 * (LLAMA_8B["attention_weights"] + 3 * 4096 * 14336)


def llama(tokens=2048, **settings):
    work = flops_per_token(**LLAMA_8B, np_parameters=64 * (4096 + 2 * 14336 + 4096), seq=2048)
    return plan_transfer([LAYER_BYTES] * 32, work, tokens, **settings)


def test_work_is_attention_and_seven_matrix_products():
    d, f = 4096, 14336
    bare = flops_per_token(hidden=d, intermediate=f, attention_weights=0, np_parameters=0, seq=0)
    assert bare == 7 * 2 * d * f
    assert (
        flops_per_token(hidden=d, intermediate=f, attention_weights=0, np_parameters=0, seq=0, gated=False)
        == 5 * 2 * d * f
    )
    full = flops_per_token(hidden=d, intermediate=f, attention_weights=10, np_parameters=100, seq=64)
    assert full - bare == 2 * 10 + 600 + 2 * d * 64


def test_llama_8b():
    plan = llama()
    assert plan.layer_bytes == 436_207_616 and plan.host_bytes == 32 * plan.layer_bytes
    assert plan.device_bytes == 2 * plan.layer_bytes
    assert plan.transfer_seconds == pytest.approx(0.01745, rel=1e-3)
    assert plan.compute_seconds == pytest.approx(2048 * 0.9395e9 / 400e12, rel=0.01)
    assert plan.hiding_micro_batches == 4
    assert plan.slowdown == pytest.approx(17.45 / 4.81, rel=0.01)
    assert plan.visit_seconds == plan.transfer_seconds
    hidden = llama(micro_batches=4)
    assert hidden.slowdown == 1 and hidden.visit_seconds == 4 * hidden.compute_seconds
    assert hidden.step_seconds(8) == 32 * 8 * hidden.compute_seconds
    assert hidden.step_seconds(9) == pytest.approx(hidden.step_seconds(8) + 32 * hidden.transfer_seconds)


def test_lines_name_assumptions_and_the_mend():
    first, second = llama().lines()
    assert "32 layers of 416.0 MiB in pinned host memory (13.00 GiB)" in first and "832.0 MiB" in first
    assert "assuming 25 GB/s" in second and "assuming 400 TFLOP/s" in second
    assert "3.6 × the time of a resident model" in second and "micro_batches_per_layer=4" in second
    assert llama(micro_batches=4).lines()[1].endswith(": hidden")
    assert "mapped files" in llama(where="disk").lines()[0] and "3 GB/s" in llama(where="disk").lines()[1]
    assert llama(where="pageable").transfer_seconds > llama().transfer_seconds


def test_layers_of_different_sizes_are_planned_for_the_largest():
    plan = plan_transfer([10, 40, 20], 1e6, 100, rates=Rates(host=10.0, flops=1e9))
    assert (plan.layer_bytes, plan.host_bytes, plan.device_bytes) == (40, 70, 80)
    assert plan.transfer_seconds == 4 and plan.compute_seconds == 0.1 and plan.hiding_micro_batches == 40


@pytest.mark.parametrize("bad", [dict(tokens=0), dict(micro_batches=0), dict(layer_bytes=[]), dict(work=0)])
def test_numbers_that_make_no_plan(bad):
    values = dict(layer_bytes=[1], work=1.0, tokens=1, micro_batches=1) | bad
    with pytest.raises(ValueError, match="a transfer plan needs layers, tokens and work"):
        plan_transfer(values["layer_bytes"], values["work"], values["tokens"], micro_batches=values["micro_batches"])
    with pytest.raises(KeyError):
        RATES.transfer("moon")
