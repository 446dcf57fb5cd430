"""Fail if README.md names a make target, an npt command or a file that does not exist, or shows Python that does not run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Shell lines of ```sh blocks, comments stripped."""
    lines = (line.split(" #")[0].strip() for block in code_blocks(text, "sh") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def problems(readme: Path) -> list[str]:
    """One line per thing that is not there."""
    text = readme.read_text()
    found = []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands(text):
        words = command.split()
        if words[0] == "make":
            found += [f"`{command}`: no target {w}" for w in words[1:] if "=" not in w and w not in targets]
        elif words[0] == "npt":
            arguments = [sys.executable, "-m", "npt_kernels", words[1], "--help"]
            if subprocess.run(arguments, capture_output=True, cwd=ROOT).returncode:
                found.append(f"`{command}`: npt has no command {words[1]}")
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        if not (readme.parent / path).exists():
            found.append(f"link to {path}, which does not exist")
    for block in code_blocks(text, "python"):
        run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
        if run.returncode:
            found.append(f"a Python example fails: {run.stderr.strip().splitlines()[-1]}")
    return found


if __name__ == "__main__":
    failures = [f"{name}: {line}" for name in ("README.md", "CONTRIBUTING.md") for line in problems(ROOT / name)]
    print("\n".join(failures) or "README.md and CONTRIBUTING.md: commands, links and examples exist and run")
    sys.exit(bool(failures))
