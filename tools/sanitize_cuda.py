"""Every Hopper kernel at small shapes under compute-sanitizer: memcheck, racecheck, synccheck (``make gpu-sanitize``).

Needs an sm_90 GPU and compute-sanitizer (it comes with the CUDA toolkit). Exit code 0: no tool found anything; 1: one did, or a
launch failed; 2: it cannot run here, and the message says what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
#: Tokens: decode, one tile and a bit, three row tiles (no cluster), four (clusters).
TOKENS = (1, 20, 70, 300, 512)
RULES = ("rank1", "diagonal", "anchored", "self_key")


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or ``None``."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer"), *(f"{h}/bin/compute-sanitizer" for h in homes if h)]
    return next((p for p in places if p and Path(p).is_file()), None)


def exercise(device: str, tokens: tuple[int, ...] = TOKENS) -> Iterator[str]:
    """Run forward and backward of every kernel family once; yields what was run. Shapes are ragged on purpose."""
    import torch

    from npt_kernels.kernels.cuda import value_grads
    from tests.support.mlp_calls import FactoredCalls, MlpCalls

    factored, mlp = FactoredCalls("cuda"), MlpCalls("cuda")

    d, f, rank = 136, 264, 24
    for count in tokens:
        for dtype in (torch.bfloat16, torch.float16):

            def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*shape, device=device).mul_(0.2).to(dtype)

            for rule in RULES:
                key = {"anchored": lambda width: make(width), "self_key": lambda width: None}.get(
                    rule, lambda width: make(rank, width)
                )
                for gated in (True, False):
                    pairs = [
                        key(d) if gated else None,
                        make(rank, f) if gated else None,
                        key(d),
                        make(rank, f),
                        key(f),
                        make(rank, d),
                    ]
                    weights = [make(f, d) if gated else None, make(f, d), make(d, f)]
                    inputs = (
                        make(count, d),
                        make(count, d),
                        make(count).abs(),
                        *weights,
                        None,
                        make(f),
                        None,
                        make(d, rank),
                        *pairs,
                    )
                    act = "silu" if gated else "gelu_new"
                    out, z, *saved = mlp.forward(*inputs, act, rule, 1, 0.7, True)
                    needs = [t is not None for t in inputs]
                    needs[3:9] = [False] * 6
                    mlp.backward(
                        torch.randn_like(out), *inputs[:6], inputs[9], *pairs, z, *saved, gated, act, rule, 1, 0.7, needs, True
                    )  # fmt: skip
                x, z, weight, value = make(count, d), make(count, rank), make(d, f).t(), make(rank, f)
                y, p = factored.forward(x, z, weight, key(d), value, make(f), rule, 1, 0.7)
                needs = [True, True, False, key(d) is not None, True, False]
                factored.backward(torch.randn_like(y), x, z, weight, key(d), value, p, rule, 1, 0.7, needs)
                value_grads.value_grads(
                    make(count, 520), make(rank, 520), z, p, make(count).abs(), rule, 1, 0.7, True, True, True, method="fused"
                )  # fmt: skip
                yield f"T={count} {str(dtype).removeprefix('torch.')} {rule}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"comma-separated, of {', '.join(TOOLS)}")
    parser.add_argument("--timeout", type=float, default=540, help="seconds for each tool (default: 540)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # what runs under the sanitizer
    options = parser.parse_args(arguments)
    if options.inside:
        import torch

        for done in exercise("cuda"):
            torch.cuda.synchronize()
            print(done, flush=True)
        return 0
    chosen = options.tools.split(",")
    if unknown := [t for t in chosen if t not in TOOLS]:
        parser.exit(2, f"gpu-sanitize: tool {unknown[0]!r} is not one of {', '.join(TOOLS)}\n")
    import torch

    sys.path.insert(0, str(ROOT))
    from npt_kernels.kernels.cuda import support as _cuda

    if not torch.cuda.is_available():
        parser.exit(2, "gpu-sanitize: torch sees no CUDA GPU here; run it on a machine with an H100 or H200\n")
    reason = _cuda.unavailable(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    if reason is not None:
        parser.exit(2, f"gpu-sanitize: the kernels cannot run here: {reason}\n")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        parser.exit(
            2, "gpu-sanitize: no compute-sanitizer on PATH or in CUDA_HOME/bin; it comes with the CUDA toolkit\n"
        )
    failed = []
    # Without torch's cache every tensor is an allocation of its own, so an access past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    for tool in chosen:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, __file__, "--inside"]
        print(f"== {tool}", flush=True)
        try:
            code = subprocess.run(command, env=environment, timeout=options.timeout, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{tool}: not finished after {options.timeout:.0f} s", file=sys.stderr)
            code = 1
        if code:
            failed.append(tool)
    print(f"gpu-sanitize: {'failed: ' + ', '.join(failed) if failed else 'nothing found by ' + ', '.join(chosen)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
