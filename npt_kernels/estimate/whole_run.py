"""``npt plan`` and ``npt train --dry-run``: what a run will do and need, from ``config.json`` alone.

No weights, no network, no text is read: the model is built on torch's ``meta`` device, sizes come from its modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..base_model.loading import quantization_notes, resolve_dtype
from ..base_model.mixed_precision import bf16_arithmetic, choose_mixed_precision, slow_bf16
from ..configs.schema import RunConfig
from ..offload import streaming_notes
from ..training.distributed import choose_device
from .advice import Suggestion, largest_batch, machine_memory, suggest
from .budget import Budget, Sizes
from .byte_count import peak, reserve, uses_closed_form
from .count_steps import count_steps
from .devices import GPUS_PER_MACHINE, Gpu, gpu_with, local_gpu
from .flops import StepTime
from .model_sizes import Adapter, ModelNumbers
from .parallel import Parallel
from .terms import MemoryTerm, Phase

__all__ = ["MemoryTerm", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        config: The resolved configuration.
        device: Where it will run.
        dtype: Of the frozen base.
        model, adapter: Sizes of the model and of its NP components.
        parallel: Degrees.
        steps: Optimizer steps, ``None`` if the text's length is not known without reading it.
        steps_from: How ``steps`` is known.
        phases: Byte count of every phase.
        gpu: Rates behind ``times``.
        times: Predicted optimizer step of every training phase.
        budget: What there is.
        largest_batch: That fits; ``None`` where nothing limits it.
        suggestions: Changes that would fit, where this does not.
        notes: What deserves a line: keys without effect here, precision, limits.
    """

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    model: ModelNumbers
    adapter: Adapter
    parallel: Parallel
    steps: int | None
    steps_from: str
    phases: list[Phase]
    gpu: Gpu | None = None
    times: list[StepTime] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    largest_batch: int | None = None
    suggestions: list[Suggestion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """Of the global step."""
        training = self.config.training
        if training.mode == "none":
            return 0
        micro = training.batch_size * self.config.data.max_length
        return micro * training.gradient_accumulation_steps * self.parallel.data

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: (phase.device_bytes, phase.host_bytes))

    @property
    def memory(self) -> list[MemoryTerm]:
        """Terms of the worst phase."""
        return self.worst.terms

    @property
    def device_bytes(self) -> int:
        """Counted tensors at the peak, on each device; on a CPU in its memory."""
        return peak(self.phases)

    @property
    def host_bytes(self) -> int:
        """Of each process."""
        return peak(self.phases, "host")

    @property
    def machine_bytes(self) -> int:
        """Host memory of a machine with all its processes."""
        processes = min(self.parallel.devices, GPUS_PER_MACHINE)
        return max(phase.machine_bytes(processes) for phase in self.phases)

    @property
    def reserve_bytes(self) -> int:
        """Assumed beside counted tensors."""
        return reserve(self.device_bytes, self.device)

    @property
    def fits(self) -> bool | None:
        """``None`` where no limit is known."""
        if self.device.type == "cpu":
            return None if self.budget.host is None else self.device_bytes + self.host_bytes <= self.budget.host
        if self.budget.device is None and self.budget.host is None:
            return None
        device = self.budget.device is None or self.device_bytes + self.reserve_bytes <= self.budget.device
        return device and (self.budget.host is None or self.machine_bytes <= self.budget.host)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        gib = 2**30
        return {
            "config": self.config.model_dump(mode="json"),
            "device": str(self.device),
            "gpu": vars(self.gpu) if self.gpu is not None else None,
            "parallel": {**vars(self.parallel), "devices": self.parallel.devices},
            "model": {**vars(self.model), "parameters": self.model.parameters},
            "adapter": {**vars(self.adapter), "total": self.adapter.total},
            "steps": self.steps,
            "steps_from": self.steps_from,
            "tokens_per_step": self.tokens_per_step,
            "phases": [
                {
                    "name": phase.name,
                    "moment": phase.moment,
                    "device_bytes": phase.device_bytes,
                    "host_bytes": phase.host_bytes,
                    "moments": phase.moments,
                    "terms": [vars(term) for term in phase.terms],
                }
                for phase in self.phases
            ],
            "peak": {
                "phase": self.worst.name,
                "device_bytes": self.device_bytes,
                "reserve_bytes": self.reserve_bytes,
                "host_bytes": self.host_bytes,
                "device_gib": round((self.device_bytes + self.reserve_bytes) / gib, 3),
                "machine_host_bytes": self.machine_bytes,
                "host_gib": round(self.host_bytes / gib, 3),
            },
            "predicted": [
                {**vars(step), "tokens_per_second": step.tokens_per_second, "what": "predicted, not measured"}
                for step in self.times
            ],
            "budget": vars(self.budget),
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "suggestions": [{**vars(entry), "cost": entry.cost} for entry in self.suggestions],
            "notes": self.notes,
        }


