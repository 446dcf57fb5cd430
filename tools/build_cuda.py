"""Builds ``npt_kernels/_cuda*.so`` from ``csrc/`` with nvcc and ninja. Standard library only: it runs in an isolated build.

``setup.py`` calls :func:`build`; ``python tools/build_cuda.py`` does the same by hand. ``compile`` is what ninja runs for each
source: nvcc, then a refusal if ptxas reported a C75xx diagnostic, a spill or a stack frame (each costs far more than it
looks: a serialised wgmma pipeline, or local memory inside the K loop).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCH = "-gencode=arch=compute_90a,code=sm_90a"  # the -arch=sm_90a shorthand adds a compute_90 pass that rejects wgmma
MIN_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
HOW = "install the CUDA toolkit 12.5 or newer (nvcc on PATH, or CUDA_HOME set) and run pip install again"


class Unavailable(RuntimeError):
    """The kernels cannot be built here; the message is the one line that users see."""


def find_nvcc() -> Path:
    """Path of a new enough nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc"), *(str(Path(h) / "bin" / "nvcc") for h in homes if h)]
    nvcc = next((Path(c) for c in candidates if c and Path(c).is_file()), None)
    if nvcc is None:
        raise Unavailable(f"no nvcc found: {HOW}")
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", banner)
    if found is None or tuple(map(int, found.groups())) < MIN_NVCC:
        raise Unavailable(f"{nvcc} is {found.group(0) if found else 'not a working nvcc'}: {HOW}")
    return nvcc


def find_ninja() -> str:
    """Path of ninja: the PyPI package's or the system's."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.is_file():
            return str(bundled)
    system = shutil.which("ninja")
    if system is None:
        raise Unavailable("no ninja found: pip install ninja")
    return system


def pybind11_include() -> str:
    """Header directory of pybind11."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("no pybind11 found: pip install pybind11") from None
    return pybind11.get_include()


def compile_flags() -> list[str]:
    """nvcc flags of a device translation unit."""
    return ["-std=c++17", "-O3", ARCH, "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}"]


def faults(ptxas_output: str) -> list[str]:
    """Lines of ptxas output that must not be there."""
    bad = []
    for line in ptxas_output.splitlines():
        if re.search(r"\(C75\d\d\)", line) or "setmaxnreg" in line:
            bad.append(line.strip())
        for count, what in re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads|cumulative stack)", line):
            if int(count):
                bad.append(f"{count} bytes {what}")
    return bad


def run_compile(command: list[str]) -> int:
    """Run one nvcc command; 1 if it fails or ptxas reports what :func:`faults` refuses."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    bad = faults(output)
    if done.returncode or bad:
        sys.stderr.write(output)
        for line in bad:
            sys.stderr.write(f"refused: {line}\n")
        return done.returncode or 1
    return 0


def target_path() -> Path:
    """Where the module goes inside the source tree."""
    return ROOT / "npt_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def write_ninja(build_dir: Path, output: Path, nvcc: Path) -> None:
    """The ninja file: one edge per source, one link."""

    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    compile_py = f"'{sys.executable}' '{Path(__file__).resolve()}' compile"
    host_includes = f"-I'{pybind11_include()}' -I'{sysconfig.get_path('include')}'"
    lines = [
        f"rule device\n  command = {compile_py} '{nvcc}' {' '.join(compile_flags())} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule host\n  command = '{nvcc}' -std=c++17 -O2 -Xcompiler=-fPIC,-fvisibility=hidden -I{CSRC} {host_includes}"
        " -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = '{nvcc}' -shared -cudart static {ARCH} $in -o $out",
    ]
    objects = []
    sources = [*sorted((CSRC / "inst").glob("*.cu")), *sorted(CSRC.glob("*.cpp"))]
    for source in sources:
        built = build_dir / f"{source.stem}.o"
        lines.append(f"build {escape(built)}: {'device' if source.suffix == '.cu' else 'host'} {escape(source)}")
        objects.append(escape(built))
    lines.append(f"build {escape(output)}: link {' '.join(objects)}")
    build_dir.mkdir(parents=True, exist_ok=True)
    # builddir: where ninja keeps its log, else it lands in the folder that pip was called from.
    (build_dir / "build.ninja").write_text("\n".join([f"builddir = {escape(build_dir)}", *lines]) + "\n")


def build(output: Path | None = None, build_dir: Path | None = None, jobs: int | None = None) -> Path:
    """Build the module and return its path. Raises :class:`Unavailable`, or ``CalledProcessError`` when compiling fails."""
    nvcc, ninja = find_nvcc(), find_ninja()
    output, build_dir = output or target_path(), build_dir or ROOT / "build" / "cuda"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_ninja(build_dir, output, nvcc)
    jobs = jobs or int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 8))
    subprocess.run([ninja, "-f", str(build_dir / "build.ninja"), "-j", str(jobs)], check=True)
    return output


def main() -> int:
    if sys.argv[1:2] == ["compile"]:
        return run_compile(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None, help="path of the module (default: inside npt_kernels/)")
    parser.add_argument("--jobs", type=int, default=None)
    arguments = parser.parse_args()
    try:
        print(build(arguments.output, jobs=arguments.jobs))
    except Unavailable as error:
        print(f"npt_kernels: CUDA kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
