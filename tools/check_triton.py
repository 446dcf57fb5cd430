"""Compile every Triton kernel at its real tile for sm_80, sm_90 and sm_100 and check the result. No GPU is needed.

    python tools/check_triton.py [--arch 80 90 100] [--only NAME] [--jobs N] [--candidates]

For each kernel and architecture it asserts, from the compiled module:

* tensor-core instructions of that generation in the PTX (``mma.sync``, ``wgmma``, ``tcgen05``) where the kernel uses ``tl.dot``;
* no stack frame, hence no register spills (cuobjdump's resource usage of the cubin);
* shared memory within what one block of that chip may use.

Kernels of ``segmented_gemm``, ``gate_up_forward``, ``explicit`` and ``decode`` are recorded from calls of the host functions on
``meta`` tensors (``runtime.recording``): what is compiled is what a call would launch. Other files list ``aot_specs()``: with
the default tile table everywhere, on sm_90 with the H200's too (a kernel without a tile table is the same in both, hence cached).
``--candidates`` compiles, for sm_90, the tiles that ``npt bench tune`` tries (``ops/_triton/tunables.py``) instead.
Prints a table; exit status 1 if any row fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels must be compiled, not interpreted
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ARCHITECTURES = (80, 90, 100)
#: Shared memory that one block may have, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: What counts as that generation's tensor-core instruction. A tile below 64 rows uses mma.sync on every generation.
TENSOR_CORE = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
#: GPUs of that architecture whose own tile table is checked beside the default one.
TABLES: dict[int, tuple[str, ...]] = {80: (), 90: ("NVIDIA H200",), 100: ()}
TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    arch: int
    tile: str
    registers: int
    stack: int
    shared: int
    instructions: str
    seconds: float
    problems: tuple[str, ...]


# ---- What to compile ------------------------------------------------------------------------------------------------


def _calls() -> dict[str, Any]:
    """Name → function that calls host code on meta tensors. Sizes: Llama-3.1-8B unless the name says otherwise."""
    import torch

    from npt_kernels.kernels.triton import decode, explicit
    from npt_kernels.kernels.triton.gate_up import gate_up_forward
    from npt_kernels.kernels.triton.segmented_gemm import (
        gate_up_backward,
        gemm_act,
        gemm_act_backward,
        gemm_terms,
        segmented_gemm,
    )

    d, f, r = 4096, 14336, 64

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def low_rank(tokens: int, out: int, rank: int = r, dtype: torch.dtype = torch.bfloat16) -> Any:
        return new(tokens, rank, dtype=dtype), new(rank, out, dtype=dtype).t()

    T = TOKENS
    fp32, fp16 = torch.float32, torch.float16

    def pair(keep: bool, gate: bool = True, up: bool = True, rank: int = r, dtype: torch.dtype = torch.bfloat16) -> Any:
        return lambda: gate_up_forward(
            new(T, d, dtype=dtype), new(f, d, dtype=dtype), new(f, d, dtype=dtype),
            low_rank(T, f, rank, dtype) if gate else None, low_rank(T, f, rank, dtype) if up else None,
            None, None, "silu", keep,
        )  # fmt: skip

    calls: dict[str, Any] = {
        "gemm one segment": lambda: segmented_gemm([(new(T, d), new(f, d))]),
        "gemm r=64": lambda: segmented_gemm([(new(T, d), new(f, d)), low_rank(T, f)]),
        "gemm r=64 bias fp16": lambda: segmented_gemm(
            [(new(T, d, dtype=fp16), new(f, d, dtype=fp16)), low_rank(T, f, r, fp16)], new(f, dtype=fp16)
        ),
        "gemm r=1024": lambda: segmented_gemm([(new(T, d), new(f, d)), low_rank(T, f, 1024)]),
        "gemm r=7": lambda: segmented_gemm([(new(T, d), new(f, d)), low_rank(T, f, 7)]),
        "gemm fp32 r=64": lambda: segmented_gemm(
            [(new(T, d, dtype=fp32), new(f, d, dtype=fp32)), low_rank(T, f, r, fp32)]
        ),
        "gemm dx, 3 segments": lambda: segmented_gemm(
            [(new(T, f), new(f, d).t()), (new(T, f), new(f, d).t()), low_rank(T, d)]
        ),
        "gemm gelu_tanh keep (GPT-2)": lambda: gemm_act(
            [(new(T, 768), new(768, 3072).t()), low_rank(T, 3072)], new(3072), "gelu_tanh", True
        ),
        "gemm gelu backward (GPT-2)": lambda: gemm_act_backward(
            [(new(T, 768), new(3072, 768)), low_rank(T, 3072)], new(T, 3072), "gelu"
        ),
        "gemm explicit k=3": lambda: gemm_terms(new(T, d), new(f, d), new(T, 3), new(T, 3, f)),
        "pair forward r=64": pair(False),
        "pair forward r=64 keep": pair(True),
        "pair forward r=1024": pair(True, rank=1024),
        "pair forward gate only r=1024": pair(True, up=False, rank=1024),
        "pair forward fp32": pair(True, dtype=fp32),
        "pair backward r=64": lambda: gate_up_backward(
            [(new(T, d), new(d, f).t()), low_rank(T, f)], new(T, f), new(T, f), "silu", True, True
        ),
        "pair backward T=16": lambda: gate_up_backward(
            [(new(16, d), new(d, f).t()), low_rank(16, f)], new(16, f), new(16, f), "silu", True, True
        ),
        "pair backward no key": lambda: gate_up_backward(
            [(new(T, d), new(d, f).t())], new(T, f), new(T, f), "gelu", True, True
        ),
        "pair backward fp32": lambda: gate_up_backward(
            [(new(T, d, dtype=fp32), new(d, f, dtype=fp32).t())], new(T, f, dtype=fp32), new(T, f, dtype=fp32),
            "silu", True, True,
        ),
        "row dot k=3": lambda: explicit.row_dot(new(T, 3, d), new(T, d)),
        "row outer k=3": lambda: explicit.row_outer(new(T, 3), new(T, d)),
    }  # fmt: skip
    for t in (1, 16, 64):
        calls[f"decode pair T={t}"] = lambda t=t: decode.decode_gate_up(
            new(t, d), new(f, d), new(f, d), low_rank(t, f), low_rank(t, f), None, None, "silu", False
        )
        calls[f"decode down T={t}"] = lambda t=t: decode.decode_gemm([(new(t, f), new(d, f)), low_rank(t, d)], None)
    calls["decode fp32 T=1"] = lambda: decode.decode_gemm(
        [(new(1, f, dtype=fp32), new(d, f, dtype=fp32)), low_rank(1, d, r, fp32)], None
    )
    return calls | _candidate_calls()


def _candidate_calls() -> dict[str, Any]:
    """The tiles of ``npt bench tune`` at 8B shapes (GPT-2 for gemm_act); splitting K does not change a kernel, so one split."""
    import torch

    from npt_kernels.kernels.triton.tunables import candidates, tunables

    calls: dict[str, Any] = {}
    for kernel, spec in tunables().items():
        wide = [shape for shape in spec["shapes"] if shape["rank"] == 64 and shape["inner"] < 8192]
        for shape in [wide[-1], *(s for s in wide if kernel == "decode" and s.get("pair") and s["tokens"] > 1)]:
            for dtype in (torch.bfloat16, torch.float32):
                for i, tile in enumerate(candidates(kernel, dtype)):
                    if tile.get("split_k", 4) == 4:
                        kind = ("pair " if shape.get("pair") else "") + ("fp32" if dtype == torch.float32 else "bf16")
                        name = f"candidate {kernel} {kind} T={shape['tokens']} #{i}"
                        calls[name] = lambda spec=spec, shape=shape, dtype=dtype, tile=tile: spec["prepare"](
                            shape, dtype, torch.device("meta")
                        )(tile)
    return calls


def _spec_from_launch(name: str, launch: Any) -> dict[str, Any]:
    """Signature, constants and attributes of a recorded launch, by Triton's own specialisation rules."""
    import torch
    from triton.runtime.jit import type_canonicalisation_dict as canonical

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    parameters = launch.kernel.params
    assert len(launch.args) == len(parameters), (name, len(launch.args), len(parameters))
    for parameter, value in zip(parameters, launch.args, strict=True):
        key = parameter.name
        if parameter.is_constexpr:
            signature[key], constants[key] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[key] = "*" + canonical[str(value.dtype).split(".")[-1]]
            divisible.append(key)
        elif hasattr(value, "block_shape"):
            element = canonical[str(value.base.dtype).split(".")[-1]]
            signature[key] = f"tensordesc<{element}{list(value.block_shape)}>".replace(" ", "")
        elif isinstance(value, float):
            signature[key] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[key], constants[key] = "constexpr", 1
        else:
            signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(key)
    return {
        "signature": signature,
        "constants": constants,
        "divisible": divisible,
        "options": dict(launch.meta),
        "tensor_core": not launch.kernel.fn.__name__.startswith(("row_", "reduce_")) and "fp32" not in name,
        "full_tile": constants.get("BT", 0) >= 64,
    }


