"""Steps from sequences: nothing lost, nothing twice, the same for any world size, resumable anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npt_kernels.training.batching import StepBatch, StepBatches, step_batches, steps_per_epoch

L = 3


def numbered(n: int) -> Tensor:
    """``[n, L]``; the first token of a row is its number."""
    return torch.arange(n)[:, None] + 1000 * torch.arange(L)


class Stream:
    """The contract of PackedStream over a tensor: every epoch in reverse."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.position, self.closed = rows, 0, 0

    def __iter__(self) -> Any:
        try:
            while self.position < len(self.rows):
                self.position += 1
                yield self.rows[-self.position]
            self.position = 0
        finally:
            self.closed += 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def make(
    n: int | Any, batch: int = 2, accumulation: int = 2, seed: int = 0, rank: int = 0, world: int = 1
) -> StepBatches:
    train = numbered(n) if isinstance(n, int) else n
    return step_batches(
        train, batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed, rank=rank, world_size=world
    )


def numbers(step: StepBatch) -> list[int]:
    return [int(row[0]) for micro in step.micro_batches for row in micro]


def epoch_of(batches: StepBatches, steps: int) -> list[int]:
    return [number for step in itertools.islice(batches, steps) for number in numbers(step)]


def piecewise(ranks: list[StepBatch]) -> list[int]:
    """Rows of a step in global order: piece after piece, rank by rank."""
    found = []
    for column in itertools.zip_longest(*(step.micro_batches for step in ranks)):
        found += [int(row[0]) for micro in column if micro is not None for row in micro]
    return found


shapes = st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)).filter(
    lambda s: s[0] >= s[3]
)


@given(shapes, st.integers(0, 3))
def test_every_sequence_once_an_epoch_whatever_the_world_size(shape: tuple[int, int, int, int], seed: int) -> None:
    n, batch, accumulation, world = shape
    ranks = [make(n, batch, accumulation, seed, rank, world) for rank in range(world)]
    alone = make(n, batch, accumulation * world, seed)
    steps = steps_per_epoch(numbered(n), batch_size=batch, gradient_accumulation_steps=accumulation, world_size=world)
    assert steps is not None
    for epoch in range(2):
        seen: list[int] = []
        for _ in range(steps):
            parts, whole = [next(r) for r in ranks], next(alone)
            assert piecewise(parts) == numbers(whole)
            assert all(part.tokens == whole.tokens == len(numbers(whole)) * L for part in parts)
            assert sum(share for part in parts for share in part.shares) == pytest.approx(1, abs=1e-12)
            for part in parts:
                for micro, share in zip(part.micro_batches, part.shares, strict=True):
                    assert 1 <= len(micro) <= batch and micro.shape[1] == L
                    assert share == pytest.approx(micro.numel() / part.tokens, abs=1e-12)
            counts = [len(part.micro_batches) for part in parts]
            assert max(counts) <= accumulation and max(counts) - min(counts) <= 1
            if len(numbers(whole)) >= world * max(counts):
                assert min(counts) == max(counts)
            seen += numbers(whole)
        assert sorted(seen) == list(range(n))
        assert all(r.epoch == epoch for r in ranks)


@given(shapes, st.booleans())
def test_resuming_anywhere_gives_the_rest(shape: tuple[int, int, int, int], streamed: bool) -> None:
    n, batch, accumulation, world = shape

    def fresh() -> StepBatches:
        return make(Stream(numbered(n)) if streamed else n, batch, accumulation, 5, world - 1, world)

    length = 2 * -(-n // (batch * accumulation * world)) + 2
    running = fresh()
    states, steps = [running.state_dict()], []
    for step in itertools.islice(running, length):
        steps.append(step)
        states.append(json.loads(json.dumps(running.state_dict())))
    for done, state in enumerate(states):
        resumed = fresh()
        resumed.load_state_dict(state)
        for expected, got in zip(steps[done:], resumed, strict=False):
            assert numbers(got) == numbers(expected) and got.shares == expected.shares and got.tokens == expected.tokens


def test_loading_a_state_in_the_middle_of_a_run_and_with_more_processes() -> None:
    batches = make(20)
    first = next(batches)
    state = batches.state_dict()
    second = numbers(next(batches))
    next(batches)
    batches.load_state_dict(state)
    assert numbers(next(batches)) == second
    pair = [make(20, accumulation=1, rank=rank, world=2) for rank in range(2)]
    for part in pair:
        part.load_state_dict(state)
    assert piecewise([next(part) for part in pair]) == second
    assert set(second).isdisjoint(numbers(first))


def test_orders_differ_by_seed_and_epoch_and_are_the_same_anywhere() -> None:
    batches = make(30, seed=1)
    first, second = epoch_of(batches, 8), epoch_of(batches, 8)
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    assert epoch_of(make(30, seed=1), 8) == first
    # Neighbouring seeds must not share epochs shifted by one.
    other = make(30, seed=2)
    assert first not in (one := [epoch_of(other, 8), epoch_of(other, 8)]) and second not in one


def test_a_step_with_fewer_sequences_than_ranks_leaves_some_without() -> None:
    ranks = [make(7, 1, 1, rank=rank, world=3) for rank in range(3)]
    last = [list(itertools.islice(r, 3))[-1] for r in ranks]
    assert [len(step.micro_batches) for step in last] == [1, 0, 0]
    assert [step.shares for step in last] == [[1.0], [], []] and all(step.tokens == L for step in last)


def test_a_stream_goes_round_and_is_closed() -> None:
    stream = Stream(numbered(5))
    with make(stream) as batches:
        assert [numbers(next(batches)) for _ in range(3)] == [[4, 3, 2, 1], [0], [4, 3, 2, 1]]
        assert (batches.epoch, batches.position) == (1, 4)
    assert stream.closed == 2
    assert steps_per_epoch(stream, batch_size=1, gradient_accumulation_steps=1) is None  # type: ignore[arg-type]
    assert numbers(next(batches)) == [0]  # closed in the middle of an epoch, it goes on


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(3, world=4, rank=1), r"3 training sequences for 4 processes, .*; start at most 3, or give more text"),
        (lambda: make(0), r"0 training sequences; give more text"),
        (lambda: next(make(Stream(numbered(0)))), r"0 training sequences; give more text"),
        (lambda: list(itertools.islice(make(Stream(numbered(2)), world=3), 2)), r"2 training sequences for 3 processes"),
        (lambda: make(3, batch=0), r"batch_size is 0"),
        (lambda: make(3, accumulation=0), r"gradient_accumulation_steps is 0"),
        (lambda: make(3, rank=2, world=2), r"rank is 2; with world_size=2 it must be in 0 … 1"),
        (lambda: make(3).load_state_dict({}), r"no seed, epoch, position, sequences \(it has nothing\)"),
        (lambda: make(3).load_state_dict(make(Stream(numbered(3))).state_dict()), r"no sequences .*data\.streaming=false"),
        (lambda: make(Stream(numbered(3))).load_state_dict(make(3).state_dict()), r"no stream .*data\.streaming=true"),
        (lambda: make(3).load_state_dict(make(4).state_dict()), r"belongs to 4 training sequences, there are now 3"),
        (lambda: make(3).load_state_dict(make(3, seed=9).state_dict()), r"belongs to seed 9, this run has 0"),
        (lambda: make(3).load_state_dict({**make(3).state_dict(), "position": 4}), r"position 4 is not within 3"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("train", [numbered(4).float(), numbered(4)[0], [[1, 2]], None])
def test_what_is_no_text(train: Any) -> None:
    with pytest.raises(TypeError, match="train must be token ids"):
        make(train)
