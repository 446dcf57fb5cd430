"""Two processes (gloo) against one: the same weights on the same global batch, replicated and sharded; agreement; one writer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npt_kernels import load_npt
from npt_kernels.configs.schema import ConfigError, RunConfig
from npt_kernels.model.install import converted_layers
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.model.sharding import forget_broken_forward, gathered, is_sharded
from npt_kernels.training import distributed
from npt_kernels.training.distributed import World, first_to_say
from tests.support.helpers import tiny_model
from tests.support.two_processes import CASES, MODES, converted, measure, train, user_loop
from tests.support.two_runs import one_run

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run something in two processes on this machine's loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(where) -> list[dict[str, Any]]:
    """Everything that two processes found, by rank: they start once for all tests here."""
    done = torchrun("tests/support/two_processes.py", str(where), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(where / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


# ---- the same weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_reach_the_weights_of_one(two, mode, name):
    """In fp64, so that what is left is the order of sums: 1e-10 of the largest entry, where a step is 1e-2."""
    model, losses = train(World(), name)
    start = adapter_state_dict(converted(CASES[name][0], CASES[name][2].get("layers", "all")))
    for results in two:
        weights, others = results[f"{mode}: {name}"]
        assert weights.keys() == start.keys()
        for key, tensor in adapter_state_dict(model).items():
            bound = 1e-10 * float(tensor.abs().max())
            assert (weights[key] - tensor).abs().max() <= bound, key
            assert (start[key] - tensor).abs().max() > 1e6 * bound, key
        for (loss, norm, layers), (other_loss, other_norm, other_layers) in zip(losses, others, strict=True):
            assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-12)
            assert norm > 0.005  # so that clipping had something to do
            assert other_layers == pytest.approx(layers, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(*(r[f"{mode}: {name}"][0].values() for r in two), strict=True))
    assert two[0][f"{mode}: {name}"][1] == two[1][f"{mode}: {name}"][1]  # losses and norms: the same bits on both


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["local", "kl"])
def test_one_micro_batch_a_rank_is_bitwise_two_in_one_process(two, mode, name):
    """a + b = b + a: with two addends not even fp32 rounding may differ."""
    model, losses = train(World(), name, torch.float32, 2, [range(0, 4), range(4, 8)])
    weights, others = two[0][f"{mode}: bitwise {name}"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in adapter_state_dict(model).items())
    assert [norm for _, norm, _ in others] == [norm for _, norm, _ in losses]


@pytest.mark.parametrize("wrap", ["accelerate", "fully_shard"])
def test_a_loop_of_your_own_wrapped_by_the_library_reaches_them_too(two, wrap, tmp_path):
    """accelerate.prepare (DDP), and fully_shard of everything, NP components included, which are saved whole."""
    expected = user_loop("none", 0, 1, tmp_path)
    start = adapter_state_dict(converted("llama"))
    for results in two:
        weights = results[f"user: {wrap}"]
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            bound = 1e-10 * float(tensor.abs().max())
            assert (weights[key] - tensor).abs().max() <= bound, key
            assert (start[key] - tensor).abs().max() > 1e6 * bound, key


# ---- sharding --------------------------------------------------------------------------------------------------------


def test_a_sharded_base_computes_the_same_bits_and_is_held_in_parts(two):
    for results in two:
        facts = results["sharding"]
        held, base = facts.pop("held"), facts.pop("base")
        assert "cannot be undone; save_npt" in facts["remove"] and "convert it first, then shard" in facts["load"]
        assert "sharded already" in facts["shard again"]
        # Three layers, two micro-batches: gathered for each of them, or once for both.
        assert facts["gathers, 1 a visit"] == 6 and facts["gathers, 2 a visit"] == 3
        assert all(facts.values()), facts
        layers = sum(
            p.numel() * 8
            for name, p in converted("llama").named_parameters()
            if ".layers." in name and p.dim() > 1 and "np_component" not in name
        )
        assert held == base - layers // 2


def test_a_base_in_another_dtype_is_never_whole_in_memory(two):
    """bfloat16 files, base in float32: each process casts a layer at a time, and the sharded model has the bits of the whole."""
    for results in two:
        facts = results["loading"]
        assert facts["original"] and facts["mapped"]
        assert facts["held"] < facts["layers"] / 2, facts


def test_a_layer_that_is_sharded_is_whole_nowhere_when_the_next_one_is(two):
    """Else a device that sharding has to fit would hold the whole model for a moment."""
    assert [results["memory"] for results in two] == [[7, 0], [7, 0]]


def test_helpers_of_sharding_do_nothing_to_a_model_that_is_whole():
    model = converted("llama")
    assert not is_sharded(model)
    forget_broken_forward(model)
    layer = converted_layers(model)[0]
    with gathered(layer):
        assert not is_sharded(layer)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_dealt_out_and_gives_the_numbers_of_one_process(two, mode):
    expected = measure(World())
    assert expected["counted"] == 60 and expected["result"].kl > 0.01
    for rank, results in enumerate(two):
        found = dict(results[f"{mode}: measure"])
        samples = found.pop("samples")
        counted = found.pop("counted")
        assert samples == [" ".join(text.split()[: 5 - 2 * rank]) for text in expected["samples"]]
        assert counted == 60 if rank == 0 else counted in (36, 48)
        assert found == {name: expected[name] for name in found}


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_ranks_agree_sum_and_wait(two):
    for rank, results in enumerate(two):
        facts = results["world"]
        assert facts["agree"] == (1, 5)
        assert facts["sums"] == [3.0, 1.0]
        assert facts["gather"] == ["rank 0", "rank 1"]
        assert facts["broadcast"] == {"from": 0}
        assert facts["on_main"] == ("done" if rank == 0 else None)
        assert facts["main_first"] == [rank]
        assert facts["all here"] is True and facts["one came"] is (False if rank == 0 else None)
        expected = "ValueError: no disk" if rank == 0 else "OtherRankError: rank 0 failed"
        assert facts["on_main fails"] == facts["main_first fails"] == expected


def test_rank_0_gives_its_adapter_to_a_model_that_was_not_converted(two):
    expected = adapter_state_dict(converted("llama", layers=[0, 2]))
    for results in two:
        copied = results["world"]["copied"]
        assert copied.keys() == expected.keys()
        assert all(torch.equal(copied[name], tensor) for name, tensor in expected.items())


def test_adapters_that_differ_are_found_by_name(two):
    for results in two:
        message = results["world"]["differ"]
        assert "layers.2.w_b_up.up" in message and "(1 of " in message and "nothing was saved" in message


def test_one_process_needs_no_group(monkeypatch):
    world = World.join(RunConfig())
    assert (world.rank, world.size, world.is_main, world.sharded) == (0, 1, True, False)
    assert world.agree(3, 4) == (3, 4) and world.sums([1.5]) == [1.5] and world.gather(7) == [7]
    assert world.mean_losses({"loss": 1.0}, {2: 3.0}, [2]) == ({"loss": 1.0}, {2: 3.0})
    batches = [torch.zeros(1, 2)]
    assert world.level(batches, [1.0]) == (batches, [1.0])
    with world.main_first():
        pass
    assert world.on_main(lambda: 5) == 5
    world.barrier()
    world.leave()


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The same runs in one process, on the same global batches."""
    directory = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    return {name: one_run(World(), name, directory) for name in ("ddp", "uneven, ddp")}


