"""What a byte count is made of: :class:`MemoryTerm`, one line, and :class:`Phase`, the lines at the worst moment of a phase."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["MemoryTerm", "Phase"]


@dataclass(frozen=True)
class MemoryTerm:
    """One line of the count.

    Attributes:
        where: ``device`` or ``host``; on a CPU both are the same memory.
        once: Only one process of a run has it (host).
    """

    name: str
    bytes: int
    why: str
    where: str = "device"
    once: bool = False


@dataclass(frozen=True)
class Phase:
    """A phase of a run at its worst moment.

    Attributes:
        name: ``load``, ``conversion``, ``local``, ``end_to_end``, ``evaluation``, ``generation``.
        moment: Which moment that is.
        terms: What exists then.
        moments: Every moment that was weighed → its bytes on the device.
    """

    name: str
    moment: str
    terms: list[MemoryTerm]
    moments: dict[str, int] = field(default_factory=dict)

    def bytes(self, where: str) -> int:
        return sum(term.bytes for term in self.terms if term.where == where)

    @property
    def device_bytes(self) -> int:
        return self.bytes("device")

    @property
    def host_bytes(self) -> int:
        return self.bytes("host")

    def machine_bytes(self, processes: int) -> int:
        """Host memory of a machine with that many processes of the run."""
        host = [term for term in self.terms if term.where == "host"]
        return sum(term.bytes * (1 if term.once else processes) for term in host)
