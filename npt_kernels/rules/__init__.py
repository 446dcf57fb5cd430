"""The rules: every form of the per-token weight change, by name. See ``base.Rule``."""

from __future__ import annotations

from .anchored import Anchored
from .base import Key, Rule, split_ranks
from .diagonal import Diagonal
from .rank1 import Rank1
from .self_key import SelfKey

__all__ = ["RULES", "Key", "Rule", "get_rule", "split_ranks"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (Rank1(), Diagonal(), Anchored(), SelfKey())}


def get_rule(name: str) -> Rule:
    """The rule of that name. Raises ``ValueError`` naming the rules that exist."""
    try:
        return RULES[name]
    except (KeyError, TypeError):
        raise ValueError(f"rule={name!r} is not known; choose one of {', '.join(RULES)}") from None
