"""Builds an sdist and a wheel, checks what is in them, installs the wheel into fresh environments without nvcc and uses it there.

    python tools/check_install.py [--work DIR] [--contents-only]

1. ``python -m build`` of the files that git knows: the wheel is built from the sdist, so the sdist is complete if the wheel is.
2. The wheel holds every file of ``npt_kernels/`` and, where a C++ compiler is, ``_cpu``; the sdist also what builds the
   kernels, the documents, the licence.
3. A fresh environment with the wheel alone (torch and safetensors): the ops run, ``npt`` says what it needs.
4. The same with ``[train]``: ``npt`` runs, every configuration, table and README is found, the examples run.

The working directory is never the repository. nvcc is hidden by ``NVCC=/bin/false``, as on a machine without a toolkit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: In the sdist beside the package: to build the kernels, to read, to be allowed.
BESIDE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
          "constraints.txt", "tools/build_cuda.py", "tools/gen_wgmma.py")  # fmt: skip

CORE = """
import sys, warnings
warnings.simplefilter("ignore")  # torch, of numpy, which a core installation does not have
import torch, npt_kernels
from npt_kernels import npt_linear, npt_factored_linear, available_backends
assert "transformers" not in sys.modules and "site-packages" in npt_kernels.__file__, npt_kernels.__file__
x, w, v_a, v_b = torch.randn(8, 16), torch.randn(12, 16), torch.randn(8, 16), torch.randn(8, 12)
y = npt_linear(x, w, v_a, v_b)
want = torch.einsum("ti,toi->to", x, w + v_b.unsqueeze(-1) * v_a.unsqueeze(-2))
assert torch.allclose(y, want, atol=1e-4), (y - want).abs().max()
z, a, b = torch.randn(8, 4, requires_grad=True), torch.randn(4, 16), torch.randn(4, 12)
npt_factored_linear(x, z, w, a, b).square().sum().backward()
assert z.grad.abs().max() > 0
from npt_kernels.kernels import native
print("the ops run; backends:", ", ".join(available_backends()), "- compiled for CPUs:", native.available() or "torch")
"""

FILES = """
from importlib.resources import files
from npt_kernels.configs.schema import RunConfig
import npt_kernels, sys
root = files("npt_kernels")
missing = [name for name in sys.argv[1:] if not root.joinpath(name).is_file()]
assert not missing, missing
print(len(sys.argv) - 1, "files that are not Python are there")
"""


def run(*command: object, env: dict[str, str], cwd: Path, fails: bool = False) -> str:
    """Its output; with ``fails`` it must end with an error, else it must not."""
    done = subprocess.run(
        [str(c) for c in command], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def known_files() -> list[str]:
    """What git tracks, and what is new and not ignored."""
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return sorted(name for name in out.stdout.splitlines() if (ROOT / name).is_file())


def environment(home: Path, env: dict[str, str], *packages: object) -> Path:
    """Python of a fresh environment with these packages."""
    python = home / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", home, env=env, cwd=home.parent)
    run(python, "-m", "pip", "install", "--quiet", *packages, env=env, cwd=home.parent)
    return python


def build(work: Path, env: dict[str, str]) -> tuple[Path, Path]:
    """``(sdist, wheel)``."""
    source, dist = work / "source", work / "dist"
    for folder in (source, dist):
        shutil.rmtree(folder, ignore_errors=True)
    for name in known_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    python = environment(work / "builder", env, "build")
    log = run(python, "-m", "build", "--outdir", dist, source, env=env, cwd=work)
    if "CUDA kernels not built" not in log:
        raise SystemExit(f"the build did not say that the CUDA kernels are left out:\n{log[-2000:]}")
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Raises ``SystemExit`` with what is missing or too much."""
    names = known_files()
    package = {name for name in names if name.startswith("npt_kernels/")}
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    wanted = package | {name for name in names if name.startswith("csrc/")} | set(BESIDE)
    problems = [f"the sdist lacks {name}" for name in sorted(wanted - packed)]
    problems += [f"the wheel lacks {name}" for name in sorted(package - installed)]
    compiled = {name for name in installed if name.startswith("npt_kernels/_cpu.")}
    if not compiled and shutil.which("c++"):
        problems.append("the wheel lacks npt_kernels/_cpu, and there is a C++ compiler")
    foreign = sorted(installed - package - compiled)
    problems += [f"the wheel holds {name}, which is not a file of the package" for name in foreign]
    problems += [] if licences else ["the wheel lacks the licence"]
    if problems:
        raise SystemExit("\n".join(problems))
    sizes = [f"{file.name} {file.stat().st_size / 1e6:.2f} MB" for file in (sdist, wheel)]
    print(f"{', '.join(sizes)}; all {len(package)} files of the package are in both")


def check_installed(wheel: Path, work: Path, env: dict[str, str]) -> None:
    """Fresh environment: core alone, then with the extra."""
    elsewhere = work / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(ROOT / "examples", elsewhere)
    home = work / "fresh"
    shutil.rmtree(home, ignore_errors=True)
    constrained = ("--constraint", ROOT / "constraints.txt")
    python = environment(home, env, *constrained, wheel)
    print(run(python, "-c", CORE, env=env, cwd=elsewhere).strip())
    said = run(python, "-m", "npt_kernels", "env", env=env, cwd=elsewhere, fails=True)
    if "pip install 'npt_kernels[train]'" not in said:
        raise SystemExit(f"npt without its extra does not say what to install: {said}")
    print(run(python, "ops_in_your_network.py", env=env, cwd=elsewhere).strip())

    environment(home, env, *constrained, f"{wheel}[train]")
    others = [
        n.removeprefix("npt_kernels/") for n in known_files() if n.startswith("npt_kernels/") and not n.endswith(".py")
    ]
    print(run(python, "-c", FILES, *others, env=env, cwd=elsewhere).strip())
    npt = home / "bin" / "npt"
    for command in (
        ["--version"],
        ["env"],
        ["configs"],
        ["train", "demo", "--dry-run"],
        ["plan", "--model", "meta-llama/Llama-3.1-8B"],
    ):
        run(npt, *command, env=env, cwd=elsewhere)
    for example in ("convert_your_model.py", "evaluate_conversion.py"):
        print(run(python, example, env=env, cwd=elsewhere).strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to build and install; default: a temporary folder")
    parser.add_argument("--contents-only", action="store_true", help="build and look inside, install nothing")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "NPT_CUDA", "NPT_CPU")
        }
        env |= {"NVCC": "/bin/false", "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        sdist, wheel = build(work, env)
        check_contents(sdist, wheel)
        if not options.contents_only:
            check_installed(wheel, work, env)
    print(f"done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