def logged(directory: Path, run: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "peak_memory", "path")} for line in lines]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "resumed", "disk"])
def test_a_whole_run_has_the_bits_of_one_process(two, one, name):
    """local+polish; ``resumed`` was stopped by Ctrl-C in one process; for ``disk`` the disk was full in between."""
    expected = one["ddp"]
    for results in two:
        found = results[f"run: {name}"]
        assert "error" not in found
        assert found["trained"] == expected["trained"] and found["fidelity"] == expected["fidelity"]
        assert all(torch.equal(found["adapter"][key], tensor) for key, tensor in expected["adapter"].items())
    assert not two[1][f"run: {name}"]["output"]  # one writes and speaks


@pytest.mark.parametrize("name", ["uneven, ddp", "uneven, fsdp"])
def test_a_step_of_one_row_is_that_of_one_process(two, one, name):
    """Nine sequences, steps of eight. fp32: Adam turns rounding of tiny gradients into at most 2·lr = 0.02 a step."""
    expected = one["uneven, ddp"]
    for results in two:
        found = results[f"run: {name}"]
        for key, tensor in expected["adapter"].items():
            assert float((found["adapter"][key] - tensor).abs().mean()) < 2e-6, key
        assert found["trained"].kl == pytest.approx(expected["trained"].kl, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*(r[f"run: {name}"]["adapter"].values() for r in two), strict=True))


