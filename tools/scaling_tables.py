"""The tables of docs/scaling.md, from the planner's own byte count: print them, rewrite the document, or check it.

python tools/scaling_tables.py            print
python tools/scaling_tables.py --write    put them into docs/scaling.md
python tools/scaling_tables.py --check    fail if the document says something else
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from npt_kernels.configs.models import KNOWN_MODELS  # noqa: E402
from npt_kernels.configs.schema import RunConfig  # noqa: E402
from npt_kernels.estimate.communication import exchanges, tensor_gradients, tensor_per_token  # noqa: E402
from npt_kernels.estimate.devices import GPUS  # noqa: E402
from npt_kernels.estimate.flops import step_time  # noqa: E402
from npt_kernels.estimate.memory import Phase, count_bytes, reserve  # noqa: E402
from npt_kernels.estimate.model_sizes import Adapter, ModelNumbers, count_adapter, meta_model, read_numbers  # noqa: E402
from npt_kernels.estimate.parallel import Parallel  # noqa: E402

DOCUMENT = ROOT / "docs" / "scaling.md"
GIB = 2**30
CUDA = torch.device("cuda")


@cache
def model_of(name: str) -> Any:
    return meta_model(name, KNOWN_MODELS[name])


def run(name: str, **keys: Any) -> tuple[ModelNumbers, Adapter, RunConfig]:
    """A model's sizes under ``section__key=value``: 2048 tokens, one sequence per micro-batch, 8 of them a step, bf16."""
    data: dict[str, dict[str, Any]] = {
        "model": {"base_model_name": name, "rank": 64, "init": "small", "dtype": "bfloat16"},
        "data": {"max_length": 2048},
        "training": {"mode": "local", "batch_size": 1, "gradient_accumulation_steps": 8},
        "optimization": {"mixed_precision": "bf16", "gradient_checkpointing": True},
        "evaluation": {"prompts": []},
    }
    for key, value in keys.items():
        section, _, entry = key.partition("__")
        data[section][entry] = value
    config = RunConfig.from_mapping(data)
    model = model_of(name)
    return read_numbers(model), count_adapter(model, config.npt_config()), config


def phase_of(name: str, parallel: Parallel | None = None, **keys: Any) -> Phase:
    model, adapter, config = run(name, **keys)
    mode = config.training.mode
    return next(p for p in count_bytes(model, adapter, config, CUDA, parallel) if p.name == mode)


def gib(count: float) -> str:
    value = count / GIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- tables ----------------------------------------------------------------------------------------------------------

EIGHT, SEVENTY, LARGEST = (f"meta-llama/Llama-3.1-{size}" for size in ("8B", "70B", "405B"))