def make_plan(
    config: RunConfig,
    device: torch.device | str | None = None,
    *,
    gpu: Gpu | None = None,
    gpu_memory: int | None = None,
    host_memory_bytes: int | None = None,
    parallel: Parallel | None = None,
) -> Plan:
    """The plan of a run on ``device``. Reads ``config.json`` at most.

    Args:
        config: The run.
        device: ``None``: a GPU if there is one, or if ``gpu`` or ``gpu_memory`` is given; else the CPU.
        gpu: Rates and memory of a named GPU; default this machine's, if it is a known one, or the one of that much memory.
        gpu_memory: Bytes of each GPU. ``None``: those of ``gpu``, or of this machine's.
        host_memory_bytes: Bytes of host memory. ``None``: this machine's, where the run would run here.
        parallel: Degrees; default one device.

    Raises:
        ConfigError: The model is not known here, has no layers that can be converted, or a setting does not fit it.
    """
    elsewhere = gpu is not None or gpu_memory is not None
    device = torch.device(device) if device is not None else torch.device("cuda") if elsewhere else choose_device()
    if device.type != "cpu":
        here = not elsewhere and torch.cuda.is_available()
        if gpu is None:
            gpu = local_gpu() if here else gpu_with(gpu_memory) if gpu_memory is not None else None
        if gpu_memory is None:
            gpu_memory = torch.cuda.get_device_properties(0).total_memory if here else gpu.memory_bytes if gpu else None
        budget = Budget(gpu_memory, host_memory_bytes if host_memory_bytes or not here else machine_memory())
    else:
        gpu = None
        budget = Budget(None, host_memory_bytes or machine_memory())
    sizes = Sizes.of(config, device, parallel, gpu)
    adapter = sizes.adapter(config)
    layout = sizes.layout(config)
    steps, steps_from = count_steps(config, layout.data)
    plan = Plan(
        config=config,
        device=device,
        dtype=resolve_dtype(config, device),
        model=sizes.numbers,
        adapter=adapter,
        parallel=layout,
        steps=steps,
        steps_from=steps_from,
        phases=sizes.phases(config),
        gpu=gpu,
        times=sizes.steps(config),
        budget=budget,
        notes=[*streaming_notes(config, device), *quantization_notes(config, device), *_notes(config, device)],
    )
    if plan.fits is None:
        return plan
    if plan.fits:
        batch = largest_batch(config, sizes, budget) if config.training.mode != "none" else None
        return replace(plan, largest_batch=batch)
    return replace(plan, suggestions=suggest(config, sizes, budget))


def _notes(config: RunConfig, device: torch.device) -> list[str]:
    notes = []
    if config.optimization.mixed_precision == "fp16" and device.type == "cpu":
        notes.append("optimization.mixed_precision=fp16 is slow on a CPU; bf16 or no is faster there")
    has, why = bf16_arithmetic(device)
    if config.optimization.mixed_precision == "auto":
        notes.append(f"optimization.mixed_precision=auto is {choose_mixed_precision(config, device)} here: {why}")
    elif config.optimization.mixed_precision == "bf16" and device.type == "cpu" and not has:
        notes.append(slow_bf16(why))
    if uses_closed_form(config) and config.model.num_ranks > 1:
        notes.append("model.num_ranks > 1 with self_key: the same form as one term of rank num_ranks × rank")
    if config.model.extra_rank:
        notes.append(
            "model.extra_rank: parameters and time of the extra change are not counted; those of the component are"
        )
    if config.training.mode == "none" and not uses_closed_form(config):
        notes.append("training.mode=none without the closed form: the converted model will be far from the original")
    return notes
