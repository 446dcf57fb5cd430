"""Tests run again in a process of its own, with instructions that this CPU would not choose by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def run_again(file: str, tests: str, capability: str) -> None:
    """Fails unless the tests of ``file`` that ``-k tests`` chooses pass under ``ATEN_CPU_CAPABILITY=capability``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", tests],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
