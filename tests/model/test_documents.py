"""Packed documents do not see each other, on every way the package runs a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt, npt_disabled, remove_npt
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.model.documents import isolated_documents, packed_position_ids
from npt_kernels.model.forward import decoder_of
from npt_kernels.model.visits import walk_layers
from tests.support.helpers import MODELS, assert_unchanged, randomise, snapshot, tiny_model, token_ids

EOS = 96
KINDS = [(name, attention) for name in MODELS for attention in ("sdpa", "eager")]


def packed(*lengths: int, seed: int = 1) -> Tensor:
    """``[1, seq]``: documents of random tokens, each with its end."""
    ids = token_ids(1, sum(lengths), seed) % EOS
    ids[0, torch.tensor(lengths).cumsum(0) - 1] = EOS
    return ids


def states(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator,union-attr]


def test_positions() -> None:
    ids = torch.tensor([[5, EOS, 5, 5, EOS, EOS, 5], [EOS, 5, 5, 5, 5, 5, EOS], [5, 5, 5, 5, 5, 5, 5]])
    assert packed_position_ids(ids, EOS).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5], [*range(7)]]
    assert packed_position_ids(ids[:, :1], EOS).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize(("name", "attention"), KINDS)
@pytest.mark.parametrize("converted", [False, True])
def test_a_document_is_as_if_alone(name: str, attention: str, converted: bool) -> None:
    model = tiny_model(name, attn_implementation=attention)
    if converted:
        apply_npt(model, NPTConfig(rank=4, init="small"))
        randomise(model)
    lengths = (5, 9, 1, 7)
    # A second row with other boundaries: masks are per row.
    ids = torch.cat([packed(*lengths), packed(8, 3, 11, seed=2)])
    crossing = states(model, ids)
    with isolated_documents(model, EOS):
        together = states(model, ids)
    for row, parts in ((0, lengths), (1, (8, 3, 11))):
        start = 0
        for length in parts:
            alone = states(model, ids[row : row + 1, start : start + length])[0]
            torch.testing.assert_close(together[row, start : start + length], alone, rtol=2e-5, atol=2e-5)
            start += length
    assert (crossing[0, 5:] - together[0, 5:]).abs().max() > 1e-2
    torch.testing.assert_close(crossing[0, :5], together[0, :5], rtol=2e-5, atol=2e-5)


def test_a_sliding_window_counts_within_the_document() -> None:
    model = tiny_model("mistral", sliding_window=4)
    ids = packed(10, 12)
    with isolated_documents(model, EOS):
        together = states(model, ids)
    torch.testing.assert_close(together[:, 10:], states(model, ids[:, 10:]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_walking_and_evaluating(name: str) -> None:
    model = tiny_model(name)
    apply_npt(model, NPTConfig(rank=4, init="small"))
    randomise(model)
    ids = packed(6, 8)
    neighbours = torch.cat([ids, packed(6, 8, seed=5)])
    neighbours[1, 6:] = ids[0, 6:]

    def walked(tokens: Tensor) -> list[Tensor]:
        found = []
        walk_layers(model, tokens, lambda layer, h, a, y: found.extend((h, a, y)))
        return found

    with isolated_documents(model, EOS):
        both = walked(neighbours)
        for part in both:  # the second document is the same behind either neighbour, bit for bit
            assert torch.equal(part[0, 6:], part[1, 6:]) and not torch.equal(part[0, :6], part[1, :6])
        isolated = evaluate(model, ids)
    assert not torch.equal(*(part[0, 6:] for part in (both[-1], walked(neighbours)[-1])))
    crossing = evaluate(model, ids)
    assert abs(isolated.npt_nll - crossing.npt_nll) > 1e-4 and abs(isolated.base_nll - crossing.base_nll) > 1e-4


def test_calibration_fits_every_batch_with_its_own_documents() -> None:
    """With the ranks of the hidden size nothing is lost only if each batch is walked with its own masks."""
    rows = [packed(5, 9, 6, seed=1), packed(12, 4, 4, seed=2), packed(3, 3, 14, seed=3), packed(20, seed=4)]
    text = torch.cat([row for row in rows for _ in range(4)])  # the refit takes four at a time
    model = tiny_model("llama", layers=3).double()
    results = {}
    for rank in (32, 20):
        with isolated_documents(model, EOS):
            apply_npt(model, NPTConfig(rank=rank, init="closed_form"), calibration=text)
            results[rank] = evaluate(model, text).kl
        remove_npt(model)
    assert abs(results[32]) < 1e-10
    # The refit of a lossy rank: batches in another order see the same text and give the same layers.
    # (pca: the Fisher draws its labels in the order of the text)
    lossy = NPTConfig(rank=20, init="closed_form", basis="pca")
    outputs = []
    for order in (rows, rows[::-1]):
        with isolated_documents(model, EOS):
            apply_npt(model, lossy, calibration=torch.cat([row for row in order for _ in range(4)]))
            outputs.append(states(model, text))
        remove_npt(model)
    # Its covariances are float32: 9e-5 apart; one mask for all batches: 2e-2.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-3)


def test_other_calls_are_left_alone() -> None:
    model = tiny_model("llama")
    ids = packed(5, 7)
    mask = torch.ones_like(ids)
    calls: list[dict[str, Any]] = [
        {"attention_mask": mask}, {"position_ids": torch.arange(12).unsqueeze(0)}, {"use_cache": True},
    ]  # fmt: skip
    with torch.no_grad():
        before = [model(input_ids=ids, **call).logits for call in calls]
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with isolated_documents(model, EOS):
            after = [model(input_ids=ids, **call).logits for call in calls]
            assert torch.equal(
                text,
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0),
            )
            assert not torch.equal(model(ids).logits, before[0])  # by position too, without use_cache
            embeddings = model.get_input_embeddings()(ids)
            assert torch.equal(model(inputs_embeds=embeddings).logits, before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_is_undone() -> None:
    model = tiny_model("gpt2")
    before = snapshot(model)
    hooks = decoder_of(model)._forward_pre_hooks
    with isolated_documents(model, EOS):
        assert hooks
    with pytest.raises(KeyError), isolated_documents(model, EOS):
        raise KeyError
    with isolated_documents(model, None):
        assert not hooks
    assert_unchanged(model, before)
    apply_npt(model, NPTConfig(rank=4, init="small"))
    with npt_disabled(model), isolated_documents(model, EOS):
        assert hooks
    assert not hooks
