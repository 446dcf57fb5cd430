"""Plants one-line faults in csrc/ and checks that the emulator finds each (part of ``make test-long``).

A fault is a text of csrc/ and what takes its place; only the translation unit named is compiled again. Faults that change
nothing that can be seen say so, with the reason, and must then pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_emulator as build
import yaml
from translate import translate_tree
from units import UNITS

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutation:
    """``old`` → ``new``, wherever it stands in csrc/; ``unit``: what is compiled and run (units.py)."""

    name: str
    unit: str
    old: str
    new: str = ""
    equivalent: str = ""  # why it cannot be seen
    hidden: bool = False  # no schedule shows it, only the order of memory (happens_before.cpp): both are checked


MUTATIONS = [Mutation(**fault) for fault in yaml.safe_load((HERE / "faults.yaml").read_text())]


def plant(mutation: Mutation, csrc: Path) -> list[Path]:
    """Change the copy ``csrc``; the files changed. Raises ``LookupError`` if the text stands nowhere."""
    files = [f for f in csrc.rglob("*") if f.is_file() and mutation.old in f.read_text()]
    if not files:
        raise LookupError(f"{mutation.name}: {mutation.old!r} stands in no file of csrc/")
    for file in files:
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
    return files


def _run(command: list[str], module: Path, timeout: float, order: bool = True) -> tuple[bool, str]:
    """(whether a fault was found, its first lines). ``order``: races are looked for."""
    environment = os.environ | {"NPT_EMULATED_MODULE": str(module), "NPT_EMULATE_ORDER": str(int(order))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return True, f"no end in {timeout:.0f} s"
    text = (done.stdout + done.stderr).strip()
    found = re.search(r"(deadlock:\s*\n[^\n]*|Schedule[^\n]*|seed \d+: [^\n]*)", text)
    if done.returncode > 1 or "Traceback" in text:
        raise RuntimeError(f"{command[1]} did not run: {text[-2000:]}")
    return done.returncode != 0, found.group(1) if found else f"exit code {done.returncode}: {text[-200:]}"


def try_one(
    mutation: Mutation, toolchain: build.Toolchain, base: Path, csrc: Path, folder: Path, timeout: float
) -> tuple[bool, str]:
    """Build and run one mutant: (whether it was caught as it should be, how). ``base``: a build of ``csrc`` as it is."""
    unit, command = UNITS[mutation.unit]
    shutil.copytree(csrc, folder / "csrc")
    changed = [file.relative_to(folder / "csrc").with_suffix("") for file in plant(mutation, folder / "csrc")]
    generated, objects = folder / "generated", []
    translate_tree(folder / "csrc", generated)
    for source in build.sources(generated):
        mutant = source.name == f"{unit}.cu.cpp"
        out = build.object_path(toolchain, source, generated, folder if mutant else base / "objects")
        objects.append(build.compile_one(toolchain, source, generated, out) if mutant else out)
        if mutant and not set(changed) & _reads(Path(f"{out}.d"), generated):
            raise LookupError(f"{mutation.name}: {unit} reads none of the files with that text")
    module = build.link(toolchain, objects, folder / f"{build.MODULE}{build.SUFFIX}")
    if mutation.hidden:
        caught, how = _run(_command(command), module, timeout, order=False)
        if caught:
            return False, f"seen without the order of memory: {how}"
    return _run(_command(command), module, timeout)


def _reads(depfile: Path, generated: Path) -> set[Path]:
    """Files of the translation that a compilation read, without their suffixes."""
    names = depfile.read_text().replace("\\\n", " ").split()
    files = [Path(name).resolve() for name in names if name.startswith(str(generated))]
    return {file.relative_to(generated.resolve()).with_suffix("") for file in files}


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, str(HERE / arguments[0]), *arguments[1:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the names")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each mutant (default: 600)")
    parser.add_argument("--csrc", type=Path, default=build.ROOT / "csrc", help="another csrc/ than this checkout's")
    options = parser.parse_args()
    base = build.ROOT / "build" / "emulator-mutants"
    try:
        whole = build.build(options.csrc, base, base / f"{build.MODULE}{build.SUFFIX}")
    except build.Unavailable as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 2
    toolchain = build.Toolchain.find()
    chosen = [m for m in MUTATIONS if re.search(options.only, m.name)]
    for unit in sorted({m.unit for m in chosen}):  # a fault that is there anyway would count for every mutant
        faulty, how = _run(_command(UNITS[unit][1]), whole, options.timeout)
        if faulty:
            print(f"mutations: {unit} fails without a mutation: {how}", file=sys.stderr)
            return 1
    wrong = 0
    for mutation in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="npt-mutant-") as folder:
            caught, how = try_one(mutation, toolchain, base, options.csrc, Path(folder), options.timeout)
        verdict = "caught" if caught else "equivalent" if mutation.equivalent else "MISSED"
        wrong += caught == bool(mutation.equivalent)
        shown = mutation.equivalent if verdict == "equivalent" else " | ".join(how.splitlines())
        shown = f"only by order: {shown}" if caught and mutation.hidden else shown
        print(f"{verdict:10} {mutation.name:52} {time.perf_counter() - start:5.0f} s  {shown[:220]}", flush=True)
    equivalent, hidden = sum(bool(m.equivalent) for m in chosen), sum(m.hidden for m in chosen)
    print(
        f"{len(chosen)} faults, {hidden} of them in no schedule, {equivalent} without effect; {wrong} not as expected"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
