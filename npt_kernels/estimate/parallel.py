"""Over how many devices a run is spread, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.schema import ConfigError

__all__ = ["Parallel"]


@dataclass(frozen=True)
class Parallel:
    """How many processes with a GPU each.

    Attributes:
        data: Processes that see different sequences.
        shard: Whether those keep a part of every frozen layer and gather it when its turn comes (FSDP2) instead of all (DDP).

    Raises:
        ConfigError: Fewer than one process.
    """

    data: int = 1
    shard: bool = False

    def __post_init__(self) -> None:
        if self.data < 1:
            raise ConfigError(f"data={self.data} must be at least 1")

    @property
    def devices(self) -> int:
        return self.data

    def __str__(self) -> str:
        if self.data == 1:
            return "one device"
        return f"{'FSDP2' if self.shard else 'DDP'} over {self.data}"
