"""Made-up results with figures that a test can look for; nothing here was measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU = "NVIDIA H200"


def head() -> str:
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def facts(device: str = GPU, commit: str | None = None, date: str = "2026-01-02T03:04:05Z") -> dict:
    return {"device": device, "date": date, "commit": head() if commit is None else commit, "torch": "2.13.0", "triton": "3.9.0",
            "driver": "999.1", "python": "3.11.7"}  # fmt: skip


def kernel(provider: str = "triton", ratio: float = 0.95, **more) -> dict:
    us = 1000 * ratio
    return {
        "op": "mlp", "shape": "Llama-3.1-8B", "d": 4096, "f": 14336, "mode": "forward", "tokens": 8192, "rank": 64,
        "rule": "self_key", "dtype": "bfloat16", "launch": "eager", "provider": provider, "function": "npt", "status": "ok",
        "us": us, "us_p10_p90": [us, us], "ratio": ratio, "ratio_p10_p90": [ratio - 0.01, ratio + 0.01], "rounds": 30,
        "tflops": 700.0, "roofline_us": 900.0, "roofline_share": 900 / us,
    } | more  # fmt: skip


def memory(provider: str = "triton", peak: int = 2**28, **more) -> dict:
    return {
        "op": "mlp", "shape": "Llama-3.1-8B", "d": 4096, "f": 14336, "mode": "local", "tokens": 8192, "rank": 64,
        "rule": "self_key", "dtype": "bfloat16", "provider": provider, "function": "npt", "status": "ok", "peak_bytes": peak,
        "peak_units": 2.02, "result_bytes": 1,
    } | more  # fmt: skip


def train(rate: float = 20000.0, **more) -> dict:
    return {
        "model": "Llama-3.1-8B", "converted": "all", "mode": "local", "setting": "resident", "rule": "self_key", "rank": 64,
        "batch": 1, "sequence": 2048, "dtype": "bfloat16", "status": "ok", "tokens_per_s": rate,
        "tokens_per_s_p10_p90": [rate - 10, rate + 10], "steps": 5, "peak_bytes": 18 * 2**30, "mfu": 0.41, "tflops": 300.0,
        "np_parameters": 10**8, "frozen_parameters": 8 * 10**9,
        "seconds_per_step": {"forward": 0.06, "backward": 0.03, "optimizer": 0.01, "total": 0.1},
    } | more  # fmt: skip


def skipped(row: dict, reason: str) -> dict:
    keep = {
        key: value for key, value in row.items() if key not in ("us", "ratio", "tflops", "peak_bytes", "roofline_share")
    }
    return keep | {"status": "skipped", "reason": reason}


def everything() -> dict[str, list[dict]]:
    """Suite → rows of a complete run on a GPU."""
    kernels = [kernel("frozen", 1.0, function="frozen")]
    for tokens in (16, 256, 2048, 8192):
        for provider, ratio in (("frozen", 1.0), ("triton", 0.95), ("eager", 1.08), ("kconcat", 1.02), ("loop", 412.0)):
            for mode in ("forward", "local"):
                kernels.append(kernel(provider, ratio, tokens=tokens, mode=mode))
    kernels += [
        kernel("compile", 1.04),
        kernel("cuda", 0.9, mode="decode", tokens=1, launch="graph"),
        kernel("frozen", 1.0, mode="decode", tokens=1, launch="graph"),
        kernel("triton", 1.012, op="linear"),
        kernel("triton-mainloop", 1.05, op="linear"),
        kernel("frozen", 1.0, op="linear"),
        skipped(kernel("peft"), "not installed: pip install peft"),
        {k: v for k, v in kernel("liger").items() if k not in ("us", "ratio")}
        | {"status": "wrong", "reason": "y is off by 7 times what it may be; not timed"},
    ]
    memories = [memory(provider, size * rank, rank=rank) for rank in (8, 64, 256)
                for provider, size in (("triton", 2**20), ("peft", 2**22))]  # fmt: skip
    headline = {"op": "linear", "tokens": 2048, "dtype": "float32"}
    memories += [
        memory("materialised", 448 * 2**30, **headline, status="formula", reason="too large", formula="T·f·d·4 B"),
        memory("eager", 116 * 2**20, **headline),
    ]
    trains = [
        train(), train(12345.0, mode="end_to_end"), train(9500.0, setting="streamed", peak_bytes=7 * 2**30),
        train(500.0, setting="published form", converted="4", mode="end_to_end", rule="rank1", rank=8, sequence=256),
        train(5.0, setting="published loop", converted="4", mode="end_to_end", rule="rank1", rank=8, sequence=256),
        {"model": "GPT-2", "converted": "all", "mode": "local", "setting": "8bit", "rule": "self_key", "rank": 64, "batch": 1,
         "sequence": 1024, "dtype": "bfloat16", "status": "unavailable", "reason": "not available: bitsandbytes"},
    ]  # fmt: skip
    return {"kernels": kernels, "memory": memories, "train": trains}


def write(folder: Path, suites: dict[str, list[dict]] | None = None, size: str = "full", **environment) -> Path:
    """Write one file a suite; returns the folder."""
    for suite, rows in (everything() if suites is None else suites).items():
        data = {
            "schema": 1, "suite": suite, "size": size, "complete": True, "environment": facts(**environment), "command": ["npt"],
            "ceilings": {"gemm_tflops": 788.0, "copy_tbs": 4.3}, "rows": rows, "not_run": [],
        }  # fmt: skip
        if suite == "kernels":
            entry = {
                "op": "linear",
                "mode": "forward",
                "gated": True,
                "provider": "eager",
                "host_us": 14.0,
                "over_frozen_us": 8.5,
            }
            data["host_overhead"] = [entry, entry | {"provider": "frozen", "host_us": 5.5, "over_frozen_us": 0.0}]
        name = environment.get("device", GPU).lower().replace(" ", "-")[:12]
        path = folder / name / f"{suite}-{size}-{environment.get('date', '1')[:4]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
    return folder
