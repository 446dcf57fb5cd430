"""What a quantised frozen linear costs: bytes, making it dense, and forward + input gradient against dense and the library's own.

    python benchmarks/quantised.py [--shape 1536x576] [--tokens 1 512] [--dtype bfloat16] [--json FILE]

Best of ``--repeat`` runs, in milliseconds. ``library`` is the module that bitsandbytes or torchao would put in place of the
linear (``Linear8bitLt`` in training mode, so that it does not round activations; ``Linear4bit`` without its CPU repacking).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from npt_kernels.conversion.quantise import quantise_linear
from npt_kernels.ops.dense_on_use import dense
from npt_kernels.quantised.names import FORMATS, import_library


def milliseconds(call: Callable[[], Any], repeat: int, device: torch.device) -> float:
    best = float("inf")
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def forward_backward(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    x = x.clone().requires_grad_()
    grad = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), x, grad)


def library_module(plain: nn.Linear, format: str, library: str) -> nn.Module | None:
    """What the library itself would compute with; ``None`` where it has nothing for this device."""
    sizes, weight = (plain.in_features, plain.out_features), plain.weight.detach().clone()
    if library == "torchao":
        ao = import_library("torchao")
        if format == "int4":
            return None
        copy = nn.Linear(*sizes, bias=False, dtype=weight.dtype, device=weight.device)
        copy.weight = nn.Parameter(weight, requires_grad=False)
        ao.quantize_(copy, ao.Int8WeightOnlyConfig() if format == "int8" else ao.Float8WeightOnlyConfig())
        return copy
    bnb = import_library("bitsandbytes")
    if format == "int8":
        eight = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=0.0)
        eight.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False)
        return eight.to(weight.device).train()  # type: ignore[no-any-return]
    four = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=four)
    four.support_avx512bf16_for_cpu = False
    return four.to(weight.device)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1536x576", help="out x in")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", help="write the rows there, with the machine and the versions")
    args = parser.parse_args()
    d_out, d_in = map(int, args.shape.split("x"))
    dtype: torch.dtype = getattr(torch, args.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    plain = nn.Linear(d_in, d_out, bias=False, dtype=dtype, device=device).requires_grad_(False)
    inputs = [torch.randn(tokens, d_in, dtype=dtype, device=device) for tokens in args.tokens]

    def measure(module: Callable[[Tensor], Tensor] | None) -> list[float | None]:
        return [
            None if module is None else milliseconds(forward_backward(module, x), args.repeat, device) for x in inputs
        ]

    rows: list[dict[str, Any]] = [
        {"format": "dense", "bytes": plain.weight.numel() * dtype.itemsize, "step_ms": measure(plain)}
    ]
    for format, libraries in FORMATS.items():
        for library in libraries:
            made = quantise_linear(plain, format, library)

            def make_dense(made: Any = made) -> None:
                with dense(made.weight):
                    pass

            rows.append({
                "format": f"{format} {library}", "bytes": made.stored_bytes,
                "dense_ms": milliseconds(make_dense, args.repeat, device), "step_ms": measure(made),
                "library_ms": measure(library_module(plain, format, library)),
            })  # fmt: skip
    print(f"{d_out} x {d_in}, {args.dtype}, {device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'':20} {'MiB':>7} {'make dense':>11}" + "".join(f" {f'T={t}':>9} {'library':>9}" for t in args.tokens))
    for row in rows:
        cells = "".join(
            f" {own:9.3f} {'' if other is None else f'{other:.3f}':>9}"
            for own, other in zip(row["step_ms"], row.get("library_ms", [None] * len(inputs)), strict=True)
        )
        make = f"{row['dense_ms']:.3f}" if "dense_ms" in row else ""
        print(f"{row['format']:20} {row['bytes'] / 2**20:7.2f} {make:>11}{cells}")
    if args.json:
        record = {"shape": [d_out, d_in], "tokens": args.tokens, "dtype": args.dtype, "device": str(device),
                  "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "machine": platform.processor(),
                  "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}  # fmt: skip
        with open(args.json, "w") as stream:
            json.dump(record, stream, indent=2)


if __name__ == "__main__":
    main()
