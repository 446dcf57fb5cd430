"""The emulator itself (tools/emulator): it translates what it knows, refuses what it does not, and reports every misuse."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
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


def test_every_known_instruction_is_used_by_csrc() -> None:
    """What csrc/ no longer uses leaves the emulator too."""
    text = "".join(translate(f.read_text(), f.name) for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cuh", ".inc"))
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
    "wgmma without proxy fence": r"wgmma reads .* not followed by fence\.proxy\.async",
    "leaves with wgmma in flight": r"leaves with wgmma in flight",
    "counts disagree": r"bar\.sync 1 with (64|128) threads where others expect (64|128)",
    "lanes apart": r"lanes of warp 0 are at different warp-wide instructions",
    "too many registers": r"registers, the SM has 65536",
    "reads a block that has left": r"reads the shared memory of block rank 1, which has left",
    "arrives at a block that has left": r"no initialised mbarrier|block rank 1, which owns the mbarrier .* has left",
}
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
    assert set(rules(machine)) == {*MISUSES, "none", "accumulators read early"}


def test_correct_use_passes(machine: ctypes.CDLL) -> None:
    for seed in range(20):
        assert break_rule(machine, "none", seed, mode=seed % 3)[0] == ""


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_reported(machine: ctypes.CDLL, name: str) -> None:
    """Under the latest legal schedule; where it takes luck (who leaves first), under some drawn one."""
    errors = [
        break_rule(machine, name, LATEST, LATEST)[0],
        *(break_rule(machine, name, seed, 2)[0] for seed in range(20)),
    ]
    assert any(re.search(MISUSES[name], error) for error in errors), errors


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
