"""The emulator itself (tools/emulator): it translates what it knows, refuses what it does not, and reports every misuse."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "emulator"))
import build_emulator as build
import mutations
from translate import Untranslatable, known_instructions, translate
from units import UNITS

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------ translation
def test_an_unknown_instruction_is_named_with_its_place() -> None:
    source = 'void f() {\n  asm volatile("bar.sync 0, 32;");\n  asm volatile("bar.warp.sync %0;" ::"r"(1));\n}\n'
    with pytest.raises(Untranslatable, match=r"^csrc/x\.cuh:3: .*'bar\.warp\.sync'"):
        translate(source, "csrc/x.cuh")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ('asm("mov.u32 %0, %%clock;" : "=r"(x));', "special register '%clock'"),
        ('asm("mov.u32 %0, other;" : "=r"(x));', "asm operand 'other'"),
        ('asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "d"(y));', "input constraint 'd'"),
        ("__global__ void __launch_bounds__(32) f(int x) { }", "__launch_bounds__"),
        ("__shared__ float a[2], b[2];", "__shared__"),
        (
            'asm("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0}, %1, %1, 1, 1, 1, 0, 0;" : "+f"(x) : "l"(d));',
            "1 accumulators",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_read_is_refused(source: str, why: str) -> None:
    with pytest.raises(Untranslatable, match=r"^f\.cu:1: .*" + why):
        translate(source, "f.cu")


def test_lines_keep_their_numbers_and_comments_their_text() -> None:
    source = '// asm("nothing");\nint a;\nasm volatile(\n    "bar.sync %0, %1;" ::"r"(1),\n    "r"(\n32));\nint b;\n'
    lines = translate(source, "csrc/y.cuh").splitlines()
    assert lines[0] == '#line 1 "csrc/y.cuh"'
    assert lines[1:3] == source.splitlines()[:2]
    assert "emu::ptx::bar_sync(in0_0, in1_0);" in lines[3]
    assert lines[7] == "int b;"


def test_the_order_of_operands_is_the_texts() -> None:
    source = 'asm("st.shared.v2.f32 [%0], {%2, %1};" ::"r"(a), "f"(x), "f"(y));'
    assert "st_shared_v2_f32(in0_0, in2_0, in1_0)" in translate(source, "f.cu")


def test_every_known_instruction_is_used() -> None:
    """What csrc/ no longer uses leaves the emulator too, but for the relaxed forms and the scopes that races are made of."""
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cuh", ".inc")]
    text = "".join(translate(f.read_text(), f.name) for f in [*files, Path(__file__).parent / "misuse" / "misuse.cu"])
    assert [name for name in sorted(known_instructions()) if f"{name}(" not in text] == []


def test_every_planted_fault_has_its_place() -> None:
    """A change of csrc/ that moves a line which mutations.py breaks is noticed here, not at night."""
    texts = [f.read_text() for f in (ROOT / "csrc").rglob("*") if f.is_file()]
    assert [m.name for m in mutations.MUTATIONS if not any(m.old in text for text in texts)] == []
    units = {f.stem for f in (ROOT / "csrc").rglob("*.cu")}
    assert {UNITS[m.unit][0] for m in mutations.MUTATIONS} <= units


# ------------------------------------------------------------------------------------------------ what is missing
def test_missing_pieces_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no no-such-compiler found: install"):
        build.find_compiler()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(build.sys, "path", [])
    monkeypatch.setattr(build.Path, "is_file", lambda self: False)
    with pytest.raises(build.Unavailable, match="no CUDA headers found: pip install triton"):
        build.find_headers()
    monkeypatch.setattr(build.Path, "read_text", lambda self: "flags : sse avx2\n")
    with pytest.raises(build.Unavailable, match="no fma, f16c"):
        build.check_processor()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own: whether kernels are emulated is decided when the package is imported."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | environment,
    )  # fmt: skip


def test_not_built_is_one_line() -> None:
    code = (
        "import sys; sys.modules['npt_kernels._cuda_emulated'] = None\n"
        "import torch; from npt_kernels import explain; print(explain('mlp', dtype=torch.bfloat16, backend='cuda'))"
    )
    done = python(code, NPT_EMULATE="1")
    assert "NPT_EMULATE=1, but the emulator is not built: run `make emulator`" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ the machine
@pytest.fixture(scope="session")
def toolchain() -> build.Toolchain:
    try:
        return build.Toolchain.find()
    except build.Unavailable as error:
        pytest.skip(f"the emulator cannot be built here: {error}")


@pytest.fixture(scope="session")
def machine(toolchain: build.Toolchain, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """misuse/misuse.cu on the emulated machine."""
    folder = tmp_path_factory.mktemp("misuse")
    build.translate_tree(Path(__file__).parent / "misuse", folder / "generated")
    objects = build.compile_all(toolchain, folder / "generated", folder, jobs=2)
    library = ctypes.CDLL(str(build.link(toolchain, objects, folder / "misuse.so")))
    library.rule_name.restype = library.break_rule.restype = library.emu_flush.restype = ctypes.c_char_p
    library.emu_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    return library


MISUSES = {
    "one arrival too many": r"one arrival more than the 1 it expects",
    "barrier never initialised": r"no initialised mbarrier",
    "nobody arrives": r"deadlock:\n  block \(0,0,0\) warp 0: mbarrier at \+0x.* for parity 0; .*1 of 1 arrivals",
    "beyond shared memory": r"st\.shared: shared memory .* is outside",
    "store without proxy fence": r"TMA store .* not followed by fence\.proxy\.async",
    "load on an unfenced barrier": r"TMA load on an mbarrier without fence\.mbarrier_init",
    "coordinate beyond 31 bits": r"coordinate x = 1073741823; .*leaves 31 bits .*cudaErrorIllegalInstruction",
    "leaves with a load in flight": r"leaves while TMA loads into it are in flight",
    "reads what a load will write": r"ld\.shared::cluster reads .* which a TMA load in flight will write",
    "writes what a store has to read": r"st\.shared writes .* which a TMA store still has to read",
    "leaves with an open group": r"leaves with bulk stores that were not committed",
    "wgmma without fence": r"without wgmma\.fence",
    "another shape in flight": r"wgmma m64n8 on accumulators of an m64n16 in flight",
    "warps disagree": r"the warps of a warpgroup give different operands",
    "wgmma without proxy fence": r"wgmma reads .* not followed by fence\.proxy\.async"
    r"|race: wgmma .* which st\.shared of rank 0, thread 0 wrote: fence\.proxy\.async comes too late or not at all",
    "leaves with wgmma in flight": r"leaves with wgmma in flight",
    "counts disagree": r"bar\.sync 1 with (64|128) threads where others expect (64|128)",
    "lanes apart": r"lanes of warp 0 are at different warp-wide instructions",
    "too many registers": r"registers, the SM has 65536",
    "reads a block that has left": r"reads the shared memory of block rank 1, which has left",
    "arrives at a block that has left": r"no initialised mbarrier|block rank 1, which owns the mbarrier .* has left",
}
NO_REACH = "what was seen in between is relaxed, or its scope does not reach from one to the other"
#: Races: in every schedule an error, whatever ran first.
RACES = {
    "no barrier": r"race: (ld\.shared::cluster .* reads .* which st\.shared of rank 0, thread 0 wrote"
    r"|st\.shared .* writes .* which ld\.shared::cluster of rank 0, thread 32 read): nothing orders them",
    "lanes of a warp": r"of rank 0, thread 1 reads .* which st\.shared of rank 0, thread 0 wrote: nothing orders them",
    "relaxed arrival": f"which st.shared of rank 0, thread 0 wrote: {NO_REACH}",
    "relaxed wait": f"thread 32 reads .* which TMA load of phase 0 of the mbarrier at 0x.* of rank 0 wrote: {NO_REACH}",
    "no wait for a load": r"thread 32 reads .* which TMA load of phase 0 .* wrote: nothing|which a TMA load in flight will write",
    "proxy fence after the barrier": r"TMA store .* which st\.shared of rank 0, thread 32 wrote: fence\.proxy\.async comes"
    r"|TMA store .* not followed by fence\.proxy\.async",
    "written before wgmma is waited for": r"st\.shared .* writes .* which wgmma 0 of rank 0, warp \d read: nothing orders them"
    r"|which a wgmma in flight reads",
    "written before a store is waited for": r"st\.shared .* which TMA store of rank 0, thread 0 \(group 1\) read: nothing orders"
    r"|which a TMA store still has to read",
    "barrier used before a meeting": r"mbarrier\.arrive of rank 0, thread 32 uses .* mbarrier\.init of thread 0 made: nothing"
    r"|no initialised mbarrier",
    "init fence after the meeting": r"mbarrier\.arrive\.shared::cluster .* uses .*: fence\.mbarrier_init comes too late"
    r"|arrival at a peer's mbarrier without fence\.mbarrier_init",
    "cluster met without release": f"race: ld.shared::cluster .* which st.shared of rank [01], thread 0 wrote: {NO_REACH}",
    "fence of one block": f"race: ld.shared::cluster .* which st.shared of rank [01], thread 0 wrote: {NO_REACH}",
    "remote arrival of scope cta": f"rank 0, thread 0 reads .* of rank 1, which st.shared of rank 1, thread 0 wrote: {NO_REACH}",
    "remote wait of scope cta": f"rank 0, thread 0 reads .* of rank 1, which st.shared of rank 1, thread 0 wrote: {NO_REACH}",
    "peer reads, no release": f"rank 1, thread 0 writes .* which ld.shared::cluster of rank 0, thread 0 read: {NO_REACH}",
}  # fmt: skip
#: Those that no schedule shows when races are not looked for: each runs as if it were right.
HIDDEN = {
    "no barrier", "lanes of a warp", "relaxed arrival", "relaxed wait", "cluster met without release", "fence of one block",
    "remote arrival of scope cta", "remote wait of scope cta", "peer reads, no release",
}  # fmt: skip
ORDERED = {
    "ordered: barrier of a warp", "ordered: relaxed with fences", "ordered: init fence and relaxed meeting",
    "ordered: fence of the cluster", "ordered: remote arrival of scope cluster",
}  # fmt: skip
LATEST = 1


def rules(library: ctypes.CDLL) -> dict[str, int]:
    return {library.rule_name(i).decode(): i for i in range(library.rule_count())}


def break_rule(library: ctypes.CDLL, name: str, seed: int, mode: int, threads: int = 0) -> tuple[str, list[int]]:
    """(error, out)."""
    data, out = (ctypes.c_uint16 * 4096)(*range(4096)), (ctypes.c_uint16 * 128)()
    start = ctypes.addressof(data)
    assert start % 16 == 0
    library.emu_configure(seed, mode, 0)
    error = library.break_rule(rules(library)[name], data, out, threads).decode()
    if not error:
        assert list(data) == list(range(4096))
    return error, list(out)


def test_every_rule_is_expected(machine: ctypes.CDLL) -> None:
    assert set(rules(machine)) == {*MISUSES, *RACES, *ORDERED, "none", "accumulators read early"}


def test_correct_use_passes(machine: ctypes.CDLL) -> None:
    for seed in range(20):
        assert break_rule(machine, "none", seed, mode=seed % 3)[0] == ""


@pytest.fixture(params=[True, False], ids=["races", "no races"])
def looks_for_races(machine: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[bool]:
    machine.emu_order(int(request.param))
    yield request.param
    machine.emu_order(1)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_reported(machine: ctypes.CDLL, name: str, looks_for_races: bool) -> None:
    """Under the latest legal schedule; where it takes luck (who leaves first), under some drawn one."""
    errors = [
        break_rule(machine, name, LATEST, LATEST)[0],
        *(break_rule(machine, name, seed, 2)[0] for seed in range(20)),
    ]
    if not looks_for_races:
        assert not any("race: " in error for error in errors), errors
    assert any(re.search(MISUSES[name], error) for error in errors), errors


def in_many_schedules(machine: ctypes.CDLL, name: str) -> list[str]:
    return [
        break_rule(machine, name, seed, mode)[0] for seed, mode in [(0, 0), (1, LATEST), *((s, 2) for s in range(30))]
    ]


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_reported_in_every_schedule(machine: ctypes.CDLL, name: str) -> None:
    errors = in_many_schedules(machine, name)
    assert [error for error in errors if not re.search(RACES[name], error)] == []
    assert any(error.startswith("emulator: race: ") for error in errors), errors


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_without_the_order_of_memory_no_schedule_shows_it(machine: ctypes.CDLL, name: str) -> None:
    machine.emu_order(0)
    try:
        assert set(in_many_schedules(machine, name)) == {""}
    finally:
        machine.emu_order(1)


@pytest.mark.parametrize("name", sorted(ORDERED))
def test_what_is_in_order_is_no_race(machine: ctypes.CDLL, name: str) -> None:
    assert set(in_many_schedules(machine, name)) == {""}


def test_accumulators_hold_nan_until_the_wait(machine: ctypes.CDLL) -> None:
    error, out = break_rule(machine, "accumulators read early", 1, LATEST)
    assert error == "" and set(out) == {0x7FC0}


def test_launch_bounds_are_kept(machine: ctypes.CDLL) -> None:
    assert "__launch_bounds__ allows 288 threads" in break_rule(machine, "none", 0, 0, threads=288)[0]


def test_an_early_writer_of_reused_memory_is_seen(machine: ctypes.CDLL) -> None:
    """The kernel before still reads the memory that the next one was given: with griddepcontrol.wait never, without it often."""
    seen = {0: 0, 1: 0}
    for waits in seen:
        for seed in range(20):
            data, out = (ctypes.c_uint16 * 4096)(*range(4096)), (ctypes.c_uint16 * 128)()
            machine.emu_configure(seed, 2, 1)
            assert machine.overlap(data, out, waits) == 0
            assert machine.emu_flush() == b""
            seen[waits] += list(out)[:32] != list(range(32))
            assert list(data)[:32] == [7] * 32
    assert seen[1] == 0 and seen[0] > 0, seen
