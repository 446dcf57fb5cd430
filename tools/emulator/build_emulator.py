"""Builds ``npt_kernels/_cuda_emulated*.so``: csrc/ translated for the host and linked with the emulated machine.

Needs g++, CUDA *headers* (a toolkit's, or those that come with triton) and a CPU with AVX2 and F16C; no nvcc, driver or GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from translate import Untranslatable, translate_tree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODULE = "_cuda_emulated"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MACHINE = HERE / "machine"


class Unavailable(RuntimeError):
    """The emulator cannot be built here; the message is the one line that users see."""


class CompilerError(RuntimeError):
    """The compiler's or the linker's text."""


# ------------------------------------------------------------------------------------------------ what is needed
def find_compiler() -> str:
    """g++ (or ``CXX``)."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable(
            f"no {os.environ.get('CXX', 'g++')} found: install a C++17 compiler (Debian: apt-get install g++)"
        )
    return compiler


def find_headers() -> Path:
    """A folder with ``cuda.h`` and ``cuda_runtime_api.h``: a toolkit's, or triton's copy."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "include" for home in homes if home]
    places += [Path(p) / "triton" / "backends" / "nvidia" / "include" for p in sys.path if p]
    for place in places:
        if (place / "cuda.h").is_file() and (place / "cuda_runtime_api.h").is_file():
            return place
    raise Unavailable(
        "no CUDA headers found: pip install triton (it brings them), or set CUDA_HOME to a toolkit 12.5 or newer"
    )


def find_pybind11() -> Path:
    """Headers of pybind11: its own package's, or torch's copy."""
    for base in sys.path:
        for place in (Path(base) / "pybind11" / "include", Path(base) / "torch" / "include"):
            if base and (place / "pybind11" / "pybind11.h").is_file():
                return place
    raise Unavailable("no pybind11 headers found: install torch (it brings them), or pip install pybind11")


def check_processor() -> None:
    """wgmma is emulated with AVX2, FMA and F16C."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split())  # type: ignore[union-attr]
    except (OSError, AttributeError):
        raise Unavailable("the emulator needs Linux on an x86-64 processor (wgmma is emulated with AVX2)") from None
    missing = [name for name in ("avx2", "fma", "f16c") if name not in flags]
    if missing:
        raise Unavailable(f"this processor has no {', '.join(missing)}, with which wgmma is emulated")


# ------------------------------------------------------------------------------------------------ compiling
@dataclass(frozen=True)
class Toolchain:
    """Compiler and flags. ``asan``: AddressSanitizer, which sees reads and writes outside any tensor."""

    compiler: str
    includes: tuple[str, ...]
    asan: bool = False

    @classmethod
    def find(cls, asan: bool = False) -> Toolchain:
        check_processor()
        includes = (find_headers(), find_pybind11(), sysconfig.get_path("include"))
        return cls(find_compiler(), tuple(f"-I{p}" for p in includes), asan)

    def command(self, source: Path, generated: Path) -> list[str]:
        """Compile one file: a kernel (``*.cu.cpp``), the machine, or csrc's host code; without the output's name."""
        if source.name.endswith(".cu.cpp"):
            own = ["-O1", f"-I{generated}", "-include", str(MACHINE / "device.h")]
        elif source.parent == MACHINE:
            own = ["-O3", "-march=x86-64-v3"]
        else:
            own = ["-O1", f"-I{generated}"]
        sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g1"] if self.asan else []
        return [
            self.compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", *own, *sanitize, *self.includes,
            "-c", str(source),
        ]  # fmt: skip


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilerError(done.stderr)


def _fingerprint(command: list[str], depfile: Path) -> str | None:
    """Of the command and the contents of everything that the last compilation read; ``None`` if that is not known."""
    try:
        names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        digest = hashlib.sha256("\0".join(command).encode())
        for name in names:
            digest.update(Path(name).read_bytes())
    except (OSError, IndexError):
        return None
    return digest.hexdigest()


