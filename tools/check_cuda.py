"""Builds every Hopper kernel and reads its machine code: what a GPU would run, checked without one (``make check-cuda``).

Per kernel: tensor-core instructions per k-block, one wait and no local memory or GPU-wide fence inside the K loops, TMA loads
(multicast in clusters) and stores, register reallocation, registers, stack and shared memory. Prints the table; exit 1 on
any finding. Needs nvcc, and cuobjdump + nvdisasm: of the toolkit, or ``pip install -e '.[cuda]'``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build_cuda

FAMILIES = ("coop", "pingpong", "decode", "split")
LOW_RANK = ("coefficients", "value_grads", "rule_forward", "rule_backward", "reduce", "norm_forward", "norm_backward")
KEYS = ("no key", "key k", "key mn", "key vector")
EPILOGUES = ("store", "act", "gate_up", "act_bwd", "gate_up_bwd")
ENTRY_REGISTERS = 168  # 65536 / 384: the register file at launch; setmaxnreg then gives 40 and 232
DECODE_REGISTERS = 160
LOW_RANK_REGISTERS = 168  # 9 warps: three share a quarter of the register file
NORM_REGISTERS = 128  # one block of 512 threads an SM
RULE_REGISTERS = 64  # four blocks of 256 threads an SM: they hide memory latency by occupancy
SMEM_LIMIT = 232448


@dataclass
class Loop:
    """An innermost loop that issues wgmma."""

    widths: dict[int, int]
    body: list[str]


@dataclass
class Code:
    """One kernel's SASS: ``(address, instruction)`` in order."""

    name: str
    lines: list[tuple[int, str]]

    def count(self, pattern: str) -> int:
        return sum(1 for _, text in self.lines if re.search(pattern, text))

    def loops(self) -> list[Loop]:
        """Innermost loops with HGMMA. A span with EXIT is no loop: it is a spin wait that ptxas moved behind the code."""
        spans = []
        for address, text in self.lines:
            branch = re.search(r"\bBRA(?:\.\S+)?\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
            if branch and (target := int(branch.group(1), 16)) < address:
                body = [t for a, t in self.lines if target <= a <= address]
                if any("HGMMA" in t for t in body) and not any(re.search(r"\bEXIT\b", t) for t in body):
                    spans.append((target, address, body))
        inner = [
            s for s in spans if not any(o is not s and s[0] <= o[0] and o[1] <= s[1] and o[:2] != s[:2] for o in spans)
        ]
        found = []
        for _, _, body in inner:
            widths: dict[int, int] = {}
            for text in body:
                if hit := re.search(r"HGMMA\.64x(\d+)x16", text):
                    widths[int(hit.group(1))] = widths.get(int(hit.group(1)), 0) + 1
            found.append(Loop(widths, body))
        return found


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: PATH, the toolkit, or NVIDIA's PyPI package."""
    candidates = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        candidates += [str(p) for p in Path(place).glob(f"*/bin/{name}")]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise build_cuda.Unavailable(f"no {name} found: pip install -e '.[cuda]' brings it")


def run_tool(*arguments: str) -> str:
    tools = {str(Path(find_tool(n)).parent) for n in ("cuobjdump", "nvdisasm")}
    path = os.pathsep.join([*tools, os.environ.get("PATH", "")])
    done = subprocess.run(
        [find_tool("cuobjdump"), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    return done.stdout


def read_code(binary: Path) -> dict[str, Code]:
    """Kernel name → code."""
    codes: dict[str, Code] = {}
    current: Code | None = None
    for line in run_tool("-sass", str(binary)).splitlines():
        if header := re.search(r"Function : (\S+)", line):
            current = codes.setdefault(header.group(1), Code(header.group(1), []))
        elif current is not None and (hit := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            current.lines.append((int(hit.group(1), 16), hit.group(2)))
    return codes


def read_resources(binary: Path) -> dict[str, dict[str, int]]:
    """Kernel name → REG, STACK, LOCAL."""
    found = {}
    text = run_tool("-res-usage", str(binary))
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        found[name] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return found


def identify(name: str) -> dict[str, Any] | None:
    """Template arguments from the mangled name; ``None`` for a function that is no kernel of ours."""
    family = re.search(r"segk_(coop|pingpong|decode|split)", name)
    if family is None:
        return None
    ints = [int(v) for v in re.findall(r"Li(\d+)E", name)]
    flags = [int(v) for v in re.findall(r"Lb([01])E", name)]
    dtype, epilogue = (int(v) for v in re.findall(r"E(\d)E", name[name.index("Dtype") :])[:2])
    kernel: dict[str, Any] = {
        "family": family.group(1),
        "dtype": dtype,
        "epilogue": epilogue,
        "mn_major": bool(flags[0]),
    }
    if family.group(1) == "decode":
        return kernel | {"block_m": ints[0], "block_n": 64, "cluster": 1}
    return kernel | {"block_m": ints[0], "block_n": ints[1], "stages": ints[2], "cluster": ints[3]}


def identify_low_rank(name: str) -> dict[str, Any] | None:
    """As :func:`identify` for the kernels of csrc/low_rank."""
    found = re.search(
        r"(low_rank_coefficients|low_rank_value_grads|rule_forward|rule_backward|reduce_shares|matched_norm_(?:for|back)ward)",
        name,
    )
    if found is None:
        return None
    family = (
        "reduce"
        if found.group(1) == "reduce_shares"
        else found.group(1).removeprefix("low_rank_").removeprefix("matched_")
    )
    dtype = int(re.findall(r"DtypeE(\d)E", name)[0])
    ints = [int(v) for v in re.findall(r"Li(\d+)E", name)]
    flags = [int(v) for v in re.findall(r"Lb([01])E", name)]
    kernel: dict[str, Any] = {"family": family, "dtype": dtype, "tile": 0, "variant": 0}
    if family == "coefficients":
        kernel |= {"tile": ints[0], "variant": 10 * int(re.findall(r"KeyKindE(\d)E", name)[0]) + flags[0]}
    elif family == "value_grads":
        kernel["tile"] = 64
    elif family != "reduce":
        kernel["variant"] = ints[0] + (10 * flags[0] if flags else 0)
    return kernel


def check_low_rank(kernel: dict[str, Any], code: Code, use: dict[str, int], smem: int) -> list[str]:
    """What is wrong with one low-rank kernel."""
    bad: list[str] = []

    def need(condition: bool, what: str) -> None:
        if not condition:
            bad.append(what)

    family, loops = kernel["family"], code.loops()
    need(code.count(r"\b(LDL|STL)\b") == 0, "local memory")
    need(use.get("STACK", 1) == 0, f"{use.get('STACK')} bytes of stack")
    need(code.count(r"\b(ATOM|RED|ATOMG|REDG)\b") == 0, "an atomic: sums must have one order")
    if family in ("coefficients", "value_grads"):
        need(use.get("REG", 999) <= LOW_RANK_REGISTERS, f"{use.get('REG')} registers, plan {LOW_RANK_REGISTERS}")
        need(0 < smem <= SMEM_LIMIT, f"{smem} bytes of shared memory")
        need(code.count("UTMALDG") > 0, "no TMA load")
        need(bool(loops), "no K loop found")
        for loop in loops:
            for pattern, what in (
                (r"\b(LDL|STL)\b", "local memory"),
                ("MEMBAR", "a fence"),
                ("ERRBAR|CCTL", "an error barrier"),
            ):
                need(not any(re.search(pattern, t) for t in loop.body), f"{what} in a K loop")
    else:
        plan = NORM_REGISTERS if family.startswith("norm") else RULE_REGISTERS
        need(use.get("REG", 999) <= plan, f"{use.get('REG')} registers, plan {plan}")
        need(not loops, "a tensor-core loop in a kernel that has none")
    if family == "coefficients":
        key, computes_z = divmod(kernel["variant"], 10)
        expected = ({kernel["tile"]} if computes_z or key in (1, 2) else set()) | ({8} if key == 3 else set())
        need({n for loop in loops for n in loop.widths} == expected, f"widths in K loops, expected {expected}")
        for loop in loops:
            counts = list(loop.widths.values())
            need(len(counts) == 1 and counts[0] % 4 == 0, f"a K loop has {loop.widths} HGMMA, expected 4 a k-block")
            waits = sum("WARPGROUP.DEPBAR" in t for t in loop.body)
            need(len(counts) == 1 and waits == counts[0] // 4, f"{waits} wgmma waits in a K loop with {loop.widths}")
            need(
                not any(re.search(r"\b(LDG|STG|LDS|STS)\b", t) for t in loop.body), "a plain memory access in a K loop"
            )
        need(code.count("UCGABAR_WAIT") > 0, "no cluster barrier")
        need(code.count("PREEXIT") > 0, "the next kernel is not allowed to start")
    elif family == "value_grads":
        need([loop.widths for loop in loops] == [{256: 4, 32: 32}], f"loops {[loop.widths for loop in loops]}")
        for loop in loops:
            waits = sum("WARPGROUP.DEPBAR" in t for t in loop.body)
            need(waits == 1, f"{waits} wgmma waits a tile, expected 1")
            need(
                sum("STG.E.64" in t for t in loop.body) == 8, "a tile's share of dc is not 8 stores of 8 bytes a thread"
            )
            need(not any(re.search(r"\b(LDG|LDS|STS)\b", t) for t in loop.body), "a plain read in the loop")
        need(code.count("USETMAXREG") == 2, "no register reallocation")
    return bad


def check(kernel: dict[str, Any], code: Code, use: dict[str, int], smem: int) -> list[str]:
    """What is wrong with one kernel."""
    bad: list[str] = []
    epilogue, decode = EPILOGUES[kernel["epilogue"]], kernel["family"] == "decode"
    gate_up, backward = epilogue == "gate_up", epilogue.endswith("bwd")

    def need(condition: bool, what: str) -> None:
        if not condition:
            bad.append(what)

    # HGMMA per k-block of 64: 4 k16 steps x slabs (ping-pong: two of 64 rows) or x weight tiles (decode, gate and up).
    width = kernel["block_m"] if decode else kernel["block_n"]
    per_block = 4 * (kernel["block_m"] // 64) if kernel["family"] == "pingpong" else 8 if decode and gate_up else 4
    expected = [(width, per_block)]
    if gate_up:
        expected.append((width, 4) if decode else (width // 2, 4))
    loops = code.loops()
    need(bool(loops), "no K loop found")
    for loop in loops:
        need(len(loop.widths) == 1, f"a K loop mixes widths {loop.widths}")
        # ptxas may unroll a loop: whole k-blocks only, each with its wait.
        ((n, count),) = loop.widths.items() if len(loop.widths) == 1 else ((0, 0),)
        unit = [u for w, u in expected if w == n]
        blocks = count // unit[0] if unit and count % unit[0] == 0 else 0
        if not blocks and decode and gate_up and n == width and count % 4 == 0:
            blocks = count // 4
        need(blocks >= 1, f"a K loop has {loop.widths} HGMMA, expected {expected}")
        waits = sum("WARPGROUP.DEPBAR" in t for t in loop.body)
        need(blocks == 0 or waits in (blocks, count // 4), f"{waits} wgmma waits for {blocks} k-blocks")
        for pattern, what in ((r"\b(LDL|STL)\b", "local memory"), ("MEMBAR", "a fence"), ("ERRBAR|CCTL", "an error barrier"),
                              (r"\b(LDG|STG|LDS|STS)\b", "a plain memory access")):  # fmt: skip
            need(not any(re.search(pattern, t) for t in loop.body), f"{what} in a K loop")
    seen = {n for loop in loops for n in loop.widths}
    need({w for w, _ in expected} <= seen, f"widths {seen} in K loops, expected {expected}")
    if gate_up and not decode:
        # In order of addresses: the last m64n256, a wait for all, the first m64n128 on the same accumulators.
        kinds = "".join(
            "w"
            if f"64x{width}x16" in t
            else "h"
            if f"64x{width // 2}x16" in t
            else "d"
            if "DEPBAR.LE gsb0, 0x0" in t
            else ""
            for _, t in code.lines
        )
        need(re.search(r"w[wd]*dh", kinds) is not None, "m64n128 may begin while m64n256 still writes its accumulators")
    need(code.count(r"\b(LDL|STL)\b") == 0, "local memory")
    need(code.count("UTMALDG") > 0, "no TMA load")
    need((code.count(r"UTMALDG\S*MULTICAST") > 0) == (kernel["cluster"] > 1), "multicast does not match the cluster")
    if kernel["family"] == "split":
        need(code.count("UCGABAR_WAIT") > 0, "no cluster barrier: K cannot be split")
        need(code.count("USETMAXREG") == 2, "no register reallocation")
    elif not decode:
        need(code.count("UTMASTG") > 0, "no TMA store")
        need(code.count("USETMAXREG") == 2, "no register reallocation")
        need(code.count(r"\bSTSM\b") > 0, "no stmatrix")
        need((code.count(r"\bLDSM\b") > 0) == backward, "ldmatrix does not match the epilogue")
    else:
        need(code.count("UCGABAR_WAIT") > 0, "no cluster barrier: K cannot be split")
        need(code.count("ACQBULK") > 0, "no wait for the kernel before")
        need(code.count("PREEXIT") > 0, "the next kernel is not allowed to start")
    limit = DECODE_REGISTERS if decode else ENTRY_REGISTERS
    need(use.get("REG", 999) <= limit, f"{use.get('REG')} registers, plan {limit}")
    need(use.get("STACK", 1) == 0, f"{use.get('STACK')} bytes of stack")
    need(use.get("LOCAL", 1) == 0, f"{use.get('LOCAL')} bytes of local memory")
    need(0 < smem <= SMEM_LIMIT, f"{smem} bytes of shared memory")
    return bad


def load_module(path: Path) -> Any:
    """The built module, without importing the package."""
    spec = importlib.util.spec_from_file_location("npt_kernels._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned_smem(module: Any) -> dict[tuple[Any, ...], int]:
    """Shared memory by instance, as the launcher requests it."""
    return {
        (FAMILIES[k["family"]], k["epilogue"], k["dtype"], k["mn_major"], k["cluster"], k["block_m"]): k["smem"]
        for k in module.kernels()
    } | {(LOW_RANK[k["family"]], k["dtype"], k["tile"], k["variant"]): k["smem"] for k in module.low_rank_kernels()}


def low_rank_row(kernel: dict[str, Any], use: dict[str, int], smem: int, loops: str, result: str) -> tuple[Any, ...]:
    """One line of the table."""
    family, variant = kernel["family"], kernel["variant"]
    what, tile = "", ""
    if family == "coefficients":
        what, tile = KEYS[variant // 10] + ("" if variant % 10 else ", z given"), f"128x{kernel['tile']}"
    elif family == "value_grads":
        tile = "64x512"
    elif variant:
        what = ("shares " if variant > 10 else "") + f"x{variant % 10}"
    return family, what, "f16" if kernel["dtype"] else "bf16", "", "", tile, use.get("REG"), smem, loops, result


FIRST_CALL = """
import time
started = time.perf_counter()
import importlib.util, sys
spec = importlib.util.spec_from_file_location("npt_kernels._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
imported = time.perf_counter()
segments, outputs = [(0, 4096, 512, 512, 8192, 512, 0, 0)], [(1 << 20, 256)]
module.launch(0, 0, 0, False, 2, 128, 512, 256, segments, [], outputs, 0, 1.0, 0.0, False, 8, 1, -1, module.DRY_RUN, 0)
print((imported - started) * 1e3, (time.perf_counter() - imported) * 1e3)
"""


def first_call(binary: Path) -> str:
    """Host cost of a first call in a fresh process, the driver's part (tensor-map encoding, launch) left out."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL, str(binary)], capture_output=True, text=True, check=True)
    load, call = map(float, done.stdout.split())
    return f"first call: loading the module {load:.1f} ms, checks and parameters {call:.2f} ms; the driver's part not counted"


def main() -> int:
    try:
        binary = build_cuda.build()
        codes, resources = read_code(binary), read_resources(binary)
    except build_cuda.Unavailable as error:
        print(f"check-cuda: {error}", file=sys.stderr)
        return 1
    smem = planned_smem(load_module(binary))
    rows, findings, met = [], [], set()
    for name, code in codes.items():
        loops = " ".join("+".join(f"{c}x n{n}" for n, c in loop.widths.items()) for loop in code.loops())
        kernel = identify_low_rank(name)
        if kernel is not None:
            key = tuple(kernel[f] for f in ("family", "dtype", "tile", "variant"))
            met.add(key)
            use = resources.get(name, {})
            bad = check_low_rank(kernel, code, use, smem.get(key, 0))
            rows.append(low_rank_row(kernel, use, smem.get(key, 0), loops, "ok" if not bad else "; ".join(bad)))
            findings += [f"{key}: {b}" for b in bad]
            continue
        kernel = identify(name)
        if kernel is None:
            continue
        key = tuple(kernel[f] for f in ("family", "epilogue", "dtype", "mn_major", "cluster", "block_m"))
        met.add(key)
        bad = check(kernel, code, resources.get(name, {}), smem.get(key, 0))
        tile = f"{kernel['block_m']}x{kernel['block_n']}"
        rows.append((
            kernel["family"], EPILOGUES[kernel["epilogue"]], "f16" if kernel["dtype"] else "bf16",
            "mn" if kernel["mn_major"] else "k", kernel["cluster"], tile, resources.get(name, {}).get("REG"),
            smem.get(key), loops, "ok" if not bad else "; ".join(bad),
        ))  # fmt: skip
        findings += [f"{key}: {b}" for b in bad]
    findings += [f"{key}: not found in the binary" for key in set(smem) - met]
    print(
        f"{'family':<14}{'epilogue':<21}{'type':<6}{'W':<4}{'cl':<4}{'tile':<9}{'regs':<6}{'smem':<8}{'HGMMA per loop':<34}result"
    )
    for row in sorted(rows, key=str):
        print("{:<14}{:<21}{:<6}{:<4}{:<4}{:<9}{:<6}{:<8}{:<34}{}".format(*map(str, row)))
    print(first_call(binary))
    print(f"{len(rows)} kernels, {len(findings)} findings")
    return 1 if findings or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
