"""Known vulnerabilities in the versions of ``constraints.txt``, by pip-audit in an environment of its own; offline it warns.

    python tools/audit.py [--work DIR]

Ends with 1 if a version has a known vulnerability, with 0 and a warning for what could not be asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def ask(work: Path) -> dict[str, Any] | str:
    """pip-audit's JSON, or in one line why there is none."""
    python = work / "bin" / "python"
    if not python.exists():
        venv.create(work, with_pip=True)
    for command in (
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"],
        ["-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json", "--timeout", "15",
         "--requirement", str(ROOT / "constraints.txt")],
    ):  # fmt: skip
        done = subprocess.run([python, *command], capture_output=True, text=True)
        if done.stdout.lstrip().startswith("{"):
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    return "pip-audit said nothing"


def judge(answer: dict[str, Any] | str) -> tuple[str, bool]:
    """``(what to print, whether a vulnerability is known)``."""
    if isinstance(answer, str):
        return f"warning: constraints.txt was not audited: {answer}", False
    entries = answer["dependencies"]
    lines = [f"{e['name']} {e['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version'}"
             for e in entries for v in e.get("vulns", ())]  # fmt: skip
    skipped = [e["name"] for e in entries if "skip_reason" in e]
    if skipped:
        lines.append(f"warning: of {len(entries)} packages {len(skipped)} were not audited ({', '.join(skipped[:3])} …): "
                     f"{entries[[e['name'] for e in entries].index(skipped[0])]['skip_reason']}")  # fmt: skip
    bad, audited = any(e.get("vulns") for e in entries), len(entries) - len(skipped)
    if audited:
        lines.append(f"{audited} packages audited, {'vulnerabilities above' if bad else 'nothing known'}")
    return "\n".join(lines), bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="environment for pip-audit, kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        text, bad = judge(ask(options.work or Path(temporary)))
    print(text)
    sys.exit(bad)


if __name__ == "__main__":
    main()
