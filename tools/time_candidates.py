"""Times instances that ``choose`` weighs beside the vendor's GEMM: ``PYTHONPATH=. python tools/time_candidates.py OUT.json``.

Down projections of 65 to 512 tokens: K split over a cluster (as chosen, and the other splits) against tiles of 128 x 128 and
128 x 256. Gate and up of as many: tiles of 128 and of 64 rows. One token: decode kernels of 8, 16 and 32. Short K at 8192 tokens:
ping-pong kernels with and without a cluster. bf16, R = 64; contenders interleaved, inputs rotate past the L2 cache
(npt_kernels/measure/timing.py). Needs an sm_90 GPU; under a minute. The predictions stand in npt_kernels/kernels/cuda/choose.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npt_kernels.kernels.cuda import launch, support
from npt_kernels.kernels.cuda.choose import Config, Epilogue, Family, choose
from npt_kernels.kernels.cuda.launch import LOW, MAIN, Segment, low_rank
from npt_kernels.measure.timing import Call, clocks, compare, rotation, settle_power

DTYPE = torch.bfloat16
TOKENS = (65, 128, 192, 256, 512)
#: Name → hidden and MLP width.
LAYERS = {"8B": (4096, 14336), "1B": (2048, 8192)}
RANK = 64
#: Tokens, columns and K of the short products: GPT-2's MLP.
SHORT = (8192, 3072, 768)


def down_configs(tokens: int, width: int, depth: int, sms: int) -> dict[str, Config]:
    """What could run ``[tokens, width]`` with a K of ``depth``."""
    chosen = choose(Epilogue.STORE, tokens, width, depth, sms)
    # Two row tiles share the weights only where row tiles come in pairs.
    pairs = (1, 2) if -(-tokens // 128) % 2 == 0 else (1,)
    found = {"chosen": chosen}
    for cluster in pairs:
        found[f"128x128 cluster {cluster}"] = Config(Family.PINGPONG, Epilogue.STORE, cluster, 128, 128, 8, "")
        found[f"128x256 cluster {cluster}"] = Config(Family.COOP, Epilogue.STORE, cluster, 128, 256, 8, "")
        for split in (2, 4, 8):
            if cluster * split <= 8:
                name = f"128x256 cluster {cluster} split {split}"
                found[name] = Config(Family.SPLIT, Epilogue.STORE, cluster, 128, 256, 8, "", split)
    return found


def gate_up_configs(tokens: int, width: int, depth: int, sms: int) -> dict[str, Config]:
    """Tiles of 128 rows as chosen for a long K, tiles of 64 rows, each with and without a cluster where rows come in pairs."""
    found = {"chosen": choose(Epilogue.GATE_UP, tokens, width, depth, sms)}
    for family, rows in ((Family.COOP, 128), (Family.PINGPONG, 64)):
        for cluster in (1, 2) if -(-tokens // rows) % 2 == 0 else (1,):
            name = f"{rows}x256 cluster {cluster}"
            found[name] = Config(family, Epilogue.GATE_UP, cluster, rows, 256, 8, "")
    return found


def decode_configs(epilogue: Epilogue, width: int, depth: int, sms: int) -> dict[str, Config]:
    """One token on the decode kernels of 8 (as chosen), 16 and 32."""
    chosen = choose(epilogue, 1, width, depth, sms)
    return {"chosen": chosen} | {f"{n} tokens": replace(chosen, block_m=n) for n in (16, 32)}


def short_configs(epilogue: Epilogue, tokens: int, width: int, depth: int, sms: int) -> dict[str, Config]:
    """The chosen ping-pong kernel with a cluster of 2 and without."""
    chosen = choose(epilogue, tokens, width, depth, sms)
    return {f"cluster {n}": replace(chosen, cluster=n, group_m=16 // n) for n in (1, 2)}


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device).mul_(shape[-1] ** -0.5)


def contenders(
    x: Tensor, stored: list[Tensor], c: Tensor, values: list[Tensor], configs: dict[str, Config], width: int
) -> dict[str, Call]:
    """cuBLAS without the delta, then ours with it: ``x @ stored[i]ᵀ + c @ value``, gate and up stored one above the other."""
    two = stored[0].shape[0] == 2 * width
    epilogue = next(iter(configs.values())).epilogue
    count = {Epilogue.ACT: 2, Epilogue.GATE_UP_BWD: 2}.get(epilogue, 1)  # ACT as in training, with its input saved
    outs = [x.new_empty(x.shape[0], width) for _ in range(count)]
    inputs = {Epilogue.ACT_BWD: 1, Epilogue.GATE_UP_BWD: 2}.get(epilogue, 0)
    saved = [torch.randn_like(outs[0]) for _ in range(inputs)]
    plain = x.new_empty(x.shape[0], stored[0].shape[0])
    low = low_rank(c, values[0], LOW, values[1] if two else None)

    def ours(config: Config) -> Call:
        def call(i: int) -> None:
            main = Segment(MAIN, x, stored[i][:width], stored[i][width:] if two else None)
            launch.run(
                config.epilogue, [main, low], outs, inputs=saved, store_pre=epilogue == Epilogue.ACT, config=config
            )

        return call

    found: dict[str, Call] = {"cuBLAS": lambda i: torch.mm(x, stored[i].t(), out=plain)}
    return found | {name: ours(config) for name, config in configs.items()}


def cases(device: torch.device) -> Iterator[tuple[str, dict[str, Call], int, str]]:
    """(name, contenders, sets of inputs, what ``choose`` picks)."""
    sms = launch.multiprocessors(device)
    for layer, (d, f) in LAYERS.items():
        for op, width, depth, weights in (("down", d, f, 1), ("gate_up", f, d, 2)):
            count = rotation(2 * weights * width * depth, device)
            stored = [normal(device, weights * width, depth) for _ in range(count)]
            values = [normal(device, RANK, width) for _ in range(2)]
            for tokens in TOKENS:
                configs = (down_configs if op == "down" else gate_up_configs)(tokens, width, depth + RANK, sms)
                x, c = normal(device, tokens, depth), normal(device, tokens, RANK)
                calls = contenders(x, stored, c, values, configs, width)
                yield f"{op} {layer} T={tokens}", calls, count, str(configs["chosen"])
            configs = decode_configs(Epilogue.STORE if op == "down" else Epilogue.GATE_UP, width, depth + RANK, sms)
            calls = contenders(normal(device, 1, depth), stored, normal(device, 1, RANK), values, configs, width)
            yield f"{op} {layer} T=1", calls, count, str(configs["chosen"])
    tokens, width, depth = SHORT
    values = [normal(device, RANK, width) for _ in range(2)]
    x, c = normal(device, tokens, depth), normal(device, tokens, RANK)
    for epilogue in Epilogue:
        stored = [normal(device, (2 if epilogue == Epilogue.GATE_UP else 1) * width, depth)]
        configs = short_configs(epilogue, tokens, width, depth + RANK, sms)
        calls = contenders(x, stored, c, values, configs, width)
        picked = str(choose(epilogue, tokens, width, depth + RANK, sms))
        yield f"short {epilogue.name.lower()} T={tokens}", calls, 1, picked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of A B C C B A (default: 30)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "time_candidates: torch sees no CUDA GPU here; run it on a machine with an H100 or H200\n")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = support.unavailable(device, DTYPE)
    if reason is not None:
        parser.exit(2, f"time_candidates: the kernels cannot run here: {reason}\n")
    started = time.perf_counter()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device), "torch": torch.__version__, "clocks": clocks(),
        "ceilings": settle_power(device, 3.0), "cases": {},
    }  # fmt: skip
    for name, calls, sets, chosen in cases(device):
        timed = compare(calls, "cuBLAS", device, rounds=options.rounds, sets=sets)
        result["cases"][name] = {"chosen": chosen, "contenders": timed}
        options.out.write_text(
            json.dumps(result, indent=1) + "\n"
        )  # after each case: a launch that dies loses only the rest
        print(name, {k: v.get("us", v.get("error")) for k, v in timed.items()}, flush=True)
    print(f"{time.perf_counter() - started:.0f} s; {clocks()}; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
