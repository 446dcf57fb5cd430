"""The kernels' programs as straight lines of atomic steps, for small rings: what ``protocol_model.py`` searches. Which lines of
csrc each mirrors: there. ``Faults`` and the flags are deliberate mistakes, for the tests that show that the search finds them."""

from __future__ import annotations

from dataclasses import dataclass, field

A_BYTES, B_BYTES = 4, 8  # any numbers that make a full and a half stage differ
FULL, HALF = 0, 1


def stage_bytes(kind: int) -> int:
    """As ``npt::stage_bytes``: LOW_FIRST loads half of B."""
    return A_BYTES + (B_BYTES // 2 if kind == HALF else B_BYTES)


@dataclass(frozen=True)
class Scenario:
    """A small launch: what the kernels' template parameters and SegkParams are to the model."""

    stages: int = 2
    cluster: int = 1
    consumers: int = 2
    pingpong: bool = False
    tiles: tuple[tuple[int, ...], ...] = ((FULL, FULL, HALF), (FULL, FULL, HALF))  # k-blocks (kinds) of each tile


@dataclass(frozen=True)
class Faults:
    """Deliberate mistakes, for the mutation tests. The default is the protocol as written in csrc."""

    producer_phase: int = 1  # what [P3] XORs into its parity
    consumer_phase_flip: bool = True
    arrive_at_peer: bool = True
    empty_counts_peer: bool = True
    release_early: bool = False  # before the wgmma that reads the stage is known to be done
    half_expects_full: bool = False
    half_expects_less: bool = False
    restart_ring_per_segment: bool = False
    order_wait: bool = True
    order_arrive: bool = True
    skip_other_tile: bool = True
    wait_for_empty: bool = True
    final_sync: bool = True


@dataclass
class Machine:
    """Barrier counts and one straight-line program per process."""

    counts: dict[object, int] = field(default_factory=dict)
    programs: list[list[tuple]] = field(default_factory=list)
    exits: dict[int, int] = field(default_factory=dict)  # process -> block, to find accesses to a block that has left
    parts: int | None = None  # loads that fill a stage; by default one for each producer of the cluster


def ring_machine(sc: Scenario, fault: Faults = Faults()) -> Machine:
    """Producers and consumer warpgroups of one cluster."""
    m = Machine()
    readers = 1 if sc.pingpong else sc.consumers
    peers = range(sc.cluster)
    for cta in peers:
        for s in range(sc.stages):
            m.counts["full", cta, s] = 1
            m.counts["empty", cta, s] = readers * (sc.cluster if fault.empty_counts_peer else 1)
        for w in range(sc.consumers):
            m.counts["order", cta, w] = 1
    m.counts["exit"] = sc.cluster * (1 + sc.consumers)

    def position(tile: int, block: int) -> tuple[int, int]:
        """(stage, use number) of a k-block; the ring runs on through tiles and segments."""
        if fault.restart_ring_per_segment and sc.tiles[tile][block] == HALF:
            first = next(i for i, kind in enumerate(sc.tiles[tile]) if kind == HALF)
            number = sum(map(len, sc.tiles[:tile])) + block - first
        else:
            number = sum(map(len, sc.tiles[:tile])) + block
        return number % sc.stages, number // sc.stages

    for cta in peers:
        producer: list[tuple] = []
        for tile, kinds in enumerate(sc.tiles):
            for block, kind in enumerate(kinds):
                stage, use = position(tile, block)
                expected = stage_bytes(kind)
                if kind == HALF and fault.half_expects_full:
                    expected = stage_bytes(FULL)
                if kind == HALF and fault.half_expects_less:
                    expected = A_BYTES
                b_share = (stage_bytes(kind) - A_BYTES) // sc.cluster
                loads = tuple(
                    (other, stage, (cta, tile, block), b_share + (A_BYTES if other == cta else 0)) for other in peers
                )
                wait = ("empty", cta, stage) if fault.wait_for_empty else None
                producer.append(
                    ("produce", wait, (use & 1) ^ fault.producer_phase, ("full", cta, stage), expected, loads)
                )
        m.exits[len(m.programs)] = cta
        m.programs.append(producer)

        for w in range(sc.consumers):
            program: list[tuple] = []
            tiles = range(w, len(sc.tiles), sc.consumers) if sc.pingpong else range(len(sc.tiles))
            done_here = 0

            def release(stage: int, program: list[tuple] = program, cta: int = cta) -> None:
                program.append(("drop", cta, stage))
                for other in peers:
                    if other == cta or fault.arrive_at_peer:
                        program.append(("arrive", ("empty", other, stage)))

            for turn, tile in enumerate(tiles):
                if sc.pingpong and fault.order_wait:
                    program.append(("wait", ("order", cta, w), (turn & 1) ^ (1 if w == 0 else 0)))
                held: int | None = None
                for block in range(len(sc.tiles[tile])):
                    stage, use = position(tile, block)
                    if sc.pingpong and not fault.skip_other_tile:
                        stage, use = done_here % sc.stages, done_here // sc.stages
                    done_here += 1
                    parity = use & 1 if fault.consumer_phase_flip else 0
                    program.append(("acquire", ("full", cta, stage), parity, cta, stage, tile, block))
                    if fault.release_early:
                        for other in peers:
                            program.append(("arrive", ("empty", other, stage)))
                    elif held is not None:
                        release(held)
                    if fault.release_early and held is not None:
                        program.append(("drop", cta, held))
                    held = stage
                if sc.pingpong and fault.order_arrive:
                    program.append(("arrive", ("order", cta, 1 - w)))
                if held is not None:
                    if fault.release_early:
                        program.append(("drop", cta, held))
                    else:
                        release(held)
            m.exits[len(m.programs)] = cta
            m.programs.append(program)
    if sc.cluster > 1 and fault.final_sync:
        for program in m.programs:
            program.append(("arrive", "exit"))
            program.append(("wait", "exit", 0))
    return m


def store_machine(buffers: int = 2, allowed: int | None = None, stores: int = 5, sync_before: bool = True,
                  sync_after: bool = True) -> Machine:  # fmt: skip
    """``CoopEpilogue::store``: leader waits, both sync, both write, both sync, leader issues the store."""
    m = Machine()
    m.counts["sync"] = 2
    allowed = buffers - 1 if allowed is None else allowed
    for leader in (True, False):
        program: list[tuple] = []
        syncs = 0

        def sync(program: list[tuple] = program) -> None:
            nonlocal syncs
            program.append(("arrive", "sync"))
            program.append(("wait", "sync", syncs & 1))
            syncs += 1

        for i in range(stores):
            if leader:
                program.append(("wait_read", allowed))
            if sync_before:
                sync()
            program.append(("write", i % buffers, leader, i))
            if sync_after:
                sync()
            if leader:
                program.append(("store", i % buffers, i))
        m.programs.append(program)
    return m


def fetch_machine(tiles: int = 2, parts: int = 6, wait_between: bool = True, wait_at_tile: bool = True,
                  parity_step: bool = True) -> Machine:  # fmt: skip
    """The backward epilogue of one warpgroup: two buffers filled by TMA, overwritten in place, stored from, refilled."""
    m = Machine()
    m.counts["sync"] = 2
    m.counts["fetched", 0] = m.counts["fetched", 1] = 1
    for leader in (True, False):
        program: list[tuple] = []
        syncs = 0
        for turn in range(tiles):
            if leader:
                if wait_at_tile:
                    program.append(("wait_read", 0))
                program.append(("fetch", 0, (turn, 0)))
                program.append(("fetch", 1, (turn, 1)))
            for j in range(parts):
                parity = (turn * (parts // 2) + j // 2) & 1 if parity_step else (j // 2) & 1
                program.append(("wait", ("fetched", j & 1), parity))
                program.append(("modify", j & 1, leader, (turn, j)))
                program.append(("arrive", "sync"))
                program.append(("wait", "sync", syncs & 1))
                syncs += 1
                if leader:
                    program.append(("store", j & 1, (turn, j)))
                    if j + 2 < parts:
                        if wait_between:
                            program.append(("wait_read", 0))
                        program.append(("fetch", j & 1, (turn, j + 2)))
        m.programs.append(program)
    return m


def meeting_machine(blocks: int = 2, groups: int = 2, k_blocks: tuple[int, ...] = (2, 1), stages: int = 2, drained: bool = True,
                    meet_first: bool = True, meet_last: bool = True, producer_meets: bool = True) -> Machine:  # fmt: skip
    """A split tile: each block its own ring and k-blocks (perhaps none), then partial sums over the ring, read by all blocks."""
    m = Machine()
    m.counts["meet"] = blocks * (groups + 1)
    for cta in range(blocks):
        for s in range(stages):
            m.counts["full", cta, s] = 1
            m.counts["empty", cta, s] = groups
        m.counts["local", cta] = groups
    for cta in range(blocks):
        count = k_blocks[cta % len(k_blocks)]
        where = [(i % stages, i // stages) for i in range(count)]
        # Every block's producer comes first among its processes and says so, even when it has nothing to load.
        program: list[tuple] = [
            ("produce", ("empty", cta, stage), (use & 1) ^ 1, ("full", cta, stage), stage_bytes(FULL),
             ((cta, stage, (cta, 0, i), stage_bytes(FULL)),))
            for i, (stage, use) in enumerate(where)
        ]  # fmt: skip
        meetings = [(0, meet_first), (1, meet_last)]

        def meet(program: list[tuple], phase: int, wanted: bool) -> None:
            if wanted:
                program.append(("arrive", "meet"))
                program.append(("wait", "meet", phase if meet_first else 0))

        if producer_meets:
            for phase, wanted in meetings:
                meet(program, phase, wanted)
        m.exits[len(m.programs)] = cta
        m.programs.append(program)
        for group in range(groups):
            program = []
            held: int | None = None
            for i, (stage, use) in enumerate(where):
                program.append(("acquire", ("full", cta, stage), use & 1, cta, stage, 0, i))
                if held is not None:
                    program += [("drop", cta, held), ("arrive", ("empty", cta, held))]
                held = stage
            if held is not None:
                program += [("drop", cta, held), ("arrive", ("empty", cta, held))]
            if drained:
                program += [("arrive", ("local", cta)), ("wait", ("local", cta), 0)]
            program.append(("deposit", cta, group))
            meet(program, *meetings[0])
            program += [("collect", other, groups) for other in range(blocks)]
            meet(program, *meetings[1])
            m.exits[len(m.programs)] = cta
            m.programs.append(program)
    return m


def split_machine(sc: Scenario, drained: bool = True, meet_last: bool = True) -> Machine:
    """One multicast group of ``segk_split``: the ring of ``ring_machine``, then sums as in ``meeting_machine``. The groups
    of a cluster share nothing but the meetings."""
    m = ring_machine(sc, Faults(final_sync=False))
    m.counts["meet"] = len(m.programs)
    for process, cta in m.exits.items():
        program, each = m.programs[process], 1 + sc.consumers
        meet = [[("arrive", "meet"), ("wait", "meet", phase)] for phase in (0, 1)]
        if process % each == 0:  # the producer
            program += meet[0]
        else:
            m.counts["local", cta] = sc.consumers
            if drained:
                program += [("arrive", ("local", cta)), ("wait", ("local", cta), 0)]
            program += [("deposit", cta, process % each - 1), *meet[0]]
            program += [("collect", other, sc.consumers) for other in range(sc.cluster)]
        if meet_last:
            program += meet[1]
    return m


def overlap_machine(k_blocks: int = 3, dependent_from: int = 1, stages: int = 2, ahead: bool = True, wait_loads: bool = True,
                    wait_stores: bool = True) -> Machine:  # fmt: skip
    """A decode kernel that starts while the kernel before still runs: that one writes the activations of k-blocks from
    ``dependent_from`` on, and still reads the memory that this one's output was given."""
    m = Machine()
    m.counts["before"] = 1
    for s in range(stages):
        m.counts["full", 0, s] = m.counts["empty", 0, s] = 1
    program: list[tuple] = []
    waited, i = not wait_loads, 0

    def weights(i: int) -> None:
        stage, use = i % stages, i // stages
        program.append(("produce", ("empty", 0, stage), (use & 1) ^ 1, ("full", 0, stage), A_BYTES + B_BYTES,
                        ((0, stage, (0, 0, i), B_BYTES),)))  # fmt: skip

    def activations(i: int) -> None:
        if i >= dependent_from:
            program.append(("need", "activations", f"k-block {i} reads activations that are not written yet"))
        program.append(("produce", None, 0, None, 0, ((0, i % stages, (1, 0, i), A_BYTES),)))

    while i < k_blocks:
        if not waited and i >= dependent_from:
            lap = min(stages, k_blocks) if ahead and dependent_from == 0 else 0
            for j in range(lap):
                weights(j)
            program.append(("wait", "before", 0))
            waited = True
            for j in range(lap):
                activations(j)
            i += lap
            if i >= k_blocks:
                break
        weights(i)
        activations(i)
        i += 1
    consumer: list[tuple] = []
    for i in range(k_blocks):
        stage, use = i % stages, i // stages
        consumer += [
            ("acquire", ("full", 0, stage), use & 1, 0, stage, 0, i), ("drop", 0, stage), ("arrive", ("empty", 0, stage)),
        ]  # fmt: skip
    if wait_stores:
        consumer.append(("wait", "before", 0))
    consumer.append(("need", "ended", "the output is written while the kernel before reads that memory"))
    m.programs = [program, consumer, [("touch", "activations"), ("touch", "ended"), ("arrive", "before")]]
    m.parts = 2
    return m


def resident_machine(tiles: int = 3, stages: int = 2, wait_resident: bool = True, wait_full: bool = True) -> Machine:
    """Value gradients: w_b_up loaded once, then a ring of tiles; two warpgroups."""
    m = Machine()
    m.counts["full", 0, "resident"] = 1
    for s in range(stages):
        m.counts["full", 0, s] = 1
        m.counts["empty", 0, s] = 2
    program: list[tuple] = [("produce", None, 0, ("full", 0, "resident"), 7, ((0, "resident", (0, 0, -1), 7),))]
    for i in range(tiles):
        stage, use = i % stages, i // stages
        program.append(
            ("produce", ("empty", 0, stage), (use & 1) ^ 1, ("full", 0, stage), 5, ((0, stage, (0, 0, i), 5),))
        )
    m.programs.append(program)
    for _ in range(2):
        consumer: list[tuple] = []
        if wait_resident:
            consumer.append(("wait", ("full", 0, "resident"), 0))
        for i in range(tiles):
            stage, use = i % stages, i // stages
            if wait_full:
                consumer.append(("acquire", ("full", 0, stage), use & 1, 0, stage, 0, i))
            else:
                consumer.append(("use", 0, stage, 0, i))
            consumer += [("use", 0, "resident", 0, -1), ("drop", 0, stage), ("arrive", ("empty", 0, stage))]
        m.programs.append(consumer)
    return m
