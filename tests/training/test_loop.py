"""The steps of a phase: memory that runs out, fp16's loss scale, the schedule, the plan of phases, Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import torch

from npt_kernels import load_npt
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.run import run
from npt_kernels.run.checkpoints import list_checkpoints
from npt_kernels.training import loop
from npt_kernels.training.batching import StepBatch, step_batches
from npt_kernels.training.loop import StopRequest, TrainingError, make_scheduler, plan_phases, regroup
from tests.support.helpers import tiny_model, token_ids
from tests.support.runs import FAR, blocks, make_config, records, start, stop_at


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("npt_kernels.evaluation.plots.write_plots", lambda *args, **kwargs: [])


# ---- out of memory ---------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch, objective, rows, *, from_step=1, error=None):
    """From a step on, forward *and* backward of a micro-batch with more than ``rows`` sequences run, then memory is out."""
    plain, sizes = objective.accumulate, []

    def accumulate(self, ids, share, backward):
        losses = plain(self, ids, share, backward)
        sizes.append(len(ids))
        if len(ids) > rows and len(sizes) >= from_step:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses

    monkeypatch.setattr(objective, "accumulate", accumulate)
    # The default of the base class: one micro-batch at a time.
    monkeypatch.setattr(objective, "accumulate_group", loop.Objective.accumulate_group)
    return sizes


def same(model, other):
    return all(torch.equal(t, adapter_state_dict(other)[name]) for name, t in adapter_state_dict(model).items())


@pytest.mark.parametrize(
    ("mode", "objective", "rows"),
    [("end_to_end", loop.KLObjective, 2), ("local", loop.LocalObjective, 2), ("local", loop.LocalObjective, 1)],
)
def test_out_of_memory_continues_with_the_bits_of_the_smaller_batch(tmp_path, monkeypatch, mode, objective, rows):
    # 21 sequences: every epoch ends in a step of three micro-batches of 2, 2 and 1, or one of 3 and 2.
    text = blocks(21)
    _, want = start(
        tmp_path / "small", sections={"model": FAR}, mode=mode, text=text, batch_size=rows,
        gradient_accumulation_steps=8 // rows,
    )  # fmt: skip
    log = records(tmp_path / "small", "train")
    sizes = limit_memory(monkeypatch, objective, rows)
    _, model = start(
        tmp_path / "large", sections={"model": FAR}, mode=mode, text=text, batch_size=4, gradient_accumulation_steps=2
    )
    assert same(model, want)
    assert [r["loss"] for r in records(tmp_path / "large", "train")] == [r["loss"] for r in log]
    assert sizes.count(4) == 1 and max(sizes[2:]) == rows, "the smaller size is kept"
    notes = [r["text"] for r in records(tmp_path / "large", "note")]
    assert len(notes) == (1 if rows == 2 else 2)
    assert "out of memory at step 1" in notes[0] and "with 4 sequences at a time; repeated with 2" in notes[0]
    assert notes[0] in start.output


def test_the_smaller_size_holds_for_later_phases_and_after_a_resume(tmp_path, monkeypatch):
    settings = {"sections": {"model": FAR}, "mode": "local+polish", "polish_steps": 4, "batch_size": 4, "save_steps": 2}
    limit_memory(monkeypatch, loop.LocalObjective, 2)
    sizes = limit_memory(monkeypatch, loop.KLObjective, 2, from_step=10**9)
    start(tmp_path, **settings)
    assert set(sizes) == {2}
    checkpoint = list_checkpoints(tmp_path / "checkpoints")[0][0]
    assert checkpoint.state()["progress"]["rows"] == 2
    sizes.clear()
    start(tmp_path, resume=tmp_path / "checkpoints" / "polish-000002", **settings)
    assert set(sizes) == {2} and not [r for r in records(tmp_path, "note") if r["text"].count("polish")]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_with_one_sequence_stops_with_advice_and_loses_nothing(tmp_path, monkeypatch, error):
    limit_memory(monkeypatch, loop.KLObjective, 0, from_step=4, error=error)
    with pytest.raises(TrainingError) as caught:
        start(tmp_path, sections={"model": FAR})
    message = str(caught.value)
    kept = tmp_path / "checkpoints" / "end_to_end-000003"
    for text in (
        "out of memory",
        "By the plan's count these would fit: ",
        "adapter of step 3 saved",
        f"checkpoint in {kept}",
    ):
        assert text in message
    assert message.endswith(f"Go on with: npt train --resume {tmp_path}")
    assert "\n" not in message
    assert "with 2 sequences at a time; repeated with 1" in start.output
    one, other = tiny_model("llama", layers=3), tiny_model("llama", layers=3)
    load_npt(one, tmp_path / "adapter")
    load_npt(other, kept)
    assert same(one, other)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    summary, model = start(tmp_path, sections={"model": FAR}, resume=tmp_path)
    # Halved in its last moments, so not the bits of a run with whole batches, but its result.
    _, whole = start(tmp_path / "whole", sections={"model": FAR})
    assert summary.steps == 6
    for name, tensor in adapter_state_dict(whole).items():
        assert torch.allclose(tensor, adapter_state_dict(model)[name], atol=1e-4), name


def test_no_second_try_where_it_is_switched_off(tmp_path, monkeypatch):
    sizes = limit_memory(monkeypatch, loop.KLObjective, 2, from_step=3)
    with pytest.raises(
        TrainingError, match=r"training.batch_size=2 training.gradient_accumulation_steps=2 .same result.*step 2 saved"
    ):
        start(tmp_path, sections={"optimization": {"oom_retry": False}})
    assert sizes == [4, 4, 4]


def test_other_errors_are_not_retried(tmp_path, monkeypatch):
    limit_memory(monkeypatch, loop.KLObjective, 2, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        start(tmp_path)
    assert not records(tmp_path, "note")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_regroup_keeps_sequences_and_shares(rows):
    batches = step_batches(token_ids(11, 5), batch_size=4, gradient_accumulation_steps=2, seed=3)
    for _ in range(4):
        batch = next(batches)
        ids, shares = regroup(batch, rows)
        assert torch.equal(torch.cat(ids), torch.cat(batch.micro_batches))
        assert max(map(len, ids)) <= max(rows, 1) and sum(shares) == pytest.approx(1)
        assert [share * batch.tokens for share in shares] == pytest.approx([piece.numel() for piece in ids])
    assert regroup(StepBatch([], [], 20), rows) == ([], []), "a process without rows"


# ---- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_on_the_cpu(monkeypatch):
    """accelerate offers fp16 on GPUs alone; autocast and loss scaling themselves run on a CPU too."""
    plain = run.make_accelerator

    def make(config):
        accelerator = plain(config)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        # So high that the first steps overflow and are skipped.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**25, growth_interval=3)
        return accelerator

    monkeypatch.setattr(run, "make_accelerator", make)


def test_loss_scale_and_skipped_steps_survive_a_resume(tmp_path, fp16_on_the_cpu, monkeypatch):
    settings = {"sections": {"model": FAR}, "max_steps": 12, "save_steps": 5, "warmup_steps": 4, "logging_steps": 1}
    _, want = start(tmp_path / "whole", **settings)
    log = records(tmp_path / "whole", "train")
    rates = [r["learning_rate"] for r in log]
    skipped = sum(a == b for a, b in itertools.pairwise(rates))
    assert 1 <= skipped <= 6, "the test shows something only if some steps were skipped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7, "ctrl-c")
        start(tmp_path / "cut", **settings)
    for name in ("end_to_end-000005", "end_to_end-000007"):
        torch.manual_seed(9)
        _, model = start(tmp_path / name, resume=tmp_path / "cut" / "checkpoints" / name, **settings)
        assert same(model, want)
        again = records(tmp_path / name, "train")
        assert [(r["loss"], r["learning_rate"], r["grad_norm"]) for r in again] == [
            (r["loss"], r["learning_rate"], r["grad_norm"]) for r in log
        ]


def test_fp16_needs_the_loss_scale_of_the_checkpoint(tmp_path, request):
    start(tmp_path, sections={"model": FAR}, max_steps=2)
    request.getfixturevalue("fp16_on_the_cpu")
    with pytest.raises(ValueError, match="was written without a loss scale"):
        start(tmp_path, sections={"model": FAR}, max_steps=3, resume=tmp_path)


# ---- phases, schedule, Ctrl-C ----------------------------------------------------------------------------------------


def test_phases_and_schedule(tmp_path):
    config = make_config(
        tmp_path, batch_size=4, gradient_accumulation_steps=3, num_epochs=2, max_steps=None, warmup_steps=2
    )
    (phase,) = plan_phases(config, token_ids(25, 4))
    assert (phase.steps, phase.objective, phase.warmup_steps) == (6, "kl", 2)  # 7 batches, 3 steps an epoch
    config = make_config(tmp_path, mode="local+polish", polish_steps=40, warmup_steps=50, max_steps=5)
    local, polish = plan_phases(config, token_ids(100, 4))
    assert (local.objective, local.steps, local.warmup_steps) == ("local", 5, 5)
    assert (polish.objective, polish.steps, polish.warmup_steps) == ("kl", 40, 4)
    assert plan_phases(make_config(tmp_path, mode="none"), token_ids(100, 4)) == []
    for kind, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make_scheduler(optimizer, kind, 4, 20)
        rates = []
        for _ in range(20):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert rates[4] == max(rates) and scheduler.get_last_lr()[0] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_interrupts_at_once(number):
    before = signal.getsignal(number)
    with StopRequest().listen() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])  # a bytecode boundary for the handler
    assert signal.getsignal(number) is before


def test_a_stream_of_unknown_length_needs_a_number_of_steps(tmp_path):
    class Stream:
        def state_dict(self):
            return {}

        def __iter__(self):
            return iter([])

    with pytest.raises(TrainingError, match=r"set training\.max_steps"):
        plan_phases(make_config(tmp_path, max_steps=None), Stream())
    (phase,) = plan_phases(make_config(tmp_path, max_steps=9), Stream())
    assert phase.steps == 9
