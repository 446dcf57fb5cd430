"""Runs every Hopper kernel on this CPU under AddressSanitizer: reads and writes outside any tensor (part of make test-long).

First a launch that is told a wrong size, which must be found; then ``check.py``, in which nothing may be.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_emulator as build

HERE = Path(__file__).resolve().parent
_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0"
#: A sum of two parts of 4096 elements that is told 4100: it reads 8 floats past the end.
_OVERRUN = """
import names, torch
names.run_reduce(torch.zeros(2, 4096), torch.empty(4096, dtype=torch.bfloat16), 4, size=4100)
"""


def environment(toolchain: build.Toolchain, module: Path) -> dict[str, str]:
    """Python has to load the sanitizer before anything else."""
    library = subprocess.run(
        [toolchain.compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_file():
        raise build.Unavailable(
            f"no AddressSanitizer for {toolchain.compiler}: install libasan (Debian: libgcc-12-dev)"
        )
    return os.environ | {
        "LD_PRELOAD": library, "ASAN_OPTIONS": _OPTIONS, "NPT_EMULATED_MODULE": str(module), "PYTHONPATH": str(HERE),
        "PYTHONMALLOC": "malloc",
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--csrc", type=Path, help="another csrc/ than this checkout's")
    options = parser.parse_args()
    try:
        module = build.build(options.csrc, jobs=options.jobs, asan=True)
        env = environment(build.Toolchain.find(asan=True), module)
    except build.Unavailable as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 2
    overrun = subprocess.run([sys.executable, "-c", _OVERRUN], env=env, capture_output=True, text=True, check=False)
    if overrun.returncode == 0 or "heap-buffer-overflow" not in overrun.stderr:
        print(f"sanitize: AddressSanitizer does not see an overrun: {overrun.stderr[-500:]}", file=sys.stderr)
        return 1
    command = [sys.executable, str(HERE / "check.py"), "--schedules", "2", "--jobs", str(options.jobs)]
    code = subprocess.run(command, env=env, check=False).returncode
    print(
        "sanitize: a planted overrun was found; "
        + ("nothing else was" if code == 0 else "and so was something else, above")
    )
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