def sizes() -> str:
    rows = []
    for name in (EIGHT, SEVENTY, LARGEST):
        model, adapter, _ = run(name)
        full = run(name, model__rank=model.hidden_size // 4)[1]
        rows.append(
            [
                name.rpartition("-")[2], str(model.num_layers), f"{model.hidden_size:,}", f"{model.intermediate_size:,}",
                gib(model.parameters * 2), f"{model.layer * 2 / 2**20:,.0f} MiB", gib(adapter.total * 16), gib(full.total * 16),
            ]
        )  # fmt: skip
    return table(
        ["", "layers", "d", "f", "frozen, bf16", "one layer", "NP, R = 64, × 16 B", "NP, R = d/4, × 16 B"], rows
    )


def one_gpu() -> str:
    rows = []
    for label, keys in (
        ("resident, bf16", {}),
        ("8-bit", {"optimization__use_8bit": True}),
        ("4-bit", {"optimization__use_4bit": True}),
        ("streamed from host", {"optimization__stream_layers": "host"}),
    ):
        row = [label]
        for mode in ("local", "end_to_end"):
            phase = phase_of(EIGHT, training__mode=mode, **keys)
            row += [gib(phase.device_bytes), gib(phase.device_bytes + reserve(phase.device_bytes, CUDA))]
        row.append(gib(phase.host_bytes) if phase.host_bytes else "–")
        rows.append(row)
    head = ["", "local, tensors", "with reserve", "end_to_end, tensors", "with reserve", "host"]
    return table(head, rows)


def _ways(devices: int) -> Iterator[tuple[str, Parallel, dict[str, Any]]]:
    yield "DDP", Parallel(data=devices), {}
    yield "DDP, layers streamed from host", Parallel(data=devices), {"optimization__stream_layers": "host"}
    yield "DDP, 4-bit", Parallel(data=devices), {"optimization__use_4bit": True}
    yield "FSDP2", Parallel(data=devices, shard=True), {}
    yield "FSDP2, NP sharded", Parallel(data=devices, shard=True, shard_adapter=True), {}
    yield (
        f"tensor 8{f' × FSDP2 {devices // 8}' if devices > 8 else ''}",
        Parallel(devices // 8, devices > 8, tensor=8),
        {},
    )
    yield (
        f"pipeline 8{f' × FSDP2 {devices // 8}' if devices > 8 else ''}",
        Parallel(devices // 8, devices > 8, pipeline=8),
        {},
    )
    if devices > 8:
        yield f"tensor 8 × pipeline {devices // 8}", Parallel(tensor=8, pipeline=devices // 8), {}


def many(name: str, devices: int, mode: str, rank: int) -> str:
    rows = []
    for label, parallel, keys in _ways(devices):
        model, adapter, config = run(name, training__mode=mode, model__rank=rank, **keys)
        phase = phase_of(name, parallel, training__mode=mode, model__rank=rank, **keys)
        total = phase.device_bytes + reserve(phase.device_bytes, CUDA)
        frozen = sum(
            t.bytes for t in phase.terms if t.where == "device" and t.name.startswith(("frozen", "embedding", "deq"))
        )
        trained = sum(t.bytes for t in phase.terms if t.name.startswith(("NP", "Adam", "gradients", "optimizer")))
        fits = ", ".join(gpu for gpu in ("H100", "H200") if total <= GPUS[gpu].memory_bytes) or "neither"
        sent = exchanges(model, adapter, config, parallel, mode)
        by = {group: sum(e.bytes for e in sent if e.group == group) for group in ("data", "tensor", "pipeline")}
        rows.append(
            [
                label, gib(frozen), gib(trained), gib(phase.device_bytes - frozen - trained), gib(total), fits,
                *(f"{by[group] / 1e9:,.1f}" if by[group] else "–" for group in ("data", "tensor", "pipeline")),
            ]
        )  # fmt: skip
    head = ["", "frozen", "NP, gradients, Adam", "activations", "sum + reserve", "fits", "data", "tensor", "pipeline"]
    return table(head, rows)


def rules() -> str:
    rows = []
    for rule in ("self_key", "rank1", "diagonal", "anchored"):
        model, adapter, _ = run(EIGHT, model__rule=rule)
        local, whole = (tensor_per_token(model, adapter, phase) for phase in ("local", "end_to_end"))
        tokens = 2048 * 8

        def mib(numbers: int, width: int = 2) -> str:
            return f"{numbers * width / 2**20:,.1f}"

        rows.append(
            [
                rule, mib(local["forward"] * tokens), mib(local["backward"] * tokens), mib(whole["forward"] * tokens),
                mib(whole["backward"] * tokens), mib(tensor_gradients(model, adapter), 4),
            ]
        )  # fmt: skip
    head = [
        "rule",
        "local forward",
        "local backward",
        "end_to_end forward",
        "end_to_end backward",
        "gradients, once a step",
    ]
    return table(head, rows)


def times() -> str:
    rows = []
    for name, devices in ((EIGHT, 1), (SEVENTY, 8), (LARGEST, 64)):
        parallel = Parallel(data=devices, shard=devices > 1)
        for visits in (1, 8):
            model, adapter, config = run(name, optimization__micro_batches_per_layer=visits)
            step = step_time(model, adapter, config, GPUS["H200"], parallel)[0]
            what = f"{name.rpartition('-')[2]}, {devices} × H200"
            rows.append(
                [
                    what, str(visits), f"{step.compute:.2f} s", f"{step.transfer:.2f} s",
                    f"{step.hidden:.0%}", f"{step.tokens_per_second:,.0f}",
                ]
            )  # fmt: skip
    return table(["local", "micro-batches per layer", "compute", "gathering layers", "hidden", "tokens/s"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "sizes": sizes,
    "one-gpu": one_gpu,
    "rules": rules,
    "70b-local": lambda: many(SEVENTY, 8, "local", 64),
    "70b-end-to-end": lambda: many(SEVENTY, 8, "end_to_end", 64),
    "70b-local-quarter": lambda: many(SEVENTY, 8, "local", 2048),
    "405b-local": lambda: many(LARGEST, 64, "local", 64),
    "405b-end-to-end": lambda: many(LARGEST, 64, "end_to_end", 64),
    "times": times,
}
TABLES = {name: cache(make) for name, make in TABLES.items()}
_BLOCK = re.compile(r"(<!-- table:([a-z0-9-]+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)


def rewritten(text: str) -> str:
    """The document with every table as it is computed now. Raises ``KeyError`` for a table that does not exist."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def problems(text: str) -> list[str]:
    """Tables that the document has otherwise, or not at all."""
    found = [f"no table {name}" for name in TABLES if f"<!-- table:{name} -->" not in text]
    for match in _BLOCK.finditer(text):
        if match[2] not in TABLES:
            found.append(f"table {match[2]} is not computed by anything")
        elif match[0] != f"{match[1]}{TABLES[match[2]]()}\n{match[3]}":
            found.append(f"table {match[2]} is not what the planner computes; run tools/scaling_tables.py --write")
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments == ["--write"]:
        DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
    elif arguments == ["--check"]:
        failures = problems(DOCUMENT.read_text())
        print("\n".join(failures) or "docs/scaling.md: tables are those of the planner")
        sys.exit(bool(failures))
    elif not arguments:
        for title, make in TABLES.items():
            print(f"{title}\n{make()}\n")
    else:
        sys.exit(__doc__)
