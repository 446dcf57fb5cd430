"""Which changes of a configuration would make it fit, the cheapest first.

A search over the keys that trade memory against something else. Every line it returns was put through the same byte count as
the plan, so what it says fits does fit as far as the count is right.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import parse_rank
from ..configs.schema import ConfigError, RunConfig
from .budget import Budget, Sizes
from .devices import gpu_with, local_gpu
from .parallel import Parallel
from .storage import quantization_of

__all__ = ["Suggestion", "advise", "largest_batch", "suggest"]

Changes = dict[str, Any]

#: What a tier of changes costs; a suggestion is as dear as its dearest change.
TIERS = (
    "same result",
    "same training, frozen weights rounded",
    "another training or calibration",
    "a smaller adapter or shorter text",
)


@dataclass(frozen=True)
class Suggestion:
    """A set of changes that fits.

    Attributes:
        line: ``section.key=value …``, to be pasted behind ``npt train``.
        tier: Index into :data:`TIERS`.
        device_bytes, host_bytes: Needed then, reserve included.
        seconds_per_token: Predicted for the first training phase, where rates are known.
    """

    line: str
    tier: int
    device_bytes: int
    host_bytes: int
    seconds_per_token: float | None

    @property
    def cost(self) -> str:
        return TIERS[self.tier]


def _changed(config: RunConfig, changes: Changes) -> RunConfig | None:
    """The configuration with changes, ``None`` if it is then not valid."""
    data = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        data[section][name] = value
    try:
        return RunConfig.from_mapping(data)
    except ConfigError:
        return None


def _line(changes: Changes) -> str:
    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"{key}={text(value)}" for key, value in changes.items())


# ---- what may change -------------------------------------------------------------------------------------------------


def _batches(config: RunConfig) -> Iterator[Changes]:
    """Smaller micro-batches for the same step; the shares of a step are weighted by tokens, so any divisor is the same."""
    size, accumulation = config.training.batch_size, config.training.gradient_accumulation_steps
    yield {}
    for smaller in range(size // 2, 0, -1):
        if size % smaller == 0:
            yield {
                "training.batch_size": smaller,
                "training.gradient_accumulation_steps": accumulation * size // smaller,
            }


def _same_result(config: RunConfig, sizes: Sizes) -> Iterator[Changes]:
    end_to_end = config.training.mode in {"end_to_end", "local+polish"}
    checkpoint: list[Changes] = [{}]
    if end_to_end and not config.optimization.gradient_checkpointing:
        checkpoint.append({"optimization.gradient_checkpointing": True})
    stream: list[Changes] = [{}]
    o = config.optimization
    sharded = sizes.layout(config).shard and sizes.parallel.data > 1
    if sizes.device.type != "cpu" and o.stream_layers == "off" and not o.use_cpu_offload and not sharded:
        stream.append({"optimization.stream_layers": "host"})
        if config.training.mode.startswith("local"):
            stream += [
                {"optimization.stream_layers": "host", "optimization.micro_batches_per_layer": n} for n in (2, 4, 8)
            ]
    elif o.micro_batches_per_layer > 1:
        stream.append({"optimization.micro_batches_per_layer": 1})
    shard: list[Changes] = [{}]
    dense = quantization_of(config) == "none" and o.stream_layers == "off" and not o.use_cpu_offload
    if sizes.parallel.data > 1 and not sharded and dense:
        shard.append({"optimization.distributed": "fsdp"})
    for parts in itertools.product(_batches(config), checkpoint, stream, shard):
        changes = {key: value for part in parts for key, value in part.items()}
        visits = changes.get("optimization.micro_batches_per_layer", 1)
        accumulation = changes.get("training.gradient_accumulation_steps", config.training.gradient_accumulation_steps)
        streamed = "optimization.stream_layers" in changes
        if visits <= max(1, accumulation) and not (streamed and "optimization.distributed" in changes):
            yield changes


def _rounded(config: RunConfig, sizes: Sizes) -> list[Changes]:
    changes: list[Changes] = [{}]
    if config.model.dtype == "float32" or (config.model.dtype == "auto" and sizes.device.type == "cpu"):
        changes.append({"model.dtype": "bfloat16"})
    if sizes.layout(config).shard and sizes.parallel.data > 1:
        return changes  # FSDP2 cannot shard quantised weights
    if quantization_of(config) == "none":
        changes += [{"optimization.use_8bit": True}, {"optimization.use_4bit": True}]
    elif quantization_of(config) in {"int8", "fp8"}:
        changes.append({"optimization.use_8bit": False, "optimization.quantization": "nf4"})
    return changes


def _other_training(config: RunConfig) -> list[Changes]:
    mode: list[Changes] = [{}]
    if config.training.mode in {"end_to_end", "local+polish"}:
        mode.append({"training.mode": "local"})
    basis: list[Changes] = [{}]
    if config.model.rule == "self_key" and config.model.basis == "fisher":
        basis.append({"model.basis": "pca"})
    return [{**a, **b} for a, b in itertools.product(mode, basis)]


def _less(config: RunConfig, sizes: Sizes) -> list[Changes]:
    kind, value = parse_rank(config.model.rank)
    ranks: list[Changes] = [{}]
    if kind in {"int", "auto"}:
        smaller = [value >> shift for shift in range(1, 8) if value >> shift >= 8]
        ranks += [{"model.rank": f"auto:{rank}" if kind == "auto" else rank} for rank in smaller]
    elif kind == "fraction":
        ranks += [{"model.rank": value / 2**shift} for shift in range(1, 5)]
    layers: list[Changes] = [{}]
    if config.model.npt_layers == "all" and kind != "list":
        layers.append({"model.npt_layers": "upper_half"})
    lengths: list[Changes] = [{}]
    length = config.data.max_length
    lengths += [{"data.max_length": length >> shift} for shift in range(1, 6) if length >> shift >= 128]
    return [{**a, **b, **c} for a, b, c in itertools.product(ranks, layers, lengths)]


# ---- the search ------------------------------------------------------------------------------------------------------


def suggest(config: RunConfig, sizes: Sizes, budget: Budget) -> list[Suggestion]:
    """The best set of changes of every tier that makes the run fit, in the order of what they cost; empty if nothing does.

    A dearer tier is listed beside a cheaper one that fits only where it is predicted to be a tenth faster; the last tier only
    where no other fits. Within a tier: what gives up least, then the fastest, then the fewest changes.
    """
    same = sorted(_same_result(config, sizes), key=len)
    few = _smallest(config, sizes, same)
    rounded, other = _rounded(config, sizes), _other_training(config)
    tiers: list[Iterator[tuple[Changes, ...]]] = [
        itertools.product(same),
        itertools.product(rounded[1:], same),
        itertools.product(other[1:], rounded, few),
        itertools.product(_less(config, sizes)[1:], other, rounded, few),
    ]
    found: list[Suggestion] = []
    for tier, candidates in enumerate(tiers):
        if found and tier == len(TIERS) - 1:
            break
        best = _best(config, sizes, budget, tier, candidates)
        if best is not None and all(_much_faster(best, cheaper) for cheaper in found):
            found.append(best)
    return found


def _weight(sizes: Sizes, config: RunConfig) -> tuple[int, int]:
    need = sizes.needs(config)
    return need.device, need.host


def _best(
    config: RunConfig, sizes: Sizes, budget: Budget, tier: int, candidates: Iterator[tuple[Changes, ...]]
) -> Suggestion | None:
    """The candidate that fits and gives up least, among those the fastest, then the one with fewest changes."""
    merged = [{key: value for part in parts for key, value in part.items()} for parts in candidates]
    ranked: list[tuple[tuple[float, ...], int, Changes, RunConfig]] = []
    for position, changes in enumerate(merged):
        changed = _changed(config, changes) if changes else None
        if changed is not None and not ("optimization.distributed" in changes and quantization_of(changed) != "none"):
            ranked.append((_given_up(config, changed), position, changes, changed))
    best: tuple[tuple[float, ...], Suggestion] | None = None
    for given_up, _, changes, changed in sorted(ranked, key=lambda entry: entry[:2]):
        if best is not None and given_up > best[0][:3]:
            break
        try:
            need = sizes.needs(changed)
        except ConfigError:  # such as a rank list that no longer matches the layers
            continue
        if not budget.allows(need):
            continue
        steps = sizes.steps(changed)
        seconds = steps[0].seconds / steps[0].tokens if steps else None
        total = sum(step.seconds / step.tokens for step in steps)
        # Predictions closer than a twentieth are the same; then the simpler change is the better one.
        speed = round(math.log(total, 1.05)) if total else 0
        key = (*given_up, speed, _effort(changes), total)
        if best is None or key < best[0]:
            best = key, Suggestion(_line(changes), tier, need.device, need.host, seconds)
    return None if best is None else best[1]


def _smallest(config: RunConfig, sizes: Sizes, same: list[Changes]) -> list[Changes]:
    """Nothing, and of the changes that keep the result those that need least memory: with frozen layers resident and streamed."""
    few: list[Changes] = [{}]
    for streamed in (False, True):
        of_kind = [c for c in same if ("optimization.stream_layers" in c) == streamed]
        valid = [(_weight(sizes, changed), c) for c in of_kind if (changed := _changed(config, c)) is not None]
        if valid:
            few.append(min(valid, key=lambda entry: entry[0])[1])
    return few


def _much_faster(one: Suggestion, other: Suggestion) -> bool:
    if one.seconds_per_token is None or other.seconds_per_token is None:
        return False
    return one.seconds_per_token < 0.9 * other.seconds_per_token


def _effort(changes: Changes) -> float:
    """Number of keys; streaming asks more of the machine than a key does."""
    return len(changes) + (2.0 if "optimization.stream_layers" in changes else 0.0)


def _given_up(before: RunConfig, after: RunConfig) -> tuple[float, float, float]:
    """What the result loses, dearest first: adapter and text, training or calibration, bits of the frozen weights."""

    def size(config: RunConfig) -> float:
        kind, rank = parse_rank(config.model.rank)
        # Half of the layers left as they were changes what is made; half the rank or text makes it worse.
        layers = 1.0 if config.model.npt_layers == before.model.npt_layers else 0.2
        return (1.0 if kind == "list" else float(rank)) * layers * config.data.max_length

    training = float(before.training.mode != after.training.mode) + float(before.model.basis != after.model.basis) / 2
    bits = {"none": 0.0, "int8": 1.0, "fp8": 1.0, "nf4": 2.0, "int4": 2.0}
    rounding = bits[quantization_of(after)] + float(before.model.dtype != after.model.dtype) / 2
    return size(before) / size(after), training, rounding


def largest_batch(config: RunConfig, sizes: Sizes, budget: Budget, limit: int = 4096) -> int:
    """The largest ``training.batch_size`` that fits; 0 if none does."""

    def fits(size: int) -> bool:
        changed = _changed(config, {"training.batch_size": size})
        return changed is not None and sizes.fits(changed, budget)

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- after an out-of-memory error ------------------------------------------------------------------------------------


def advise(
    config: RunConfig,
    device: torch.device,
    failed: Sequence[str] = (),
    *,
    limit: int | None = None,
    processes: int = 1,
) -> list[Suggestion]:
    """Changes after a run ran out of memory, the cheapest first.

    Args:
        config: The run.
        device: Whose memory ran out; on a CPU the machine's.
        failed: Phases it may have happened in. Each that the run has must need at least a fifth less than the count gives it
            now; if it has none of them, that holds for the largest phase.
        limit: Bytes that the whole must fit in; ``None``: what the device, or the machine, has.
        processes: How many train.

    Raises:
        ConfigError: The model's ``config.json`` cannot be found.
    """
    limit = _memory_of(device) if limit is None else limit
    gpu = (local_gpu() or gpu_with(limit)) if device.type == "cuda" else None
    sizes = Sizes.of(config, device, Parallel(data=processes), gpu)
    need = sizes.needs(config)
    found = [name for name in failed if name in need.phases]
    found = found or [max(need.phases, key=lambda name: need.phases[name])]
    limits = {name: need.phases[name] * 4 // 5 for name in found}
    budget = Budget(None, limit, limits) if device.type == "cpu" else Budget(limit, machine_memory(), limits)
    return suggest(config, sizes, budget)


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory() or 2**62


def machine_memory() -> int | None:
    """All memory of this machine (``offload.setup.free_host_memory``: what is free now); ``None`` if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