def _tile_text(spec: dict[str, Any]) -> str:
    constants, options = spec["constants"], spec["options"]
    names = [constants[k] for k in ("BT", "BN", "BK0", "BK") if k in constants]
    return "x".join(map(str, names)) + f" w{options['num_warps']} s{options['num_stages']}"


def _jobs(architectures: tuple[int, ...], only: str, candidates: bool = False) -> list[tuple[str, int, int]]:
    """(name, index of the launch within the call, arch). Each worker records again: kernels do not travel by pickle."""
    from npt_kernels.kernels.triton.launch import recording

    jobs = []
    for arch in architectures:
        for name, call in _calls().items():
            if only in name and name.startswith("candidate ") == candidates:
                with recording((arch // 10, 0)) as launches:
                    call()
                jobs += [(name, i, arch) for i in range(len(launches))]
        for module in [] if candidates else _spec_modules():
            for device in ("", *TABLES[arch]):
                for i, spec in enumerate(module.aot_specs(device_name=device)):
                    name = spec.name + (f" @{device}" if device else "")
                    if only in name:
                        jobs.append((f"{module.__name__}:{name}", i, arch))
    return jobs


def _spec_modules() -> list[Any]:
    import npt_kernels.kernels.triton as package

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return [m for m in modules if hasattr(m, "aot_specs")]


# ---- Compiling and judging ------------------------------------------------------------------------------------------


def _load(job: tuple[str, int, int]) -> tuple[str, Any, dict[str, Any]]:
    name, index, arch = job
    if ":" in name:
        module, text = name.split(":", 1)
        spec = importlib.import_module(module).aot_specs(device_name=text.partition(" @")[2])[index]
        constants = {**spec.constexprs, **dict.fromkeys(spec.equal_to_1, 1)}
        signature = {k: "constexpr" if k in constants else v for k, v in spec.signature.items()}
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        return text, spec.fn, {
            "signature": signature, "constants": constants, "divisible": list(spec.divisible_by_16), "options": options,
            "tensor_core": spec.tensor_core, "full_tile": spec.wgmma,
        }  # fmt: skip
    from npt_kernels.kernels.triton.launch import recording

    with recording((arch // 10, 0)) as launches:
        _calls()[name]()
    launch = launches[index]
    kernel = launch.kernel.fn.__name__ if hasattr(launch.kernel, "fn") else str(launch.kernel)
    label = name if index == 0 else f"{name} · {kernel.removesuffix('_kernel')}"
    return label, launch.kernel, _spec_from_launch(name, launch)


def compile_one(job: tuple[str, int, int]) -> Row:
    """Compile one kernel for one architecture and say what is wrong with it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    started = time.time()
    label, kernel, spec = _load(job)
    arch = job[2]
    position = {key: i for i, key in enumerate(spec["signature"])}
    attributes = {(position[key],): [["tt.divisibility", 16]] for key in spec["divisible"]}
    source = ASTSource(kernel, spec["signature"], constexprs=spec["constants"], attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=spec["options"])
    except Exception as error:
        message = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
        return Row(label, arch, _tile_text(spec), 0, 0, 0, "-", time.time() - started, (message,))
    ptx = compiled.asm["ptx"]
    registers, stack = resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    counts = {key: len(re.findall(pattern, ptx)) for key, pattern in TENSOR_CORE.items()}
    problems = []
    if spec["tensor_core"]:
        wanted = arch if spec["full_tile"] else 80
        if counts[wanted] == 0 and not (wanted != arch and counts[arch]):
            problems.append(f"no {TENSOR_CORE[wanted].removeprefix(chr(92) + 'b')} in the PTX")
    if stack:
        problems.append(f"{stack} bytes of stack: registers spill")
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"{shared} bytes of shared memory, the chip has {SHARED_LIMIT[arch]}")
    names = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    instructions = " ".join(f"{names[k]}:{n}" for k, n in counts.items() if n) or "-"
    return Row(
        label, arch, _tile_text(spec), registers, stack, shared, instructions, time.time() - started, tuple(problems)
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the kernel in a cubin, by the cuobjdump that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump said nothing about registers:\n{text}")
    return int(found[1]), int(found[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--candidates", action="store_true", help="the tiles of `npt bench tune`, sm_90")
    options = parser.parse_args(argv)
    started = time.time()
    jobs = _jobs((90,) if options.candidates else tuple(options.arch), options.only, options.candidates)
    header = ("kernel", "sm", "tile", "regs", "stack", "shared", "tensor core", "s")
    print("{:<44} {:>4} {:<18} {:>4} {:>5} {:>7} {:<18} {:>4}".format(*header), flush=True)
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_one, jobs):
            print(
                f"{row.name:<44} {row.arch:>4} {row.tile:<18} {row.registers:>4} {row.stack:>5} {row.shared:>7} "
                f"{row.instructions:<18} {row.seconds:>4.1f}" + "".join(f"\n    FAIL: {p}" for p in row.problems),
                flush=True,
            )
            failed += bool(row.problems)
    print(f"{len(jobs)} compilations in {time.time() - started:.0f} s, {failed} failed")
    return 1 if failed or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
