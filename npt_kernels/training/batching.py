"""Which sequences make up an optimizer step, on one process or many: seeded, resumable, the same text for any world size.

An epoch is one global order of sequences, a function of the seed and the epoch alone. A *global step* is the next
``batch_size · gradient_accumulation_steps · world_size`` of them; only then are they dealt out: in micro-batches, one after the
other, to rank 0, 1, … and again to rank 0. So one process with the ranks' accumulation in its own meets the same steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..text.packing import derived_seed

if TYPE_CHECKING:
    from ..text.streaming import PackedStream

__all__ = ["StepBatch", "StepBatches", "derived_seed", "step_batches", "steps_per_epoch"]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step.

    Attributes:
        micro_batches: Token ids ``[n, L]``, int64, on the CPU: those of this rank. Empty if the step has fewer sequences than
            there are ranks and this rank got none.
        shares: Of each micro-batch in the tokens of the *global* step; over all ranks they sum to 1.
        tokens: Of the global step.
    """

    micro_batches: list[Tensor]
    shares: list[float]
    tokens: int


def step_batches(
    train: Tensor | PackedStream,
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> StepBatches:
    """An endless iterator over optimizer steps, epoch after epoch.

    Args:
        train: Token ids ``[n, L]``, shuffled anew for every epoch, or a stream, which comes in an order of its own.
        batch_size: Sequences per process and micro-batch.
        gradient_accumulation_steps: Micro-batches per process and step.
        seed: Of the order (a stream has its own).
        rank, world_size: This process and how many there are.

    Raises:
        ValueError: A number out of range, or fewer sequences than ranks.
        TypeError: ``train`` is neither.
    """
    return StepBatches(train, batch_size, gradient_accumulation_steps, seed, rank, world_size)


def steps_per_epoch(
    train: Tensor | PackedStream, *, batch_size: int, gradient_accumulation_steps: int, world_size: int = 1
) -> int | None:
    """Optimizer steps that one pass takes; ``None`` for a stream, whose length is known when it ends."""
    if not isinstance(train, Tensor):
        return None
    return math.ceil(len(train) / (batch_size * gradient_accumulation_steps * world_size))


class StepBatches(Iterator[StepBatch]):
    """See :func:`step_batches`. ``close()`` ends the threads of a stream; a ``with`` block does so by itself."""

    def __init__(
        self,
        train: Tensor | PackedStream,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        _check(train, batch_size, gradient_accumulation_steps, rank, world_size)
        self.train, self.seed = train, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.sequences_per_step = batch_size * gradient_accumulation_steps * world_size
        self.epoch = 0
        #: Sequences of this epoch that all ranks together have been given.
        self.position = 0
        self._order: Iterator[Tensor] | None = None

    def __next__(self) -> StepBatch:
        rows = self._take()
        while not rows:
            if self.position < self.world_size:
                # Only a stream gets here: the length of a tensor is checked at the start.
                raise ValueError(_too_few(self.position, self.world_size))
            self.epoch, self.position, self._order = self.epoch + 1, 0, None
            rows = self._take()
        self.position += len(rows)
        return self._deal(rows)

    def _take(self) -> list[Tensor]:
        """The next global step of this epoch; shorter at its end, then empty."""
        if self._order is None:
            self._order = self._rest_of_epoch()
        return list(itertools.islice(self._order, self.sequences_per_step))

    def _rest_of_epoch(self) -> Iterator[Tensor]:
        train = self.train
        if not isinstance(train, Tensor):
            return iter(train)
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, self.epoch))
        order = torch.randperm(len(train), generator=generator).tolist()
        return (train[index] for index in itertools.islice(order, self.position, None))

    def _deal(self, rows: list[Tensor]) -> StepBatch:
        total = len(rows)
        # Pieces in whole rounds of the ranks and of even size, so that at an uneven end every rank runs equally often and long
        # (sharded layers need every rank in every forward) and none is left out while another has two sequences.
        rounds = math.ceil(total / (self.batch_size * self.world_size))
        pieces = min(rounds * self.world_size, total)
        bounds = [piece * total // pieces for piece in range(pieces + 1)]
        mine = [(bounds[p], bounds[p + 1]) for p in range(self.rank, pieces, self.world_size)]
        return StepBatch(
            micro_batches=[torch.stack(rows[start:end]) for start, end in mine],
            shares=[(end - start) / total for start, end in mine],
            tokens=sum(len(row) for row in rows),
        )

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was yielded; plain JSON types. The world size may change in between."""
        state: dict[str, Any] = {"seed": self.seed, "epoch": self.epoch, "position": self.position}
        if isinstance(self.train, Tensor):
            return state | {"sequences": len(self.train)}
        return state | {"stream": self.train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ``ValueError`` if the state belongs to another text or seed."""
        expected = ["seed", "epoch", "position", "sequences" if isinstance(self.train, Tensor) else "stream"]
        if missing := [name for name in expected if name not in state]:
            kind = "data.streaming=false" if isinstance(self.train, Tensor) else "data.streaming=true"
            raise ValueError(
                f"the saved data position has no {', '.join(missing)} (it has {', '.join(state) or 'nothing'}); it was not "
                f"saved with {kind}"
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved data position belongs to seed {state['seed']}, this run has {self.seed}; resume with the "
                f"training.seed of the checkpoint"
            )
        if isinstance(self.train, Tensor):
            if state["sequences"] != len(self.train):
                raise ValueError(
                    f"the saved data position belongs to {state['sequences']:,} training sequences, there are now "
                    f"{len(self.train):,}; resume with the same text, data.max_length and data.num_train_samples"
                )
            if not 0 <= state["position"] <= len(self.train):
                raise ValueError(
                    f"the saved data position {state['position']} is not within {len(self.train)} sequences"
                )
        else:
            self.train.load_state_dict(state["stream"])
        self.close()
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    # ---- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop reading ahead. The iterator may be used again; it goes on where it was."""
        order, self._order = self._order, None
        if order is not None and hasattr(order, "close"):
            order.close()

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(train: Any, batch_size: int, accumulation: int, rank: int, world_size: int) -> None:
    for name, value in (
        ("batch_size", batch_size), ("gradient_accumulation_steps", accumulation), ("world_size", world_size)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size={world_size} it must be in 0 … {world_size - 1}")
    if isinstance(train, Tensor):
        if train.dim() != 2 or train.dtype != torch.int64:
            raise TypeError(f"train must be token ids [n, L], int64, got {train.dtype} {list(train.shape)}")
        if len(train) < world_size:
            raise ValueError(_too_few(len(train), world_size))
    elif not (hasattr(train, "state_dict") and hasattr(train, "__iter__")):
        raise TypeError(f"train must be token ids [n, L] or a PackedStream, got {type(train).__name__}")


def _too_few(sequences: int, world_size: int) -> str:
    if world_size == 1:
        return "there are 0 training sequences; give more text or a smaller data.max_length"
    return (
        f"there are {sequences} training sequences for {world_size} processes, so some would never get one; start at most "
        f"{max(sequences, 1)}, or give more text (or a smaller data.max_length)"
    )
