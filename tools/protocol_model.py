"""Exhaustive search of the kernels' barrier protocol on small rings: deadlock, a stage overwritten too early, stale data.

The model mirrors, line by line where marked in the sources:

* ``csrc/gemm/mainloop.cuh``: ``init_barriers`` [P1] [P2], ``produce`` [P3] [P4], ``multiply`` [P5], ``release`` [P6],
  ``finish_tile`` [P7]; ``csrc/decode/segk_swapab.cuh`` is the same with one consumer and no cluster.
* ``csrc/gemm/segk_pingpong.cuh``: the turn order [O1] [O2] and the epilogue's fetches and stores [E1] to [E4].
* ``csrc/low_rank/ring.cuh``: the ring of two warpgroups again; ``csrc/low_rank/value_grads.cuh``: the resident operand [S4] [S5].
* ``csrc/low_rank/coefficients.cuh`` [S1] [S2] [S3] and ``decode_finish_split`` of ``csrc/decode/segk_swapab.cuh`` [D2] [D3]: a
  cluster's blocks leave partial sums in the memory of their rings, meet, read each other's, meet again.
* ``csrc/gemm/segk_split.cuh`` [S6] [S7] [S8]: the same after a ring with multicast.
* ``csrc/decode/segk_swapab.cuh``: overlap with the kernel before [D1] [D4].
* ``csrc/gemm/segk_coop.cuh``: ``CoopEpilogue::store`` (two buffers in rotation) and the final ``cluster_sync``.

What is modelled: mbarriers with their parity waits (so that aliasing two laps apart is seen), pending counts and byte
counts (bytes may arrive before they are expected); TMA loads that land at any later time, per destination block; wgmma reads
that last until the wait that covers them; TMA stores that read shared memory until ``wait_group.read``; named barriers. A
warpgroup is one process in the ring programs and a leader and a follower thread in the store programs.

What is not: memory ordering below the barriers (proxies, fences), the tensor cores, timing. Each program is a straight line of
atomic steps; the search visits every interleaving of steps and landings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from protocol_machines import (
    FULL,
    HALF,
    Faults,
    Machine,
    Scenario,
    fetch_machine,
    meeting_machine,
    overlap_machine,
    resident_machine,
    ring_machine,
    split_machine,
    store_machine,
)

__all__ = [
    "CASES", "FULL", "HALF", "Faults", "Machine", "Scenario", "Search", "Violation", "fetch_machine", "meeting_machine",
    "overlap_machine", "resident_machine", "ring_machine", "split_machine", "store_machine",
]  # fmt: skip


class Violation(Exception):
    """Something that must not happen; the message says what."""


class Search:
    """Breadth-first over all interleavings. A state is nested tuples, so it hashes."""

    def __init__(self, machine: Machine, limit: int = 3_000_000) -> None:
        self.machine, self.limit = machine, limit
        self.barriers = {name: i for i, name in enumerate(machine.counts)}
        self.counts = list(machine.counts.values())

    # State: (program counters, barriers (phase, pending, bytes), landings in flight, contents, holds, stores in flight)
    def initial(self) -> tuple:
        return (
            (0,) * len(self.machine.programs),
            tuple((0, count, 0) for count in self.counts),
            frozenset(), frozenset(), frozenset(), (),
        )  # fmt: skip

    def _settle(self, barriers: list, index: int, pending: int, tx: int) -> None:
        phase, left, bytes_ = barriers[index]
        left, bytes_ = left - pending, bytes_ + tx
        if left < 0:
            raise Violation(
                f"barrier {list(self.machine.counts)[index]} gets more arrivals than its count in one phase"
            )
        # Phases are kept modulo 4: parity waits and the check below see no more.
        barriers[index] = (
            ((phase + 1) % 4, self.counts[index], 0) if left == 0 and bytes_ == 0 else (phase, left, bytes_)
        )

    def _producers(self, cta: int) -> int:
        """Processes that load into block ``cta``."""
        return sum(
            any(step[0] == "produce" and any(load[0] == cta for load in step[5]) for step in program)
            for program in self.machine.programs
        )

    def _passed(self, state: tuple, name: object, parity: int) -> bool:
        return (state[1][self.barriers[name]][0] & 1) != parity

    def successors(self, state: tuple) -> list[tuple]:
        """Every state one step later."""
        pcs, barriers, flying, contents, holds, stores = state
        result = []
        for landing in flying:  # (kind, block, stage, writer key, tag, bytes, barrier index)
            _, cta, stage, part, tag, size, bar = landing
            if (cta, stage) in {(h[0], h[1]) for h in holds}:
                raise Violation(f"stage {stage} of block {cta} is overwritten while it is read")
            if any(s[0] == (cta, stage) and not s[2] for s in stores):
                raise Violation(f"buffer {stage} is refilled while a store reads it")
            if self.machine.exits and all(
                pcs[i] == len(self.machine.programs[i]) for i, block in self.machine.exits.items() if block == cta
            ):
                raise Violation(f"a multicast lands in block {cta}, which has left")
            bars = list(barriers)
            self._settle(bars, bar, 0, -size)
            kept = frozenset(c for c in contents if c[:3] != (cta, stage, part))
            result.append((pcs, tuple(bars), flying - {landing}, kept | {(cta, stage, part, tag)}, holds, stores))
        for i, store in enumerate(stores):  # a store finishes reading
            if not store[2]:
                done = (*stores[:i], (store[0], store[1], True), *stores[i + 1 :])
                while done and done[0][2]:
                    done = done[1:]
                result.append((pcs, barriers, flying, contents, holds, done))
        for process, pc in enumerate(pcs):
            program = self.machine.programs[process]
            if pc < len(program):
                after = self._step(state, program[pc], process)
                if after is not None:
                    result.append(((*pcs[:process], pc + 1, *pcs[process + 1 :]), *after))
        return result

    def _step(self, state: tuple, step: tuple, process: int) -> tuple | None:
        """State without program counters after one step; ``None`` while it must wait."""
        _, barriers, flying, contents, holds, stores = state
        bars = list(barriers)
        match step:
            case ("wait", name, parity):
                return state[1:] if self._passed(state, name, parity) else None
            case ("arrive", name):
                self._settle(bars, self.barriers[name], 1, 0)
                return (tuple(bars), *state[2:])
            case ("produce", wait, parity, full, expected, loads):
                if wait is not None and not self._passed(state, wait, parity):
                    return None
                if full is not None:
                    self._settle(bars, self.barriers[full], 1, expected)
                new = {
                    ("stage", cta, stage, tag[0], tag[1:], size, self.barriers["full", cta, stage])
                    for cta, stage, tag, size in loads
                }
                return (tuple(bars), flying | new, *state[3:])
            case ("acquire", full, parity, cta, stage, tile, block):
                if not self._passed(state, full, parity):
                    return None
                found = {c[3] for c in contents if c[0] == cta and c[1] == stage}
                parts = {c[2] for c in contents if c[0] == cta and c[1] == stage}
                wanted = self.machine.parts or self._producers(cta)
                if found != {(tile, block)} or len(parts) != wanted:
                    raise Violation(
                        f"tile {tile} k-block {block} of block {cta} reads {sorted(found)} from stage {stage}"
                    )
                return (*state[1:4], holds | {(cta, stage, process)}, stores)
            case ("use", cta, stage, tile, block):
                if {c[3] for c in contents if c[0] == cta and c[1] == stage} != {(tile, block)}:
                    raise Violation(f"k-block {block} reads {stage} before it is loaded")
                return state[1:]
            case ("touch", name):
                return (*state[1:3], contents | {("memory", name, 0, 0)}, *state[4:])
            case ("need", name, why):
                if ("memory", name, 0, 0) not in contents:
                    raise Violation(why)
                return state[1:]
            case ("deposit", cta, group):
                if any(h[0] == cta for h in holds):
                    raise Violation(f"block {cta} writes its sums over a stage that is being read")
                if any(f[1] == cta for f in flying):
                    raise Violation(f"block {cta} writes its sums where a load is about to land")
                return (*state[1:3], contents | {("sums", cta, group, 0)}, *state[4:])
            case ("collect", cta, groups):
                if any(("sums", cta, group, 0) not in contents for group in range(groups)):
                    raise Violation(f"the sums of block {cta} are read before they are written")
                if all(state[0][i] == len(self.machine.programs[i]) for i, b in self.machine.exits.items() if b == cta):
                    raise Violation(f"the sums of block {cta} are read after it has left")
                return state[1:]
            case ("drop", cta, stage):
                return (*state[1:4], holds - {(cta, stage, process)}, stores)
            case ("wait_read", allowed):
                older = stores[: max(0, len(stores) - allowed)]
                return state[1:] if all(s[2] for s in older) else None
            case ("write", buffer, leader, tag):
                if any(s[0] == (0, buffer) and not s[2] for s in stores):
                    raise Violation(f"buffer {buffer} is overwritten while a store reads it")
                kept = frozenset(c for c in contents if c[:3] != (0, buffer, leader))
                return (*state[1:3], kept | {(0, buffer, leader, tag)}, *state[4:])
            case ("modify", buffer, leader, tag):
                if (0, buffer, "tma", tag) not in contents:
                    raise Violation(f"part {tag} finds other data in buffer {buffer}")
                kept = frozenset(c for c in contents if c[:3] != (0, buffer, leader))
                return (*state[1:3], kept | {(0, buffer, leader, tag)}, *state[4:])
            case ("store", buffer, tag):
                for thread in (True, False):
                    if (0, buffer, thread, tag) not in contents:
                        raise Violation(f"store {tag} reads buffer {buffer} before both threads wrote it")
                return (*state[1:5], (*stores, ((0, buffer), tag, False)))
            case ("fetch", buffer, tag):
                index = self.barriers["fetched", buffer]
                self._settle(bars, index, 1, 1)
                return (tuple(bars), flying | {("buffer", 0, buffer, "tma", tag, 1, index)}, *state[3:])
        raise AssertionError(step)

    def run(self) -> int:
        """Number of states; raises :class:`Violation`."""
        start = self.initial()
        seen, frontier = {start}, [start]
        while frontier:
            following = []
            for state in frontier:
                successors = self.successors(state)
                if not successors:
                    stuck = [i for i, pc in enumerate(state[0]) if pc < len(self.machine.programs[i])]
                    if stuck:
                        steps = ", ".join(f"{i}: {self.machine.programs[i][state[0][i]][:3]}" for i in stuck)
                        raise Violation(f"deadlock at {steps}")
                    if state[2]:
                        raise Violation("the kernel ends with loads in flight")
                for after in successors:
                    if after not in seen:
                        seen.add(after)
                        following.append(after)
            if len(seen) > self.limit:
                raise RuntimeError(f"more than {self.limit} states; choose a smaller scenario")
            frontier = following
        return len(seen)


F3, F4 = (FULL, FULL, FULL), (FULL,) * 4
#: What `python tools/protocol_model.py` and the tests check: name → machine.
CASES: dict[str, Callable[[], Machine]] = {
    "coop, 2 stages, 2 warpgroups, ragged segment": lambda: ring_machine(Scenario()),
    "coop, 3 stages, tile shorter than the ring": lambda: ring_machine(
        Scenario(stages=3, tiles=((FULL,), (FULL, HALF), (FULL,)))
    ),
    "coop, 3 stages, 4 k-blocks": lambda: ring_machine(Scenario(stages=3, tiles=(F4, F4))),
    "decode, 1 warpgroup": lambda: ring_machine(Scenario(stages=3, consumers=1, tiles=(F4, F3, F4))),
    "coop, cluster of 2, 1 warpgroup each": lambda: ring_machine(
        Scenario(cluster=2, consumers=1, tiles=((FULL, FULL, HALF), (FULL, HALF)))
    ),
    "coop, cluster of 2, 2 warpgroups each": lambda: ring_machine(
        Scenario(cluster=2, consumers=2, tiles=((FULL, FULL, HALF),))
    ),
    "ping-pong, 2 stages, odd tiles": lambda: ring_machine(Scenario(pingpong=True, tiles=(F3, F3, F3))),
    "ping-pong, 3 stages, tile shorter than the ring": lambda: ring_machine(
        Scenario(stages=3, pingpong=True, tiles=((FULL,),) * 5)
    ),
    "ping-pong, 2 stages, even tiles": lambda: ring_machine(Scenario(pingpong=True, tiles=((FULL, FULL),) * 4)),
    "ping-pong, ragged segment (gate_up), cluster of 2": lambda: ring_machine(
        Scenario(cluster=2, pingpong=True, tiles=((FULL, HALF),) * 3)
    ),
    "ping-pong, cluster of 2": lambda: ring_machine(
        Scenario(cluster=2, pingpong=True, tiles=((FULL, FULL, FULL), (FULL,) * 3))
    ),
    "epilogue stores, 2 buffers": lambda: store_machine(2),
    "epilogue stores, 4 buffers": lambda: store_machine(4, stores=9),
    "backward epilogue, 6 parts, 2 tiles": lambda: fetch_machine(),
    "backward epilogue, 6 parts, 3 tiles": lambda: fetch_machine(tiles=3),
    "split tile, 2 blocks, 2 warpgroups": lambda: meeting_machine(),
    "split tile, 2 blocks, one without k-blocks": lambda: meeting_machine(k_blocks=(3, 0)),
    "split tile, 3 blocks, 1 warpgroup (decode)": lambda: meeting_machine(blocks=3, groups=1),
    "split tile, multicast pair, 2 warpgroups each": lambda: split_machine(Scenario(cluster=2, tiles=((FULL, FULL),))),
    "split tile, multicast pair, 3 k-blocks": lambda: split_machine(
        Scenario(cluster=2, consumers=1, tiles=((FULL, FULL, FULL),))
    ),
    "overlap, low-rank segment depends": lambda: overlap_machine(),
    "overlap, all activations depend, weights ahead": lambda: overlap_machine(k_blocks=4, dependent_from=0),
    "overlap, ring longer than the K loop": lambda: overlap_machine(k_blocks=2, dependent_from=0, stages=3),
    "value gradients, resident operand and 2 stages": lambda: resident_machine(),
}


def main(names: Sequence[str] = ()) -> int:
    """Check the cases (all, or those whose name contains an argument) and print their sizes."""
    for name, build in CASES.items():
        if not names or any(n in name for n in names):
            try:
                print(f"{name:<50} {Search(build()).run():>9,} states, no violation", flush=True)
            except Violation as error:
                print(f"{name:<50} VIOLATION: {error}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
