"""A run's sizes in one place: what it counts from, counted once, for as many changes of its configuration as a search tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base_model.loading import check_length, load_model_config
from ..configs.schema import ConfigError, RunConfig
from .byte_count import count_bytes, peak, reserve
from .devices import GPUS_PER_MACHINE, Gpu
from .flops import StepTime, step_time
from .model_sizes import Adapter, ModelNumbers, count_adapter, meta_model, read_numbers
from .parallel import Parallel
from .terms import Phase

__all__ = ["Budget", "Need", "Sizes"]


@dataclass(frozen=True)
class Budget:
    """Bytes there are; ``None``: not known, so never too little.

    Attributes:
        device: On each device.
        host: In the host memory of a machine.
        phases: Phase → bytes that its tensors may take, for a phase that is known to have failed with more.
    """

    device: int | None = None
    host: int | None = None
    phases: dict[str, int] = field(default_factory=dict)

    def allows(self, need: Need) -> bool:
        """Whether that much is there."""
        return (
            (self.device is None or need.device <= self.device)
            and (self.host is None or need.host <= self.host)
            and all(need.phases.get(name, 0) <= limit for name, limit in self.phases.items())
        )


@dataclass(frozen=True)
class Need:
    """Bytes at the peak: ``device`` with reserve, ``host`` of a machine, and of every phase the counted tensors.

    On a CPU all is host memory.
    """

    device: int
    host: int
    phases: dict[str, int]


@dataclass
class Sizes:
    """Counts bytes and seconds of a model under any configuration, without weights.

    Attributes:
        config_json: The model's ``config.json``.
        meta: The model without storage.
        numbers: Its sizes.
        device: Type of the device planned for.
        parallel: Degrees of the run.
        gpu: Rates, if they are known.
    """

    config_json: dict[str, Any]
    meta: nn.Module
    numbers: ModelNumbers
    device: torch.device
    parallel: Parallel
    gpu: Gpu | None = None
    _adapters: dict[Any, Adapter] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: RunConfig, device: torch.device, parallel: Parallel | None = None, gpu: Gpu | None = None
    ) -> Sizes:
        """Read ``config.json`` and build the model on the meta device. Raises :class:`ConfigError`."""
        name = config.model.base_model_name
        config_json = load_model_config(name, config.model.revision, config.cache_dir)
        check_length(config, config_json)
        meta = meta_model(name, config_json)
        try:
            numbers = read_numbers(meta)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{name}: {error}") from error
        return cls(config_json, meta, numbers, device, parallel or Parallel(), gpu)

    def adapter(self, config: RunConfig) -> Adapter:
        """The NP components of ``config``. Raises :class:`ConfigError` for settings that do not fit the model."""
        m = config.model
        key = (
            str(m.npt_layers),
            str(m.rank),
            m.rule,
            m.num_ranks,
            tuple(m.targets),
            m.norm_match,
            m.attention_residual,
            m.fold,
        )
        if key not in self._adapters:
            try:
                self._adapters[key] = count_adapter(self.meta, config.npt_config())
            except ValueError as error:
                raise ConfigError(f"{m.base_model_name}: {error}") from error
        return self._adapters[key]

    def phases(self, config: RunConfig) -> list[Phase]:
        """The byte count of ``config``."""
        return count_bytes(self.numbers, self.adapter(config), config, self.device, self.layout(config))

    def layout(self, config: RunConfig) -> Parallel:
        """Degrees under ``config``: several processes replicate the frozen base or shard it."""
        p = self.parallel
        shard = p.shard or config.optimization.distributed == "fsdp"
        return Parallel(p.data, shard)

    def steps(self, config: RunConfig) -> list[StepTime]:
        """Predicted times; empty without rates."""
        if self.gpu is None:
            return []
        return step_time(self.numbers, self.adapter(config), config, self.gpu, self.layout(config))

    def needs(self, config: RunConfig) -> Need:
        """What the whole run needs under ``config``."""
        phases, processes = self.phases(config), self.processes_per_machine
        by_phase = {phase.name: phase.device_bytes for phase in phases}
        if self.device.type == "cpu":
            return Need(0, processes * max(phase.device_bytes + phase.host_bytes for phase in phases), by_phase)
        counted = peak(phases)
        return Need(
            counted + reserve(counted, self.device), max(phase.machine_bytes(processes) for phase in phases), by_phase
        )

    @property
    def processes_per_machine(self) -> int:
        """Processes that share one machine's memory."""
        return min(self.parallel.devices, GPUS_PER_MACHINE)

    def fits(self, config: RunConfig, budget: Budget) -> bool:
        return budget.allows(self.needs(config))
