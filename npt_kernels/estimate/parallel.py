"""Over how many devices a run is spread, and along what."""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.schema import ConfigError

__all__ = ["Parallel"]


@dataclass(frozen=True)
class Parallel:
    """Degrees; their product is the number of devices.

    Attributes:
        data: Processes that see different sequences.
        shard: Whether those keep a part of every frozen layer and gather it when its turn comes (FSDP2) instead of all (DDP).
        shard_adapter: Whether NP parameters, gradients and moments are divided over them too (on paper).
        tensor: Devices that share every matrix product (on paper).
        pipeline: Devices that hold a part of the layers each (on paper).

    Raises:
        ConfigError: A degree below 1.
    """

    data: int = 1
    shard: bool = False
    shard_adapter: bool = False
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        if self.devices == 1:
            return "one device"
        parts = []
        if self.data > 1:
            how = "FSDP2" if self.shard else "DDP"
            parts.append(f"{how} over {self.data}" + (", NP parameters sharded" if self.shard_adapter else ""))
        if self.tensor > 1:
            parts.append(f"tensor parallel over {self.tensor}")
        if self.pipeline > 1:
            parts.append(f"pipeline of {self.pipeline}")
        return ", ".join(parts)
