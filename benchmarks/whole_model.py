"""What a converted model costs to read and to write text with, beside the original: whole models, side by side in one run.

    python benchmarks/whole_model.py                                    SmolLM2-135M (the demo's), this machine
    python benchmarks/whole_model.py --model llama-3.1-8b --rank 64     random weights at a model's shape
    python benchmarks/whole_model.py --tokens 512 --decode 256          prefill of 512 tokens; one token behind 256

Contenders: the original; converted and folded (``NPTConfig(fold=True)``: the attention's output projection is not computed);
converted with ``fold=False``. Medians over rounds of A B C C B A (``npt_kernels.measure.timing.compare``), the ratio to the
original with its 10th and 90th percentile. On a GPU also as CUDA graphs, where Python costs nothing. Components hold random
numbers: speed does not depend on them. ``--compile`` adds ``torch.compile`` of the original and of the folded.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npt_kernels import NPTConfig, apply_npt
from npt_kernels.base_model.assets import demo_model_dir
from npt_kernels.bench.results import device_folder, environment, write_json
from npt_kernels.bench.training_shapes import find_model
from npt_kernels.configs.schema import default_cache_dir
from npt_kernels.measure.random_model_step import build_model
from npt_kernels.measure.timing import Call, compare, compare_graphs
from npt_kernels.ops.registry import default_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def demo_model(dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    path = demo_model_dir(default_cache_dir())
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()  # type: ignore[no-any-return]


def contenders(model: nn.Module, rank: int, compiled: bool) -> dict[str, nn.Module]:
    found = {"original": model}
    for name, fold in (("folded", True), ("unfolded", False)):
        found[name] = copy.deepcopy(model)
        apply_npt(found[name], NPTConfig(layers="all", rank=rank, init="small", fold=fold))
    for model_ in found.values():
        model_.requires_grad_(False)
    if compiled:
        found |= {f"{name}, compiled": torch.compile(found[name]) for name in ("original", "folded")}  # type: ignore[misc]
    return found


def prefill(model: nn.Module, ids: Tensor) -> Call:
    @torch.no_grad()
    def call(_: int) -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor) -> Call:
    """One token behind ``ids``, whose keys and values stand in a cache of fixed size: every call computes the same."""
    from transformers import StaticCache

    device, behind = ids.device, ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=behind + 8)
    model(input_ids=ids, past_key_values=cache, cache_position=torch.arange(behind, device=device), logits_to_keep=1)
    position = torch.tensor([behind], device=device)
    token = ids[:, -1:].clone()

    @torch.no_grad()
    def call(_: int) -> None:
        for layer in cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(behind)
        model(
            input_ids=token,
            past_key_values=cache,
            cache_position=position,
            position_ids=position[None],
            logits_to_keep=1,
        )

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a shape of `npt bench train` (random weights)")
    parser.add_argument("--rank", type=int, nargs="+", default=[78, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="tokens of a prefill; 0: none")
    parser.add_argument("--decode", type=int, default=256, help="tokens in the cache; 0: no decoding")
    parser.add_argument("--dtype", choices=[*DTYPES], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the record (default: print only)")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = DTYPES[name]
    shape = None if args.model == "demo" else find_model(args.model)
    model = demo_model(dtype).to(device) if shape is None else build_model(dict(shape.numbers), dtype, device)
    facts = environment(device) | {"NPT_BACKEND": default_backend() or "automatic"}
    rows: list[dict[str, Any]] = []
    for rank in args.rank:
        models = contenders(model, rank, args.compile)
        generator = torch.Generator().manual_seed(0)
        work: list[tuple[str, int]] = [("prefill", n) for n in args.tokens if n] + [("decode", args.decode)] * bool(
            args.decode
        )
        for what, tokens in work:
            ids = torch.randint(1000, (1, tokens), generator=generator).to(device)
            calls = {key: (prefill if what == "prefill" else decode)(each, ids) for key, each in models.items()}
            ways = [("eager", compare)] + [("graph", compare_graphs)] * (device.type == "cuda")
            for way, timed in ways:
                settings: dict[str, Any] = {"rounds": args.rounds, "sets": 1}
                if timed is compare_graphs:
                    settings["repeat"] = 4
                times = timed(calls, "original", device, **settings)
                for key, entry in times.items():
                    row = {
                        "what": what,
                        "tokens": tokens,
                        "rank": rank,
                        "dtype": name,
                        "launch": way,
                        "contender": key,
                        **entry,
                    }
                    rows.append(row)
                    time = (
                        f"{entry['us'] / 1e3:9.2f} ms  {entry.get('ratio', 1):6.3f}"
                        if "us" in entry
                        else entry["error"]
                    )
                    print(f"{what:7} {tokens:5} tokens  rank {rank:4}  {way:5}  {key:20} {time}", flush=True)
        del models
    record = {"suite": "whole-model", "model": args.model, "environment": facts, "rows": rows}
    if args.out:
        stamp = facts["date"].replace("-", "").replace(":", "")
        print(write_json(record, args.out / device_folder(facts) / f"whole-model-{stamp}.json"))


if __name__ == "__main__":
    main()
