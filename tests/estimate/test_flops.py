"""Operations against the products that run, and what the predicted times must obey."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from npt_kernels import apply_npt
from npt_kernels.estimate.devices import GPUS
from npt_kernels.estimate.flops import LayerWork, needed_flops, step_time
from npt_kernels.estimate.parallel import Parallel
from npt_kernels.measure.random_model_step import build_model, training_steps
from tests.support.helpers import GemmMeter
from tests.support.plan_cases import FAMILIES, LLAMA, config_of, sizes_of

H100, RTX4090 = GPUS["H100"], GPUS["RTX4090"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {}, {"model__npt_layers": [1]}, {"model__rule": "rank1"}, {"model__rule": "diagonal", "model__targets": ["up"]},
        {"model__rule": "anchored"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ["local", "end_to_end", "checkpointing", "task", "task beside the residual"])
def test_operations_are_those_that_run(family: str, keys: dict[str, Any], mode: str) -> None:
    """Matrix products of one real step; the attention's own are left out, one operator on a CPU."""
    recompute = mode == "checkpointing"
    phase = "local" if mode == "local" else "end_to_end"
    if mode.endswith("residual"):
        mode, keys = "task", {**keys, "model__attention_residual": True, "training__objective": "task"}
    config = config_of(
        training__mode=phase, optimization__gradient_checkpointing=recompute, training__batch_size=2, **keys
    )
    numbers = {**FAMILIES[family], "num_hidden_layers": 4} if family == "llama" else {**FAMILIES[family], "n_layer": 4}
    model, adapter = sizes_of(numbers, config)
    real = build_model(numbers, torch.float32)
    apply_npt(real, config.npt_config())
    kind = mode if mode in ("local", "task") else "kl"
    with training_steps(real, config, kind) as step, GemmMeter() as meter:
        tokens = step()
    run = sum(2 * m * n * k for m, n, k in meter.products)
    # Without attention's scores: the same numbers with sequences of no length.
    micro = config.training.batch_size * config.data.max_length
    ours = needed_flops(model, adapter, 0, mode if mode == "task" else phase, recompute=recompute, micro=micro) * tokens
    assert ours == pytest.approx(run, rel=0.01)


def test_attention_scores() -> None:
    model, adapter = sizes_of(LLAMA, config_of())
    short, long = (LayerWork(model, adapter, length) for length in (0, 64))
    assert short.attention_scores == 0
    # Q Kᵀ and P V over a causal half: 2 products · 2 operations · 64 positions / 2 · 64 columns.
    assert long.attention_scores == 2 * 2 * 32 * 64
    assert long.attention - short.attention == long.attention_scores


def test_predicted_times() -> None:
    config = config_of(training__mode="local+polish", data__max_length=512, model__dtype="bfloat16")
    model, adapter = sizes_of({**LLAMA, "hidden_size": 1024, "intermediate_size": 4096}, config)
    local, polish = step_time(model, adapter, config, H100)
    assert (local.phase, polish.phase) == ("local", "end_to_end")
    assert local.seconds < polish.seconds
    slow = step_time(model, adapter, config, RTX4090)[0]
    assert slow.seconds > 3 * local.seconds
    assert 0 < local.mfu < 0.51, "the assumed share of the peak is never passed"
    assert local.tokens == 4 * 512 == local.tokens_per_second * local.seconds
    two = step_time(model, adapter, config, H100, Parallel(data=2))[0]
    assert two.tokens == 2 * local.tokens and local.seconds < two.seconds < 2 * local.seconds
    streamed = config_of(
        training__mode="local", data__max_length=512, model__dtype="bfloat16", optimization__stream_layers="host",
        training__gradient_accumulation_steps=8, training__batch_size=1,
    )  # fmt: skip
    one = step_time(model, adapter, streamed, RTX4090)[0]
    assert one.transfer > 0 and one.hidden < 1
    streamed.optimization.micro_batches_per_layer = 8
    eight = step_time(model, adapter, streamed, RTX4090)[0]
    assert eight.transfer == pytest.approx(one.transfer / 8)
    assert eight.hidden > one.hidden and eight.seconds < one.seconds


def test_a_task_runs_one_model() -> None:
    """Its step is predicted without the original's forward: in operations, and in visits of streamed layers."""
    common = {"training__mode": "end_to_end", "data__max_length": 512, "model__dtype": "bfloat16"}
    kl = config_of(**common)
    task = config_of(training__objective="task", **common)
    model, adapter = sizes_of({**LLAMA, "hidden_size": 1024, "intermediate_size": 4096}, kl)
    (whole,), (one,) = step_time(model, adapter, kl, H100), step_time(model, adapter, task, H100)
    assert one.phase == whole.phase == "end_to_end"
    assert one.seconds < 0.85 * whole.seconds
    micro = task.training.batch_size * 512
    assert one.flops == needed_flops(model, adapter, 512, "task", micro=micro) * one.tokens
    streamed = [config_of(**common, optimization__stream_layers="host") for _ in range(2)]
    streamed[1].training.objective = "task"
    twice, once = (step_time(model, adapter, config, H100)[0].transfer for config in streamed)
    assert once == pytest.approx(twice * 2 / 3)


def test_a_slower_link_makes_sharding_slower() -> None:
    config = config_of(training__mode="local", model__dtype="bfloat16", data__max_length=64)
    model, adapter = sizes_of(LLAMA, config)
    over = Parallel(data=4, shard=True)
    fast = step_time(model, adapter, config, H100, over)[0]
    slow = step_time(model, adapter, config, replace(H100, link_gbs=1.0), over)[0]
    assert slow.transfer == pytest.approx(fast.transfer * H100.link_gbs)
    assert slow.seconds > fast.seconds
