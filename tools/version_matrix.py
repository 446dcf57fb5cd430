"""The suite's parts that meet other libraries, with the oldest versions that pyproject.toml allows and the newest there are.

A virtual environment per row, under ``--work``, kept and reused; the tests of :data:`TESTS`; a table at the end. torch stays that
of ``constraints.txt`` (a CPU build; others would bring gigabytes of CUDA libraries along), Python the one that runs this.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomllib  # Python 3.11

ROOT = Path(__file__).resolve().parent.parent
#: Where models, text, saving and the command line meet transformers, accelerate, peft, huggingface_hub, safetensors and typer.
TESTS = ("tests/model", "tests/cli", "tests/base_model", "tests/test_public_api.py", "tests/examples")
#: Whose versions the table shows.
SHOWN = ("torch", "transformers", "accelerate", "peft", "huggingface_hub", "safetensors", "typer", "pydantic")
#: What every row takes as the constraints say: torch, and what runs the tests.
SAME = ("torch", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "bitsandbytes", "torchao")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """Package → version of ``constraints.txt``."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(n): v for n, _, v in (line.partition("==") for line in lines) if v}


def lower_bounds() -> dict[str, str]:
    """Package → oldest version that ``pyproject.toml`` allows for users: the core, ``train`` and peft."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *(d for d in extras["dev"] if d.startswith("peft"))]
    return {normal(n): v for n, v in (re.match(r"([\w.-]+)>=([\d.]+)", w).groups() for w in wanted)}  # type: ignore[union-attr]


def requirements(row: str) -> tuple[list[str], list[str]]:
    """``(what to ask for, constraints)`` of a row."""
    pins, bounds = pinned(), lower_bounds()
    same = [f"{name}=={pins[name]}" for name in map(normal, SAME) if name in pins]
    if row == "oldest":
        # peft 0.18 imports a name that this torchao no longer has.
        same = [requirement for requirement in same if not requirement.startswith("torchao")]
        return [f"{name}=={version}" for name, version in bounds.items() if name != "torch"], same
    if row == "newest":
        return [name for name in bounds if name != "torch"], same
    raise SystemExit(f"row {row!r} is not one of oldest, newest")


def environment(row: str, work: Path) -> Path:
    """The Python of the row's environment, made if it is not there or was made for other requirements."""
    wanted, constraints = requirements(row)
    home, stamp = work / row, work / row / "made-for.json"
    python = home / "bin" / "python"
    text = json.dumps([wanted, constraints, sys.version])
    if stamp.is_file() and stamp.read_text() == text:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", file.name]
        # The project itself is on the path, not installed: only its dependencies differ between rows.
        subprocess.run([*pip, *constraints, *wanted], check=True)
    stamp.write_text(text)
    return python


def versions(python: Path) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True).stdout)


def run_row(row: str, work: Path, jobs: int, extra: list[str]) -> tuple[dict[str, str], str, bool]:
    """``(versions, the last line of pytest, whether all passed)``."""
    python = environment(row, work)
    log = work / f"{row}.log"
    tests = [test for test in TESTS if (ROOT / test).exists()]
    command = [python, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider", *(extra or tests)]
    with log.open("w") as file:
        outcome = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(failed), end="\n" if failed else "", flush=True)
    return versions(python), lines[-1].strip("= ") if lines else "nothing", outcome.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["oldest", "newest"], choices=["oldest", "newest"])
    parser.add_argument(
        # Not a name in a folder that all users share: what lies there is run.
        "--work",
        type=Path,
        default=ROOT / "build" / "test-matrix",
        help="environments and logs",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("tests", nargs="*", help="these tests alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    table, good = [], True
    for row in arguments.rows:
        begun = time.monotonic()
        found, outcome, passed = run_row(row, arguments.work, arguments.jobs, arguments.tests)
        good &= passed
        table.append((row, *(found[name] for name in SHOWN), outcome))
        print(f"{row}: {outcome} ({time.monotonic() - begun:.0f} s; log: {arguments.work / row}.log)", flush=True)
    print(
        f"\nPython {sys.version.split()[0]}\n| versions | {' | '.join(SHOWN)} | outcome |\n|{'---|' * (len(SHOWN) + 2)}"
    )
    print("\n".join(f"| {' | '.join(line)} |" for line in table))
    sys.exit(not good)


if __name__ == "__main__":
    main()