def compile_one(toolchain: Toolchain, source: Path, generated: Path, out: Path) -> Path:
    """Compile unless nothing that it reads has changed. Raises :class:`CompilerError`."""
    command, stamp, depfile = toolchain.command(source, generated), Path(f"{out}.stamp"), Path(f"{out}.d")
    if out.exists() and stamp.exists() and stamp.read_text() == _fingerprint(command, depfile):
        return out
    new = Path(f"{out}.{os.getpid()}")  # renamed when complete: another process may build the same
    _run([*command, "-MD", "-MF", str(depfile), "-MT", "object", "-o", str(new)])
    new.replace(out)
    stamp.write_text(_fingerprint(command, depfile) or "")
    return out


def object_path(toolchain: Toolchain, source: Path, generated: Path, objects: Path) -> Path:
    """The machine's objects are shared by all builds."""
    shared = ROOT / "build" / ("emulator-asan" if toolchain.asan else "emulator") / "machine"
    if source.parent == MACHINE:
        return shared / f"{source.name}.o"
    return objects / ("-".join(source.relative_to(generated).parts) + ".o")


def compile_all(toolchain: Toolchain, generated: Path, objects: Path, jobs: int) -> list[Path]:
    """Object files of a translated source tree and of the machine."""

    def one(source: Path) -> Path:
        out = object_path(toolchain, source, generated, objects)
        out.parent.mkdir(parents=True, exist_ok=True)
        return compile_one(toolchain, source, generated, out)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, sources(generated)))


def link(toolchain: Toolchain, objects: list[Path], out: Path) -> Path:
    """The extension module."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sanitize = ["-fsanitize=address"] if toolchain.asan else []
    new = Path(f"{out}.{os.getpid()}")  # renamed over the old one: a running Python may have that mapped
    # Bsymbolic: its cudaLaunchKernelExC is its own, also where torch has loaded NVIDIA's runtime.
    command = [toolchain.compiler, "-shared", "-Wl,-Bsymbolic", *sanitize, *map(str, objects), "-o", str(new)]
    _run(command)
    new.replace(out)
    return out


def sources(generated: Path) -> list[Path]:
    """Everything that is compiled: kernels first, they take longest."""
    kernels = sorted(generated.rglob("*.cu.cpp"))
    host = [file for file in sorted(generated.rglob("*.cpp")) if file not in kernels]
    return [*kernels, *host, *sorted(MACHINE.glob("*.cpp"))]


def default_output() -> Path:
    """Where ``NPT_EMULATE=1`` looks for the module."""
    return ROOT / "npt_kernels" / f"{MODULE}{SUFFIX}"


def build(
    csrc: Path | None = None, build_dir: Path | None = None, out: Path | None = None, jobs: int = 2, asan: bool = False
) -> Path:
    """Build the module and return its path.

    Raises:
        Unavailable: Something needed is missing.
        Untranslatable: csrc/ holds an instruction or construct that the emulator does not know; file and line are named.
        CompilerError: The compiler refused it.
    """
    toolchain = Toolchain.find(asan)
    build_dir = build_dir or ROOT / "build" / ("emulator-asan" if asan else "emulator")
    generated, objects = build_dir / "csrc", build_dir / "objects"
    translate_tree(csrc or ROOT / "csrc", generated)
    built = compile_all(toolchain, generated, objects, jobs)
    return link(toolchain, built, out or (build_dir / f"{MODULE}{SUFFIX}" if asan else default_output()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csrc", type=Path, help="another csrc/ than this checkout's")
    parser.add_argument("--build-dir", type=Path, help="default: build/emulator")
    parser.add_argument("--out", type=Path, help=f"path of the module (default: {default_output().relative_to(ROOT)})")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--asan", action="store_true", help="with AddressSanitizer, into build/emulator-asan")
    options = parser.parse_args()
    try:
        print(build(options.csrc, options.build_dir, options.out, options.jobs, options.asan))
    except (Unavailable, Untranslatable) as error:
        print(f"npt_kernels: emulator not built: {error}", file=sys.stderr)
        return 1
    except CompilerError as error:
        print(f"{error}\nnpt_kernels: emulator not built: the compiler refused it; its text is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
