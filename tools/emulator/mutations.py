"""Plants one-line faults in csrc/ and checks that the emulator finds each (part of ``make test-long``).

A fault is a text of csrc/ and what takes its place; only the translation unit named is compiled again. Faults that change
nothing that can be seen say so, with the reason, and must then pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build
from translate import translate_tree
from units import UNITS

HERE = Path(__file__).resolve().parent
_TMA_XY = '" [%0], [%1, {{%{}, %{}}}], [%2], %3;"'
_PACK = 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"({}), "f"({}));'


@dataclass(frozen=True)
class Mutation:
    """``old`` → ``new``, wherever it stands in csrc/; ``unit``: what is compiled and run (units.py)."""

    name: str
    unit: str
    old: str
    new: str = ""
    equivalent: str = ""  # why it cannot be seen


M = Mutation
MUTATIONS = [
    # Addresses, descriptors, fragments
    M("descriptor: strides swapped", "cooperative", "smem_descriptor(address, chunk_bytes, 1024);", "smem_descriptor(address, 1024, chunk_bytes);"),
    M("descriptor: stride of a K-major operand", "cooperative", "smem_descriptor(address, 16, 1024);", "smem_descriptor(address, 16, 512);"),
    M("descriptor: step of k16", "cooperative", ": 32u >> 4;", ": 64u >> 4;"),
    M("fragment row", "decode", "+ 8 * ((i >> 1) & 1); }", "+ 8 * (i & 1); }"),
    M("stmatrix rows", "cooperative", "((lane >> 3) & 1) * 8, 2 * p + (lane >> 4));", "(lane >> 4) * 8, 2 * p + ((lane >> 3) & 1));"),
    M("shared memory not aligned to 1024", "cooperative", "return (smem_address(raw) + 1023u) & ~1023u;", "return (smem_address(raw) + 127u) & ~127u;"),
    # The text of the asm statements
    M("pack: halves swapped", "cooperative", _PACK.format("hi", "lo"), _PACK.format("lo", "hi")),
    M("TMA: x and y swapped", "cooperative", _TMA_XY.format(4, 5), _TMA_XY.format(5, 4)),
    M("wgmma: transposes swapped", "cooperative", "p, 1, 1, %131, %132;", "p, 1, 1, %132, %131;"),
    M("wgmma: registers out of order", "cooperative", '"+f"(d[120]), "+f"(d[121])', '"+f"(d[121]), "+f"(d[120])'),
    # The ring
    M("producer waits for the other parity", "cooperative", "barrier_wait(bars.empty + 8 * at.stage, at.phase ^ 1u);", "barrier_wait(bars.empty + 8 * at.stage, at.phase);"),
    M("empty barrier counts one warp less", "cooperative", "(kPingPong ? 4 : 8);", "(kPingPong ? 4 : 7);"),
    M("producer does not wait", "cooperative", "barrier_wait(bars.empty + 8 * at.stage, at.phase ^ 1u);"),
    M("consumer does not wait", "cooperative", "barrier_wait(bars.full + 8 * s.at.stage, s.at.phase);"),
    M("stage released one k-block early", "cooperative", "wgmma_wait<1>();  // everything but", "wgmma_wait<2>();  // everything but"),
    M("tile finished with wgmma in flight", "cooperative", "  wgmma_wait<0>();\n  pin<C>(acc);", "  wgmma_wait<1>();\n  pin<C>(acc);"),
    M("no wgmma fence", "cooperative", "barrier_wait(bars.full + 8 * s.at.stage, s.at.phase);  // [P5]\n    wgmma_fence();", "barrier_wait(bars.full + 8 * s.at.stage, s.at.phase);"),
    M("first product accumulates", "cooperative", "k == 0 ? s.accumulate : 1);", "1);"),
    M("half stage expects a whole one", "cooperative", "(kind == kLowFirst ? block_n / 2 : block_n)", "block_n"),
    # Clusters
    M("release: own block only", "cooperative", "if (lane < uint32_t(C::kCluster)) barrier_arrive_cluster(bars.empty + 8 * stage, lane);", "if (lane < 2) barrier_arrive_cluster(bars.empty + 8 * stage, cluster_rank());"),
    M("multicast to one block", "cooperative", "constexpr uint16_t kAll = (1u << C::kCluster) - 1;", "constexpr uint16_t kAll = 1;"),
    M("no fence after mbarrier.init", "cooperative", "    barrier_init_fence();\n  }\n  if constexpr", "  }\n  if constexpr"),
    M("cluster does not meet after mbarrier.init", "cooperative", "cluster_sync();  // a peer's multicast", "__syncthreads();  // a peer's multicast"),
    M("a block leaves before its peer", "cooperative", "if constexpr (C::kCluster > 1) cluster_sync();"),
    # Epilogues
    M("no proxy fence before a store", "cooperative", "    fence_async_proxy();\n    named_barrier(barrier_id, 128);", "    named_barrier(barrier_id, 128);"),
    M("buffer written while a store reads it", "cooperative", "store_wait_read<1>();", "store_wait_read<2>();"),
    M("no barrier before the buffer is written", "cooperative", "store_wait_read<1>();\n    named_barrier(barrier_id, 128);", "store_wait_read<1>();"),
    M("no barrier before the store", "cooperative", "fence_async_proxy();\n    named_barrier(barrier_id, 128);", "fence_async_proxy();"),
    M("nothing committed outside the matrix", "cooperative", "tma_store(map, tile, column, row);  // TMA clips a tile that reaches over the edge\n      store_commit();", "{ tma_store(map, tile, column, row); store_commit(); }"),
    M("a block leaves with stores under way", "cooperative", "if (thread == 0) store_wait_all();"),
    # Ping-pong
    M("no turns", "pingpong", "barrier_wait(bars.order + 8 * consumer, (turn & 1u) ^ (consumer == 0 ? 1u : 0u));"),
    M("turns: both first", "pingpong", "(consumer == 0 ? 1u : 0u)", "0u"),
    M("the other warpgroup's k-blocks not skipped", "pingpong", "loop.at = ring_advance(loop.at, tile_blocks, C::kStages);"),
    M("ping-pong buffer written while a store reads it", "pingpong", "store_wait_read<3>();", "store_wait_read<4>();"),
    M("buffers do not rotate from tile to tile", "pingpong", "const int base_number = int(turn) * (p.store_pre ? 6 : 2);", "const int base_number = 0;"),
    M("backward: no wait [E2]", "pingpong_bwd", "store_wait_read<0>();  // [E2]", "// [E2]"),
    M("backward: no wait [E3]", "pingpong_bwd", "barrier_wait(out.barriers + 8 * (j & 1), (turn + uint32_t(j / 2)) & 1u);"),
    M("backward: parity of [E3]", "pingpong_bwd", "(turn + uint32_t(j / 2)) & 1u);", "uint32_t(j / 2) & 1u);"),
    M("backward: no wait [E4]", "pingpong_bwd", "store_wait_read<0>();  // [E4]", "// [E4]"),
    M("backward: no proxy fence", "pingpong_bwd", "out.template backward<kInputs>(part, j);\n          fence_async_proxy();", "out.template backward<kInputs>(part, j);"),
    # Decode
    M("sums written over a stage being read", "decode", "named_barrier(1, 128);  // every warp", "// every warp"),
    M("split: no meeting [D2]", "decode", "cluster_sync();  // [D2]", "named_barrier(2, 128);  // [D2]"),
    M("split: a block leaves early [D3]", "decode", "cluster_sync();  // [D3]", "//"),
    M("a part without k-blocks adds garbage", "decode", "acc[half][i] = fed[half] ? acc[half][i] : 0.0f;", ";"),
    M("stores beyond the last token", "decode", "if (token < p.rows && column < p.cols) {", "if (column < p.cols) {"),
    M("overlap: activations read early [D1]", "overlap", "wait_for_previous();  // [D1]", "// [D1]"),
    M(
        "overlap: outputs written without [D4]", "overlap", "wait_for_previous();  // [D4]", "// [D4]",
        "every cluster's producer has passed [D1] before its last stage can be full, [D2] joins a split tile's parts, and the host "
        "refuses a dependent_from that names no segment: [D4] waits for what has ended",
    ),
    # The low-rank side
    M("coefficients: no barrier [S2]", "coefficients", "named_barrier(1, 256);  // [S2]"),
    M("coefficients: no meeting [S1]", "coefficients", "cluster_sync();  // [S1] every block's", "named_barrier(2, 256);  // every block's"),
    M("coefficients: a block leaves early [S3]", "coefficients", "cluster_sync();  // [S3]", "//"),
    M("value_grads: stage released before its wgmma", "value_grads", "wgmma_commit();\n    wgmma_wait<0>();", "wgmma_commit();\n    ring.release(ring.at.stage, lane);\n    wgmma_wait<0>();"),
    M("value_grads: no wait for w_b_up [S5]", "value_grads", "barrier_wait(resident_full, 0);  // [S5]"),
]  # fmt: skip


def plant(mutation: Mutation, csrc: Path) -> None:
    """Change the copy ``csrc``. Raises ``LookupError`` if the text stands in no file, or in several."""
    files = [f for f in csrc.rglob("*") if f.is_file() and mutation.old in f.read_text()]
    if len(files) != 1:
        raise LookupError(f"{mutation.name}: {mutation.old!r} stands in {len(files)} files of csrc/, not in one")
    files[0].write_text(files[0].read_text().replace(mutation.old, mutation.new))


def _run(command: list[str], module: Path, timeout: float) -> tuple[bool, str]:
    """(whether a fault was found, its first lines)."""
    environment = os.environ | {"NPT_EMULATED_MODULE": str(module)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return True, f"no end in {timeout:.0f} s"
    text = (done.stdout + done.stderr).strip()
    found = re.search(r"(deadlock:\s*\n[^\n]*|Schedule[^\n]*|seed \d+: [^\n]*)", text)
    return done.returncode == 1, found.group(1) if found else text[-300:]


def try_one(mutation: Mutation, toolchain: build.Toolchain, base: Path, csrc: Path, folder: Path, timeout: float) -> tuple[bool, str]:
    """Build and run one mutant: (whether it was caught, how). ``base``: a build of ``csrc`` as it is."""
    unit, command = UNITS[mutation.unit]
    shutil.copytree(csrc, folder / "csrc")
    plant(mutation, folder / "csrc")
    translate_tree(folder / "csrc", folder / "generated")
    objects = []
    for source in build.sources(folder / "generated"):
        mutant = source.name == f"{unit}.cu.cpp"
        out = build.object_path(toolchain, source, folder if mutant else base / "objects")
        objects.append(build.compile_one(toolchain, source, folder / "generated", out) if mutant else out)
    module = build.link(toolchain, objects, folder / f"{build.MODULE}{build.SUFFIX}")
    return _run(_command(command), module, timeout)


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, str(HERE / arguments[0]), *arguments[1:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the names")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each mutant (default: 600)")
    parser.add_argument("--csrc", type=Path, default=build.ROOT / "csrc", help="another csrc/ than this checkout's")
    options = parser.parse_args()
    base = build.ROOT / "build" / "emulator-mutants"
    try:
        whole = build.build(options.csrc, base, base / f"{build.MODULE}{build.SUFFIX}")
    except build.Unavailable as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 2
    toolchain = build.Toolchain.find()
    chosen = [m for m in MUTATIONS if re.search(options.only, m.name)]
    for unit in sorted({m.unit for m in chosen}):  # a fault that is there anyway would count for every mutant
        faulty, how = _run(_command(UNITS[unit][1]), whole, options.timeout)
        if faulty:
            print(f"mutations: {unit} fails without a mutation: {how}", file=sys.stderr)
            return 1
    wrong = 0
    for mutation in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="npt-mutant-") as folder:
            caught, how = try_one(mutation, toolchain, base, options.csrc, Path(folder), options.timeout)
        verdict = "caught" if caught else "equivalent" if mutation.equivalent else "MISSED"
        wrong += caught == bool(mutation.equivalent)
        shown = mutation.equivalent if verdict == "equivalent" else " | ".join(how.splitlines()) if caught else ""
        print(f"{verdict:10} {mutation.name:52} {time.perf_counter() - start:5.0f} s  {shown[:220]}", flush=True)
    equivalent = sum(bool(m.equivalent) for m in chosen)
    print(f"{len(chosen)} faults, {equivalent} of them without effect; {wrong} not as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
