"""Everything is declared in pyproject.toml; this file adds the compiled code of ``csrc/``.

``npt_kernels._cuda``, the Hopper kernels, where nvcc is; ``npt_kernels._cpu``, loops for CPUs, where a C++ compiler is.
``NPT_CUDA=0`` and ``NPT_CPU=0`` never build them, ``=1`` fails if they cannot be built; unset builds them where it can and
otherwise says in one line what is missing, and the package works without them.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_cuda


class BuildCompiled(build_ext):
    """Hands ``_cuda`` to tools/build_cuda.py. A failed compilation is setuptools' own kind of error, which ``optional`` turns
    into a warning."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            try:
                build_cuda.build(output, Path(self.build_temp).resolve() / "cuda")
            except subprocess.CalledProcessError as error:
                raise CompileError(f"npt_kernels: nvcc could not build csrc/ ({error}); the log is above") from error
            return
        try:
            super().build_extension(ext)
        except (CCompilerError, OSError) as error:
            raise CompileError(
                f"npt_kernels: no C++ compiler could build csrc/cpu ({error}); writing text token by token on a CPU runs on "
                "torch alone, slower; install g++ and run pip install again"
            ) from error


def wish(name: str) -> str:
    """``NPT_CUDA`` or ``NPT_CPU``: empty, ``0`` or ``1``."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r} must be 0 or 1")
    return value


def cuda() -> list[Extension]:
    """The Hopper kernels, or nothing and the reason."""
    if wish("NPT_CUDA") == "0":
        return []
    try:
        build_cuda.find_nvcc()
        build_cuda.find_ninja()
        build_cuda.pybind11_include()
    except build_cuda.Unavailable as error:
        if wish("NPT_CUDA") == "1":
            raise SystemExit(f"NPT_CUDA=1, but {error}") from None
        print(f"npt_kernels: CUDA kernels not built: {error}", file=sys.stderr)
        return []
    # Unless forced, a toolkit that cannot compile them costs the backend "cuda", not the installation.
    return [Extension("npt_kernels._cuda", sources=[], optional=wish("NPT_CUDA") != "1")]


def cpu() -> list[Extension]:
    """The compiled loops; whether there is a compiler is seen when it is called."""
    if wish("NPT_CPU") == "0":
        return []
    folder = Path("csrc/cpu")
    try:
        include = build_cuda.pybind11_include()
    except build_cuda.Unavailable as error:
        if wish("NPT_CPU") == "1":
            raise SystemExit(f"NPT_CPU=1, but {error}") from None
        print(f"npt_kernels: csrc/cpu not built: {error}", file=sys.stderr)
        return []
    return [
        Extension(
            "npt_kernels._cpu",
            sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
            depends=[str(path) for path in sorted(folder.glob("*.h"))],
            include_dirs=[include],
            # Instruction sets are chosen when it runs (csrc/cpu/loops.cpp), so the flags name none.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd"],
            libraries=["dl"],
            language="c++",
            optional=wish("NPT_CPU") != "1",
        )
    ]


setup(ext_modules=[*cuda(), *cpu()], cmdclass={"build_ext": BuildCompiled})
