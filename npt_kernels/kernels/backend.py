"""What a backend says of itself: its name, what it can run and why not, whether it may be chosen unasked, where its steps are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .steps import Steps

__all__ = ["OPS", "Backend", "Call"]

#: The ops that a backend may implement, by the names of their folders in ``ops/``.
OPS = ("linear", "factored_linear", "mlp", "matched_norm")


class Call(NamedTuple):
    """What a backend may ask about a call. A further fact is a further field with a default."""

    op: str
    device: torch.device
    dtype: torch.dtype
    #: Activation that the op applies, any alias; ``None`` for ops without one.
    act: str | None = None
    #: Rule of the op by name; ``None`` for ops without one.
    rule: str | None = None
    #: Rows of the input; 0: not known, as under a compiler.
    tokens: int = 0
    #: ``mlp``: widths (d, f, R); empty: not known.
    sizes: tuple[int, ...] = ()
    #: Whether a backward may follow.
    trains: bool = True


def _always(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    Attributes:
        name: What users write in ``backend=``.
        load: Gives the steps; called at the first use, so that naming a backend imports nothing of it.
        summary: One line for ``npt env``.
        automatic: Whether it may be chosen without being asked for: a bool, or a function of the call. True only where a
            committed run on such a device has verified it and found it no slower.
        check: ``(Call) -> reason it cannot run, or None``; asked only about ops that it implements.
        ops: Ops whose steps it has.
        absent: Op → why it has none of it, for ops that are not in ``ops``.
        rules: Rules that its kernels know; ``None``: whatever ``Rule`` there is, by the rule's own code.
        unasked: Where it is chosen unasked, in words, if ``automatic`` is a function.
    """

    name: str
    load: Callable[[], Steps]
    summary: str
    automatic: bool | Callable[[Call], bool] = False
    check: Callable[[Call], str | None] = field(default=_always)
    ops: tuple[str, ...] = OPS
    absent: dict[str, str] = field(default_factory=dict)
    rules: frozenset[str] | None = None
    unasked: str = ""

    @cached_property
    def steps(self) -> Steps:
        """Its steps: one instance a process."""
        return self.load()

    def lacks(self, op: str) -> str | None:
        """Why it has no implementation of ``op`` at all, or ``None`` if it has one."""
        return None if op in self.ops else self.absent.get(op, f"it has no implementation of {op}")

    def reason(self, call: Call) -> str | None:
        """Why it cannot run the call, or ``None``."""
        missing = self.lacks(call.op)
        if missing is not None:
            return missing
        if call.rule is not None and self.rules is not None and call.rule not in self.rules:
            return f"its kernels do not know rule {call.rule!r}; they know {', '.join(sorted(self.rules))}"
        return self.check(call)

    def chosen_unasked(self, call: Call) -> bool:
        """Whether it may run the call without being named."""
        return self.automatic if isinstance(self.automatic, bool) else self.automatic(call)
