"""What the two-process tests run, in every process of ``torchrun``; the same functions run in one process to compare with.

``python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training/two_processes.py DIRECTORY``
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":  # pytest puts both on the path itself
    sys.path.insert(0, str(Path(__file__).parents[2]))

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_disabled, npt_parameters, remove_npt, save_npt
from npt_kernels.configs.schema import RunConfig
from npt_kernels.evaluation.fidelity import layer_fidelity
from npt_kernels.evaluation.perplexity import evaluate, evaluate_base
from npt_kernels.evaluation.samples import generate
from npt_kernels.measure.allocations import memory_meter
from npt_kernels.model.install import converted_layers
from npt_kernels.model.save import adapter_state_dict
from npt_kernels.model.shard_base import shard_base
from npt_kernels.model.sharding import forget_broken_forward, gathered, is_sharded, local_part
from npt_kernels.model.visits import tapped_layers, walk_layers
from npt_kernels.offload import load_for_sharding
from npt_kernels.offload.weights import is_mapped
from npt_kernels.training import distributed
from npt_kernels.training.distributed import OtherRankError, World
from npt_kernels.training.objectives import (
    KLObjective,
    LayerObjective,
    LocalObjective,
    delta_variances,
    enable_checkpointing,
)
from tests.support import two_runs
from tests.support.helpers import Words, randomise, tiny_model, token_ids

#: Rows of every global step. Five do not divide by two ranks, and the one row of the last step leaves rank 1 with none.
STEPS = (range(0, 5), range(0, 9), range(9, 10))
#: Name → (family, objective, settings).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "local": ("llama", "local", {"regularization_weight": 0.01}),
    "local, lower layers": ("llama", "local", {"layers": [0, 1]}),
    "local, layers visited once for two": ("llama", "local", {"micro_batches_per_layer": 2}),
    "local, gpt2": ("gpt2", "local", {"regularization_weight": 0.01}),
    "kl": ("llama", "kl", {}),
    "kl, penalty, checkpointing": ("llama", "kl", {"regularization_weight": 0.01, "checkpointing": True}),
    "layer, checkpointing": ("llama", "layer", {"regularization_weight": 0.01, "checkpointing": True}),
    "layer, gpt2": ("gpt2", "layer", {}),
}
MODES = ("ddp", "fsdp")


def converted(family: str, layers: Any = "all", dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(family, layers=3, **({"tie_word_embeddings": False} if family == "llama" else {})).to(dtype)
    apply_npt(model, NPTConfig(layers=layers, rank=6, init="small"))
    randomise(model)
    return model


def train(world: World, name: str, dtype: torch.dtype = torch.float64, micro: int = 2, steps: Any = STEPS) -> Any:
    """A minimal loop: the model of the case after one AdamW step per entry of ``steps``."""
    family, kind, settings = CASES[name]
    settings = dict(settings)
    checkpointing = settings.pop("checkpointing", False)
    model = converted(family, settings.pop("layers", "all"), dtype)
    text = token_ids(10, 12)
    variances = delta_variances(model, text) if kind != "kl" else {}
    if world.sharded:
        shard_base(model, world.device)
    if kind == "kl":
        objective: Any = KLObjective(model, **settings)
    else:
        objective = (LocalObjective if kind == "local" else LayerObjective)(model, variances=variances, **settings)
    enable_checkpointing(model, checkpointing)
    parameters = npt_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for rows in steps:
        # Whole micro-batches go round: rank 0 gets the first, rank 1 the second …
        mine = torch.tensor(list(rows)).split(micro)[world.rank :: world.size]
        batches, shares = world.level([text[part] for part in mine], [len(part) / len(rows) for part in mine])
        values: dict[str, float] = {"loss": 0.0}
        layers: dict[int, float] = {}
        results = objective.accumulate_group(batches, shares, lambda loss: loss.backward())
        for result, share in zip(results, shares, strict=True):
            values["loss"] += float(result.loss) * share
            for index, loss in result.layers.items():
                layers[index] = layers.get(index, 0.0) + float(loss) * share
        world.reduce_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.005))
        values, layers = world.mean_losses(values, layers, [] if kind == "kl" else list(converted_layers(model)))
        losses.append((values["loss"], norm, layers))
        optimizer.step()
        optimizer.zero_grad()
    world.check_replicas(model)
    return model, losses


class GatherMeter(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def check_sharding(world: World, directory: Path) -> dict[str, Any]:
    """Facts about a sharded model that are only true inside a process group."""
    model = converted("llama")
    text = token_ids(2, 12)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    own = sum(p.numel() * p.element_size() for p in npt_parameters(model))
    with torch.no_grad():
        want = model(input_ids=text).logits
        with npt_disabled(model):
            original = model(input_ids=text).logits
    layer = converted_layers(model)[1]
    weight = layer.mlp.gate_proj.weight.detach().clone()
    held = shard_base(model, world.device)
    facts: dict[str, Any] = {"held": held, "base": total - own}
    with torch.no_grad():
        facts["converted"] = torch.equal(model(input_ids=text).logits, want)
        with npt_disabled(model):
            facts["original"] = torch.equal(model(input_ids=text).logits, original)
    facts["sharded between forwards"] = local_part(layer.mlp.gate_proj.weight).shape[0] < len(weight)
    held_through = []
    with gathered(layer):
        for _ in range(2):
            with torch.no_grad():
                model(input_ids=text)
            held_through.append(len(local_part(layer.mlp.gate_proj.weight)) == len(weight))
        facts["held through forwards"] = all(held_through)
        facts["gathered"] = torch.equal(layer.mlp.gate_proj.weight.detach(), weight)
    facts["freed"] = local_part(layer.mlp.gate_proj.weight).shape[0] < len(weight)
    facts["adapter is whole"] = all(local_part(p) is p for p in npt_parameters(model))
    facts["is_sharded"] = is_sharded(model)
    met: list[int] = []

    class EnoughError(Exception):
        pass

    def visit(layer: Any, *_: Any) -> None:
        met.append(layer.mlp.gate_proj.weight.shape[0])
        if layer.npt_plan.index == 1:
            raise EnoughError

    # Ended by an exception, a forward leaves the layer gathered; walk_layers ends so behind the last converted layer.
    with torch.no_grad(), npt_disabled(model), contextlib.suppress(EnoughError), tapped_layers(model, visit):
        model(input_ids=text)
    facts["gathered while visited"] = met == [len(weight)] * 2
    facts["left behind"] = len(local_part(layer.mlp.gate_proj.weight)) == len(weight)
    forget_broken_forward(model)
    facts["cleaned up"] = len(local_part(layer.mlp.gate_proj.weight)) < len(weight)
    for per_visit in (1, 2):
        objective = LocalObjective(model, micro_batches_per_layer=per_visit)
        with GatherMeter() as meter:
            objective.accumulate_group([text, text], [0.5, 0.5], lambda loss: loss.backward())
        facts[f"gathers, {per_visit} a visit"] = meter.count
    lower = converted("llama", layers=[0, 1])
    shard_base(lower, world.device)
    walk_layers(lower, text, lambda *_: None)
    facts["walk cleans up"] = len(local_part(converted_layers(lower)[1].mlp.gate_proj.weight)) < len(weight)
    saved = save_npt(model, directory / f"sharded-{world.rank}")
    for name, act in (
        ("remove", lambda: remove_npt(model)),
        ("load", lambda: load_npt(model, saved)),
        ("shard again", lambda: shard_base(model, world.device)),
    ):
        try:
            act()
        except ValueError as error:
            facts[name] = str(error)
    return facts


def check_loading(world: World, directory: Path) -> dict[str, Any]:
    """A base in bfloat16 files, wanted in float32: what is held while it is loaded and sharded, and if its bits are right."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = directory / "wide"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    if world.is_main:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).bfloat16().save_pretrained(folder)
    world.barrier()
    config = RunConfig.from_mapping(
        {"optimization": {"distributed": "fsdp"}, "paths": {"cache_dir": str(directory / "cache")}}
    )

    def load(dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    with memory_meter() as loading:
        model = load_for_sharding(config, torch.float32, None, load)
    stays = all(is_mapped(p) for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    with torch.no_grad():
        logits = load(torch.float32)(token_ids(2, 12) % 16).logits
    apply_npt(model, NPTConfig(layers="all", rank=2, init="published"))
    shard_base(model, world.device)
    with torch.no_grad(), npt_disabled(model):
        same = torch.equal(model(token_ids(2, 12) % 16).logits, logits)
    layers = sum(p.numel() * 4 for n, p in load("auto").named_parameters() if ".layers." in n)
    # Mappings of files count as allocations, though their pages are the files'; ``mapped`` says that the layers are such.
    mapped = (folder / "model.safetensors").stat().st_size + layers
    return {"original": same, "mapped": stays, "layers": layers, "held": loading[0].peak - mapped}


def check_memory(world: World) -> list[int]:
    """How many of the first layer's whole matrices are referred to when it is its turn, and when it is the second's."""
    model = converted("llama", dtype=torch.float32)
    own = set(npt_parameters(model))
    matrices = [weakref.ref(p) for p in model.model.layers[0].parameters() if p.dim() > 1 and p not in own]
    alive: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> Any:
        alive.append(sum(ref() is not None for ref in matrices))
        return fully_shard(*arguments, **settings)

    with mock.patch("torch.distributed.fsdp.fully_shard", counted):
        shard_base(model, world.device)
    return alive[:2]


def measure(world: World) -> dict[str, Any]:
    """Evaluation and samples: five sequences in batches of two, so that one process has a batch more than the other."""
    model = converted("llama", dtype=torch.float32)
    text = token_ids(5, 12)
    if world.sharded:
        shard_base(model, world.device)
    counted = 0

    def advance(tokens: int) -> None:
        nonlocal counted
        counted += tokens

    with npt_disabled(model):
        base, teacher = evaluate_base(model, text, batch_tokens=24, ranks=world)
    return {
        "base": base,
        "result": evaluate(model, text, batch_tokens=24, ranks=world, advance=advance),
        "with teacher": evaluate(model, text, batch_tokens=24, ranks=world, teacher=teacher),
        "fidelity": layer_fidelity(model, text),
        # The second process ends its text early, and must go on computing for the other.
        "samples": generate(model, Words(), ["1 2 3", "4"], 3 + 2 * world.is_main),
        "counted": counted,
    }


def user_loop(wrap: str, rank: int, size: int, directory: Path) -> dict[str, torch.Tensor]:
    """What users write themselves: the model's own loss, and all wrapping by the library. Returns the adapter it saved."""
    model = converted("llama")
    if wrap == "fully_shard":  # everything, NP components too, as accelerate's FSDP2 does
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(npt_parameters(model), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    if wrap == "accelerate":
        model, optimizer = accelerator.prepare(model, optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)  # twice, as notebooks do: once recursed without end
        assert size == 1 or type(model).__name__ == "DistributedDataParallel"
    text = token_ids(8, 12)
    for rows in text.split(4):
        mine = rows[rank::size]
        loss = model(input_ids=mine, labels=mine, use_cache=False).loss
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(npt_parameters(model), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    folder = save_npt(accelerator.unwrap_model(model), directory / f"{wrap}-{size}-{rank}")
    return load_file(folder / "npt_model.safetensors")


def check_world(world: World) -> dict[str, Any]:
    """Agreement, failures and copies between two ranks."""
    facts: dict[str, Any] = {
        "agree": world.agree(world.rank, 5 - world.rank),
        "sums": world.sums([1.0 + world.rank, 0.5]),
        "gather": world.gather(f"rank {world.rank}"),
        "broadcast": world.broadcast({"from": world.rank}),
        "on_main": world.on_main(lambda: "done"),
    }

    def fail() -> None:
        raise ValueError("no disk")

    for name, act in (
        ("on_main fails", lambda: world.on_main(fail)),
        ("main_first fails", lambda: _first(world, fail)),
    ):
        try:
            act()
        except (ValueError, OtherRankError) as error:
            facts[name] = f"{type(error).__name__}: {error}"
    facts["all here"] = world.all_here()
    with mock.patch.object(distributed, "_CALL_TIMEOUT", timedelta(seconds=0.3)):
        # The second process does something else meanwhile.
        facts["one came"] = world.all_here() if world.is_main else None
    world._calls = 2
    world.barrier()
    order: list[int] = []
    with world.main_first():
        order.append(world.rank)
    facts["main_first"] = order
    # Rank 0 alone converts; the other gets layers, ranks and numbers.
    model = converted("llama", layers=[0, 2]) if world.is_main else tiny_model("llama", layers=3).double()
    world.copy_adapter(model)
    facts["copied"] = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    world.check_replicas(model)
    if world.rank == 1:
        with torch.no_grad():  # two entries swapped: every plain sum stays the same
            value = converted_layers(model)[2].np_component.w_b_up["up"].view(-1)
            value[:2] = value[:2].flip(0).clone()
    try:
        world.check_replicas(model)
    except RuntimeError as error:
        facts["differ"] = str(error)
    return facts


def _first(world: World, work: Any) -> None:
    with world.main_first():
        work()


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    world = World.join(RunConfig())
    results: dict[str, Any] = {"world": check_world(world), "sharding": check_sharding(world, directory)}
    results["memory"] = check_memory(world)
    results["loading"] = check_loading(world, directory)
    for wrap in ("accelerate", "fully_shard"):
        results[f"user: {wrap}"] = user_loop(wrap, world.rank, world.size, directory)
    for mode in MODES:
        world.sharded = mode == "fsdp"
        results[f"{mode}: measure"] = measure(world)
        for name in CASES:
            model, losses = train(world, name)
            results[f"{mode}: {name}"] = adapter_state_dict(model), losses
        # Two micro-batches, one a rank: the same two numbers are added, so not even rounding may differ.
        for name in ("local", "kl"):
            model, losses = train(world, name, torch.float32, 2, [range(0, 4), range(4, 8)])
            results[f"{mode}: bitwise {name}"] = adapter_state_dict(model), losses
    for name in two_runs.RUNS:
        results[f"run: {name}"] = two_runs.one_run(world, name, directory)
    torch.save(results, directory / f"rank{world.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
