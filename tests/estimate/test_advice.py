"""Suggestions: each fits by the same count, the cheapest comes first, and none is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from npt_kernels.configs import load_run_config
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.estimate import advice
from npt_kernels.estimate.advice import TIERS, Suggestion, advise, largest_batch, suggest
from npt_kernels.estimate.budget import Budget, Sizes
from npt_kernels.estimate.devices import GPUS
from npt_kernels.estimate.parallel import Parallel
from npt_kernels.run.oom import failed_phases, memory_advice
from tests.support.plan_cases import LLAMA, config_of

GIB = 2**30


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Sizes]:
    """Llama-3.1-8B by the optimized configuration at rank 64 on a GPU with 24 GiB."""
    cache = tmp_path_factory.mktemp("cache")
    config = load_run_config("optimized", None, [f"paths.cache_dir={cache}", "model.rank=64"])
    return config, Sizes.of(config, torch.device("cuda"), Parallel(), GPUS["RTX4090"])


def applied(config: RunConfig, entry: Suggestion) -> RunConfig:
    """The configuration with the suggestion's line, as a user would paste it."""
    path = config.save()
    return load_run_config(None, path, entry.line.split())


@pytest.mark.parametrize("gib", [8, 10, 12, 16, 20, 24, 36])
@pytest.mark.parametrize("mode", ["local", "end_to_end"])
def test_every_suggestion_fits_when_it_is_pasted(gib: int, mode: str, eight: Any, tmp_path: Path) -> None:
    config, sizes = eight
    config = config.model_copy(deep=True)
    config.paths.output_dir = str(tmp_path)
    config.training.mode, config.model.init, config.training.batch_size = mode, "small", 8
    config.optimization.gradient_checkpointing = False
    budget = Budget(device=gib * GIB)
    if sizes.fits(config, budget):
        assert gib >= 24 and mode == "local"
        return
    found = suggest(config, sizes, budget)
    assert found
    for entry in found:
        changed = applied(config, entry)
        assert changed != config
        assert sizes.fits(changed, budget)
        assert sizes.needs(changed).device == entry.device_bytes <= gib * GIB
        assert entry.cost == TIERS[entry.tier]
    assert [entry.tier for entry in found] == sorted(entry.tier for entry in found)
    # A dearer one is only there if it is faster.
    speeds = [entry.seconds_per_token for entry in found]
    assert speeds == sorted(speeds, reverse=True)


def test_the_result_is_kept_where_that_is_possible(eight: Any) -> None:
    config, sizes = eight
    config = config.model_copy(deep=True)
    config.model.init, config.training.mode, config.training.batch_size = "small", "local", 16
    first = suggest(config, sizes, Budget(device=19 * GIB))[0]
    assert first.tier == 0
    changed = applied_in_memory(config, first)
    before, after = config.training, changed.training
    assert after.batch_size < 16
    assert (
        after.batch_size * after.gradient_accumulation_steps == before.batch_size * before.gradient_accumulation_steps
    )
    assert changed.model == config.model and changed.data == config.data and after.mode == before.mode


def applied_in_memory(config: RunConfig, entry: Suggestion) -> RunConfig:
    data = config.model_dump()
    for text in entry.line.split():
        key, _, value = text.partition("=")
        section, name = key.split(".")
        data[section][name] = json.loads(value) if value[0].isdigit() or value in {"true", "false"} else value
    return RunConfig.from_mapping(data)


def test_streaming_needs_the_host_to_have_room(eight: Any) -> None:
    config, sizes = eight
    config = config.model_copy(deep=True)
    config.model.init, config.training.mode = "small", "local"
    rich, poor = (suggest(config, sizes, Budget(device=8 * GIB, host=host * GIB)) for host in (64, 2))
    assert "optimization.stream_layers=host" in rich[0].line and rich[0].tier == 0
    assert 13 * GIB < rich[0].host_bytes <= 64 * GIB
    assert all("stream_layers" not in entry.line for entry in poor)


def test_nothing_is_suggested_where_nothing_fits(eight: Any) -> None:
    config, sizes = eight
    assert suggest(config, sizes, Budget(device=GIB)) == []


def test_several_processes_may_shard(eight: Any) -> None:
    config, sizes = eight
    config = config.model_copy(deep=True)
    config.model.init = "small"
    over = Sizes(sizes.config_json, sizes.meta, sizes.numbers, sizes.device, Parallel(data=8), GPUS["H100"])
    lines = " ".join(entry.line for entry in suggest(config, over, Budget(device=9 * GIB)))
    assert "optimization.distributed=fsdp" in lines


@pytest.mark.parametrize("limit", [20, 24, 40])
def test_the_largest_batch(limit: int, eight: Any) -> None:
    config, sizes = eight
    config = config.model_copy(deep=True)
    config.model.init, config.training.mode = "small", "local"
    budget = Budget(device=limit * GIB)
    size = largest_batch(config, sizes, budget)
    assert size >= 1
    for batch, fits in ((size, True), (size + 1, False)):
        config.training.batch_size = batch
        assert sizes.fits(config, budget) is fits
    assert largest_batch(config, sizes, Budget(device=GIB)) == 0


# ---- after an error --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def raised_in(module: str, error: BaseException) -> BaseException:
    """The error with a traceback through a function of that module."""
    namespace: dict[str, Any] = {"__name__": module}
    exec("def fail(error): raise error", namespace)
    try:
        namespace["fail"](error)
    except BaseException as caught:
        return caught
    raise AssertionError


def test_advice_is_about_the_phase_that_failed(folder: Path) -> None:
    config = config_of(
        str(folder),
        model__init="closed_form",
        training__mode="end_to_end",
        training__batch_size=8,
        data__max_length=128,
    )
    sizes = Sizes.of(config, torch.device("cpu"))
    for module, phase in (
        ("npt_kernels.training.loop", "end_to_end"),
        ("npt_kernels.conversion.moments", "conversion"),
    ):
        error = raised_in(module, MemoryError())
        found = advise(config, torch.device("cpu"), failed_phases(error), limit=64 * GIB)
        assert found
        for entry in found:
            changed = sizes.needs(applied_in_memory(config, entry)).phases[phase]
            assert changed <= 0.8 * sizes.needs(config).phases[phase], (entry.line, phase)
    text = memory_advice(config, raised_in("npt_kernels.training.loop", MemoryError("DefaultCPUAllocator: 4 GiB")))
    assert text.startswith(
        "out of memory on the host (DefaultCPUAllocator: 4 GiB). By the plan's count these would fit: "
    )
    assert "\n" not in text and "same result" in text


def test_advice_without_a_known_model_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("nobody/knows-this")
    with pytest.raises(ConfigError):
        advise(config, torch.device("cpu"))
    assert "Try: training.batch_size=2" in memory_advice(config, torch.OutOfMemoryError("CUDA out of memory"))


def test_host_memory_is_read_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advice.machine_memory() is None or advice.machine_memory() > 2**28

    def refuse(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(advice.os, "sysconf", refuse)
    assert advice.machine_memory() is None
