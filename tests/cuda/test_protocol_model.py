"""The barrier protocol has no deadlock and no early overwrite in any interleaving, and the model notices when it has."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import protocol_model as model

ROOT = Path(__file__).resolve().parents[2]


F, H = model.FULL, model.HALF
SC, FA, ring, store, fetch = (
    model.Scenario, model.Faults, model.ring_machine, model.store_machine, model.fetch_machine,
)  # fmt: skip
PAIR = SC(cluster=2, consumers=1, tiles=((F, F, H), (F, F)))
TURNS = SC(pingpong=True, tiles=((F, F, F),) * 3)


@pytest.mark.parametrize("name", model.CASES)
def test_no_violation(name: str) -> None:
    assert model.Search(model.CASES[name]()).run() > 30


MUTANTS = {
    "producer waits for the wrong phase": lambda: ring(SC(), FA(producer_phase=0)),
    "producer does not wait for empty": lambda: ring(SC(), FA(wait_for_empty=False)),
    "consumer never flips its phase": lambda: ring(SC(), FA(consumer_phase_flip=False)),
    "no arrival at the peer": lambda: ring(PAIR, FA(arrive_at_peer=False)),
    "peer's readers are not counted": lambda: ring(PAIR, FA(arrive_at_peer=False, empty_counts_peer=False)),
    "count without the peer, arrivals from it": lambda: ring(PAIR, FA(empty_counts_peer=False)),
    "stage released before its wgmma is done": lambda: ring(SC(), FA(release_early=True)),
    "half stage expects a full one": lambda: ring(SC(), FA(half_expects_full=True)),
    "half stage expects too few bytes": lambda: ring(SC(), FA(half_expects_less=True)),
    "ring restarts at a segment": lambda: ring(SC(stages=3, tiles=((F, F, H, H),)), FA(restart_ring_per_segment=True)),
    "no wait for the turn": lambda: ring(TURNS, FA(order_wait=False)),
    "the turn is never passed on": lambda: ring(TURNS, FA(order_arrive=False)),
    "the other's k-blocks are not skipped": lambda: ring(TURNS, FA(skip_other_tile=False)),
    "store buffer reused one store early": lambda: store(2, allowed=2),
    "store buffer reused one store early, 4 buffers": lambda: store(4, allowed=4, stores=9),
    "no barrier before writing the buffer": lambda: store(2, sync_before=False),
    "no barrier before the store": lambda: store(2, sync_after=False),
    "backward: refill while the store reads": lambda: fetch(wait_between=False),
    "backward: next tile fetches too early": lambda: fetch(wait_at_tile=False),
    "backward: parity restarts with the tile": lambda: fetch(parity_step=False),
    "sums over a stage that is still read": lambda: model.meeting_machine(drained=False),
    "sums read before they are written": lambda: model.meeting_machine(meet_first=False),
    "block leaves while its sums are read": lambda: model.meeting_machine(meet_last=False),
    "the producer does not come to the meeting": lambda: model.meeting_machine(producer_meets=False),
    "split: sums over a stage that the other warpgroup still reads": lambda: model.split_machine(
        SC(cluster=2, tiles=((F, F),)), drained=False
    ),
    "split: block leaves while its sums are read": lambda: model.split_machine(
        SC(cluster=2, consumers=1, tiles=((F, F),)), meet_last=False
    ),
    "overlap: activations before their writer ends": lambda: model.overlap_machine(wait_loads=False),
    "overlap: output before the kernel before ends": lambda: model.overlap_machine(
        k_blocks=2, dependent_from=2, wait_stores=False
    ),
    "value gradients: resident operand not waited for": lambda: model.resident_machine(wait_resident=False),
    "value gradients: tile not waited for": lambda: model.resident_machine(wait_full=False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(name: str) -> None:
    with pytest.raises(model.Violation):
        model.Search(MUTANTS[name]()).run()


def test_marked_lines_exist() -> None:
    """The sources still carry the marks that the model says it mirrors."""
    marks = {
        "gemm/mainloop.cuh": [f"P{i}" for i in range(1, 8)],
        "gemm/segk_pingpong.cuh": ["O1", "O2", "E1", "E2", "E3", "E4"],
        "low_rank/coefficients.cuh": ["S1", "S2", "S3"],
        "gemm/segk_split.cuh": ["S6", "S7", "S8"],
        "low_rank/value_grads.cuh": ["S4", "S5"],
        "decode/segk_swapab.cuh": ["D1", "D2", "D3", "D4"],
    }
    for path, wanted in marks.items():
        assert set(re.findall(r"\[([A-Z]\d)\]", (ROOT / "csrc" / path).read_text())) >= set(wanted), path
