"""transformers' ``Trainer`` over a converted model: it moves the components alone, its checkpoints go on, adapters load again."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, save_npt
from tests.support.helpers import tiny_model, token_ids

IDS = token_ids(8, 12)
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def converted(name="llama"):
    model = tiny_model(name, layers=2, **({"tie_word_embeddings": False} if name == "llama" else {}))
    apply_npt(model, NPTConfig(layers="all", rank=4, init="published"))
    return model


def trainer(model, folder, steps, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, seed=3, data_seed=3, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=DATA)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_two_steps_move_the_components_alone_and_load_again(name, checkpointing, tmp_path):
    model = converted(name)
    with npt_disabled(model):
        original = logits(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = trainer(model, tmp_path / "run", 2, gradient_checkpointing=checkpointing).train()
    assert result.global_step == 2 and result.training_loss > 0
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".np_component." in n} and moved
    with npt_disabled(model):
        assert torch.equal(logits(model), original)
    fresh = tiny_model(name, layers=2, **({"tie_word_embeddings": False} if name == "llama" else {}))
    load_npt(fresh, save_npt(model, tmp_path / "adapter"))
    assert torch.equal(logits(fresh), logits(model))


def test_a_checkpoint_of_the_trainer_goes_on(tmp_path):
    """Two steps at once, and one step, a new process' model, another step: the same components."""
    whole = converted()
    trainer(whole, tmp_path / "whole", 2).train()
    trainer(converted(), tmp_path / "parts", 1).train()
    resumed = converted()
    with torch.no_grad():
        for parameter in npt_parameters(resumed):
            parameter.zero_()
    trainer(resumed, tmp_path / "parts", 2).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))
    for a, b in zip(npt_parameters(resumed), npt_parameters(whole), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
