"""The build's and check-cuda's refusals: each finding is provoked on made-up compiler output."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import build_cuda
import check_cuda

CLEAN = (
    "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info    : Used 168 registers, used 16 barriers\n"
)


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads",
        "ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
    ],
)
def test_build_refuses(line: str) -> None:
    assert build_cuda.faults(CLEAN) == []
    assert build_cuda.faults(CLEAN + line) != []


def test_failed_compile_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_cuda.run_compile([sys.executable, "-c", "print('x')"]) == 0
    assert build_cuda.run_compile([sys.executable, "-c", "print('(C7510) serialized')"]) == 1
    assert "refused" in capsys.readouterr().err


def test_no_nvcc_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(build_cuda.Path, "is_file", lambda self: False)
    with pytest.raises(build_cuda.Unavailable, match=r"no nvcc found: install the CUDA toolkit"):
        build_cuda.find_nvcc()


def test_old_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvcc").write_text("")
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    answer = SimpleNamespace(stdout="Cuda compilation tools, release 11.8, V11.8.89")
    monkeypatch.setattr(build_cuda.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(build_cuda.Unavailable, match=r"release 11\.8"):
        build_cuda.find_nvcc()


KERNEL: dict[str, Any] = {
    "family": "coop", "dtype": 0, "epilogue": 0, "mn_major": False, "cluster": 2, "block_m": 128, "block_n": 256,
}  # fmt: skip
USE = {"REG": 168, "STACK": 0, "LOCAL": 0}
BODY = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", *["HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24"] * 4,
        "WARPGROUP.DEPBAR.LE gsb0, 0x1", "SYNCS.ARRIVE.TRANS64 RZ, [UR4], RZ", "@!P0 BRA 0x10"]  # fmt: skip
REST = ["USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", "USETMAXREG.DEALLOC.CTAPOOL 0x28", "STSM.16.M88.4 [R0], R4",
        "UTMASTG.2D [UR16], [UR10]", "UTMALDG.2D.MULTICAST [UR8], [UR4], UR6", "EXIT"]  # fmt: skip


def code(body: list[str], rest: list[str]) -> check_cuda.Code:
    return check_cuda.Code("k", [(0x10 * (i + 1), t) for i, t in enumerate([*body, *rest])])


def test_a_clean_kernel_passes() -> None:
    assert check_cuda.check(KERNEL, code(BODY, REST), USE, 230512) == []


@pytest.mark.parametrize(
    ("body", "rest", "use", "smem", "part"),
    [
        ([BODY[0], "STL [R1], R2", *BODY[1:]], REST, USE, 1024, "local memory in a K loop"),
        ([BODY[0], "MEMBAR.ALL.GPU", *BODY[1:]], REST, USE, 1024, "a fence in a K loop"),
        ([BODY[0], *BODY[2:]], REST, USE, 1024, "HGMMA"),
        ([t.replace("256x16", "128x16") for t in BODY], REST, USE, 1024, "expected"),
        ([t for t in BODY if "DEPBAR" not in t], REST, USE, 1024, "wgmma waits"),
        (BODY[:-1], REST, USE, 1024, "no K loop"),
        (BODY, [t for t in REST if "USETMAXREG.D" not in t], USE, 1024, "register reallocation"),
        (BODY, [t for t in REST if "UTMASTG" not in t], USE, 1024, "no TMA store"),
        (BODY, [t.replace(".MULTICAST", "") for t in REST], USE, 1024, "multicast"),
        (BODY, REST, USE | {"REG": 200}, 1024, "200 registers"),
        (BODY, REST, USE | {"STACK": 8}, 1024, "8 bytes of stack"),
        (BODY, REST, USE, 232449, "shared memory"),
    ],
)
def test_findings(body: list[str], rest: list[str], use: dict[str, int], smem: int, part: str) -> None:
    found = check_cuda.check(KERNEL, code(body, rest), use, smem)
    assert any(part in f for f in found), found


GATE_UP = KERNEL | {"epilogue": 2}
HALF = [t.replace("256x16", "128x16") for t in BODY[:-1]]


@pytest.mark.parametrize(
    ("between", "clean"),
    [(["WARPGROUP.DEPBAR.LE gsb0, 0x0"], True), ([], False), (["WARPGROUP.DEPBAR.LE gsb0, 0x1"], False)],
)
def test_half_segments_wait_for_the_full_ones(between: list[str], clean: bool) -> None:
    lines = [*BODY, *between, *HALF]
    back = f"@!P0 BRA {0x10 * (len(BODY) + len(between) + 1):#x}"
    found = check_cuda.check(GATE_UP, code([*lines, back], REST), USE, 230512)
    assert found == ([] if clean else ["m64n128 may begin while m64n256 still writes its accumulators"])


COEFFICIENTS_NAME = (
    "_ZN3npt21low_rank_coefficientsINS_18CoefficientsConfigILi64ELb1ELNS_7KeyKindE3ELNS_5DtypeE1EEEEEv"
    "NS_18CoefficientsParamsE"
)
VALUE_GRADS_NAME = "_ZN3npt20low_rank_value_gradsINS_16ValueGradsConfigILNS_5DtypeE0EEEEEvNS_16ValueGradsParamsE"
RULE_NAME = "_ZN3npt13rule_backwardILNS_5DtypeE0ELi2ELb1EEEvNS_10RuleParamsE"


def test_low_rank_kernels_are_recognised() -> None:
    assert check_cuda.identify_low_rank(COEFFICIENTS_NAME) == {
        "family": "coefficients",
        "dtype": 1,
        "tile": 64,
        "variant": 31,
    }
    assert check_cuda.identify_low_rank(VALUE_GRADS_NAME) == {
        "family": "value_grads",
        "dtype": 0,
        "tile": 64,
        "variant": 0,
    }
    assert check_cuda.identify_low_rank(RULE_NAME) == {"family": "rule_backward", "dtype": 0, "tile": 0, "variant": 12}
    assert check_cuda.identify_low_rank("_ZN3npt9segk_coopI") is None


def low_rank_loop(width: int) -> list[str]:
    return [*[f"HGMMA.64x{width}x16.F32.BF16 R24, gdesc[UR8], R24"] * 4, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@!P0 BRA"]


def low_rank_code(loops: list[list[str]], rest: list[str]) -> check_cuda.Code:
    lines, at = [], 0x10
    for body in loops:
        start = at
        for text in body:
            lines.append((at, text if not text.endswith("BRA") else f"{text} {start:#x}"))
            at += 0x10
    return check_cuda.Code("k", [*lines, *((at + 0x10 * i, t) for i, t in enumerate(rest))])


COEFFICIENTS_REST = ["UTMALDG.2D [UR8], [UR4]", "UCGABAR_WAIT", "PREEXIT", "EXIT"]
VALUE_GRADS_LOOP = [*low_rank_loop(256)[:4], *["HGMMA.64x32x16.F32.BF16 R152, gdesc[UR8], R152"] * 32,
             "WARPGROUP.DEPBAR.LE gsb0, 0x0", *["STG.E.64 [R2], R152"] * 8, "@!P0 BRA"]  # fmt: skip
VALUE_GRADS_REST = ["UTMALDG.2D [UR8], [UR4]", "USETMAXREG 0xe8", "USETMAXREG 0x28", "EXIT"]


@pytest.mark.parametrize(
    ("name", "loops", "rest", "use", "part"),
    [
        (COEFFICIENTS_NAME, [low_rank_loop(64), low_rank_loop(8)], COEFFICIENTS_REST, USE, None),
        (COEFFICIENTS_NAME, [low_rank_loop(64)], COEFFICIENTS_REST, USE, "widths in K loops"),
        (
            COEFFICIENTS_NAME,
            [low_rank_loop(64)[:3] + low_rank_loop(64)[4:], low_rank_loop(8)],
            COEFFICIENTS_REST,
            USE,
            "expected 4 a k-block",
        ),
        (
            COEFFICIENTS_NAME,
            [[*low_rank_loop(64)[:4], "@!P0 BRA"], low_rank_loop(8)],
            COEFFICIENTS_REST,
            USE,
            "wgmma waits",
        ),
        (
            COEFFICIENTS_NAME,
            [["LDS R1, [R2]", *low_rank_loop(64)], low_rank_loop(8)],
            COEFFICIENTS_REST,
            USE,
            "plain memory access",
        ),
        (
            COEFFICIENTS_NAME,
            [low_rank_loop(64), low_rank_loop(8)],
            COEFFICIENTS_REST[:1] + COEFFICIENTS_REST[2:],
            USE,
            "cluster barrier",
        ),
        (
            COEFFICIENTS_NAME,
            [low_rank_loop(64), low_rank_loop(8)],
            COEFFICIENTS_REST,
            USE | {"REG": 170},
            "170 registers",
        ),
        (VALUE_GRADS_NAME, [VALUE_GRADS_LOOP], VALUE_GRADS_REST, USE, None),
        (VALUE_GRADS_NAME, [VALUE_GRADS_LOOP[1:]], VALUE_GRADS_REST, USE, "loops"),
        (VALUE_GRADS_NAME, [VALUE_GRADS_LOOP], VALUE_GRADS_REST[:1], USE, "register reallocation"),
        (VALUE_GRADS_NAME, [["RED.E.ADD.F32 [R2], R3", *VALUE_GRADS_LOOP]], VALUE_GRADS_REST, USE, "atomic"),
        (RULE_NAME, [], ["LDG.E R2, [R4]", "EXIT"], USE | {"REG": 40}, None),
        (RULE_NAME, [], ["STL [R1], R2", "EXIT"], USE | {"REG": 40}, "local memory"),
        (RULE_NAME, [], ["EXIT"], USE | {"REG": 80}, "80 registers"),
    ],
)
def test_low_rank_findings(
    name: str, loops: list[list[str]], rest: list[str], use: dict[str, int], part: str | None
) -> None:
    kernel = check_cuda.identify_low_rank(name)
    assert kernel is not None
    found = check_cuda.check_low_rank(kernel, low_rank_code(loops, rest), use, 197728)
    if part is None:
        assert found == []
    else:
        assert any(part in f for f in found), found