def test_files_are_written_once(two, where):
    for name in ("ddp", "fsdp"):
        records = logged(where, name)
        kinds = [record["kind"] for record in records]
        assert kinds.count("start") == kinds.count("end") == 1
        assert [r["stage"] for r in records if r["kind"] == "eval"].count("after training") == 1
        steps = [(r["phase"], r["step"]) for r in records if r["kind"] == "train"]
        assert steps == sorted(set(steps)) and steps[-1] == ("polish", 2)
        assert not list((where / name).rglob("*.tmp"))
        load_npt(tiny_model("llama", layers=3), where / name / "adapter")
    ddp, fsdp = ([r for r in logged(where, name) if r["kind"] == "train"] for name in ("ddp", "fsdp"))
    assert ddp == fsdp


def test_ctrl_c_in_one_process_stops_both_after_the_same_step(two, where):
    for rank, results in enumerate(two):
        found = results["run: ctrl-c"]
        assert found["error"].startswith("KeyboardInterrupt")
        assert ("interrupted after 3 steps; adapter of step 3 saved" in found["output"]) == (rank == 0)
    assert "resumed from" in two[0]["run: resumed"]["output"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "TrainingError: loss is nan at step 3 .* adapter of step 2 saved"),
        ("memory, no retry", r"TrainingError: out of memory on the host \(no more\).* adapter of step 2 saved"),
        ("differ", "RuntimeError: NP parameters differ between ranks, first layers.0.w_down .* nothing was saved"),
    ],
)
def test_what_goes_wrong_in_one_process_stops_both_with_one_message(two, name, message):
    first, second = (results[f"run: {name}"]["error"] for results in two)
    assert re.match(message, first) and first == second


def test_out_of_memory_in_one_process_halves_the_micro_batch_in_both(two, one):
    for rank, results in enumerate(two):
        found = results["run: memory"]
        assert ("repeated with 1, and so is the rest of the run" in found["output"]) == (rank == 0)
        assert found["trained"].kl == pytest.approx(one["ddp"]["trained"].kl, rel=1e-3)


def test_a_full_disk_costs_a_checkpoint_only(two):
    assert "no checkpoint, it could not be written: No space left" in two[0]["run: disk"]["output"]


# ---- settings --------------------------------------------------------------------------------------------------------


def launched(monkeypatch, **environment: str) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **environment}.items():
        monkeypatch.setenv(name, value)


def test_deepspeed_is_refused_in_one_line(monkeypatch):
    launched(monkeypatch, ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(ConfigError, match=r"does not run under DeepSpeed.*distributed=fsdp") as caught:
        World.join(RunConfig())
    assert "\n" not in str(caught.value)


def test_the_command_says_an_error_once(tmp_path):
    """Rank 0 loads first and fails; the other stops without a word."""
    done = torchrun("-m", "npt_kernels", "train", "model.base_model_name=./nowhere", "-o", str(tmp_path / "out"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "./nowhere' is not a directory" in lines[0]
    assert not done.stdout.count("loading") > 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("stream_layers", "host"), ("use_cpu_offload", True), ("quantization", "nf4"), ("use_8bit", True)],
)
def test_what_does_not_go_with_fsdp_is_named(monkeypatch, key, value):
    launched(monkeypatch)
    config = RunConfig.from_mapping({"optimization": {"distributed": "fsdp", key: value}})
    name = "quantization" if key == "use_8bit" else key
    with pytest.raises(ConfigError, match=rf"optimization\.{name}=.* do not go together; use distributed=ddp"):
        World.join(config)


@pytest.mark.parametrize(
    ("asked", "given", "mode"), [("true", "auto", "fsdp"), ("true", "ddp", "ddp"), ("", "auto", "ddp")]
)
def test_auto_follows_accelerate_launch(monkeypatch, asked, given, mode):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    config = RunConfig.from_mapping({"optimization": {"distributed": given}})
    assert distributed._mode(config) == mode
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert distributed._mode(config) == mode  # a second run in the process still knows


def test_fewer_sequences_than_processes_are_refused():
    World(size=4).check_sequences(4)
    with pytest.raises(ConfigError, match=r"3 training sequences cannot be divided over 4 processes; .* at most 3$"):
        World(size=4).check_sequences(3)


def test_an_error_before_the_processes_met_is_said_once_per_machine(monkeypatch):
    assert first_to_say("x")
    launched(monkeypatch)
    assert not first_to_say("x")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert first_to_say("x")
