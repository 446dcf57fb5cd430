"""Fail if a document names a make target, an npt command, a file or a heading that does not exist, or shows Python that fails.

Read are README.md, CONTRIBUTING.md and every Markdown file of ``docs/``. Of examples that begin with ``# with a model of your
own`` only the imports are run. CONTRIBUTING.md must also name every ``NPT_`` environment variable that the code reads.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: First line of an example that cannot run by itself.
NOT_ALONE = "# with a model of your own"


def code_blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Shell lines of ```sh blocks, comments stripped."""
    lines = (line.split(" #")[0].strip() for block in code_blocks(text, "sh") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@lru_cache(maxsize=None)
def npt_has(command: str) -> bool:
    """Whether ``npt`` knows the command."""
    arguments = [sys.executable, "-m", "npt_kernels", command, "--help"]
    return subprocess.run(arguments, capture_output=True, cwd=ROOT).returncode == 0


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, punctuation dropped, a hyphen for each space."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems(readme: Path) -> list[str]:
    """One line per thing that is not there."""
    text = readme.read_text()
    found = []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands(text):
        words = command.split()
        if words[0] == "make":
            found += [f"`{command}`: no target {w}" for w in words[1:] if "=" not in w and w not in targets]
        elif words[0] == "npt" and not npt_has(words[1]):
            found.append(f"`{command}`: npt has no command {words[1]}")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = readme.parent / path if path else readme
        if not target.exists():
            found.append(f"link to {path}, which does not exist")
        elif anchor and anchor not in anchors(target):
            found.append(f"link to #{anchor}, a heading that {path or 'this document'} does not have")
    for block in code_blocks(text, "python"):
        if block.startswith(NOT_ALONE):
            block = "\n".join(line for line in block.splitlines() if re.match(r"from |import ", line))
        run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT)
        if run.returncode:
            found.append(f"a Python example fails: {run.stderr.strip().splitlines()[-1]}")
    return found


def unlisted_variables() -> list[str]:
    """Environment variables of our own that the code reads and CONTRIBUTING.md's table does not have."""
    sources = [ROOT / "setup.py", *(ROOT / "npt_kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"[\"'](NPT_[A-Z_]+)[\"']", source.read_text())}
    return sorted(read - set(re.findall(r"`(NPT_[A-Z_]+)`", (ROOT / "CONTRIBUTING.md").read_text())))


if __name__ == "__main__":
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    failures = [f"{document.relative_to(ROOT)}: {line}" for document in documents for line in problems(document)]
    failures += [f"CONTRIBUTING.md: no line about the environment variable {name}" for name in unlisted_variables()]
    print("\n".join(failures) or f"{len(documents)} documents: commands, links and examples exist and run")
    sys.exit(bool(failures))
