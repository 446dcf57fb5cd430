"""Everything is declared in pyproject.toml; this file adds the compiled kernels (csrc/) where nvcc is present.

``NPT_CUDA=0`` never builds them, ``NPT_CUDA=1`` fails if they cannot be built; unset builds them where it can and otherwise
says in one line what is missing, and the package works without them.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_cuda


class BuildCuda(build_ext):
    """Hands the one extension to tools/build_cuda.py."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_cuda.build(output, Path(self.build_temp).resolve() / "cuda")


def extensions() -> list[Extension]:
    """The extension, or nothing and the reason."""
    wish = os.environ.get("NPT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"NPT_CUDA={wish!r} must be 0 or 1")
    if wish == "0":
        return []
    try:
        build_cuda.find_nvcc()
        build_cuda.find_ninja()
        build_cuda.pybind11_include()
    except build_cuda.Unavailable as error:
        if wish == "1":
            raise SystemExit(f"NPT_CUDA=1, but {error}") from None
        print(f"npt_kernels: CUDA kernels not built: {error}", file=sys.stderr)
        return []
    # Unless forced, a toolkit that cannot compile them costs the backend "cuda", not the installation.
    return [Extension("npt_kernels._cuda", sources=[], optional=wish != "1")]


class BuildCudaOrSay(BuildCuda):
    """As BuildCuda; a failed compilation is setuptools' own kind of error, which ``optional`` turns into a warning."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except subprocess.CalledProcessError as error:
            from setuptools.errors import CompileError

            raise CompileError(f"npt_kernels: nvcc could not build csrc/ ({error}); the log is above") from error


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCudaOrSay})
